"""The row of the operator table for the LSTM cell that all coordinates share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)

# M, F, H: one, odd, empty, rows and columns that tiles divide or not, several panels
SHAPES = (
    (1, 1, 1),
    (3, 2, 5),
    (0, 2, 3),
    (4, 0, 2),
    (5, 3, 0),
    (37, 2, 20),
    (128, 7, 4),
    (301, 4, 6),
)
SMALL = ((2, 2, 1), (3, 1, 2))


def samples(
    shapes, dtypes, device: str | torch.device = "cpu", expanded: bool = True
) -> Iterator[Sample]:
    """With both biases, one or none; contiguous, transposed and expanded inputs."""
    for i, (rows, features, hidden) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)

        def random(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, h, c = random(rows, features), random(rows, hidden).tanh(), random(rows, hidden)
        if i % 2:
            x, c = x.t().contiguous().t(), c[:1].expand(rows, hidden) if rows and expanded else c
        w_ih, w_hh = random(4 * hidden, features), random(4 * hidden, hidden) / 2
        biases = [random(4 * hidden) for _ in range((2, 0, 1)[i % 3])]

        def call(x, h, c, w_ih, w_hh, *biases):
            return ops.coordinate_lstm(x, h, c, w_ih, w_hh, *biases)

        yield Sample(
            f"{rows}x{features}x{hidden}",
            tuple(t.to(device, dtypes[0]) for t in (x, h, c, w_ih, w_hh, *biases)),
            call,
        )


TABLE = (
    OpRow(
        name="coordinate_lstm",
        raw=("coordinate_lstm", "coordinate_lstm_backward", "coordinate_lstm_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SHAPES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device, False),
        gpu="triton",
    ),
)
