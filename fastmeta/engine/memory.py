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


@dataclass(frozen=True)
class MemoryPlan:
    """Attributes:
    mode: ``"unroll"`` or ``"recompute"``.
    task_chunk: Tasks differentiated at once, or None for all.
    step_bytes: Predicted bytes that one inner step of one task keeps, 0 where not measured.
    """

    mode: str
    task_chunk: int | None = None
    step_bytes: int = 0


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
    loop: InnerLoop,
    packed: Tensor,
    support: dict[str, Tensor],
    batch: TaskBatch,
    memory: str,
    task_chunk: int | str | None,
) -> MemoryPlan:
    """Fill in what the user left to ``"auto"``.

    One task's exact step is run once, counting the bytes its graph keeps. ``unroll`` keeps K such
    steps, ``recompute`` one step and the K fast weights; the query pass comes on top.
    """
    chunk = task_chunk if isinstance(task_chunk, int) else None
    if memory != "auto" and task_chunk != "auto":
        return MemoryPlan(memory, chunk)
    step, query = _measure(loop, packed[:1], batch[:1])
    state = packed.shape[1] * packed.element_size() * (1 + len(loop.rule.init(packed[:1, :1])))
    unroll = loop.steps * (step + state) + query
    recompute = max(step, query) + loop.steps * state
    budget = int(_USABLE * free_bytes(packed.device))
    tasks = chunk or batch.num_tasks
    mode = memory
    if memory == "auto":
        mode = "unroll" if unroll * tasks <= budget else "recompute"
    need = unroll if mode == "unroll" else recompute
    if task_chunk == "auto" or (memory == "auto" and task_chunk is None):
        fitting = max(1, budget // max(need, 1))
        chunk = fitting if fitting < batch.num_tasks else None
    return MemoryPlan(mode, chunk, step)


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
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
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
