"""Compare adapting tasks by a hypernetwork, one forward pass, with inner gradient steps.

    python -m bench.compare_hypernetwork [--device cuda] [--rounds 5] [--out results.json]

64 tasks, 5-way 1-shot, 12 tokens a text; an encoder of MiniLM's size with random weights, on which
times do not depend. Both adapt the same: LoRA of rank 4 on queries and values of all layers, and
the head. The limit is that of the products of one forward pass over the support sets. Steps of the
head alone (ANIL) read features that are computed once, and cost as much as the hypernetwork.
"""

from __future__ import annotations

import torch
import transformers as tf

import fastmeta as fm
from bench.comparison import Case, run
from bench.timing import Way

TASKS, WAYS, LENGTH, WIDTH, LAYERS = 64, 5, 12, 384, 6
SPEC = fm.LoRA(r=4, targets=("query", "value")) + fm.Head()


def ways(device: str) -> dict[str, Way]:
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12,
        intermediate_size=4 * WIDTH, vocab_size=5000,
    )  # fmt: skip
    encoder = tf.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    model = fm.models.SentenceClassifier(encoder, WAYS).eval().to(device)
    ids = torch.randint(1, 5000, (TASKS, WAYS, LENGTH), device=device)
    labels = torch.arange(WAYS, device=device).expand(TASKS, WAYS).contiguous()
    support = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    patched, head = fm.patch(model, SPEC), fm.patch(model, fm.Head())
    hyper = fm.HyperNetwork(patched)
    return {
        "hypernetwork": lambda: hyper.adapt(support),
        "5 steps of the same (MAML)": lambda: fm.adapt(patched, support, steps=5, lr=0.01),
        "5 steps of the head alone (ANIL)": lambda: fm.adapt(head, support, steps=5, lr=0.01),
    }


def cases(device: str) -> dict[str, Case]:
    flops = 2 * TASKS * WAYS * LENGTH * LAYERS * 12 * WIDTH**2
    return {"64 tasks, 5-way 1-shot, MiniLM": Case(lambda: ways(device), flops=flops)}


if __name__ == "__main__":
    run("bench.compare_hypernetwork", __doc__, cases)
