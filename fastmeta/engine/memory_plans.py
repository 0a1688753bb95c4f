"""The memory plan for every batch of a learner: measured for few shapes, and taken over for others.

Texts of real tasks make a batch of another shape nearly every time, and measuring takes about half
as long as a meta-step. Where all of a measured batch fitted, batches that are not much larger do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmeta.batch import TaskBatch
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.memory import MemoryPlan, allowed_bytes, choose_plan, computed_tokens

_MORE_TOKENS = 1.05
"""A plan holds for batches of up to this many times the tokens that it was made for."""


def plan_for(
    plans: dict[Hashable, MemoryPlan],
    loop: InnerLoop,
    batch: TaskBatch,
    memory: str,
    task_chunk: int | str | None,
    memory_budget: int | None,
) -> MemoryPlan:
    """The plan for a batch, which is noted in `plans`; see :func:`choose_plan`."""
    shapes = tuple(tuple(t.shape) for s in (batch.support, batch.query) for t in s.values())
    key = loop.steps, torch.is_grad_enabled(), shapes
    plan = plans.get(key)
    if plan is not None and not plan.predicted_bytes:
        return plan
    tokens = computed_tokens(loop, batch)
    if plan is None or growth(plan.tokens, tokens) > _MORE_TOKENS:
        plan = _taken_over(plans, key, tokens, allowed_bytes(loop, memory_budget))
        if plan is None:
            plan = choose_plan(loop, batch, memory, task_chunk, memory_budget)
        plans[key] = plan
    return plan


def growth(then: Sequence[int], now: Sequence[int]) -> float:
    """The largest ratio of some numbers to others, 1 where there are none."""
    return max((b / max(a, 1) for a, b in zip(then, now, strict=False)), default=1.0)


def _taken_over(
    plans: dict[Hashable, MemoryPlan], key: Any, tokens: Sequence[int], allowed: int
) -> MemoryPlan | None:
    """One that was made for another batch, if this one is sure to fit: what a task needs grows at
    most with the square of its inputs, as the scores of attention do."""
    *kind, shapes = key
    found = None
    for (*same, before), plan in plans.items():
        if same != kind or not (plan.is_whole and plan.predicted_bytes and _alike(before, shapes)):
            continue
        then, now = ([math.prod(shape) for shape in of] for of in (before, shapes))
        more = max(1.0, growth(then, now), growth(plan.tokens, tokens))
        bound = int(more**2 * plan.predicted_bytes)
        if bound <= allowed and (found is None or bound < found.predicted_bytes):
            found = replace(plan, predicted_bytes=bound, tokens=tokens)
    return found


def _alike(before: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> bool:
    """Whether these are shapes of the same inputs of as many tasks."""
    return [(len(s), s[0]) for s in before] == [(len(s), s[0]) for s in now]
