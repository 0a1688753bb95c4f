"""The shared LSTM cell of learned optimizers, forward and backward, beside torch.nn.LSTMCell.

The limits: what must move are the arguments, results, cotangents and gradients, ``(2 F + 10 H)``
numbers a coordinate (x and h are read twice: the backward pass computes the gates again); what must
be computed are four products of ``4H (F + H)`` multiply-adds (the gates twice, the gradients of the
inputs and of the weights), and ten exponentials a unit, which the limits leave out.
`bench/compare_coordinate_lstm.py` interleaves the two.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastmeta as fm

# (M, F, H): coordinates, inputs, width
CASES = {
    "2M coordinates": (2_000_000, 2, 20),
    "a head, 64 tasks x 1,925": (123_200, 2, 20),
    "4 inputs, width 32": (500_000, 4, 32),
    "few": (2_000, 2, 20),
}


def tensors(case: str, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, h, c, weights and biases that require grad, and cotangents of h and c."""
    rows, features, hidden = CASES[case]
    cell = torch.nn.LSTMCell(features, hidden, device=device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, h, c = random(rows, features), random(rows, hidden).tanh_(), random(rows, hidden)
    given = [t.requires_grad_() for t in (x, h, c)]
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    return [*given, *weights], [random(rows, hidden), random(rows, hidden)]


def torch_cell(x, h, c, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Tensor]:
    """What torch.nn.LSTMCell calls."""
    return torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fastmeta": fm.ops.coordinate_lstm,
    "torch.nn.LSTMCell": torch_cell,
}


def step(way: str, case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the cell and its backward pass."""
    given, upstream = tensors(case, device)
    return lambda: torch.autograd.grad(WAYS[way](*given), given, upstream)


def weights_step(way: str, case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    """The same with gradients of the weights alone: the last step of a truncated unroll."""
    given, upstream = tensors(case, device)
    for t in given[:3]:
        t.requires_grad_(False)
    return lambda: torch.autograd.grad(WAYS[way](*given), given[3:], upstream)


def forward(way: str, case: str, device: str = "cpu") -> Callable[[], tuple[Tensor, ...]]:
    given, _ = tensors(case, device)

    def call():
        with torch.no_grad():
            return WAYS[way](*given)

    return call


def floors(case: str) -> tuple[int, int]:
    """Bytes that must move and operations of the products, forward and backward."""
    rows, features, hidden = CASES[case]
    moved = 4 * rows * (3 * features + 10 * hidden)
    return moved, 4 * 2 * rows * 4 * hidden * (features + hidden)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def bench_coordinate_lstm(benchmark, case: str, way: str):
    benchmark.group = case
    benchmark.extra_info["floor_bytes"], benchmark.extra_info["floor_flops"] = floors(case)
    benchmark(step(way, case))
