"""Tasks in chunks, so that only one chunk's graph exists at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta._memory_errors import is_out_of_memory
from fastmeta.engine.backward import add, backpropagate, differentiable_once
from fastmeta.engine.by_leaf import may_serve
from fastmeta.engine.conditions import Conditions, Versions, versions
from fastmeta.engine.free_memory import free_bytes
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.losses import name_of
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.update_rule import FusedRule
from fastmeta.patching import TaskParams
from fastmeta.patching.later_params import LaterParams
from fastmeta.patching.narrow_params import joined


class TaskResults(NamedTuple):
    """What an episode gives per task."""

    losses: Tensor
    """Query losses ``[T]``."""
    params: TaskParams
    """Adapted fast weights."""
    logits: Tensor
    """Query logits ``[T, Q, ...]``; ``[T, 0]`` where there are none."""
    active: Tensor
    """bool ``[T]``: the support losses and gradients of every step were finite."""
    support_losses: Tensor
    """``[T, K]``."""


RunTasks = Callable[[slice, TaskParams, str], TaskResults]
"""``(tasks, their initial fast weights, memory mode) -> results``."""
Ahead = tuple[TaskResults, list[Tensor | None]]
"""Results, and the gradients of their losses' sum."""
Replay = Callable[[TaskParams, list[Tensor]], Ahead | None]
"""``(initial fast weights, other weights) -> results and gradients``, of all tasks; None where they
have to run."""


def run_chunks(
    loop: InnerLoop,
    run: RunTasks,
    start: TaskParams,
    plan: MemoryPlan,
    inputs: Sequence[Tensor],
    replay: Replay | None = None,
) -> TaskResults:
    """Run all tasks, in chunks where the plan says so.

    With gradients, a chunk takes that of the sum of its losses at once and drops its graph. A loss
    that weights its tasks alike only scales it; for any other the graph is built again in the
    backward pass, with the same random numbers. The graph of all tasks at once is kept. A chunk
    whose backward pass runs out of memory is split as the plan allows; under dropout it cannot be
    split without changing its masks, and only the memory mode changes. All tasks at once are left
    to autograd where they take but a small part of the memory, and where the loss or the update
    rule is not the library's own, since it may hold meta-parameters of its own.

    Args:
        inputs: What `run` reads of a batch.
        replay: Runs all tasks at once, with that gradient, in another way.
    """
    pieces = split(slice(0, start.num_tasks), plan.task_chunk)
    whole = len(pieces) == 1
    carrying = [t for t in inputs if t.requires_grad]
    if carrying or not (whole and _may_replay(loop, plan)):
        replay = None
    if whole and replay is None and not _may_shrink(loop, start, plan):
        return run(pieces[0], start, plan.mode)
    if not torch.is_grad_enabled():
        return _joined([run(tasks, start.select(tasks), plan.mode) for tasks in pieces])
    weights = [*loop.added_parameters(), *loop.shared, *carrying]
    read = versions(loop.patched, inputs)
    work = _Work(loop, run, plan, pieces, start.detach(), weights, read)
    token, losses, *others = _Chunks.apply(work, replay, *start.tensors(), *weights)
    params = partial(work.read, start, token)
    return TaskResults(losses, LaterParams(start, params), *others)


def _joined(parts: list[TaskResults]) -> TaskResults:
    """The results of the tasks of all parts."""
    losses, params, *others = zip(*parts, strict=True)
    return TaskResults(_cat(losses), joined(params), *map(_cat, others))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split(tasks: slice, size: int | None) -> list[slice]:
    """Consecutive slices of at most `size` tasks."""
    size = size or tasks.stop - tasks.start
    return [slice(i, min(i + size, tasks.stop)) for i in range(tasks.start, tasks.stop, size)]


def _may_shrink(loop: InnerLoop, start: TaskParams, plan: MemoryPlan) -> bool:
    """Whether all tasks at once are to be split where a backward pass runs out of memory."""
    if not (torch.is_grad_enabled() and (plan.free_mode or plan.free_chunk) and _closed(loop)):
        return False
    return plan.mode != "unroll" or not _ample(loop, start, plan)


def _may_replay(loop: InnerLoop, plan: MemoryPlan) -> bool:
    """Whether the gradient of the losses' sum is what all tasks at once are run for."""
    return torch.is_grad_enabled() and plan.ahead and _closed(loop)


def _ample(loop: InnerLoop, start: TaskParams, plan: MemoryPlan) -> bool:
    """Whether weights can be kept by leaf, in less than half of what is free."""
    if not may_serve(loop, start):
        return False
    return 0 < 2 * plan.predicted_bytes < free_bytes(start.device)


def _closed(loop: InnerLoop) -> bool:
    """Whether only fast weights, rates and the model's own weights can receive a gradient."""
    settings = vars(loop.rule).values()
    own = isinstance(loop.rule, FusedRule) and not any(isinstance(s, Tensor) for s in settings)
    return own and name_of(loop.loss_fn) is not None


class _Work:
    """What the forward pass over pieces leaves for later.

    Attributes:
        loop, run, plan, pieces: See :func:`run_chunks`.
        start, weights: Initial fast weights, detached, and the other weights.
        read_before: What else they read.
        conditions: Of each piece.
        ahead: Gradients of the losses' sum.
        kept: Of all tasks at once: what stands for the start in their graph, and the results.
        parts: Adapted fast weights of each piece, detached.
        adapted: Of all tasks, where somebody has read them.
        pulled: Their gradient, by the number of the backward pass.
    """

    def __init__(
        self,
        loop: InnerLoop,
        run: RunTasks,
        plan: MemoryPlan,
        pieces: list[slice],
        start: TaskParams,
        weights: list[Tensor],
        read: Versions,
    ) -> None:
        self.read_before = read
        self.loop, self.run, self.plan, self.pieces = loop, run, plan, pieces
        self.start, self.weights = start, weights
        self.conditions: list[Conditions] = []
        self.ahead: list[Tensor | None] | None = None
        self.kept: tuple[list[Tensor], TaskResults] | None = None
        self.parts: list[TaskParams] = []
        self.adapted: TaskParams | None = None
        self.pulled: dict[int, Tensor] = {}

    def read(self, start: TaskParams, token: Tensor) -> TaskParams:
        """The adapted fast weights, differentiable to `start` by way of the `token`."""
        with torch.enable_grad():
            if self.kept is None:
                adapted = joined(self.parts)
            else:
                leaves, results = self.kept
                adapted = joined([results.params])
                self.kept = leaves, results._replace(params=adapted)
            self.adapted, self.parts = adapted.detach(), []
            return self.adapted.again(start, _Read.apply(self, token, self.adapted.compact))

    def pull_back(
        self, tasks: slice, conditions: Conditions, gradients: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the start and the weights, by the graph of these tasks: kept, or built
        now."""
        if self.kept is not None:
            leaves, results = self.kept
            retain = torch._C._autograd._get_current_graph_task_keep_graph()
            if not retain:
                self.kept = None
            compact = None if gradients[1] is None else results.params.compact
            tensors = results._replace(params=compact)
            wanted = [*leaves, *self.weights]
            try:
                return backpropagate(tensors, gradients, wanted, retain_graph=retain)
            except (RuntimeError, MemoryError):
                self.kept = None  # spent
                raise
        with conditions.restored(self.loop.patched):
            leaves, results = _with_graph(self.run, tasks, self.plan.mode, self.start)
            compact = None if gradients[1] is None else self.adapted.compact_of(results.params)
            tensors = results._replace(params=compact)
            return backpropagate(tensors, gradients, [*leaves, *self.weights])


class _Chunks(torch.autograd.Function):
    """``run(tasks, start, plan.mode)``, piece after piece of the tasks.

    The graph of all at once is kept; of pieces their gradient, or their graphs are built again.
    Of the adapted fast weights a token is returned, see :meth:`_Work.read`.
    """

    @staticmethod
    def forward(ctx, work, replay, *given):
        ctx.work, plan, start = work, work.plan, work.start
        ctx.save_for_backward(*given)  # only so that changing them before backward() raises
        ctx.set_materialize_grads(False)
        gradients, parts = _Gradients(start, work.weights), []
        whole = len(work.pieces) == 1
        for tasks in work.pieces:
            conditions = Conditions(work.loop.patched, start.device, work.read_before)
            found = None if replay is None else replay(start, work.weights)
            if found is None and whole:
                work.kept = _with_graph(work.run, tasks, plan.mode, start)
                results = work.kept[1]
            elif found is None and not plan.ahead:
                results = work.run(tasks, start.select(tasks), plan.mode)
            else:
                if found is None:
                    found = with_gradient(work.run, tasks, plan.mode, start, work.weights)
                results = found[0]
                gradients.add(tasks, found[1])
            conditions.finish()
            work.conditions.append(conditions)
            work.parts.append(results.params.detach())
            shown = results.losses, results.logits, results.active, results.support_losses
            parts.append([t.detach() for t in shown])
        if gradients.pieces == len(work.pieces):
            work.ahead = gradients.together()
        losses, *others = map(_cat, zip(*parts, strict=True))
        ctx.mark_non_differentiable(*others[1:])
        return losses.new_zeros(()), losses, *others

    @staticmethod
    @differentiable_once
    def backward(ctx, _, losses: Tensor | None, logits: Tensor | None, *__: Tensor | None):
        work, _ = ctx.work, ctx.saved_tensors
        plan = work.plan
        params = work.pulled.pop(torch._C._current_graph_task_id(), None)
        gradients = [losses, params, logits, None, None]  # as results
        if work.ahead is not None:
            found, retain = work.ahead, torch._C._autograd._get_current_graph_task_keep_graph()
            work.ahead = work.ahead if retain else None
            if _alike(gradients):
                return None, None, *(g if g is None else g * losses[0] for g in found)
            plan.ahead = False
        total = _Gradients(work.start, work.weights)
        pending = []
        for tasks, conditions in zip(work.pieces, work.conditions, strict=True):
            parts = [tasks] if conditions.random is not None else split(tasks, plan.task_chunk)
            pending += [(part, conditions) for part in parts]
        while pending:
            (tasks, conditions), mode = pending[0], plan.mode
            mine = [g if g is None else g[tasks] for g in gradients]
            try:
                found = work.pull_back(tasks, conditions, mine)
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and plan.shrink(tasks.stop - tasks.start)):
                    raise
                if conditions.random is not None and plan.mode == mode:
                    raise
                found = None  # try again outside this block, which holds the failed graph
            if found is not None:
                pending.pop(0)
                total.add(tasks, found)
            elif conditions.random is None:
                pending[:1] = [(part, conditions) for part in split(tasks, plan.task_chunk)]
        return None, None, *total.together()


class _Read(torch.autograd.Function):
    """The adapted fast weights, whose gradient goes to :class:`_Chunks` past autograd, which knows
    the token in their place: few ask for them, and packing those of all tasks takes time."""

    @staticmethod
    def forward(ctx, work, token, compact):
        ctx.work = work
        return compact.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient: Tensor):
        ctx.work.pulled[torch._C._current_graph_task_id()] = gradient
        return None, gradient.new_zeros(()), None


class _Gradients:
    """Gradients of initial fast weights and other weights, piece by piece.

    Attributes:
        pieces: How many were added.
    """

    def __init__(self, start: TaskParams, weights: list[Tensor]) -> None:
        self.start, self.pieces = start.tensors(), 0
        tensors = len(self.start)
        # of what tasks have of their own: the rows of each piece
        self.own: dict[int, list[Tensor]] = {i: [] for i in range(start.shared, tensors)}
        self.sums: set[int] = set()  # which of the others are tensors of our own
        self.found: list[Tensor | None] = [None] * (tensors + len(weights))

    def add(self, tasks: slice, found: list[Tensor | None]) -> None:
        for i, more in enumerate(found):
            if i in self.own:
                rows = torch.zeros_like(self.start[i][tasks]) if more is None else more
                self.own[i].append(rows)
            elif i in self.sums and more is not None:
                self.found[i] += more
            elif more is not None:
                if self.found[i] is not None:
                    self.sums.add(i)
                self.found[i] = add(self.found[i], more)
        self.pieces += 1

    def together(self) -> list[Tensor | None]:
        for i, rows in self.own.items():
            self.found[i] = torch.cat(rows)
        return self.found


def _with_graph(
    run: RunTasks, tasks: slice, mode: str, start: TaskParams
) -> tuple[list[Tensor], TaskResults]:
    """What stands for these tasks' tensors of `start` in the results' graph, and the results."""
    own = start.select(tasks)
    leaves = [t.detach().requires_grad_() for t in own.tensors()]
    with torch.enable_grad():
        return leaves, run(tasks, own.like(leaves), mode)


def with_gradient(
    run: RunTasks, tasks: slice, mode: str, start: TaskParams, weights: list[Tensor]
) -> Ahead:
    """The results, and the gradients of their losses' sum to `start` and the weights."""
    leaves, results = _with_graph(run, tasks, mode, start)
    ones = [torch.ones_like(results.losses), *[None] * (len(results) - 1)]
    found = backpropagate(results, ones, [*leaves, *weights])
    return TaskResults(*(part.detach() for part in results)), found


def _alike(gradients: list[Tensor | None]) -> bool:
    """Whether only losses have a gradient, the same for every task."""
    losses, *others = gradients
    if losses is None or any(g is not None for g in others):
        return False
    return bool((losses == losses[0]).all())
