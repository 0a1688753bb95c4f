"""The Triton kernel that turns matrix products into squared distances."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, launch, power_of_2
from fastmeta.kernels.pairwise import SQUARES, pair_programs, rows_at, sums_of, tile_of


@triton.jit(do_not_specialize=["N"])
def squares_kernel(
    dots, x, y, xx, yy, N, M, D, d_b, d_n, d_m, x_b, x_n, y_b, y_n, xx_b, xx_n, yy_b, yy_n,
    ACC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``|x|^2 + |y|^2 - 2 x y`` over the dots; a tile in which some would cancel has those again as
    differences."""
    batch, rows, columns = tile_of(N, M, BN, BM)
    rows_64, columns_64 = rows.to(tl.int64), columns.to(tl.int64)
    in_rows, in_columns = rows < N, columns < M
    at = dots + batch * d_b + rows_64[:, None] * d_n + columns_64[None, :] * d_m
    inside = in_rows[:, None] & in_columns[None, :]
    dot = tl.load(at, mask=inside, other=0)
    x_square = tl.load(xx + batch * xx_b + rows_64 * xx_n, mask=in_rows, other=0)
    y_square = tl.load(yy + batch * yy_b + columns_64 * yy_n, mask=in_columns, other=0)
    both = x_square[:, None] + y_square[None, :]
    square = both - 2 * dot
    # NaN compares false; where a sum of squares overflows the difference may not
    good = (square >= both * 0.03125) & (square < float("inf"))
    again = inside & ~good
    if tl.max(tl.max(again.to(tl.int32), 1), 0) > 0:
        x_at = rows_at(x, batch, rows, N, x_b, x_n)
        y_at = rows_at(y, batch, columns, M, y_b, y_n)
        square = tl.where(again, sums_of(x_at, y_at, D, SQUARES, 2.0, ACC, BN, BM, BD), square)
    tl.store(at, square, mask=inside)


def pairwise_squares_(dots: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor) -> None:
    """Squared distances over the dots of rows, exact where those would cancel."""
    b, n, m = dots.shape
    acc = accumulator(x)
    # A tile of whole cache lines, small because one pair that cancels evaluates all of it again.
    bn = power_of_2(n, 16 // (1 + (acc == tl.float64)))
    tile = {"BN": bn, "BM": power_of_2(m, 64), "BD": power_of_2(x.shape[2], 8)}
    launch(
        squares_kernel, pair_programs(b, n, m, tile),
        dots, x, y, xx, yy, n, m, x.shape[2], *dots.stride(), *x.stride()[:2], *y.stride()[:2],
        *xx.stride(), *yy.stride(), ACC=acc, num_warps=4, **tile,
    )  # fmt: skip
