"""The memory plan for every batch: measured for few shapes, and taken over for others.

Texts of real tasks make a batch of another shape nearly every time, and measuring takes about half
as long as a meta-step. Where all of a measured batch fitted, batches that are not much larger do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fastmeta._memory_errors import is_out_of_memory
from fastmeta.batch import TaskBatch
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.memory import (
    MemoryPlan,
    allowed_bytes,
    check_memory,
    choose_plan,
    computed_tokens,
)
from fastmeta.engine.prediction import Predict, predict

_JUMPS = 4
"""What memory may grow by at once with a batch: whole tables instead of few rows, weights instead
of rows."""

_MORE_TOKENS = 1.05
"""A plan holds for batches of up to this many times the tokens that it was made for."""

_LESS = 4 / 3
"""A plan that gave something up for memory was made for up to this many times what it serves."""

Shapes = Sequence[tuple[str, Sequence[int]]]
"""Of every input of the support and the query set, by name."""

Result = TypeVar("Result")


class MemoryPlans:
    """What to do with the memory that there is: a mode and tasks at a time, or ``"auto"``.

    Args:
        memory, task_chunk, memory_budget: As for a learner.
        predict: Tells what a batch needs.

    Attributes:
        memory, task_chunk: As given.
        budget: Bytes, or None.
        known: The plans made, by the shapes that they are for.
    """

    def __init__(
        self,
        memory: str,
        task_chunk: int | str | None,
        memory_budget: int | str | None = None,
        predict: Predict = predict,
    ) -> None:
        self.budget = check_memory(memory, task_chunk, memory_budget)
        self.memory, self.task_chunk, self.predict = memory, task_chunk, predict
        self.known: dict[Hashable, MemoryPlan] = {}

    def run(self, loop: InnerLoop, batch: TaskBatch, run: Callable[[MemoryPlan], Result]) -> Result:
        """Run under the plan for a batch; where an allocation fails, again under a smaller one."""
        plan = self.plan(loop, batch)
        while True:
            try:
                return run(plan)
            except (RuntimeError, MemoryError) as error:
                tasks = plan.task_chunk or batch.num_tasks
                if not (is_out_of_memory(error) and plan.shrink(tasks)):
                    raise
                for key, other in [*self.known.items()]:  # what they know was too little
                    if other is not plan:
                        self.known.pop(key, None)

    def plan(self, loop: InnerLoop, batch: TaskBatch) -> MemoryPlan:
        """The plan for a batch; see :func:`choose_plan`."""
        inputs = [item for s in (batch.support, batch.query) for item in s.items()]
        shapes = tuple((name, tuple(t.shape)) for name, t in inputs)
        key = loop.steps, torch.is_grad_enabled(), loop.patched.training, shapes
        plan = self.known.get(key)
        if plan is not None and not plan.predicted_bytes:
            return plan
        tokens = computed_tokens(loop, batch)
        if plan is None or growth(plan.tokens, tokens) > _MORE_TOKENS:
            plan = _taken_over(self.known, key, tokens, allowed_bytes(loop, self.budget))
            if plan is None:
                how = self.memory, self.task_chunk, self.budget, self.predict
                plan = choose_plan(loop, batch, *how)
            self.known[key] = plan
        return plan


def growth(then: Sequence[int], now: Sequence[int]) -> float:
    """The largest ratio of some numbers to others, 1 where there are none."""
    return max((b / max(a, 1) for a, b in zip(then, now, strict=False)), default=1.0)


def _taken_over(
    plans: dict[Hashable, MemoryPlan], key: Any, tokens: Sequence[int], allowed: int
) -> MemoryPlan | None:
    """One that was made for another batch, if this one is sure to fit: it is no larger, or there is
    room for more than the square of its growth, which is that of attention's scores. One that gave
    something up for memory serves batches that are hardly smaller."""
    *kind, shapes = key
    found = None
    for (*same, before), plan in [*plans.items()]:
        if same != kind or not plan.predicted_bytes or not _alike(before, shapes):
            continue
        then, now = [*_sizes(before), *plan.tokens], [*_sizes(shapes), *tokens]
        more, less = max(1.0, growth(then, now)), growth(now, then)
        bound = int(more**2 * plan.predicted_bytes)
        fits = bound <= allowed if more == 1 else plan.is_whole and _JUMPS * bound <= allowed
        if fits and (plan.is_whole or less <= _LESS):
            if found is None or bound < found.predicted_bytes:
                found = replace(plan, predicted_bytes=bound, tokens=tokens)
    return found


def _sizes(shapes: Shapes) -> list[int]:
    """Every axis of every input, and its elements."""
    return [n for _, shape in shapes for n in (*shape, math.prod(shape))]


def _alike(before: Shapes, now: Shapes) -> bool:
    """Whether these are shapes of the same inputs of as many tasks."""
    return [(n, len(s), s[0]) for n, s in before] == [(n, len(s), s[0]) for n, s in now]
