"""All inner steps of a linear head for every task, forward and backward, beside autograd loops.

The floor is arithmetic. In the Gram form a task takes about ``3/2 N^2 D + 4 K N^2 C + 6 N C D``
multiplications and as many additions (N rows, D features, C classes, K steps), forward and
backward; its memory traffic, twice the features and the weights, is far below that. ``floor_flops``
is stored with each measurement.

    python -m bench.bench_head_inner_loop                # interleaved ratios, medians
    python -m bench.bench_head_inner_loop --threads=1    # on a machine that others use too
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm

# (T, N, D, C, K): tasks, rows, features, classes, steps
CASES = {
    "5-way 1-shot": (64, 5, 384, 5, 10),
    "5-way 5-shot": (64, 25, 384, 5, 10),
    "20-way 5-shot": (64, 100, 384, 20, 10),
    "5-way 50-shot": (64, 250, 384, 5, 10),
    "5-way 5-shot, wide": (64, 25, 1024, 5, 5),
}
LR = 0.1


def tensors(case: str) -> tuple[Tensor, ...]:
    """Features, labels, weight, bias; those that learn require grad."""
    tasks, rows, width, classes, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(tasks, rows, width, generator=generator), dim=2) * 3
    labels = torch.arange(rows).remainder(classes).expand(tasks, rows).contiguous()
    weight = 0.05 * torch.randn(classes, width, generator=generator)
    return (
        features.requires_grad_(),
        labels,
        weight.requires_grad_(),
        torch.zeros(classes, requires_grad=True),
    )


def fused(features, labels, weight, bias, steps: int) -> tuple[Tensor, Tensor]:
    return fm.ops.head_inner_loop(features, labels, weight, bias, LR, steps)


def batched(features, labels, weight, bias, steps: int) -> tuple[Tensor, Tensor]:
    """All tasks in one autograd loop of batched products."""
    tasks, rows, _ = features.shape
    w, b = (p.expand(tasks, *p.shape) for p in (weight, bias))
    for _ in range(steps):
        logits = torch.einsum("tnd,tcd->tnc", features, w) + b[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / rows
        g_w, g_b = torch.autograd.grad(loss, (w, b), create_graph=True)
        w, b = w - LR * g_w, b - LR * g_b
    return w, b


def loop(features, labels, weight, bias, steps: int) -> tuple[Tensor, Tensor]:
    """One task after another."""
    found = []
    for x, y in zip(features, labels, strict=True):
        w, b = weight, bias
        for _ in range(steps):
            loss = F.cross_entropy(F.linear(x, w, b), y)
            g_w, g_b = torch.autograd.grad(loss, (w, b), create_graph=True)
            w, b = w - LR * g_w, b - LR * g_b
        found.append((w, b))
    return torch.stack([w for w, _ in found]), torch.stack([b for _, b in found])


WAYS: dict[str, Callable] = {"fastmeta": fused, "batched autograd": batched, "task loop": loop}


def step(way: str, case: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the loop and its backward pass, and returns the gradients."""
    features, labels, weight, bias = tensors(case)
    steps = CASES[case][-1]

    def run() -> tuple[Tensor, ...]:
        w, b = WAYS[way](features, labels, weight, bias, steps)
        loss = w.square().sum() + b.square().sum()
        return torch.autograd.grad(loss, (features, weight, bias))

    return run


def floor_flops(case: str) -> int:
    """Multiplications and additions of the cheaper form."""
    tasks, rows, width, classes, steps = CASES[case]
    once = 6 * rows * classes * width
    gram = 1.5 * rows**2 * width + 4 * steps * rows**2 * classes + once
    direct = 7 * steps * rows * classes * width
    return int(2 * tasks * min(gram, direct))


def ratios(case: str, repeats: int = 15, slow_repeats: int = 3) -> dict[str, float]:
    """Medians in seconds of each way, interleaved: ``fastmeta`` before and after every other."""
    runs = {way: step(way, case) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in runs.values():
        run()
    for i in range(repeats):
        for way, run in runs.items():
            if way == "task loop" and i >= slow_repeats:
                continue
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in seconds.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_head_inner_loop(benchmark, case: str, way: str):
    benchmark.group = case
    benchmark.extra_info["floor_flops"] = floor_flops(case)
    benchmark(step(way, case))


def main() -> None:
    threads = [a.removeprefix("--threads=") for a in sys.argv[1:] if a.startswith("--threads=")]
    if threads:
        torch.set_num_threads(int(threads[-1]))
    for case in [a for a in sys.argv[1:] if not a.startswith("--")] or CASES:
        found = ratios(case)
        own = found["fastmeta"]
        rate = floor_flops(case) / own / 1e9
        print(
            f"{case}: {own * 1e3:.2f} ms ({rate:.0f} GFLOP/s of the floor's operations), "
            + ", ".join(f"{w} {t / own:.1f}x" for w, t in found.items() if w != "fastmeta")
        )


if __name__ == "__main__":
    main()
