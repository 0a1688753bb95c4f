"""The Triton kernel that keeps the smallest of a stream of tiles, ``fastmeta.ops.nearest``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import launch, power_of_2


@triton.jit(do_not_specialize=["k", "first"])
def select_kernel(
    values, indices, sums, offset, M, k, first, v_n, i_n, s_n, s_m,
    ALPHA: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One row. The kept values stay where they are with a rank each: a smaller one takes the place
    of the last and moves the ranks behind it up; the store puts all in order."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BK)
    there = slots < k
    kept = tl.load(values + row * v_n + slots, mask=there, other=float("-inf"))
    names = tl.load(indices + row * i_n + slots, mask=there, other=-1)
    rank = tl.where(there, slots, -1)
    worst = tl.max(tl.where(rank == k - 1, kept, float("-inf")), 0)
    for start in range(0, M, BM):
        columns = start + tl.arange(0, BM)
        inside = columns < M
        at = sums + row * s_n + columns.to(tl.int64) * s_m
        found = ALPHA * tl.load(at, mask=inside, other=0)
        if offset is not None:
            found += tl.load(offset + columns, mask=inside, other=0)
        found = tl.where(inside & (found == found), found, float("inf"))
        best = tl.min(found, 0)
        while best < worst:  # at most k times: each makes the worst no larger than the next best
            column = tl.min(tl.where(found == best, columns, M), 0)
            place = tl.sum((there & (kept <= best)).to(tl.int32), 0)  # behind its equals
            out_goes = rank == k - 1
            kept = tl.where(out_goes, best, kept)
            names = tl.where(out_goes, (first + column).to(tl.int64), names)
            rank = tl.where(out_goes, place, tl.where(rank >= place, rank + 1, rank))
            found = tl.where(columns == column, float("inf"), found)
            worst = tl.max(tl.where(rank == k - 1, kept, float("-inf")), 0)
            best = tl.min(found, 0)
    tl.store(values + row * v_n + rank, kept, mask=there)
    tl.store(indices + row * i_n + rank, names, mask=there)


def nearest_select_(
    values: Tensor, indices: Tensor, sums: Tensor, offset: Tensor | None, alpha: float, first: int
) -> None:
    """Keep the smallest of values (rising) and of ``alpha sums + offset``, with their columns."""
    (rows, k), columns = values.shape, sums.shape[1]
    if k == 0 or columns == 0:
        return
    # A row is one warp: its reductions are shuffles, without a barrier, and the thousand rows of a
    # tile are enough warps for every device. 16 columns per lane, twice that would not fit with k.
    launch(
        select_kernel, rows,
        values, indices, sums, offset, columns, k, first, values.stride(0), indices.stride(0),
        *sums.stride(), ALPHA=float(alpha), BK=power_of_2(k, 1 << 30),
        BM=power_of_2(columns, 512), num_warps=1 if k <= 256 else 4,
    )  # fmt: skip
