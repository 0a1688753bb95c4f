"""The inner update over packed fast weights, beside the same update in eager torch and a copy.

The limit is memory traffic: 12 bytes an element in float32, where a copy moves 8.
"""

import pytest
import torch

import fastmeta as fm

SHAPES = {"heads": (64, 2_000), "lora": (64, 60_000), "small BERT": (64, 1_100_000)}


def _tensors(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["fastmeta", "fastmeta in place", "eager", "copy"])
def bench_sgd_update(benchmark, shape: str, way: str):
    params, grads = _tensors(SHAPES[shape])
    out = torch.empty_like(params)
    ways = {
        "fastmeta": lambda: fm.ops.sgd_update(params, grads, 0.01),
        "fastmeta in place": lambda: fm.ops.sgd_update_(params, grads, 0.01),
        "eager": lambda: params - 0.01 * grads,
        "copy": lambda: out.copy_(params),
    }
    benchmark.group = shape
    benchmark.extra_info["bytes"] = params.numel() * (8 if way == "copy" else 12)
    benchmark(ways[way])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["fastmeta", "eager"])
def bench_sgd_update_with_backward(benchmark, shape: str, way: str):
    params, grads = (t.requires_grad_() for t in _tensors(SHAPES[shape]))
    rate = torch.full((1, params.shape[1]), 0.01, requires_grad=True)  # Meta-SGD's
    upstream = torch.ones_like(params)

    def step():
        if way == "fastmeta":
            new = fm.ops.sgd_update(params, grads, rate)
        else:
            new = params - rate * grads
        return torch.autograd.grad(new, (params, grads, rate), upstream)

    benchmark.group = f"{shape}, with backward and a learned rate"
    benchmark(step)
