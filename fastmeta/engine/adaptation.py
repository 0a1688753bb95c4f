"""`fm.adapt`: adaptation without meta-gradient, for evaluation and services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.engine.episode import adapt_tasks
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.losses import WAYS, LossFn, check_labels, resolve_loss
from fastmeta.engine.optimizers import UpdateRule, resolve_rule
from fastmeta.engine.rates import LearnedRate, Rates
from fastmeta.patching import Patched, TaskParams


@dataclass
class Adapted:
    """Attributes:
    params: Adapted fast weights of T tasks, detached.
    support_losses: Support losses before each step, ``[K, T]``.
    diverged: bool ``[T]``; tasks that became NaN or Inf and kept their last finite weights.
    """

    params: TaskParams
    support_losses: Tensor
    diverged: Tensor


def adapt(
    patched: Patched,
    support: Mapping[str, Tensor],
    *,
    steps: int,
    lr: float,
    optimizer: str | UpdateRule = "sgd",
    loss_fn: str | LossFn = "classification",
    clip_norm: float | None = None,
    task_chunk: int | None = None,
    params: TaskParams | None = None,
    ways: Tensor | None = None,
) -> Adapted:
    """Adapt T tasks in one batch and keep no graph.

    Args:
        patched: The model, from `fm.patch`.
        support: Model inputs and ``labels``, each ``[T, N, ...]``.
        steps: Inner steps, at least 1.
        lr: Learning rate, positive.
        optimizer: ``"sgd" | "momentum" | "adam" | "adamw" | "rmsprop"`` or a rule object.
        loss_fn: ``"classification"``, ``"causal_lm"`` or a callable ``(outputs, batch) -> [T]``.
        clip_norm: Bound on each task's gradient norm, or None.
        task_chunk: Tasks adapted at once, or None for all.
        params: Fast weights to start from; default the model's own initial values.
        ways: Number of classes of each task ``[T]``, when fewer than the head has.

    Returns:
        The adapted fast weights: ``patched(adapted.params, **query_inputs)``.

    Raises:
        ValueError: Empty support, labels out of range, steps below 1, lr not positive.
    """
    steps = check_steps(steps)
    if isinstance(lr, LearnedRate):
        raise TypeError("adapt takes a number as lr; learned rates belong to a learner")
    tasks = next(iter(support.values())).shape[0] if support else 0
    if params is not None and params.num_tasks != tasks:
        raise ValueError(f"params hold {params.num_tasks} tasks, the support set {tasks}")
    if not tasks:
        raise ValueError("the support set is empty: it has no tasks")
    check_labels(support, "support", None)
    if ways is not None:
        support = {**support, WAYS: ways}
    rates = Rates(lr, patched.layout, steps, patched.slots.initial[0])
    loop = InnerLoop(
        patched=patched,
        rule=resolve_rule(optimizer),
        rates=rates,
        steps=steps,
        loss_fn=resolve_loss(loss_fn),
        second_order=0,
        clip_norm=clip_norm,
    )
    with torch.no_grad():
        start = (params or patched.init(tasks)).packed
        size = task_chunk or tasks
        pieces = [
            adapt_tasks(
                loop,
                start[i : i + size],
                {k: v[i : i + size] for k, v in support.items()},
                "unroll",
                slice(i, min(i + size, tasks)),
            )
            for i in range(0, tasks, size)
        ]
    return Adapted(
        TaskParams(patched.layout, torch.cat([p.params for p in pieces])),
        torch.cat([torch.stack(p.losses) for p in pieces], dim=1),
        ~torch.cat([p.active for p in pieces]),
    )


def check_steps(steps: object) -> int:
    """The number of inner steps, or an error."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an integer of at least 1, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps
