"""The peak memory of an inner loop, predicted from small episodes that are really run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastmeta.batch import TaskBatch
from fastmeta.engine.backward import backpropagate
from fastmeta.engine.inner import InnerLoop, Support, model_inputs
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.narrow import narrowed
from fastmeta.engine.recompute import SLICES


@dataclass(frozen=True)
class Need:
    """Peak bytes of a forward and backward pass over some tasks at once.

    Attributes:
        fixed: Whatever the number of tasks, such as gradients of shared weights.
        per_task: What every task adds.
        least: Fewer tasks than this need as much as this many.
        per_step: Share of `per_task` that every differentiated step adds.
        row: Fast weights of one task.
        others: What a task takes while others are run.
        shared: Gradients of what all tasks share.
        ends: What even one task needs when gradients of the initial values are made.
    """

    fixed: float
    per_task: float
    least: int = 1
    per_step: float = 0.0
    row: int = 0
    others: int = 0
    shared: int = 0
    ends: int = 0

    def bytes(self, tasks: int) -> int:
        """Of a batch of so many tasks."""
        return max(int(self.fixed + self.per_task * max(tasks, self.least)), self.ends)

    def chunk(self, tasks: int, total: int) -> int:
        """Of a batch of `total` tasks, so many at a time: also what is there of all the others
        (fast weights; their gradient where they start from rows of their own) and the sum of
        earlier gradients of shared weights."""
        if tasks >= total:
            return self.bytes(total)
        return self.bytes(tasks) + self.others * (total - tasks) + self.shared


Predict = Callable[[InnerLoop, TaskBatch, str], Need]
"""``(loop, batch, memory mode) -> what it needs``."""


def predict(loop: InnerLoop, batch: TaskBatch, mode: str) -> Need:
    """Peak memory of the loop in one mode, from small episodes that are really run.

    The peak is linear in tasks and in steps. One and two tasks give the one slope (``recompute``
    works in two slices: two tasks and four); the other is measured from a step more (``unroll``),
    or known (``recompute`` stores weights and state). The global random state and ``.grad`` are
    left alone. Gradients of an embedding's whole table, where steps hold few rows of it, would hide
    what few tasks take: they are counted apart.

    Args:
        loop: The inner loop in question.
        batch: Tasks of the shape in question; the first ones are run.
        mode: ``"unroll"`` or ``"recompute"``.
    """
    few = 1
    exact = torch.is_grad_enabled() and loop.second_order > 0
    if mode == "unroll" and exact:
        steps, all_steps = 1, loop.second_order
    else:
        # From the second step on, gradients of two steps meet, and tasks have their own weights.
        steps, all_steps = min(2, loop.steps), loop.steps
        if exact and batch.num_tasks >= 2 * SLICES:
            few = SLICES
    for task_set in (batch.support, batch.query):
        loop.patched.plan(model_inputs(task_set))  # made once, and not part of an episode
    row, apart = _start(loop, batch)
    measure = partial(_measure, loop, batch, mode, apart)
    first = measure(few, steps)
    base = first.others
    if mode == "recompute" and exact:
        per_step = row.nbytes + sum(t.nbytes for t in loop.rule.init(row))
    elif torch.is_grad_enabled() and all_steps > steps:
        per_step = measure(1, steps + 1).others - base
    else:
        per_step = 0  # a step's memory is free for the next
    per_task = base / few
    if batch.num_tasks >= 2 * few:
        per_task = (measure(2 * few, steps).others - base) / few
    more = (all_steps - steps) * per_step
    others, shared = row.nbytes, 0
    if torch.is_grad_enabled():
        others *= 1 + loop.own_rows
        shared = sum(p.nbytes for p in loop.shared)
        shared += 0 if loop.own_rows else loop.patched.layout.num_params * row.itemsize
    fixed = base - few * per_task + first.apart_then
    ends = first.peak if apart else 0
    return Need(fixed, per_task + more, few, per_step, row.nbytes, others, shared, ends)


def _start(loop: InnerLoop, batch: TaskBatch) -> tuple[Tensor, set[int]]:
    """The initial fast weights of one task, as steps of the general loop hold them; the bytes of a
    table of which those leave rows out."""
    with torch.no_grad():
        start, support = narrowed(loop, loop.patched.initial(1), Support(batch[:1].support))
    return start, set() if support.narrowing is None else {support.narrowing.table.nbytes}


def _measure(
    loop: InnerLoop, batch: TaskBatch, mode: str, apart: set[int], tasks: int, steps: int
) -> PeakMemory:
    """The memory of one episode, with its backward pass where gradients are enabled."""
    from fastmeta.engine.episode import run_episode
    from fastmeta.engine.memory import MemoryPlan

    patched = loop.patched
    exact = min(loop.second_order, steps)
    by_leaf = loop.by_leaf and not loop.captures_packed
    small = replace(
        loop, steps=steps, second_order=exact, capture=None, by_leaf=by_leaf, replays=None
    )
    devices = [patched.device] if patched.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), PeakMemory(apart) as meter:
        start = patched.initial(tasks)
        meta = [*start.tensors(), *loop.shared, *loop.added_parameters()]
        out = run_episode(small, start, batch[:tasks], MemoryPlan(mode))
        if torch.is_grad_enabled():
            backpropagate([out.loss], [torch.ones_like(out.loss)], meta)
    return meter
