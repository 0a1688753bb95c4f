"""How much memory is free on a device."""

from __future__ import annotations

from pathlib import Path

import torch

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
