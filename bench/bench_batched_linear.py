"""Linear layers whose weight differs from task to task, beside torch's batched product.

The floor is arithmetic: ``2 T M K N`` operations at the rate of a large matrix product, except for
few rows, where reading the weights ``4 T K N`` bytes takes longer. Both are stored with each
measurement.
"""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm

# (T, M, K, N): tasks, rows of a task, inputs, outputs
CASES = {
    "BERT h=128, 1-shot": (32, 80, 128, 512),
    "its first tokens": (32, 5, 128, 512),
    "MiniLM, 5-shot": (8, 600, 384, 1536),
}
WAYS = {
    "fastmeta": fm.ops.batched_linear,
    "torch.bmm": lambda x, weight: torch.bmm(x, weight.mT),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_batched_linear(benchmark, way: str, case: str):
    tasks, rows, inner, outer = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, rows, inner, generator=generator)
    weight = torch.randn(tasks, outer, inner, generator=generator)
    benchmark.group = case
    benchmark.extra_info["floor_flops"] = 2 * tasks * rows * inner * outer
    benchmark.extra_info["floor_bytes"] = weight.nbytes
    benchmark(WAYS[way], x, weight)
