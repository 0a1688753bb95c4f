"""The meta-steps that are compared: model, tasks, what adapts. Inputs are made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastmeta as fm

WAYS = 5
LR = 0.01

# Words of a text of CLINC150 by all-MiniLM's tokenizer, at every twentieth of all texts.
CLINC_LENGTHS = (3, 5, 6, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 17, 19, 28)


@dataclass(frozen=True)
class Case:
    """Attributes:
    title: What it is, for tables.
    layers, hidden, heads: Size of the BERT.
    tasks, shots, length, steps: T, K-shot, L, inner steps; the query set has the support's size.
    spec: What adapts.
    trained: Parameters that the outer loop learns, by substring of their name; None for all.
    lengths: What texts' lengths are drawn from, L being the longest; None: all are of length L but
        every third, which is a quarter shorter.
    words: Of the vocabulary.
    training: Whether dropout is active.
    """

    title: str
    layers: int
    hidden: int
    heads: int
    tasks: int
    shots: int
    length: int
    steps: int
    spec: Callable[[], fm.Spec]
    trained: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    words: int = 30_522
    training: bool = False

    def model(self, device: str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.words,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=64,
            num_labels=WAYS,
        )
        model = BertForSequenceClassification(config).train(self.training)
        if self.trained is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(part in name for part in self.trained))
        return model.to(device)

    def batch(self, device: str = "cpu", seed: int = 1) -> fm.TaskBatch:
        generator = torch.Generator().manual_seed(seed)
        sets = []
        for _ in range(2):
            shape = (self.tasks, WAYS * self.shots, self.length)
            ids = torch.randint(5, self.words, shape, generator=generator)
            mask = torch.ones_like(ids)
            mask[:, 1::3, self.length * 3 // 4 :] = 0  # some texts are shorter
            if self.lengths is not None:
                drawn = torch.randint(len(self.lengths), shape[:2], generator=generator)
                mask = torch.arange(self.length) < torch.tensor(self.lengths)[drawn].unsqueeze(-1)
                mask = mask.to(ids.dtype)
            labels = (torch.arange(shape[1]) % WAYS).expand(shape[:2]).contiguous()
            sets.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return fm.TaskBatch(*sets).to(device)


CASES = {
    "full": Case(
        "2-layer BERT h=128, T=32, 1-shot, L=16, K=5, all parameters",
        2, 128, 2, 32, 1, 16, 5, lambda: fm.Params("*"),
    ),
    "training": Case(
        "2-layer BERT h=128, T=32, 1-shot, L=16, K=5, all parameters, training (dropout 0.1)",
        2, 128, 2, 32, 1, 16, 5, lambda: fm.Params("*"), training=True,
    ),
    "lora": Case(
        "the same, LoRA (r=8) + head",
        2, 128, 2, 32, 1, 16, 5, lambda: fm.LoRA(r=8) + fm.Params("classifier.*"),
    ),
    "last2": Case(
        "6-layer BERT h=384 (MiniLM), T=8, 5-shot, L=24, K=5, last 2 layers + head",
        6, 384, 12, 8, 5, 24, 5,
        lambda: fm.Params("bert.encoder.layer.4.*", "bert.encoder.layer.5.*", "classifier.*"),
        ("layer.4.", "layer.5.", "classifier"),
    ),
    "deep": Case(
        "4-layer BERT h=256, T=8, 5-shot, L=32, K=3, all parameters",
        4, 256, 4, 8, 5, 32, 3, lambda: fm.Params("*"),
    ),
    "minilm-lora": Case(
        "6-layer BERT h=384 (MiniLM), T=32, 1-shot, L=16, K=5, LoRA (r=8) + head, frozen backbone",
        6, 384, 12, 32, 1, 16, 5, lambda: fm.LoRA(r=8) + fm.Params("classifier.*"),
        ("classifier",),
    ),
    "texts-lora": Case(
        "the same with texts as long as those of CLINC150, L=28, T=8",
        6, 384, 12, 8, 1, 28, 5, lambda: fm.LoRA(r=8) + fm.Params("classifier.*"),
        ("classifier",), CLINC_LENGTHS,
    ),
    "memory": Case(
        "4-layer BERT h=256, T=8, 5-shot, L=32, all parameters",
        4, 256, 4, 8, 5, 32, 10, lambda: fm.Params("*"),
    ),
    # for GPUs: few words, since under vmap every task has a table of its own
    "small-1": Case(
        "BERT-small (4 layers, h=512), T=64, 1-shot, L=32, K=5, all parameters",
        4, 512, 8, 64, 1, 32, 5, lambda: fm.Params("*"), words=1000,
    ),
    "small-5": Case(
        "BERT-small (4 layers, h=512), T=64, 5-shot, L=64, K=5, all parameters",
        4, 512, 8, 64, 5, 64, 5, lambda: fm.Params("*"), words=1000,
    ),
    "small-lora": Case(
        "BERT-small (4 layers, h=512), T=64, 1-shot, L=32, K=5, LoRA (r=8) + head",
        4, 512, 8, 64, 1, 32, 5, lambda: fm.LoRA(r=8) + fm.Params("classifier.*"), words=1000,
    ),
}  # fmt: skip
