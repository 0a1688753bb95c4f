"""One candidate at a time, on a model that is physically pruned, by the ordinary library."""

from __future__ import annotations

import torch
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


def batch_of(tokenizer, tasks: int = 2, shots: int = 1, queries: int = 2, ways: int = 5):
    episodes = fm.data.Episodes(
        fm.data.builtin("train"), tokenizer, ways=ways, shots=shots, queries=queries, tasks=tasks,
        num_batches=1,
    )  # fmt: skip
    return next(iter(episodes))


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
