"""One meta-step: adapt every task on its support set, judge it on its query set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastmeta.batch import TaskBatch
from fastmeta.engine.by_leaf import may_serve, unroll_by_leaf
from fastmeta.engine.captured_leaves import captured_losses
from fastmeta.engine.chunks import RunTasks, TaskResults, run_chunks, with_gradient
from fastmeta.engine.head import adapt_head, head_may_serve, with_prototypes
from fastmeta.engine.implicit import implicit
from fastmeta.engine.inner import (
    InnerLoop,
    Support,
    Trajectory,
    model_inputs,
    task_losses,
    unroll,
)
from fastmeta.engine.losses import WAYS, logits_of, scores
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.narrow import looked_up, narrowed
from fastmeta.engine.recompute import recompute, slices
from fastmeta.patching import TaskParams
from fastmeta.patching.leaf_params import LeafParams
from fastmeta.patching.unpadded import IDS


@dataclass
class MetaOutput:
    """What a learner returns.

    Attributes:
        loss: Mean over tasks of the mean query loss; scalar, differentiable. Diverged tasks are
            left out; where all diverged it is 0, with a gradient of zeros.
        task_losses: Query losses ``[T]``, differentiable; NaN for diverged tasks.
        logits: Query logits ``[T, Q, ...]`` (what the model returns, where that is a tensor), or
            None where it has none, or where a loss of words did without
            (``patched(out.params, **batch.query)`` has them).
        params: Adapted fast weights; of a metric learner what support sets became (prototypes). Of
            an embedding's table they hold the rows of each task's words, the others are the model's
            own: read them before the model learns on, or keep ``params.packed``.
        diverged: bool ``[T]``; tasks whose loss or gradient became NaN or Inf. They keep the fast
            weights from before that step; `loss` and its gradient are what they would be without
            them.
        support_losses: Support losses before each step ``[K, T]``, detached.
        accuracy: Share of right query answers ``[T]`` for classes, else None.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Tensor | None
    params: TaskParams
    diverged: Tensor
    support_losses: Tensor
    accuracy: Tensor | None = None


# torch finds the tensors of a result so, DistributedDataParallel(static_graph=True) among others.
pytree.register_pytree_node(
    MetaOutput,
    lambda out: ([getattr(out, f.name) for f in fields(out)], None),
    lambda values, _: MetaOutput(*values),
)


def with_ways(batch: TaskBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Support and query mappings that carry the tasks' numbers of classes to the loss."""
    extra = {} if batch.ways is None else {WAYS: batch.ways}
    return {**batch.support, **extra}, {**batch.query, **extra}


def run_episode(
    loop: InnerLoop, start: TaskParams, batch: TaskBatch, plan: MemoryPlan
) -> MetaOutput:
    """Adapt and judge T tasks from initial fast weights.

    A task that diverges is frozen; if any did, the others are run again without it, so that its
    NaNs cannot reach the gradient of weights that all tasks share.
    """
    results = _run(loop, start, batch, plan)
    good = _finite(results)
    every = bool(good.all())
    some = every or bool(good.any())
    if not every:
        # lets go of the graph before another one is built
        params = TaskParams(loop.patched.layout, results.params.packed)
        results = TaskResults(*(t.detach() for t in results._replace(params=params)))
        if some and torch.is_grad_enabled():
            results, good = _without(loop, start, batch, plan, results, good)
            some = bool(good.any())
        else:
            results = results._replace(losses=_nan_where(~good, results.losses))
    if some:
        loss = (results.losses if every else results.losses[good]).mean()
    else:
        loss = zero_loss([*start.tensors(), *loop.added_parameters(), *loop.shared])
    plain = isinstance(results.logits, Tensor) and results.logits.numel()
    logits = results.logits if plain else None
    return MetaOutput(
        loss=loss,
        task_losses=results.losses,
        logits=logits,
        params=results.params,
        diverged=~good,
        support_losses=results.support_losses.t(),
        accuracy=scores(loop.loss_fn, logits, with_ways(batch)[1]),
    )


def _without(
    loop: InnerLoop,
    start: TaskParams,
    batch: TaskBatch,
    plan: MemoryPlan,
    frozen: TaskResults,
    good: Tensor,
) -> tuple[TaskResults, Tensor]:
    """The episode of the good tasks, with the others' detached values put back; who is good."""
    loop = replace(loop, capture=None)  # a number of tasks that is not worth graphs of its own
    while bool(good.any()):
        index = good.nonzero().flatten()
        again = _run(loop, start.select(index), batch.select(index), plan, index)
        still = _finite(again)
        if bool(still.all()):
            frozen = _put(frozen, index, again)
            break
        # Other dropout masks, another task lost: fewer tasks each time, so this ends.
        good = good.index_copy(0, index, still)
    return frozen._replace(losses=_nan_where(~good, frozen.losses)), good


def _put(old: TaskResults, index: Tensor, new: TaskResults) -> TaskResults:
    """Results with those of some tasks replaced."""
    layout = old.params.layout
    before, after = (r._replace(params=r.params.packed) for r in (old, new))
    pairs = zip(before, after, strict=True)
    losses, packed, *others = (a.index_copy(0, index, b) for a, b in pairs)
    return TaskResults(losses, TaskParams(layout, packed), *others)


def zero_loss(meta: list[Tensor]) -> Tensor:
    """0, with a gradient of zeros to every tensor, whatever it holds."""
    everywhere = torch.ones((), dtype=torch.bool, device=meta[0].device)
    return torch.stack([t.masked_fill(everywhere, 0.0).sum().to(meta[0]) for t in meta]).sum()


def _finite(results: TaskResults) -> Tensor:
    return results.active & torch.isfinite(results.losses.detach())


def _nan_where(bad: Tensor, losses: Tensor) -> Tensor:
    return losses.masked_fill(bad, float("nan"))


def _run(
    loop: InnerLoop,
    start: TaskParams,
    batch: TaskBatch,
    plan: MemoryPlan,
    index: Tensor | None = None,
) -> TaskResults:
    """The episode of all tasks in `batch`; `index` is where they are in the learner's batch."""
    replay = None
    if index is None:
        index = torch.arange(batch.num_tasks, device=start.device)
        if loop.replays is not None:
            replay = partial(_replay, loop, batch, plan)
    if plan.task_chunk is not None and plan.task_chunk < batch.num_tasks:
        start = looked_up(loop, start, *with_ways(batch), most=1)
    run = _runner(loop, batch, plan, index)
    return run_chunks(loop, run, start, plan, batch.tensors(), replay)


def _runner(loop: InnerLoop, batch: TaskBatch, plan: MemoryPlan, index: Tensor) -> RunTasks:
    def run(tasks: slice, start: TaskParams, mode: str) -> TaskResults:
        whole = tasks.stop - tasks.start == batch.num_tasks
        support_inputs, query_inputs = with_ways(batch if whole else batch[tasks])
        start = looked_up(loop, start, support_inputs, query_inputs)
        trajectory = adapt_tasks(loop, start, support_inputs, mode, index[tasks], keep=plan.keep)
        losses, logits = _judge(loop, trajectory.params, query_inputs, start)
        if logits is None:
            logits = losses.new_zeros(losses.shape[0], 0)
        none = losses.new_zeros(losses.shape[0], 0)
        support_losses = torch.stack(trajectory.losses, 1) if trajectory.losses else none
        return TaskResults(losses, trajectory.params, logits, trajectory.active, support_losses)

    return run


def _replay(
    loop: InnerLoop, batch: TaskBatch, plan: MemoryPlan, start: TaskParams, weights: list[Tensor]
) -> tuple[TaskResults, list[Tensor | None]] | None:
    """The episode of all tasks with the gradient of its losses' sum, by a CUDA graph."""
    recorded = replace(loop, replays=None, asks=False)

    def step(loop: InnerLoop, own: TaskBatch, index: Tensor, start: TaskParams):
        run, whole = _runner(loop, own, plan, index), slice(0, own.num_tasks)
        weights = [*loop.added_parameters(), *loop.shared]
        results, gradients = with_gradient(run, whole, plan.mode, start, weights)
        return results._replace(params=results.params.packed), gradients

    mode = (plan.mode, plan.keep)
    found = loop.replays.run(recorded, mode, batch, start, weights, step)
    if found is None:
        return None
    (losses, packed, *others), gradients = found
    return TaskResults(losses, TaskParams(loop.patched.layout, packed), *others), gradients


def adapt_tasks(
    loop: InnerLoop,
    start: TaskParams,
    inputs: Mapping[str, Tensor],
    mode: str,
    tasks: Tensor | None = None,
    *,
    keep: int = 0,
) -> Trajectory:
    """The inner loop on a support set, with the frozen prefix computed once.

    Where only a plain linear head adapts, by SGD on its cross-entropy, one operator runs all steps.

    Args:
        start: Initial fast weights of T tasks.
        inputs: The support set, each ``[T, N, ...]``.
        mode: ``"unroll"`` or ``"recompute"``.
        tasks: Where these tasks are in the learner's batch, int64 ``[T]``.
        keep: Of a recomputed loop: the last this many steps keep their graphs.
    """
    shared = loop.shared
    differentiated = torch.is_grad_enabled()
    if loop.steps == 0:
        active = torch.ones(start.num_tasks, dtype=torch.bool, device=start.device)
        return Trajectory(start, active, [])
    if head_may_serve(loop):
        trajectory = adapt_head(loop, start, support_of(loop, start, inputs, tasks))
        if trajectory is not None:
            return trajectory
    if mode == "recompute" and loop.second_order and differentiated and not loop.implicit:
        parts = slices(loop, start.num_tasks)
        if len(parts) > 1:
            found = []
            for part in parts:
                texts = {k: v[part] for k, v in inputs.items()}
                places = None if tasks is None else tasks[part]
                support = support_of(loop, mine := start.select(part), texts, places)
                found.append(_recomputed(loop, mine, support, keep))
            return Trajectory.joined(found)
        return _recomputed(loop, start, support_of(loop, start, inputs, tasks), keep)
    support = support_of(loop, start, inputs, tasks)
    if loop.head is None and may_serve(loop, start):
        trajectory = unroll_by_leaf(loop, start, support)
        if trajectory is not None:
            return trajectory
    packed, support = narrowed(loop, start, support)
    if loop.implicit and differentiated:
        with torch.no_grad():
            trajectory = unroll(loop, packed, support)
        adapted = implicit(loop, packed, trajectory.params.compact, support, shared)
        return replace(trajectory, params=support.after(loop, adapted))
    return unroll(loop, with_prototypes(loop, packed, support), support)


def _recomputed(loop: InnerLoop, start: TaskParams, support: Support, keep: int) -> Trajectory:
    packed, support = narrowed(loop, start, support)
    return recompute(loop, with_prototypes(loop, packed, support), support, loop.shared, keep)


def _judge(
    loop: InnerLoop, params: TaskParams, inputs: Mapping[str, Tensor], start: TaskParams
) -> tuple[Tensor, Tensor | None]:
    """Losses ``[T]`` and logits of a query set, by fast weights that come from `start`."""
    given, prefix, rows = model_inputs(inputs), None, None
    if start.looked_up is not None:
        rows = params.query_rows(given[IDS].flatten(1), start.looked_up)
    leaves = None if loop.capture is None else _leaves(loop, params)
    if leaves is not None or not loop.asks:  # then numbers of tokens are rounded
        prefix = loop.patched.record_prefix(params, given, widths=loop.widths)
    if leaves is not None:
        found = captured_losses(loop, leaves, Support(inputs, prefix, rows=rows))
        if found is not None:
            return found
    losses, outputs = task_losses(loop, params.reading(rows), inputs, prefix)
    return losses, logits_of(outputs)


def _leaves(loop: InnerLoop, params: TaskParams) -> LeafParams | None:
    """Fast weights as captured losses read them: packed ones are the rest, beside no leaves. None
    where they do not, as compilers have enough to do with steps."""
    if isinstance(params, LeafParams):
        return params
    packed = type(params) is TaskParams and loop.capture.by_leaf
    return LeafParams(params.layout, params, {}) if packed else None


def support_of(
    loop: InnerLoop, start: TaskParams, inputs: Mapping[str, Tensor], tasks: Tensor | None
) -> Support:
    """The support set with its frozen prefix, run once."""
    prefix = loop.patched.record_prefix(start, model_inputs(inputs), widths=loop.widths)
    return Support(inputs, prefix, tasks)
