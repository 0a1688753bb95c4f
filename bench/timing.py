"""Interleaved timing: all ways in one process, in turn, so that a slow moment hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Way = Callable[[], object]


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(ways: dict[str, Way], *, rounds: int, device: str = "cpu") -> dict[str, dict]:
    """Median seconds of every way, and its ratio to the first way, median over rounds.

    In every round a way runs once before it is timed, so that none pays for the state of caches and
    heap that another left. Fast ways are repeated until the clock can be trusted (2 ms).
    """
    repeats = {}
    for label, way in ways.items():
        for _ in range(3):  # plans, caches, page faults
            start = time.perf_counter()
            way()
            synchronise(device)
            once = time.perf_counter() - start
        repeats[label] = max(1, min(1000, int(2e-3 / once)))
    times: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            way()
            synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats[label]):
                way()
            synchronise(device)
            times[label].append((time.perf_counter() - start) / repeats[label])
    first = times[next(iter(ways))]
    return {
        label: {
            "seconds": median(t),
            "ratio": median(a / b for a, b in zip(t, first, strict=True)),
        }
        for label, t in times.items()
    }


def gemm_rate(device: str = "cpu") -> float:
    """Best float32 GEMM rate in FLOP/s, over a few sizes of transformer layers."""
    best = 0.0
    for m, k, n in ((2560, 512, 512), (1024, 1024, 1024), (4800, 384, 1536)):
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        times = []
        for _ in range(10):
            synchronise(device)
            start = time.perf_counter()
            torch.mm(a, b)
            synchronise(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * m * k * n / min(times))
    return best


def copy_bandwidth(device: str = "cpu", mib: int = 256) -> float:
    """Bytes per second that a copy moves, read and written."""
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(times)
