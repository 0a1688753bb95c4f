"""A linear layer with each task's low-rank term, forward and backward, beside other ways.

The floor is that of the shared matrix products, ``2 M K N`` operations for y and as many for dx,
which are done whatever the tasks add. The low-rank terms add ``6 M r (K + N)``: a share of
``3 r (K + N) / (2 K N)``, 6 % at 384 with r = 8. `bench/compare_lora.py` interleaves the ways.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastmeta as fm

# (T, R, K, N, r): tasks, rows of each, inputs, outputs, rank
CASES = {
    "MiniLM, 25 x 32 tokens": (64, 800, 384, 384, 8),
    "MiniLM, up": (64, 200, 384, 1536, 8),
    "BERT h=128, 5 x 16 tokens": (32, 80, 128, 128, 8),
    "one token each": (64, 25, 384, 384, 8),
    "d=1024, r=16": (16, 200, 1024, 1024, 16),
}


def tensors(case: str, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, frozen W and bias, A, B, and the cotangent of y."""
    tasks, rows, width, outputs, rank = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, weight, bias = random(tasks, rows, width), random(outputs, width), random(outputs)
    a, b = random(tasks, rank, width) / width**0.5, random(tasks, outputs, rank)
    upstream = random(tasks, rows, outputs)
    return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), upstream


def fused(x, weight, bias, a, b) -> Tensor:
    return fm.ops.lora_linear(x, weight, bias, a, b, 2.0)


def separate(x, weight, bias, a, b) -> Tensor:
    """The shared product, then batched products of the low-rank terms."""
    y = torch.nn.functional.linear(x, weight, bias)
    return torch.baddbmm(y, torch.bmm(x, a.mT) * 2.0, b.mT)


def merged(x, weight, bias, a, b) -> Tensor:
    """A merged weight for each task."""
    return torch.baddbmm(bias, x, (weight + 2.0 * torch.bmm(b, a)).mT)


def vmapped(x, weight, bias, a, b) -> Tensor:
    """`torch.func.vmap` of one task's layer."""

    def one(x, a, b):
        return torch.nn.functional.linear(x, weight, bias) + 2.0 * ((x @ a.mT) @ b.mT)

    return torch.func.vmap(one)(x, a, b)


WAYS: dict[str, Callable[..., Tensor]] = {
    "fastmeta": fused,
    "linear + bmm": separate,
    "merged weights, bmm": merged,
    "vmap": vmapped,
}


def step(way: str, case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the layer and its backward pass, W frozen."""
    x, weight, bias, a, b, upstream = tensors(case, device)
    return lambda: torch.autograd.grad(WAYS[way](x, weight, bias, a, b), (x, a, b), upstream)


def bare(case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """The shared products alone, for y and dx."""
    x, weight, _, _, _, upstream = tensors(case, device)
    x, upstream = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    return lambda: (torch.mm(x, weight.mT), torch.mm(upstream, weight))


def floor_flops(case: str) -> int:
    """Multiplications and additions of the shared products."""
    tasks, rows, width, outputs, _ = CASES[case]
    return 4 * tasks * rows * width * outputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_lora_linear(benchmark, case: str, way: str):
    benchmark.group = case
    benchmark.extra_info["floor_flops"] = floor_flops(case)
    benchmark(step(way, case))
