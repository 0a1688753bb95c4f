"""The inner loop of plain SGD, leaf by leaf: no gradient of a large weight is ever written.

A linear layer's weight gradient is the product of what the layer read and of its output's gradient.
Where nothing but ``W - lr g`` is made of it, the loop takes gradients to the layers' outputs, and a
step is one product that updates the weight as it computes, or none where its rows stay factors
(`fastmeta.patching.fast_weights`). All tasks start from the same weights, so the first step's
products read one weight, and the meta-gradient's are one product over the rows of all tasks.
Biases, norms and whatever is no linear layer or embedding stay packed, in a small buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, Trajectory, model_inputs, task_losses
from fastmeta.engine.optimizers import SGD
from fastmeta.ops._adapted_linear import Gate
from fastmeta.ops.batched_linear import rounds
from fastmeta.patching import ParamLayout, TaskParams
from fastmeta.patching.fast_weights import FastMatrix, FastTable, Leaf
from fastmeta.patching.leaf_params import LeafParams, leaf_slots


def may_serve(loop: InnerLoop, packed: Tensor) -> bool:
    """Whether the settings fit; a task that diverges asks for the general loop all the same."""
    settings = not (loop.clip_norm or loop.proximal or loop.implicit)
    return (
        settings
        and loop.by_leaf
        and loop.capture is None
        and loop.steps > 0
        and type(loop.rule) is SGD
        and loop.rule.weight_decay == 0.0
        and set(loop.rates.axes) <= {"step", "task"}
        and packed.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and (rounds(packed) or not torch.is_autocast_enabled(packed.device.type))
    )


def unroll_by_leaf(loop: InnerLoop, row: Tensor, tasks: int, support: Support) -> Trajectory | None:
    """All K steps in the autograd graph, or None where the model or a task asks for the general
    loop.

    Args:
        loop: One that :func:`may_serve`.
        row: The initial fast weights ``[P]`` of all tasks.
        tasks: T.
    """
    layout, gate = loop.patched.layout, Gate(bf16=rounds(row))
    leaves = _leaves(loop, row, tasks, support, gate)
    if 2 * sum(layout.numels[slot] for slot in leaves) < layout.num_elements:
        return None  # what is packed would be most of it
    others = [slot for slot in range(len(layout)) if slot not in leaves]
    small = ParamLayout([layout.names[s] for s in others], [layout.shapes[s] for s in others])
    parts = layout.unpack(row.unsqueeze(0))
    rest = small.pack([parts[s][0] for s in others]) if others else row[:0]
    rest = rest.expand(tasks, -1)
    losses, finite = [], []
    for step in range(loop.steps):
        params = LeafParams(layout, TaskParams(small, rest), leaves)
        found = _gradients(loop, step, params, support, gate)
        if found is None:
            return None
        step_losses, d_rest, gradients = found
        losses.append(step_losses)
        finite += [t.detach().sum() for t in (step_losses, d_rest) if t is not None]
        if d_rest is not None:
            rest = rest + d_rest
        for leaf, g in gradients:
            leaf.descend(g, loop.create_graph(step))
            if not leaf.with_bias:  # else it is in the bias's, which is in d_rest
                finite.append(g.detach().sum())
        for leaf in leaves.values():
            leaf.calls.clear()
    for leaf in leaves.values():
        leaf.recording = False
    if not bool(torch.isfinite(torch.stack(finite)).all()):
        return None  # who diverged, and when, is found there
    active = torch.ones(tasks, dtype=torch.bool, device=row.device)
    return Trajectory(LeafParams(layout, TaskParams(small, rest), leaves), active, losses)


def _leaves(
    loop: InnerLoop, row: Tensor, tasks: int, support: Support, gate: Gate
) -> dict[int, Leaf]:
    """Every weight that is kept by leaf, at its initial value."""
    plan = loop.patched.plan(model_inputs(support.inputs))
    parts = loop.patched.layout.unpack(row.unsqueeze(0))
    found: dict[int, Leaf] = {}
    for slot, leaf in leaf_slots(plan).items():
        weight = parts[slot][0]
        if isinstance(leaf.module, torch.nn.Embedding):
            found[slot] = FastTable(weight, tasks, leaf.module.padding_idx)
        else:
            found[slot] = FastMatrix(weight, tasks, loop.steps, gate)
        found[slot].recording, found[slot].with_bias = True, leaf.with_bias
    return found


def _gradients(loop: InnerLoop, step: int, params: LeafParams, support: Support, gate: Gate):
    """Support losses, and gradients times the negative rate: of the rest ``[T, P']`` or None, and
    of the leaves' outputs. None where a leaf does not run once."""
    create_graph = loop.create_graph(step)
    rate = loop.rates.at(step, support.tasks)
    if isinstance(rate, Tensor):
        rate = rate[:, 0].to(params.rest.packed.dtype)  # [1 or T]
    losses, _ = task_losses(loop, params, support.inputs, support.prefix)
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
