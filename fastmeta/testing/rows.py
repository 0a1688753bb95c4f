"""The row of the operator table for rows in another order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
)

# rows of x, columns, rows of the result, how many of them are of x
SIZES = ((1, 1, 1, 1), (7, 5, 4, 4), (4, 3, 9, 2), (0, 3, 2, 0), (5, 0, 5, 5), (300, 130, 280, 270))
SMALL = ((3, 2, 4, 2), (4, 3, 2, 2))


def order(rows: int, results: int, shared: int, generator: torch.Generator):
    """``index [results]`` and ``inverse [rows]`` with `shared` rows taken."""
    taken = torch.randperm(rows, generator=generator)[:shared]
    places = torch.randperm(results, generator=generator)[:shared]
    index, inverse = torch.full((results,), -1), torch.full((rows,), -1)
    index[places], inverse[taken] = taken, places
    return index, inverse


def samples(sizes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Rows dropped, rows of zeros, strided."""
    for i, (rows, columns, results, shared) in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        x = x.mT.contiguous().mT if i % 2 else x
        index, inverse = (t.to(device) for t in order(rows, results, shared, generator))
        yield Sample(
            f"{rows}x{columns}to{results}",
            (x.to(device, dtypes[0]),),
            # squared: its second derivative is not zero
            lambda x, index=index, inverse=inverse: ops.take_rows(x, index, inverse).square(),
        )


TABLE = (
    OpRow(
        name="take_rows",
        raw=("take_rows",),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SIZES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device),
        gpu="torch",
    ),
)
