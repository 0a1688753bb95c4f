"""The cross-entropy of many classes to its second derivative, beside torch's; of logits, and of the
linear layer that makes them.

Of logits the limit is memory: they are read in the forward pass; read, and their gradient written,
in the backward pass; the derivative of that reads logits and a cotangent and writes one more. With
the layer it is products: one for the logits, one for the gradient, two for the derivative of that.
`bench/compare_cross_entropy.py` interleaves the ways.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
LAYERS = {  # (R, D, C): rows, their width, classes
    "8 tasks of 4 x 64 tokens, Llama's words": (2048, 512, 32_000),
    "the same, narrow": (2048, 256, 32_000),
    "512 tokens, Qwen's words": (512, 1024, 151_936),
}


def separate(loss: Callable) -> Callable:
    return lambda x, weight, labels: loss(F.linear(x, weight), labels)


WAYS_OF_LAYERS = {
    "fastmeta": fm.ops.linear_cross_entropy,
    "linear + fastmeta's cross_entropy": separate(WAYS["fastmeta"]),
    "linear + torch's": separate(WAYS["torch"]),
}
PRODUCTS = {"forward": 1, "forward + backward": 2, "second order": 4}
PASSES = {"forward": 1, "forward + backward": 3, "second order": 6}
"""Passes over memory of one tensor of the logits' size that each of them takes at least."""


def step(way: str, case: str, order: str, device: str = "cpu") -> Callable[[], object]:
    rows, classes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    x, v = (torch.randn(rows, classes, generator=generator).to(device) for _ in range(2))
    return derivatives(lambda x: WAYS[way](x, labels), x, v, order)


def step_of_layer(way: str, case: str, order: str, device: str = "cpu") -> Callable[[], object]:
    """With the layer frozen."""
    rows, width, classes = LAYERS[case]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).to(device)
    x, v = (torch.randn(rows, width, generator=generator).to(device) for _ in range(2))
    return derivatives(lambda x: WAYS_OF_LAYERS[way](x, weight, labels), x, v, order)


def derivatives(loss: Callable, x: Tensor, v: Tensor, order: str) -> Callable[[], object]:
    """Losses of x; their gradient; the derivative of that times v, in x and the cotangent."""
    g = torch.rand(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    x.requires_grad_(order != "forward")
    g.requires_grad_(order == "second order")

    def call():
        losses = loss(x)
        if order == "forward":
            return losses
        found = torch.autograd.grad(losses, x, g, create_graph=g.requires_grad)
        return torch.autograd.grad(found, (x, g), v) if g.requires_grad else found

    return call


def floor_bytes(case: str, order: str) -> int:
    rows, classes = CASES[case]
    return 4 * rows * classes * PASSES[order]


def floor_flops(case: str, order: str) -> int:
    rows, width, classes = LAYERS[case]
    return 2 * rows * width * classes * PRODUCTS[order]


@pytest.mark.parametrize("order", PASSES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_cross_entropy(benchmark, case: str, way: str, order: str):
    benchmark.group = f"{case}, {order}"
    benchmark.extra_info["floor_bytes"] = floor_bytes(case, order)
    benchmark(step(way, case, order))


@pytest.mark.parametrize("order", PRODUCTS)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("way", WAYS_OF_LAYERS)
def bench_linear_cross_entropy(benchmark, case: str, way: str, order: str):
    benchmark.group = f"layer, {case}, {order}"
    benchmark.extra_info["floor_flops"] = floor_flops(case, order)
    benchmark(step_of_layer(way, case, order))
