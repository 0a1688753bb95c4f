"""The inner loop of plain SGD, leaf by leaf: no gradient of a large weight is ever written.

A linear layer's weight gradient is the product of what the layer read and of its output's gradient.
Where nothing but ``W - lr g`` is made of it, the loop takes gradients to the layers' outputs, and a
step is one product that updates the weight as it computes, or none where its rows stay factors
(`fastmeta.patching.fast_weights`). All tasks start from the same weights, so the first step's
products read one weight, and the meta-gradient's are one product over the rows of all tasks.
Biases, norms and whatever is no linear layer or embedding stay packed, in a small buffer.

Steps can be captured (`fastmeta.engine.captured_leaves`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.engine.captured_leaves import captured_step
from fastmeta.engine.inner import InnerLoop, Support, Trajectory, model_inputs
from fastmeta.engine.leaf_step import one_step
from fastmeta.engine.optimizers import SGD
from fastmeta.ops.batched_linear import rounds
from fastmeta.patching import ParamLayout, TaskParams
from fastmeta.patching.adapted_linear import Gate
from fastmeta.patching.fast_weights import FastMatrix, FastTable, Leaf
from fastmeta.patching.initial_params import InitialParams
from fastmeta.patching.leaf_params import LeafParams, leaf_slots


def may_serve(loop: InnerLoop, start: TaskParams) -> bool:
    """Whether the settings and the start fit; a task that diverges asks for the general loop all
    the same."""
    if not isinstance(start, InitialParams):
        return False
    like = start.parts[0]
    settings = not (loop.clip_norm or loop.proximal or loop.implicit)
    return (
        settings
        and loop.by_leaf
        and not loop.captures_packed
        and loop.steps > 0
        and type(loop.rule) is SGD
        and not isinstance(loop.rule.weight_decay, Tensor)
        and loop.rule.weight_decay == 0.0
        and set(loop.rates.axes) <= {"step", "task"}
        and like.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and (rounds(like) or not torch.is_autocast_enabled(like.device.type))
    )


def unroll_by_leaf(loop: InnerLoop, start: InitialParams, support: Support) -> Trajectory | None:
    """All K steps in the autograd graph, or None where the model or a task asks for the general
    loop.

    Args:
        loop: One that :func:`may_serve`.
        start: Of T tasks.
    """
    layout, parts, tasks = loop.patched.layout, start.parts, start.num_tasks
    gate = Gate(bf16=rounds(parts[0]))
    leaves = _leaves(loop, start, support, gate)
    if 2 * sum(layout.numels[slot] for slot in leaves) < layout.num_elements:
        return None  # what is packed would be most of it
    others = [slot for slot in range(len(layout)) if slot not in leaves]
    small = ParamLayout([layout.names[s] for s in others], [layout.shapes[s] for s in others])
    rest = small.pack([parts[s] for s in others]) if others else parts[0].new_zeros(0)
    rest = rest.expand(tasks, -1)
    params = LeafParams(layout, TaskParams(small, rest), leaves)
    losses, finite = [], []
    for step in range(loop.steps):
        create_graph = loop.create_graph(step)
        rate = loop.rates.at(step, support.tasks)
        if isinstance(rate, Tensor):
            rate = rate[:, 0].to(rest.dtype)  # [1 or T]
        found = None
        if loop.capture is not None:
            found = captured_step(loop, rate, params, support, gate)
        if found is None:
            found = one_step(loop, rate, params, support, gate, create_graph)
        if found is None:
            return None
        step_losses, step_finite, params = found
        losses.append(step_losses)
        finite.append(step_finite)
    leaves = params.leaves
    for leaf in leaves.values():
        leaf.finish()
    active = torch.isfinite(torch.stack(finite)).all()
    if loop.asks and not bool(active):
        return None  # who diverged, and when, is found there
    active = active.expand(tasks)
    return Trajectory(params, active, losses)


def _leaves(loop: InnerLoop, start: InitialParams, support: Support, gate: Gate) -> dict[int, Leaf]:
    """Every weight that is kept by leaf, at its initial value."""
    plan = loop.patched.plan(model_inputs(support.inputs))
    found: dict[int, Leaf] = {}
    alike = loop.capture is not None
    for slot, leaf in leaf_slots(plan).items():
        weight, tasks = start.parts[slot], start.num_tasks
        if isinstance(leaf.module, torch.nn.Embedding):
            found[slot] = FastTable(weight, tasks, leaf.module.padding_idx)
        else:
            found[slot] = FastMatrix(weight, tasks, loop.steps, gate, alike)
        found[slot].recording, found[slot].with_bias = True, leaf.with_bias
    if start.looked_up is not None:
        found[start.looked_up.slot].base = start.looked_up.support
    return found
