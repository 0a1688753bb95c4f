"""The cross-entropy of many classes to its second derivative, beside torch's.

The limit is memory: logits are read in the forward pass; read, and their gradient written, in the
backward pass; the derivative of that reads logits and a cotangent and writes one more.
`bench/compare_cross_entropy.py` interleaves the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm

# (R, C): rows, classes
CASES = {
    "8 tasks of 4 x 64 tokens, Llama's words": (2048, 32_000),
    "512 tokens, Qwen's words": (512, 151_936),
    "512 tokens, BERT's words": (512, 30_522),
}
WAYS = {
    "fastmeta": fm.ops.cross_entropy,
    "torch": partial(F.cross_entropy, reduction="none"),
}
PASSES = {"forward": 1, "forward + backward": 3, "second order": 6}
"""Passes over memory of one tensor of the logits' size that each of them takes at least."""


def step(way: str, case: str, order: str, device: str = "cpu") -> Callable[[], object]:
    rows, classes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(rows, classes, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    g = torch.rand(rows, generator=generator).to(device)
    loss = WAYS[way]
    x.requires_grad_(order != "forward")
    g.requires_grad_(order == "second order")

    def call():
        losses = loss(x, labels)
        if order == "forward":
            return losses
        found = torch.autograd.grad(losses, x, g, create_graph=g.requires_grad)
        return torch.autograd.grad(found, (x, g), v) if g.requires_grad else found

    return call


def floor_bytes(case: str, order: str) -> int:
    rows, classes = CASES[case]
    return 4 * rows * classes * PASSES[order]


@pytest.mark.parametrize("order", PASSES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_cross_entropy(benchmark, case: str, way: str, order: str):
    benchmark.group = f"{case}, {order}"
    benchmark.extra_info["floor_bytes"] = floor_bytes(case, order)
    benchmark(step(way, case, order))
