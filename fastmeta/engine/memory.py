"""Which memory mode and how many tasks at once: measured on a few tasks, chosen to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastmeta._memory_errors import is_out_of_memory
from fastmeta._settings import integer
from fastmeta.batch import TaskBatch
from fastmeta.engine.budget import budget_bytes, readable
from fastmeta.engine.free_memory import free_bytes
from fastmeta.engine.inner import InnerLoop, model_inputs
from fastmeta.engine.prediction import Need, Predict, predict
from fastmeta.patching.unpadded import MASK

MODES = ("unroll", "recompute", "auto")

_USABLE = 0.7
"""Share of the free memory that a plan may fill; the rest is for temporaries and fragmentation."""

_CHUNK_BYTES = 512 << 20
"""A chunk whose graph is this large spends its time in kernels on a CPU, not on calling them: then
chunks, which compute nothing twice, are faster than recomputing."""

_TRUSTED = 0.9
"""Share of a given budget that a prediction may fill."""


@dataclass
class MemoryPlan:
    """How a batch of one shape is run; shrinks in place when memory runs out.

    Attributes:
        mode: ``"unroll"`` or ``"recompute"``.
        task_chunk: Tasks differentiated at once, or None for all.
        free_mode: Whether the mode may change.
        free_chunk: Whether the chunk may change.
        predicted_bytes: Predicted peak of one chunk beyond what is already allocated, or a bound of
            it; 0 where nothing was predicted.
        keep: Of a recomputed loop: the last this many steps keep their graphs.
        tokens: Of the support and the query set that it was made for: see :func:`computed_tokens`.
        ahead: Whether chunks take their gradient in the forward pass, for a loss that weights all
            tasks alike; False after one that did not.
    """

    mode: str
    task_chunk: int | None = None
    free_mode: bool = False
    free_chunk: bool = False
    predicted_bytes: int = 0
    keep: int = 0
    ahead: bool = True
    tokens: Sequence[int] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing had to be given up for memory."""
        return self.task_chunk is None and not (self.free_mode and self.mode == "recompute")

    def shrink(self, tasks: int) -> bool:
        """After running out of memory with `tasks` at once: recompute, and half the tasks.

        Returns:
            False where nothing is left to shrink.
        """
        changed = False
        if self.free_mode and (self.mode == "unroll" or self.keep):
            self.mode, self.keep, changed = "recompute", 0, True
        if self.free_chunk and tasks > 1:
            self.task_chunk, changed = min(self.task_chunk or tasks, (tasks + 1) // 2), True
        return changed


def check_memory(
    memory: str, task_chunk: int | str | None, memory_budget: int | str | None = None
) -> int | None:
    """Raise for a mode, chunk or budget that does not exist; returns the budget's bytes."""
    if memory not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}; got {memory!r}")
    if not (task_chunk is None or task_chunk == "auto"):
        integer("task_chunk", task_chunk, or_else=", None or 'auto'")
    budget = budget_bytes(memory_budget)
    if budget is not None and memory != "auto" and task_chunk != "auto":
        raise ValueError(
            "memory_budget needs memory='auto' or task_chunk='auto', "
            f"got memory={memory!r} and task_chunk={task_chunk!r}"
        )
    return budget


def choose_plan(
    loop: InnerLoop,
    batch: TaskBatch,
    memory: str,
    task_chunk: int | str | None,
    memory_budget: int | None = None,
    predict: Predict = predict,
) -> MemoryPlan:
    """Fill in what the user left to ``"auto"``: measure small episodes, choose what fits.

    Unrolling is preferred where all tasks fit; then, on a CPU, unrolling large chunks of tasks;
    then recomputing with as many steps kept as fit, in chunks where that does not fit either.

    Args:
        memory_budget: Bytes that a meta-step may take beyond what is allocated before it; None:
            most of what is free on the device.
        predict: Tells what is needed.

    Raises:
        ValueError: One task at a time needs more than `memory_budget`.
    """
    plan = MemoryPlan(
        mode="unroll" if memory == "auto" else memory,
        task_chunk=task_chunk if isinstance(task_chunk, int) else None,
        free_mode=memory == "auto",
        free_chunk=memory == "auto" or task_chunk == "auto",
    )
    exact = torch.is_grad_enabled() and loop.second_order > 0
    if not (plan.free_mode or plan.free_chunk):
        return plan
    plan.tokens, batch = computed_tokens(loop, batch), _fullest_first(batch)
    budget = allowed_bytes(loop, memory_budget)
    total = batch.num_tasks
    tasks = min(plan.task_chunk or total, total)
    try:
        need = unrolled = predict(loop, batch, plan.mode)
        over = need.chunk(tasks, total) > budget
        if loop.by_leaf and plan.mode == "unroll" and (over or tasks < total):
            # Chunks and kept steps hold packed weights, whatever all tasks at once would.
            need = unrolled = predict(replace(loop, by_leaf=False), batch, plan.mode)
        less = plan.free_mode and exact and over
        if less and not _large_chunk_fits(loop, plan, need, total, budget):
            plan.mode = "recompute"
            need = predict(loop, batch, plan.mode)
            if not loop.implicit:
                need, plan.keep = _keeping(loop, need, unrolled, tasks, budget)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        plan.shrink(2)  # not even two tasks fit: one at a time
        return plan
    if plan.task_chunk is None and need.chunk(tasks, total) > budget:
        plan.task_chunk = tasks = max(1, _fitting(need, total, budget))
    plan.predicted_bytes = need.chunk(tasks, total)
    if memory_budget is not None and need.chunk(1, total) > memory_budget:
        raise ValueError(
            f"memory_budget must hold one task at a time, which needs about "
            f"{readable(need.chunk(1, total))}, got {readable(memory_budget)}"
        )
    return plan


def allowed_bytes(loop: InnerLoop, memory_budget: int | None) -> int:
    """What a plan may fill."""
    allowed = int(_USABLE * free_bytes(loop.patched.device))
    return allowed if memory_budget is None else min(allowed, int(_TRUSTED * memory_budget))


def computed_tokens(loop: InnerLoop, batch: TaskBatch) -> tuple[int, ...]:
    """Of the support and of the query set, the positions of a task that layers compute; 0 where
    those are the same for every batch of a shape."""
    found = (
        loop.patched.computed_tokens(model_inputs(batch.support), loop.widths),
        loop.patched.computed_tokens(model_inputs(batch.query)),
    )
    return tuple(n or 0 for n in found)


def _fullest_first(batch: TaskBatch) -> TaskBatch:
    """The batch, those tasks first that decide how much of it is computed."""
    mask = batch.support.get(MASK)
    if mask is None or mask.dim() < 2:
        return batch
    return batch.select((mask != 0).flatten(1).sum(1).argsort(descending=True, stable=True))


def _fitting(need: Need, total: int, budget: int) -> int:
    """Tasks at once that fit, 0 where not even one does; no more than make as many chunks."""
    most = next((n for n in range(total, 0, -1) if need.chunk(n, total) <= budget), 0)
    return most and -(-total // -(-total // most))


def _large_chunk_fits(
    loop: InnerLoop, plan: MemoryPlan, need: Need, total: int, budget: int
) -> bool:
    """Whether unrolled chunks fit that are large enough to be faster than recomputing."""
    if plan.task_chunk is not None or loop.implicit or loop.patched.device.type != "cpu":
        return False
    tasks = _fitting(need, total, budget)
    return tasks > 0 and need.bytes(tasks) >= _CHUNK_BYTES


def _keeping(
    loop: InnerLoop, recomputed: Need, unrolled: Need, tasks: int, budget: int
) -> tuple[Need, int]:
    """What a recomputed loop needs with as many steps kept as fit, and how many those are."""
    row = unrolled.row
    for keep in range(loop.second_order - 1, 0, -1):
        # Kept graphs are gone when the first step is rebuilt: the larger of both.
        gone = loop.second_order - keep
        kept = unrolled.bytes(tasks) - gone * (unrolled.per_step - row) * tasks
        if max(kept, recomputed.bytes(tasks)) <= budget:
            more = max(0, kept - recomputed.bytes(tasks))
            return replace(recomputed, fixed=recomputed.fixed + more), keep
    return recomputed, 0
