"""The row of the operator table for linear layers whose weight differs from task to task."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = ((torch.float32, torch.float32), (torch.float64, torch.float64))

# T, M, K, N: one, odd, empty, tiles of every height, columns in several parts, whole panels
SHAPES = (
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (0, 2, 3, 4),
    (2, 0, 3, 4),
    (2, 3, 0, 4),
    (2, 13, 33, 17),
    (4, 25, 16, 64),
    (1, 30, 40, 300),
)
SMALL = ((1, 2, 3, 2), (2, 3, 2, 2), (2, 2, 2, 3))


def samples(
    shapes, dtypes, device: str | torch.device = "cpu", expanded: bool = True
) -> Iterator[Sample]:
    """Weights stored either way, as views of one packed buffer, expanded; every form of base."""
    for i, (tasks, rows, inner, outer) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)

        def random(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        nt = i % 2 == 0
        shape = (outer, inner) if nt else (inner, outer)
        packed = random(tasks, inner * outer + 5)  # fast weights lie in one buffer
        weight = packed[:, 3:-2].unflatten(1, shape)
        if expanded and i % 3 == 2:
            weight = weight[:1].expand(tasks, *shape)
        x = random(tasks, inner, rows).mT if i % 4 == 3 else random(tasks, rows, inner)
        base = ([], [random(tasks, 1, outer)], [random(tasks, rows, outer)])[i % 3]

        def call(x, weight, *base, nt=nt):
            return ops.batched_linear(x, weight, *base, nt=nt)

        yield Sample(
            f"{tasks}x{rows}x{inner}x{outer}",
            tuple(t.to(device, dtypes[0]) for t in (x, weight, *base)),
            call,
        )


TABLE = (
    OpRow(
        name="batched_linear",
        raw=("batched_mm",),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SHAPES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device, expanded=False),
        gpu="torch",
    ),
)
