"""Which memory mode and how many tasks at once: measured on one task, chosen to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.batch import TaskBatch
from fastmeta.engine.inner import InnerLoop, Support, gradient, task_losses

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
    loop: InnerLoop, packed: Tensor, batch: TaskBatch, memory: str, task_chunk: int | str | None
) -> MemoryPlan:
    """Fill in what the user left to ``"auto"``.

    One task's exact step is run once, counting the bytes its graph keeps. ``unroll`` keeps K such
    steps, ``recompute`` one step and the K fast weights; the query pass comes on top.
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
    need = predict(loop, packed, batch)
    budget = int(_USABLE * free_bytes(packed.device))
    tasks = plan.task_chunk or batch.num_tasks
    if plan.free_mode and need["unroll"] * tasks > budget:
        plan.mode = "recompute"
    fitting = max(1, budget // max(need[plan.mode], 1))
    if plan.task_chunk is None and fitting < tasks:
        plan.task_chunk = tasks = fitting
    plan.predicted_bytes = need[plan.mode] * tasks
    return plan


def predict(loop: InnerLoop, packed: Tensor, batch: TaskBatch) -> dict[str, int]:
    """Peak bytes that one task adds in each mode, from one measured step.

    Args:
        packed: Initial fast weights, at least one row ``[T, P]``.
        batch: Tasks of the shape in question; the first one is run.
    """
    step, query = _measure(loop, packed[:1], batch[:1])
    row = packed.shape[1] * packed.element_size()
    state = row * (1 + len(loop.rule.init(packed[:1, :1])))
    return {
        "unroll": loop.steps * (step + state) + query,
        "recompute": max(step, query) + loop.steps * state,
    }


def _measure(loop: InnerLoop, packed: Tensor, batch: TaskBatch) -> tuple[int, int]:
    """Bytes kept by the graph of one exact inner step, and of one query pass, of one task."""
    from fastmeta.engine.episode import with_ways

    support, query = with_ways(batch)
    known = {t.untyped_storage().data_ptr() for t in loop.patched.model.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in (*support.values(), *query.values())}
    packed = packed.detach().clone().requires_grad_()
    known.add(packed.untyped_storage().data_ptr())
    start = packed.detach() if loop.proximal else None
    with torch.enable_grad():
        with count_saved(known) as step:
            gradient(loop, packed, Support(support, start=start), create_graph=True)
        with count_saved(known) as judged:
            task_losses(loop, packed, query)
    return step.bytes, judged.bytes


class count_saved:
    """Count the bytes that graphs built inside keep for their backward passes."""

    def __init__(self, known: set[int]) -> None:
        self.seen = set(known)
        self.kept: list[Tensor] = []  # holds storages so that their addresses stay distinct
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> count_saved:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self.kept.clear()


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
