"""Modules that no rule serves: run per task by vmap, or one task after another.

A unit is a module that runs as a whole with each task's tensors bound to its pristine copy: by
`torch.func.vmap` over tasks where the module allows it, else in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call, running


def by_vmap(module: nn.Module, call: Call, tensors: Callable[[Call], dict[str, Tensor]], args: Any):
    """Run `module` once under vmap; `args` is an ``(args, kwargs)`` pair."""
    leaves, spec = tree_flatten(args)
    batched = [_is_batched(leaf, call) for leaf in leaves]
    stacked = [
        leaf.reshape(call.tasks, leaf.shape[0] // call.tasks, *leaf.shape[1:]) if b else leaf
        for leaf, b in zip(leaves, batched, strict=True)
    ]
    fast = tensors(call)

    def one(fast_t: dict[str, Tensor], *moving: Tensor):
        rest = iter(moving)
        full = [next(rest) if b else leaf for leaf, b in zip(stacked, batched, strict=True)]
        a, k = tree_unflatten(full, spec)
        return bind(module, fast_t)(*a, **k)

    moving = [leaf for leaf, b in zip(stacked, batched, strict=True) if b]
    out = torch.func.vmap(one, randomness="different")(fast, *moving)
    out_leaves, out_spec = tree_flatten(out)
    return tree_unflatten([_merge(t, call) for t in out_leaves], out_spec)


def by_loop(module: nn.Module, call: Call, tensors: Callable[[Call], dict[str, Tensor]], args: Any):
    """Run `module` for one task after another and join the outputs."""
    leaves, spec = tree_flatten(args)
    batched = [_is_batched(leaf, call) for leaf in leaves]
    outputs, out_spec = [], None
    for t in range(call.tasks):
        mine = [
            leaf.view(call.tasks, -1, *leaf.shape[1:])[t] if b else leaf
            for leaf, b in zip(leaves, batched, strict=True)
        ]
        a, k = tree_unflatten(mine, spec)
        one = Call([v[t : t + 1] for v in call.views], 1, call.rows)
        with running(one):
            fast = {name: v[0] for name, v in tensors(one).items()}
            out, out_spec = tree_flatten(bind(module, fast)(*a, **k))
        outputs.append(out)
    joined = []
    for pieces in zip(*outputs, strict=True):
        if isinstance(pieces[0], Tensor) and pieces[0].dim() > 0:
            joined.append(_merge(torch.stack(pieces), call))
        else:
            joined.append(pieces[0])
    return tree_unflatten(joined, out_spec)


def _is_batched(leaf: Any, call: Call) -> bool:
    """Whether a tensor's leading rows are the call's ``T * N`` rows (or flattened further)."""
    total = call.tasks * call.rows
    return (
        isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] % total == 0 < leaf.shape[0]
    )


def _merge(stacked: Any, call: Call) -> Any:
    """``[T, n, ...]`` -> ``[T * n, ...]``; a single shared row is expanded to the task's N rows."""
    if not isinstance(stacked, Tensor) or stacked.dim() < 2:
        return stacked
    if stacked.shape[1] == 1 and call.rows > 1:
        stacked = stacked.expand(-1, call.rows, *stacked.shape[2:])
    return stacked.flatten(0, 1)
