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
from fastmeta.patching.narrow_params import held_apart, joined


class TaskResults(NamedTuple):
    """What an episode gives per task."""

    losses: Tensor
    """Query losses ``[T]``."""
    params: TaskParams
    """Adapted fast weights."""
    logits: Tensor
    """Query logits ``[T, Q, ...]``; ``[T, 0]`` where the model has none."""
    active: Tensor
    """bool ``[T]``: the support losses and gradients of every step were finite."""
    support_losses: Tensor
    """``[T, K]``."""


Run = Callable[[slice, TaskParams, str], TaskResults]
"""``(tasks, their initial fast weights, memory mode) -> results``."""
Ahead = tuple[TaskResults, list[Tensor | None]]
"""Results, and the gradients of their losses' sum."""
Replay = Callable[[TaskParams, list[Tensor]], Ahead | None]
"""``(initial fast weights, other weights) -> results and gradients``, of all tasks; None where they
have to run."""


def run_chunks(
    loop: InnerLoop, run: Run, start: TaskParams, plan: MemoryPlan, replay: Replay | None = None
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
        replay: Runs all tasks at once, with that gradient, in another way.
    """
    pieces = split(slice(0, start.num_tasks), plan.task_chunk)
    whole = len(pieces) == 1
    if not (whole and _may_replay(loop, plan)):
        replay = None
    if whole and replay is None and not _may_shrink(loop, start, plan):
        return run(pieces[0], start, plan.mode)
    if not torch.is_grad_enabled():
        return _joined([run(tasks, start.select(tasks), plan.mode) for tasks in pieces])
    weights = [*loop.added_parameters(), *loop.patched.shared_parameters()]
    given, forms = [*start.tensors(), *weights], []
    found = _Chunks.apply(loop, run, plan, pieces, replay, forms, start, weights, *given)
    losses, compact, *others = found
    return TaskResults(losses, forms[0].again(start, compact), *others)


def _joined(parts: list[TaskResults]) -> TaskResults:
    """The results of the tasks of all parts."""
    if len(parts) == 1:
        return parts[0]
    losses, params, *others = zip(*parts, strict=True)
    return TaskResults(torch.cat(losses), joined(params), *map(torch.cat, others))


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
    return own and loop.loss_fn in (classification, causal_lm)


class _Chunks(torch.autograd.Function):
    """``run(tasks, start, plan.mode)``, piece after piece of the tasks.

    The graph of all at once is kept; of pieces their gradient, or their graphs are built again.
    """

    @staticmethod
    def forward(ctx, loop, run, plan, pieces, replay, forms, start, weights, *given):
        start = start.detach()
        ctx.loop, ctx.run, ctx.plan, ctx.pieces = loop, run, plan, pieces
        ctx.start, ctx.weights = start, weights
        ctx.save_for_backward(*given)  # only so that changing them before backward() raises
        ctx.set_materialize_grads(False)
        ctx.conditions, ctx.kept, ctx.ahead = [], None, None
        gradients, parts = _Gradients(start, weights), []
        for tasks in pieces:
            ctx.conditions.append(Conditions(loop.patched, start.device))
            found = None if replay is None else replay(start, weights)
            if found is None and len(pieces) == 1:
                leaves, results = _with_graph(run, tasks, plan.mode, start)
            elif found is None and not plan.ahead:
                results = run(tasks, start.select(tasks), plan.mode)
            else:
                if found is None:
                    found = with_gradient(run, tasks, plan.mode, start, weights)
                results = found[0]
                gradients.add(tasks, found[1])
            ctx.conditions[-1].finish()
            parts.append(results._replace(params=held_apart(results.params)))
        results = _joined(parts)
        ctx.form = results.params.detach()
        forms.append(ctx.form)
        tensors = list(results._replace(params=results.params.compact))
        if gradients.pieces == len(pieces):
            ctx.ahead = gradients.together()
        elif len(pieces) == 1:
            ctx.kept = leaves, tensors
        outputs = [t.detach() for t in tensors]
        ctx.mark_non_differentiable(*outputs[3:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        plan, _ = ctx.plan, ctx.saved_tensors
        if ctx.ahead is not None:
            found, retain = ctx.ahead, torch._C._autograd._get_current_graph_task_keep_graph()
            ctx.ahead = ctx.ahead if retain else None
            if _alike(gradients):
                scale = gradients[0][0]
                return *[None] * 8, *(g if g is None else g * scale for g in found)
            plan.ahead = False
        total = _Gradients(ctx.start, ctx.weights)
        pending = []
        for tasks, conditions in zip(ctx.pieces, ctx.conditions, strict=True):
            parts = [tasks] if conditions.random is not None else split(tasks, plan.task_chunk)
            pending += [(part, conditions) for part in parts]
        while pending:
            (tasks, conditions), mode = pending[0], plan.mode
            mine = [g if g is None else g[tasks] for g in gradients]
            try:
                found = _pull_back(ctx, tasks, conditions, mine)
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
        return *[None] * 8, *total.together()


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
    run: Run, tasks: slice, mode: str, start: TaskParams
) -> tuple[list[Tensor], TaskResults]:
    """What stands for these tasks' tensors of `start` in the results' graph, and the results."""
    own = start.select(tasks)
    leaves = [t.detach().requires_grad_() for t in own.tensors()]
    with torch.enable_grad():
        return leaves, run(tasks, own.like(leaves), mode)


def with_gradient(
    run: Run, tasks: slice, mode: str, start: TaskParams, weights: list[Tensor]
) -> Ahead:
    """The results, and the gradients of their losses' sum to `start` and the weights."""
    leaves, results = _with_graph(run, tasks, mode, start)
    ones = [torch.ones_like(results.losses), *[None] * (len(results) - 1)]
    found = backpropagate(results, ones, [*leaves, *weights])
    results = results._replace(params=held_apart(results.params))
    return TaskResults(*(part.detach() for part in results)), found


def _alike(gradients: tuple[Tensor | None, ...]) -> bool:
    """Whether only losses have a gradient, the same for every task."""
    losses, *others = gradients
    if losses is None or any(g is not None for g in others):
        return False
    return bool((losses == losses[0]).all())


def _pull_back(
    ctx, tasks: slice, conditions: Conditions, gradients: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the start and the weights, by the graph of these tasks: kept, or built now."""
    if ctx.kept is not None:
        leaves, tensors = ctx.kept
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retain:
            ctx.kept = None
        wanted = [*leaves, *ctx.weights]
        try:
            return backpropagate(tensors, gradients, wanted, retain_graph=retain)
        except (RuntimeError, MemoryError):
            ctx.kept = None  # spent
            raise
    with conditions.restored(ctx.loop.patched):
        leaves, results = _with_graph(ctx.run, tasks, ctx.plan.mode, ctx.start)
        compact = None if gradients[1] is None else ctx.form.compact_of(results.params)
        tensors = results._replace(params=compact)
        return backpropagate(tensors, gradients, [*leaves, *ctx.weights])
