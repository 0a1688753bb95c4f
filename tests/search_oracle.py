"""One candidate at a time, on a model that is physically pruned, by the ordinary library."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

import fastmeta as fm
from fastmeta.engine.optimizers import RULES
from fastmeta.search.adaptation import step_rows
from fastmeta.search.pruning import prune


def tiny_bert(num_layers: int = 3, num_labels: int = 5, seed: int = 0):
    model, tokenizer = fm.data.tiny_bert(
        num_labels, hidden_size=32, num_layers=num_layers, num_heads=4, seed=seed
    )
    with torch.no_grad():  # layers that differ from the identity, and biases that are not zero
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.double().eval(), tokenizer


_WORDS = {
    "vocab_size": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES = {
    "deberta": lambda **more: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**_WORDS, **_SIZES, intermediate_size=48, max_position_embeddings=40,
                           relative_attention=True, pos_att_type=["c2p", "p2c"],
                           pooler_hidden_size=32, type_vocab_size=0, **more)
    ),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**_WORDS, **_SIZES, intermediate_size=48, cls_token_id=1,
                            sep_token_id=2, local_attention=4)
    ),
    "opt": lambda: tf.OPTForSequenceClassification(
        tf.OPTConfig(**_WORDS, **_SIZES, ffn_dim=48, max_position_embeddings=40,
                     word_embed_proj_dim=32)
    ),
    "bloom": lambda: tf.BloomForSequenceClassification(
        tf.BloomConfig(**_WORDS, hidden_size=32, n_layer=2, n_head=4)
    ),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(**_WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    ),
    "llama": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**_WORDS, **_SIZES, num_key_value_heads=4, intermediate_size=48)
    ),
    "olmo2": lambda: tf.Olmo2ForSequenceClassification(
        tf.Olmo2Config(**_WORDS, **_SIZES, num_key_value_heads=4, intermediate_size=48)
    ),
}  # fmt: skip
"""Small classifiers of three classes and two layers."""


def disturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In float64, no parameter zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().eval().parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def rows_of(tasks: int = 2, ways: int = 3, words: int = 7) -> fm.TaskBatch:
    """One text of random words for each class, the last words of one of them padding."""
    ids = torch.randint(3, 64, (tasks, ways, words), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, 0, -2:] = mask[0, 0, -2:] = 0
    labels = torch.arange(ways).expand(tasks, -1).clone()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return fm.TaskBatch(rows, rows)


def batch_of(tokenizer, tasks: int = 2, shots: int = 1, queries: int = 2, ways: int = 5):
    episodes = fm.data.Episodes(
        fm.data.builtin("train"), tokenizer, ways=ways, shots=shots, queries=queries, tasks=tasks,
        num_batches=1,
    )  # fmt: skip
    return next(iter(episodes))


def make_space(model: torch.nn.Module, **more) -> fm.search.Space:
    settings = {"layers": [1, 2, 3], "widths": [1.0, 0.5], "lora": [0, 2], "steps": [1, 2]}
    return fm.search.Space(model, lr=fm.search.Range(0.05, 0.5, log=True), **(settings | more))


def run(space: fm.search.Space, tasks, **more) -> fm.search.Result:
    small = {"evaluations": 12, "population": 4, "progress": False}
    return fm.search.run(space, tasks, **(small | more))


def alone(evaluator: fm.search.Evaluator, candidate, batch: fm.TaskBatch) -> Tensor:
    """Query losses ``[T]`` of one candidate: prune, patch, and step task by task over rows."""
    net, space = evaluator.net, evaluator.space
    model = prune(net.model, space.anatomy, candidate)
    kept = [i for i, k in enumerate(candidate.kept) if k]
    spec: fm.Spec = fm.Head()
    places = {}  # module of the pruned model -> of the whole one
    for target, modules in space.targets.items():
        rank = candidate.ranks[target]
        here = [m for m in modules if space.layer_of(m) in candidate.adapted] if rank else []
        for m in here:
            old = space.layer_of(m)
            stack = space.anatomy.stack
            new = m.replace(f"{stack}.{old}.", f"{stack}.{kept.index(old)}.")
            places[new] = m
            spec = fm.LoRA(r=rank, alpha=space.lora_scale * rank, targets=new) + spec
    patched = fm.patch(model, spec)
    views = net.start([candidate], 1)
    pieces = []
    for name, shape in zip(patched.layout.names, patched.layout.shapes, strict=True):
        module, _, attribute = name.rpartition(".")
        whole = views[f"{places.get(module, module)}.{attribute}"][0]
        pieces.append(whole[tuple(slice(n) for n in shape)])
    start = fm.TaskParams(patched.layout, patched.layout.pack(pieces).unsqueeze(0))
    rule = RULES[candidate.optimizer](weight_decay=candidate.weight_decay)
    losses = []
    for t in range(batch.num_tasks):
        support = {k: v[t : t + 1] for k, v in batch.support.items()}
        query = {k: v[t : t + 1] for k, v in batch.query.items() if k != "labels"}
        params = start.packed
        state = rule.init(params)
        for step in range(candidate.steps):
            rows = step_rows(batch.support["labels"], [candidate.batch_size], step, evaluator.seed)
            mine = {k: v[:, rows.index[t]] for k, v in support.items()}
            fast = params.detach().requires_grad_()
            inputs = {k: v for k, v in mine.items() if k != "labels"}
            logits = patched(fm.TaskParams(patched.layout, fast), **inputs).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, rows.labels[0, t])
            (grad,) = torch.autograd.grad(loss, fast)
            params, state = rule.update(fast.detach(), grad, state, candidate.lr, step)
        with torch.no_grad():
            logits = patched(fm.TaskParams(patched.layout, params), **query).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.query["labels"][t]))
    return torch.stack(losses)
