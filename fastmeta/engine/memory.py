"""Which memory mode and how many tasks at once: measured on a few tasks, chosen to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.batch import TaskBatch
from fastmeta.engine.budget import budget_bytes, readable
from fastmeta.engine.inner import InnerLoop, Support, model_inputs
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.narrow import narrowed
from fastmeta.engine.recompute import SLICES
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
    if not (task_chunk is None or task_chunk == "auto") and (
        isinstance(task_chunk, bool) or not isinstance(task_chunk, int) or task_chunk < 1
    ):
        raise ValueError(
            f"task_chunk must be None, 'auto' or an integer of at least 1, got {task_chunk!r}"
        )
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
) -> MemoryPlan:
    """Fill in what the user left to ``"auto"``: measure small episodes, choose what fits.

    Unrolling is preferred where all tasks fit; then, on a CPU, unrolling large chunks of tasks;
    then recomputing with as many steps kept as fit, in chunks where that does not fit either.

    Args:
        memory_budget: Bytes that a meta-step may take beyond what is allocated before it; None:
            most of what is free on the device.

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
    if not (plan.free_mode or plan.free_chunk) or not (exact or memory_budget):
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
            wanted = [t for t in meta if t.requires_grad]
            torch.autograd.grad(out.loss, wanted, allow_unused=True)
    return meter


_graphs = False


def note_graphs() -> None:
    """From now on there are CUDA graphs, which keep free blocks to themselves."""
    global _graphs
    _graphs = True


def _kept_by_graphs(device: torch.device) -> int:
    """Free bytes in blocks that CUDA graphs alone may use."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        s["total_size"] - s["allocated_size"]
        for s in torch.cuda.memory_snapshot()
        if s["device"] == index and tuple(s["segment_pool_id"]) != (0, 0)
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; of a host's, this process's share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free - (_kept_by_graphs(device) if _graphs else 0)
    available = _meminfo()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used)
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    return max(available, 0) // processes


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
