"""The inner loop of a plain linear head: one operator runs all steps on features computed once.

The same numbers as the general loop, which serves wherever this one does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.engine.conditions import Conditions
from fastmeta.engine.inner import InnerLoop, Support, Trajectory, model_inputs
from fastmeta.engine.losses import WAYS, classification
from fastmeta.engine.optimizers import SGD, Momentum
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.head import linear_head, read_by, why_unread
from fastmeta.patching.prefix import PrefixCache


def head_may_serve(loop: InnerLoop) -> bool:
    """Whether the settings and the adapted parameters fit; the model's outputs may still not."""
    plain = loop.loss_fn is classification and not (loop.clip_norm or loop.proximal)
    fits = plain and set(loop.rates.axes) <= {"step", "task"} and _rule(loop) is not None
    return fits and linear_head(loop.patched) is not None


def adapt_head(loop: InnerLoop, start: TaskParams, support: Support) -> Trajectory | None:
    """All K steps, or None where the model asks for the general loop.

    Args:
        loop: One that :func:`head_may_serve`.
        start: Initial fast weights of T tasks.
        support: The support set, with the stored outputs of the modules before the head.
    """
    features = frozen_features(loop.patched, start, model_inputs(support.inputs), support.prefix)
    if features is None:
        return None
    inputs = support.inputs
    return head_steps(loop, start, features, inputs["labels"], inputs.get(WAYS), support.tasks)


def frozen_features(
    patched: Patched,
    params: TaskParams,
    inputs: Mapping[str, Any],
    prefix: PrefixCache | None,
) -> Tensor | None:
    """What the one adapted linear head reads, ``[T, N, D]``, or None where it may change."""
    head = linear_head(patched)
    if head is None or prefix is None or _autocast(params.packed):
        return None
    plan = patched.plan(inputs)
    if plan.prefix_is_random() or plan.modes.get(head.name) != "rule":
        return None
    conditions = Conditions(patched, params.device)
    features = read_by(patched, head.name, params, inputs, prefix)
    conditions.finish()
    if conditions.random is not None:
        return None  # dropout: every step has features of its own
    if features is None or features.dtype not in (torch.float32, torch.float64):
        return None
    return features


def head_steps(
    loop: InnerLoop,
    start: TaskParams,
    features: Tensor,
    labels: Tensor,
    ways: Tensor | None,
    tasks: Tensor | None,
) -> Trajectory:
    """All K steps of T heads on features ``[T, N, D]``; see :func:`head_may_serve`."""
    options, head, views = _rule(loop), linear_head(loop.patched), start.views
    if loop.head is not None:
        views = loop.head.put(views, features, labels)
    bias = head.slots.get("bias")
    weight, new_bias, losses, active = ops.head_inner_loop(
        features,
        labels,
        views[head.slots["weight"]],
        None if bias is None else views[bias],
        _rates(loop, tasks),
        loop.steps,
        ways=ways,
        truncate=min(loop.second_order, loop.steps),
        check_finite=True,
        **options,
    )
    found = {head.slots["weight"]: weight}
    if bias is not None:
        found[bias] = new_bias
    packed = start.layout.pack([found[slot] for slot in range(len(start.layout))])
    return Trajectory(TaskParams(start.layout, packed), active, list(losses.unbind(1)))


def with_prototypes(loop: InnerLoop, packed: Tensor, support: Support) -> Tensor:
    """Initial fast weights ``[T, P]`` whose head is that of each task's prototypes, if it is to be.

    The prototypes are those of what the head reads at the initial values; differentiable.
    """
    if loop.head is None:
        return packed
    start = support.params(loop, packed)
    inputs = model_inputs(support.inputs)
    features = read_by(loop.patched, loop.head.name, start, inputs, support.prefix)
    if features is None:
        raise ValueError(why_unread(loop.patched, loop.head.name, inputs))
    held = TaskParams(support.layout(loop), packed)
    return held.layout.pack(loop.head.put(held.views, features, support.inputs["labels"]))


def _rule(loop: InnerLoop) -> dict[str, float] | None:
    """The update rule as arguments of the operator."""
    rule = loop.rule
    if rule.learned():
        return None
    if type(rule) is SGD:
        return {"weight_decay": rule.weight_decay}
    if type(rule) is Momentum and not rule.nesterov and rule.dampening == 0:
        return {"momentum": rule.momentum, "weight_decay": rule.weight_decay}
    return None


def _rates(loop: InnerLoop, tasks: Tensor | None) -> float | Tensor:
    """The rate of every step: a number, or ``[1 or T, K]``."""
    rates = [loop.rates.at(step, tasks) for step in range(loop.steps)]
    return torch.cat(rates, dim=1) if isinstance(rates[0], Tensor) else rates[0]


def _autocast(packed: Tensor) -> bool:
    return torch.is_autocast_enabled(packed.device.type)
