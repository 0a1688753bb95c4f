"""All inner steps of a linear head for every task, forward and backward, beside autograd loops.

The floor is arithmetic. In the Gram form a task takes about ``3/2 N^2 D + 4 K N^2 C + 6 N C D``
multiplications and as many additions (N rows, D features, C classes, K steps), forward and
backward; its memory traffic, twice the features and the weights, is far below that. ``floor_flops``
is stored with each measurement. `bench/compare_updates.py` interleaves the ways.
"""

from __future__ import annotations

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


def title(case: str) -> str:
    tasks, _, width, _, steps = CASES[case]
    return f"T={tasks}, {case.split(',')[0]}, D={width}, K={steps}"


def tensors(case: str, device: str) -> tuple[Tensor, ...]:
    """Features, labels, weight, bias; those that learn require grad."""
    tasks, rows, width, classes, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(tasks, rows, width, generator=generator), dim=2) * 3
    labels = torch.arange(rows).remainder(classes).expand(tasks, rows).contiguous()
    weight = 0.05 * torch.randn(classes, width, generator=generator)
    bias = torch.zeros(classes)
    features, labels, weight, bias = (t.to(device) for t in (features, labels, weight, bias))
    return features.requires_grad_(), labels, weight.requires_grad_(), bias.requires_grad_()


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


def step(way: str, case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the loop and its backward pass, and returns the gradients."""
    features, labels, weight, bias = tensors(case, device)
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


def ways(case: str, device: str = "cpu") -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    return {way: step(way, case, device) for way in WAYS}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_head_inner_loop(benchmark, case: str, way: str):
    benchmark.group = case
    benchmark.extra_info["floor_flops"] = floor_flops(case)
    benchmark(step(way, case))
