"""Which memory mode and how many tasks at once: measured on a few tasks, chosen to fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastmeta.batch import TaskBatch
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.recompute import SLICES

MODES = ("unroll", "recompute", "auto")

_USABLE = 0.7
"""Share of the free memory that a plan may fill; the rest is for temporaries and fragmentation."""


@dataclass
class MemoryPlan:
    """How a batch of one shape is run; shrinks in place when memory runs out.

    Attributes:
        mode: ``"unroll"`` or ``"recompute"``.
        task_chunk: Tasks differentiated at once, or None for all.
        free_mode: Whether the mode may change.
        free_chunk: Whether the chunk may change.
        predicted_bytes: Predicted peak of one chunk beyond what is already allocated, 0 where not
            measured.
    """

    mode: str
    task_chunk: int | None = None
    free_mode: bool = False
    free_chunk: bool = False
    predicted_bytes: int = 0

    def shrink(self, tasks: int) -> bool:
        """After running out of memory with `tasks` at once: recompute, and half the tasks.

        Returns:
            False where nothing is left to shrink.
        """
        changed = False
        if self.free_mode and self.mode == "unroll":
            self.mode, changed = "recompute", True
        if self.free_chunk and tasks > 1:
            self.task_chunk, changed = min(self.task_chunk or tasks, (tasks + 1) // 2), True
        return changed


def check_memory(memory: str, task_chunk: int | str | None) -> None:
    """Raise ValueError for a mode or chunk that does not exist."""
    if memory not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}; got {memory!r}")
    if task_chunk is None or task_chunk == "auto":
        return
    if isinstance(task_chunk, bool) or not isinstance(task_chunk, int) or task_chunk < 1:
        raise ValueError(
            f"task_chunk must be None, 'auto' or an integer of at least 1, got {task_chunk!r}"
        )


def choose_plan(
    loop: InnerLoop, batch: TaskBatch, memory: str, task_chunk: int | str | None
) -> MemoryPlan:
    """Fill in what the user left to ``"auto"``: measure small episodes, choose what fits.

    Unrolling is preferred where all tasks fit, then recomputing, then chunks of tasks.
    """
    plan = MemoryPlan(
        mode="unroll" if memory == "auto" else memory,
        task_chunk=task_chunk if isinstance(task_chunk, int) else None,
        free_mode=memory == "auto",
        free_chunk=memory == "auto" or task_chunk == "auto",
    )
    exact = torch.is_grad_enabled() and loop.second_order > 0
    if not exact or not (plan.free_mode or plan.free_chunk):
        return plan
    budget = int(_USABLE * free_bytes(loop.patched.device))
    tasks = plan.task_chunk or batch.num_tasks
    try:
        need = predict(loop, batch, plan.mode)
        if plan.free_mode and need.bytes(tasks) > budget:
            plan.mode = "recompute"
            need = predict(loop, batch, plan.mode)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        plan.shrink(2)  # not even two tasks fit: one at a time
        return plan
    if plan.task_chunk is None and need.bytes(tasks) > budget:
        plan.task_chunk = tasks = need.fitting(budget, batch.num_tasks)
    plan.predicted_bytes = need.bytes(tasks)
    return plan


@dataclass(frozen=True)
class Need:
    """Peak bytes of a forward and backward pass over some tasks at once.

    Attributes:
        fixed: Whatever the number of tasks, such as gradients of shared weights.
        per_task: What every task adds.
        least: Fewer tasks than this need as much as this many.
    """

    fixed: float
    per_task: float
    least: int = 1

    def bytes(self, tasks: int) -> int:
        return int(self.fixed + self.per_task * max(tasks, self.least))

    def fitting(self, budget: int, most: int) -> int:
        """How many tasks fit, at least 1."""
        return min(most, max(1, int((budget - self.fixed) // max(self.per_task, 1))))


def predict(loop: InnerLoop, batch: TaskBatch, mode: str) -> Need:
    """Peak memory of the loop in one mode, from small episodes that are really run.

    The peak is linear in tasks and in steps. One and two tasks give the one slope (``recompute``
    works in two slices: two tasks and four); the other is measured from a step more (``unroll``),
    or known (``recompute`` stores weights and state). The global random state and ``.grad`` are
    left alone.

    Args:
        loop: The inner loop in question.
        batch: Tasks of the shape in question; the first ones are run.
        mode: ``"unroll"`` or ``"recompute"``.
    """
    few = 1
    if mode == "unroll":
        steps, all_steps = 1, loop.second_order
    else:
        # From the second step on, gradients of two steps meet.
        steps, all_steps = min(2, loop.steps), loop.steps
        if batch.num_tasks >= 2 * SLICES:
            few = SLICES
    base = _measure(loop, batch, mode, few, steps)
    if mode == "unroll":
        per_step = _measure(loop, batch, mode, 1, steps + 1) - base if all_steps > 1 else 0
    else:
        row = loop.patched.init(1).packed
        per_step = row.nbytes + sum(t.nbytes for t in loop.rule.init(row))
    per_task = base / few
    if batch.num_tasks >= 2 * few:
        per_task = (_measure(loop, batch, mode, 2 * few, steps) - base) / few
    return Need(base - few * per_task, per_task + (all_steps - steps) * per_step, few)


def _measure(loop: InnerLoop, batch: TaskBatch, mode: str, tasks: int, steps: int) -> int:
    """Peak bytes of one episode with its backward pass."""
    from fastmeta.engine.episode import run_episode

    patched = loop.patched
    small = replace(loop, steps=steps, second_order=steps, capture=None)
    devices = [patched.device] if patched.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), PeakMemory() as meter:
        packed = patched.init(tasks).packed
        meta = [*patched.shared_parameters(), *loop.added_parameters()]
        out = run_episode(small, packed, batch[:tasks], MemoryPlan(mode))
        torch.autograd.grad(out.loss, [packed, *meta], allow_unused=True)
    return meter.peak


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _meminfo()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used)
    return max(available, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in ("can't allocate memory", "ALLOC_FAILED"))
    )


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30  # a system that does not tell: assume a modest machine


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
