"""One step of a loop that keeps weights by leaf."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, task_losses
from fastmeta.patching import TaskParams
from fastmeta.patching.adapted_linear import Gate
from fastmeta.patching.fast_weights import Leaf
from fastmeta.patching.leaf_params import LeafParams


def one_step(
    loop: InnerLoop,
    rate: Tensor | float,
    params: LeafParams,
    support: Support,
    gate: Gate,
    create_graph: bool,
) -> tuple[Tensor, Tensor, LeafParams] | None:
    """Support losses ``[T]``, a number that is finite where all of the step is, and the fast
    weights after it, of the same leaves; None where a leaf does not run once.

    Args:
        rate: ``[1 or T]``, or a number.
    """
    found = _gradients(loop, rate, params, support, gate, create_graph)
    if found is None:
        return None
    losses, d_rest, gradients = found
    finite = [t.detach().sum() for t in (losses, d_rest) if t is not None]
    rest = params.rest
    if d_rest is not None:
        rest = TaskParams(rest.layout, rest.packed + d_rest)
    for leaf, g in gradients:
        leaf.descend(g, create_graph)
        if not leaf.with_bias:  # else it is in the bias's, which is in d_rest
            finite.append(g.detach().sum())
    for leaf in params.leaves.values():
        leaf.calls.clear()
    return losses, torch.stack(finite).sum(), LeafParams(params.layout, rest, params.leaves)


def _gradients(
    loop: InnerLoop,
    rate: Tensor | float,
    params: LeafParams,
    support: Support,
    gate: Gate,
    create_graph: bool,
) -> tuple[Tensor, Tensor | None, list[tuple[Leaf, Tensor]]] | None:
    """Support losses, and gradients times the negative rate: of the rest ``[T, P']`` or None, and
    of the leaves' outputs. None where a leaf does not run once."""
    losses, _ = task_losses(
        loop, params, support.inputs, support.prefix, only_tasks=not create_graph
    )
    called = [leaf for leaf in params.leaves.values() if leaf.calls]
    if any(len(leaf.calls) > 1 for leaf in called):
        return None
    wanted = [leaf.calls[0][1] for leaf in called]
    places = [i for i, y in enumerate(wanted) if y.requires_grad]
    rest = params.rest.packed
    inputs = [
        *([rest] if rest.requires_grad and rest.numel() else []),
        *(wanted[i] for i in places),
    ]
    if not losses.requires_grad or not inputs:
        return None
    # first order: the rate's gradient is wanted all the same
    outer = isinstance(rate, Tensor) and not create_graph
    total = losses if outer else losses * -rate
    gate.inner = True
    try:
        found = torch.autograd.grad(
            total.sum(), inputs, create_graph=create_graph, allow_unused=True
        )
    finally:
        gate.inner = False
    if outer:
        found = [g if g is None else _times_rate(g, -rate) for g in found]
    d_rest = found[0] if len(inputs) > len(places) else None
    found = found[len(inputs) - len(places) :]
    pairs = [(called[i], g) for i, g in zip(places, found, strict=True) if g is not None]
    if d_rest is None and not pairs:
        return None
    return losses.detach(), d_rest, pairs


def _times_rate(g: Tensor, rate: Tensor) -> Tensor:
    """``[T * H, ...]`` times a rate ``[1 or T]``."""
    rate = rate.repeat_interleave(g.shape[0] // rate.shape[0])
    return g * rate.view(-1, *(1,) * (g.dim() - 1))
