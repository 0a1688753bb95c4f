"""LayerNorm and the exact GELU of a second-order step, beside torch's own.

The floor is memory: what the forward pass, the gradient and its derivative must read and write,
``4 R D`` bytes for every one of their tensors (2, 3 and 5 of LayerNorm and of GELU), at the
speed of a copy.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm

# (T, M, D): tasks, rows of a task, width
CASES = {"BERT h=128, 1-shot": (32, 80, 128), "MiniLM, 5-shot": (8, 600, 384)}


def torch_layer_norm(x, weight, bias):
    return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:]), weight.unsqueeze(1))


WAYS = {
    "layer_norm, fastmeta": fm.ops.layer_norm,
    "layer_norm, torch": torch_layer_norm,
    "gelu, fastmeta": lambda x, *_: fm.ops.gelu(x),
    "gelu, torch": lambda x, *_: F.gelu(x),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_second_order(benchmark, way: str, case: str):
    tasks, rows, width = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(tasks, rows, width, generator=generator) for _ in range(2))
    vectors = torch.randn(2, tasks, width, generator=generator)
    inputs = [x.requires_grad_()]
    if way.startswith("layer_norm"):
        inputs += [v.requires_grad_() for v in vectors.unbind(0)]

    def step():
        y = WAYS[way](*inputs)
        first = torch.autograd.grad(y, inputs, d, create_graph=True)
        return torch.autograd.grad(first[0], inputs[:2], d)

    benchmark.group = f"{way.split(',')[0]}, {case}"
    benchmark.extra_info["floor_bytes"] = 10 * x.nbytes
    benchmark(step)
