"""Tasks in chunks, so that only one chunk's graph exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.engine.by_leaf import may_serve
from fastmeta.engine.conditions import Conditions
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.losses import causal_lm, classification
from fastmeta.engine.memory import MemoryPlan, free_bytes, is_out_of_memory
from fastmeta.engine.optimizers import FusedRule
from fastmeta.engine.recompute import add, backpropagate
from fastmeta.patching import TaskParams
from fastmeta.patching.task_params import shared_row


class TaskResults(NamedTuple):
    """What an episode gives per task."""

    losses: Tensor
    """Query losses ``[T]``."""
    params: Tensor | TaskParams
    """Adapted fast weights ``[T, P]``, or what can be packed to them where tasks run at once."""
    logits: Tensor
    """Query logits ``[T, Q, ...]``; ``[T, 0]`` where the model has none."""
    active: Tensor
    """bool ``[T]``: the support losses and gradients of every step were finite."""
    support_losses: Tensor
    """``[T, K]``."""

    def detach(self) -> TaskResults:
        params = self.params.packed if isinstance(self.params, TaskParams) else self.params
        return TaskResults(*(t.detach() for t in self._replace(params=params)))


Run = Callable[[slice, Tensor, str], TaskResults]
"""``(tasks, their rows of the initial fast weights, memory mode) -> results``."""
Ahead = tuple[TaskResults, list[Tensor | None]]
"""Results, and the gradients of their losses' sum."""
Replay = Callable[[Tensor, list[Tensor]], Ahead | None]
"""``(initial fast weights, other weights) -> results and gradients``, of all tasks; None where they
have to run."""


def run_chunks(
    loop: InnerLoop, run: Run, packed: Tensor, plan: MemoryPlan, replay: Replay | None = None
) -> TaskResults:
    """Run all tasks, in chunks where the plan says so.

    With gradients, a chunk takes that of the sum of its losses at once and drops its graph. A loss
    that weights its tasks alike only scales it; for any other the graph is built again in the
    backward pass, with the same random numbers. The graph of all tasks at once is kept. A chunk
    whose backward pass runs out of memory is split as the plan allows; under dropout it cannot be
    split without changing its masks, and only the memory mode changes. Where all tasks at once
    take but a small part of the memory, they may be kept by leaf, which no backward pass can split.
    All tasks at once by a loss or an update rule that is not the library's own are left to
    autograd, since they may hold meta-parameters of their own.

    Args:
        replay: Runs all tasks at once, with that gradient, in another way.
    """
    pieces = split(slice(0, packed.shape[0]), plan.task_chunk)
    whole = len(pieces) == 1
    if not (whole and _may_replay(loop, plan)):
        replay = None
    if whole and replay is None and not _may_shrink(loop, packed, plan):
        return run(pieces[0], packed, plan.mode)
    if torch.is_grad_enabled():
        weights = [*loop.added_parameters(), *loop.patched.shared_parameters()]
        row = None if whole and replay is None else shared_row(packed)
        if row is not None:  # tasks that start from one row may be kept by leaf
            starts = [row] * len(pieces)
        else:
            starts = packed.split([s.stop - s.start for s in pieces])
        results = [
            TaskResults(*_Chunk.apply(loop, run, plan, s, whole, replay, weights, start, *weights))
            for s, start in zip(pieces, starts, strict=True)
        ]
    else:
        results = [run(s, packed[s], plan.mode) for s in pieces]
    if whole:
        return results[0]
    return TaskResults(*(torch.cat(tensors) for tensors in zip(*results, strict=True)))


def split(tasks: slice, size: int | None) -> list[slice]:
    """Consecutive slices of at most `size` tasks."""
    size = size or tasks.stop - tasks.start
    return [slice(i, min(i + size, tasks.stop)) for i in range(tasks.start, tasks.stop, size)]


def _may_shrink(loop: InnerLoop, packed: Tensor, plan: MemoryPlan) -> bool:
    """Whether all tasks at once are to be split where a backward pass runs out of memory."""
    if not (torch.is_grad_enabled() and (plan.free_mode or plan.free_chunk) and _closed(loop)):
        return False
    return plan.mode != "unroll" or not _ample(loop, packed, plan)


def _may_replay(loop: InnerLoop, plan: MemoryPlan) -> bool:
    """Whether the gradient of the losses' sum is what all tasks at once are run for."""
    return torch.is_grad_enabled() and plan.ahead and _closed(loop)


def _ample(loop: InnerLoop, packed: Tensor, plan: MemoryPlan) -> bool:
    """Whether weights can be kept by leaf, in less than half of what is free."""
    if shared_row(packed) is None or not may_serve(loop, packed):
        return False
    return 0 < 2 * plan.predicted_bytes < free_bytes(packed.device)


def _closed(loop: InnerLoop) -> bool:
    """Whether only fast weights, rates and the model's own weights can receive a gradient."""
    settings = vars(loop.rule).values()
    own = isinstance(loop.rule, FusedRule) and not any(isinstance(s, Tensor) for s in settings)
    return own and loop.loss_fn in (classification, causal_lm)


class _Chunk(torch.autograd.Function):
    """``run(tasks, packed, plan.mode)``: its graph kept, or its gradient, or built again.

    The initial fast weights are the rows ``[T, P]`` of these tasks, or the one row ``[P]`` of all.
    """

    @staticmethod
    def forward(ctx, loop, run, plan, tasks, keep, replay, weights, start, *_):
        ctx.loop, ctx.run, ctx.plan, ctx.tasks, ctx.weights = loop, run, plan, tasks, weights
        ctx.conditions = Conditions(loop.patched, start.device)
        # The weights are saved only so that changing them before backward() raises.
        ctx.save_for_backward(start, *weights)
        ctx.set_materialize_grads(False)
        ctx.kept = ctx.ahead = None
        found = None if replay is None else replay(start, weights)
        if found is not None:
            results, ctx.ahead = found
        elif keep:
            ctx.kept = _with_graph(run, tasks, plan.mode, start)
            results = ctx.kept[1].detach()
        elif plan.ahead:
            results, ctx.ahead = with_gradient(run, tasks, plan.mode, start, weights)
        else:
            results = run(tasks, _rows_of(start, tasks), plan.mode)
        ctx.conditions.finish()
        ctx.mark_non_differentiable(results.active, results.support_losses)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        whole, plan, start = ctx.tasks, ctx.plan, ctx.saved_tensors[0]
        if ctx.ahead is not None:
            found, retain = ctx.ahead, torch._C._autograd._get_current_graph_task_keep_graph()
            ctx.ahead = ctx.ahead if retain else None
            if _alike(gradients):
                scale = gradients[0][0]
                return *[None] * 7, *(g if g is None else g * scale for g in found)
            plan.ahead = False
        random = ctx.conditions.random is not None
        pending = [whole] if random else split(whole, plan.task_chunk)
        d_start: list[Tensor] = []
        d_weights: list[Tensor | None] = [None] * len(ctx.weights)
        while pending:
            tasks, mode = pending[0], plan.mode
            rows = slice(tasks.start - whole.start, tasks.stop - whole.start)
            size = tasks.stop - tasks.start
            mine = start[rows] if start.dim() == 2 else start
            try:
                found = _pull_back(
                    ctx, tasks, mine, [g if g is None else g[rows] for g in gradients]
                )
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and plan.shrink(size)):
                    raise
                if random and plan.mode == mode:
                    raise
                found = None  # try again outside this block, which holds the failed graph
            if found is None:
                pending[:1] = [tasks] if random else split(tasks, plan.task_chunk)
                continue
            pending.pop(0)
            d_start.append(torch.zeros_like(mine) if found[0] is None else found[0])
            d_weights = [add(a, b) for a, b in zip(d_weights, found[1:], strict=True)]
        together = torch.cat(d_start) if start.dim() == 2 else sum(d_start)
        return *[None] * 7, together, *d_weights


def _rows_of(start: Tensor, tasks: slice) -> Tensor:
    """The initial fast weights ``[T, P]``."""
    return start if start.dim() == 2 else start.expand(tasks.stop - tasks.start, -1)


def _with_graph(run: Run, tasks: slice, mode: str, start: Tensor) -> tuple[Tensor, TaskResults]:
    """What stands for `start` in the results' graph, and the results."""
    alias = start.detach().requires_grad_()
    with torch.enable_grad():
        return alias, run(tasks, _rows_of(alias, tasks), mode)


def with_gradient(run: Run, tasks: slice, mode: str, start: Tensor, weights: list[Tensor]) -> Ahead:
    """The results, and the gradients of their losses' sum to `start` and the weights."""
    alias, results = _with_graph(run, tasks, mode, start)
    ones = [torch.ones_like(results.losses), *[None] * (len(results) - 1)]
    found = backpropagate(results, ones, [alias, *weights])
    return results.detach(), found


def _alike(gradients: tuple[Tensor | None, ...]) -> bool:
    """Whether only losses have a gradient, the same for every task."""
    losses, *others = gradients
    if losses is None or any(g is not None for g in others):
        return False
    return bool((losses == losses[0]).all())


def _pull_back(
    ctx, tasks: slice, start: Tensor, gradients: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `start` and the weights, by the graph of these tasks: kept, or built now."""
    if ctx.kept is not None:
        alias, results = ctx.kept
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retain:
            ctx.kept = None
        wanted = [alias, *ctx.weights]
        try:
            return backpropagate(results, gradients, wanted, retain_graph=retain)
        except (RuntimeError, MemoryError):
            ctx.kept = None  # spent
            raise
    alias = start.detach().requires_grad_()
    with ctx.conditions.restored(ctx.loop.patched):
        results = ctx.run(tasks, _rows_of(alias, tasks), ctx.plan.mode)
        if isinstance(results.params, TaskParams) and gradients[1] is not None:
            results = results._replace(params=results.params.packed)
        return backpropagate(results, gradients, [alias, *ctx.weights])
