"""One meta-step: adapt every task on its support set, judge it on its query set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmeta.batch import TaskBatch
from fastmeta.engine.implicit import ImplicitGradient
from fastmeta.engine.inner import (
    InnerLoop,
    Support,
    Trajectory,
    model_inputs,
    task_losses,
    unroll,
)
from fastmeta.engine.losses import WAYS, accuracy
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.recompute import Rerun, recompute
from fastmeta.patching import TaskParams


@dataclass
class MetaOutput:
    """What a learner returns.

    Attributes:
        loss: Mean over tasks of the mean query loss; scalar, differentiable.
        task_losses: Query losses ``[T]``; NaN for diverged tasks.
        logits: Query logits ``[T, Q, ...]``, or None where the model has none.
        params: Adapted fast weights.
        diverged: bool ``[T]``; tasks whose loss or gradient became NaN or Inf. They keep their
            last finite fast weights and are left out of `loss` and its gradient.
        support_losses: Support losses before each step ``[K, T]``.
        accuracy: Share of right query answers ``[T]`` for classification, else None.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Tensor | None
    params: TaskParams
    diverged: Tensor
    support_losses: Tensor
    accuracy: Tensor | None = None


@dataclass
class _Result:
    """Per-task tensors of one episode; the tuple form crosses autograd Functions."""

    losses: Tensor  # [T]
    params: Tensor  # [T, P]
    active: Tensor  # [T]
    support_losses: Tensor  # [K, T]
    logits: Tensor  # [T, Q, ...], empty where the model has none

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.losses, self.params, self.active, self.support_losses, self.logits)


def with_ways(batch: TaskBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Support and query mappings that carry the tasks' numbers of classes to the loss."""
    extra = {} if batch.ways is None else {WAYS: batch.ways}
    return {**batch.support, **extra}, {**batch.query, **extra}


def run_episode(
    loop: InnerLoop,
    packed: Tensor,
    batch: TaskBatch,
    plan: MemoryPlan,
) -> MetaOutput:
    """Adapt and judge T tasks from initial fast weights ``[T, P]``.

    A task that diverges is frozen; if any did, the others are run again without it, so that its
    NaNs cannot reach the gradient of weights that all tasks share.
    """
    result = _run(loop, packed, batch, plan)
    good = result.active & torch.isfinite(result.losses.detach())
    if not bool(good.all()):
        result = _without(loop, packed, batch, plan, result, good)
    losses = result.losses[good] if not bool(good.all()) else result.losses
    loss = losses.mean() if losses.numel() else result.losses.new_zeros(()).requires_grad_()
    logits = result.logits if result.logits.numel() else None
    scores = None
    query = with_ways(batch)[1]
    if logits is not None and logits.dim() == 3 and query["labels"].shape == logits.shape[:2]:
        scores = accuracy(logits, query)
    return MetaOutput(
        loss=loss,
        task_losses=result.losses,
        logits=logits,
        params=TaskParams(loop.patched.layout, result.params),
        diverged=~good,
        support_losses=result.support_losses,
        accuracy=scores,
    )


def _without(
    loop: InnerLoop,
    packed: Tensor,
    batch: TaskBatch,
    plan: MemoryPlan,
    first: _Result,
    good: Tensor,
) -> _Result:
    """The episode of the surviving tasks, with the frozen ones' detached values put back."""
    nan = torch.full_like(first.losses.detach(), float("nan"))
    kept = _Result(*(t.detach() for t in first.tensors()))
    kept.losses = nan
    kept.active = good
    index = good.nonzero().flatten()
    if not index.numel() or not torch.is_grad_enabled():
        kept.losses = torch.where(good, first.losses, nan)
        return kept
    if "task" in loop.rates.axes:
        raise NotImplementedError(
            "a task diverged while its rate is learned per task; lower the learning rate"
        )
    again = _run(loop, packed[index], batch.select(index), plan)
    kept.losses = nan.index_copy(0, index, again.losses)
    kept.params = kept.params.index_copy(0, index, again.params)
    kept.logits = kept.logits.index_copy(0, index, again.logits)
    return kept


def _run(loop: InnerLoop, packed: Tensor, batch: TaskBatch, plan: MemoryPlan) -> _Result:
    """All tasks, in chunks where the plan says so."""
    chunk = plan.task_chunk or batch.num_tasks
    if chunk >= batch.num_tasks:
        return _run_chunk(loop, packed, batch, plan.mode, None)
    if not torch.is_grad_enabled():
        pieces = [
            _run_chunk(loop, packed[s], batch[s], plan.mode, s)
            for s in _slices(batch.num_tasks, chunk)
        ]
    else:
        meta = [*loop.rates.parameters(), *loop.patched.shared_parameters()]
        pieces = []
        for s in _slices(batch.num_tasks, chunk):

            def run(packed: Tensor, *_: Tensor, s: slice = s) -> tuple[Tensor, ...]:
                return _run_chunk(loop, packed, batch[s], plan.mode, s).tensors()

            pieces.append(_Result(*Rerun.apply(run, loop.patched.training, packed[s], *meta)))
    joined = [
        torch.cat(tensors, dim=1 if i == 3 else 0)
        for i, tensors in enumerate(zip(*(p.tensors() for p in pieces), strict=True))
    ]
    return _Result(*joined)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _run_chunk(
    loop: InnerLoop, packed: Tensor, batch: TaskBatch, mode: str, tasks: slice | None
) -> _Result:
    support_inputs, query_inputs = with_ways(batch)
    trajectory = adapt_tasks(loop, packed, support_inputs, mode, tasks)
    losses, outputs = task_losses(loop, trajectory.params, query_inputs)
    logits = getattr(outputs, "logits", None)
    return _Result(
        losses,
        trajectory.params,
        trajectory.active,
        torch.stack(trajectory.losses),
        losses.new_zeros(losses.shape[0], 0) if logits is None else logits,
    )


def adapt_tasks(
    loop: InnerLoop,
    packed: Tensor,
    inputs: Mapping[str, Tensor],
    mode: str,
    tasks: slice | None = None,
) -> Trajectory:
    """The inner loop on a support set, with the frozen prefix computed once."""
    params = TaskParams(loop.patched.layout, packed)
    prefix = loop.patched.record_prefix(params, model_inputs(inputs))
    support = Support(inputs, prefix, tasks, packed.detach() if loop.proximal else None)
    if loop.implicit and torch.is_grad_enabled():
        with torch.no_grad():
            trajectory = unroll(loop, packed, support)
        adapted = ImplicitGradient.apply(loop, support, trajectory.params, packed)
        return replace(trajectory, params=adapted)
    if mode == "recompute" and loop.second_order and torch.is_grad_enabled():
        return recompute(loop, packed, support, loop.patched.shared_parameters())
    return unroll(loop, packed, support)
