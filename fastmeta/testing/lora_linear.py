"""The row of the operator table for the linear layer with low-rank terms."""

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

# T, R, K, N, r: one, odd, empty, tasks of several tiles and parts, sizes that vectors divide or not
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 2),
    (3, 6, 16, 4, 4),
    (0, 3, 4, 2, 1),
    (2, 0, 3, 4, 2),
    (1, 5, 4, 0, 2),
    (1, 3, 0, 4, 1),
    (5, 2, 64, 32, 8),
    (2, 21, 18, 3, 17),
    (3, 40, 37, 50, 16),
    (2, 290, 33, 65, 5),
    (1, 1100, 8, 6, 3),
)
SMALL = ((1, 2, 3, 2, 1), (2, 3, 2, 3, 2), (2, 2, 2, 2, 2), (3, 2, 3, 1, 1))


def ragged(tasks: int, rows: int, generator: torch.Generator) -> Tensor:
    """Offsets of `rows` rows; the second of three or more tasks has none."""
    cuts = torch.randint(0, rows + 1, (max(tasks - 1, 0),), generator=generator).sort().values
    if tasks > 2:
        cuts[1] = cuts[0]
    return torch.tensor([0, *cuts.tolist(), rows] if tasks else [0])


def samples(shapes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Every form of bias, scale and rows, mixed ranks, weights stored either way, strides."""
    for i, (tasks, rows, width, outputs, rank) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)

        def random(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weight = random(outputs, width) if i % 2 else random(width, outputs).mT
        packed = random(tasks, 2, rank * max(width, outputs))  # fast weights lie in one buffer
        a = packed[:, 0, : rank * width].unflatten(1, (rank, width))
        b = packed[:, 1, : rank * outputs].unflatten(1, (outputs, rank))
        x = random(tasks, rows, width)
        x = x.mT.contiguous().mT if i % 4 == 3 else x
        options = {}
        if i % 3 == 1:
            options["offsets"] = ragged(tasks, tasks * rows, generator).to(device)
            x = x.flatten(0, 1)
        if i % 4 == 1:
            options["ranks"] = torch.randint(0, rank + 1, (tasks,), generator=generator).to(device)
        tensors = [x, weight, a, b]
        bias = ((outputs,), (tasks, outputs), None)[(i + 1) % 3]
        scaled = i % 4 == 1
        if bias is not None:  # of tasks, it lies in one buffer with what else they have
            tensors.append(random(*bias[:-1], outputs + 3)[..., 2:-1])
        tensors += [0.5 + random(tasks).abs()] if scaled else []

        def call(x, weight, a, b, *more, bias=bias, scaled=scaled, options=options):
            own = more[-1] if scaled else 0.5
            return ops.lora_linear(x, weight, more[0] if bias else None, a, b, own, **options)

        yield Sample(
            f"{tasks}x{rows}x{width}x{outputs}x{rank}",
            tuple(t.to(device, dtypes[0]) for t in tensors),
            call,
        )


TABLE = (
    OpRow(
        name="lora_linear",
        raw=("lora_linear", "lora_linear_backward", "lora_linear_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SHAPES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device),
        gpu="triton",
    ),
)
