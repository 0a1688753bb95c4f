"""Triton kernels of the pairwise sums, ``fastmeta.ops._pairwise``.

Shapes: ``x [B, N, D]`` and ``y [B, M, D]`` with any batch and row strides and dense rows; sums and
their cotangents ``w [B, N, M]``; cotangents of the gradients ``a [B, N, D]`` and ``b [B, M, D]``.
Every pair is evaluated as ``x - y``, in tiles of rows x rows x coordinates that live in registers;
nothing of size N x M x D is ever in memory. Each program owns its results, so that two runs give
equal bits.

Layout of a tile of three axes: Triton spreads the last axis over the lanes of a warp, then the
second over lanes and warps that are left, and keeps the first in the registers of each thread. A
thread thus uses each value it has fetched several times; the sizes below make that a block of about
64 pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import (
    PROGRAMS,
    TERMS,
    accumulator,
    ceil_div,
    empty_like,
    launch,
    max_with_nan,
    power,
    power_of_2,
)
from fastmeta.reference import pairwise as reference

SQUARES = tl.constexpr(reference.SQUARES)
ABSOLUTE = tl.constexpr(reference.ABSOLUTE)
POWER = tl.constexpr(reference.POWER)
MAXIMUM = tl.constexpr(reference.MAXIMUM)
PRODUCT = tl.constexpr(reference.PRODUCT)


@triton.jit
def sign(z):
    """-1, 0 or 1; 0 of NaN, as torch has it."""
    return tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0)).to(z.dtype)


@triton.jit
def accumulate(acc, x, y, KIND: tl.constexpr, P: tl.constexpr):
    """``acc`` and the next coordinates ``f(x - y)``, added or the larger of both."""
    if KIND == PRODUCT:
        return acc + x * y
    z = x - y
    if KIND == SQUARES:
        return acc + z * z
    elif KIND == ABSOLUTE:
        return acc + tl.abs(z)
    elif KIND == MAXIMUM:
        return tl.maximum(acc, tl.abs(z), propagate_nan=tl.PropagateNan.ALL)
    else:
        size = tl.abs(z)
        return acc + tl.where(size == 0, 0, power(tl.where(size == 0, 1, size), P))


@triton.jit
def finish(acc, KIND: tl.constexpr):
    """The sum, or maximum, over the last axis."""
    if KIND == MAXIMUM:
        return max_with_nan(acc, 2)
    else:
        return tl.sum(acc, 2)


@triton.jit
def slope(z, KIND: tl.constexpr, P: tl.constexpr):
    """``f'(z)`` of a sum."""
    if KIND == SQUARES:
        return 2 * z
    elif KIND == ABSOLUTE:
        return sign(z)
    else:
        zero = z == 0
        size = power(tl.where(zero, 1, tl.abs(z)), P - 1)
        size = P * size  # not where(z < 0, -P, P): a constant alone is a float32
        return tl.where(zero, 0, tl.where(z < 0, -size, size))


@triton.jit
def curvature(z, KIND: tl.constexpr, P: tl.constexpr):
    """``f''(z)`` of a sum; the caller knows that of the other kinds."""
    if KIND == SQUARES:
        return z * 0 + 2
    else:
        zero = z == 0
        size = power(tl.where(zero, 1, tl.abs(z)), P - 2)
        return tl.where(zero, 0, P * (P - 1) * size)


@triton.jit
def tile_of(N, M, BN: tl.constexpr, BM: tl.constexpr):
    """This program's tile: batch (int64), rows and columns (int32)."""
    along_m = tl.cdiv(M, BM)
    tiles = tl.cdiv(N, BN) * along_m
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    tile = program % tiles
    rows = tile // along_m * BN + tl.arange(0, BN)
    columns = tile % along_m * BM + tl.arange(0, BM)
    return batch, rows, columns


@triton.jit
def rows_at(x, batch, rows, N, x_b, x_n):
    """Pointers to rows; those past the end point to the last one: what they give is not stored."""
    return x + batch * x_b + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * x_n


@triton.jit
def coordinates(at, k, D, ACC: tl.constexpr, BD: tl.constexpr):
    """The next coordinates of each row, zeros past the end."""
    ks = k + tl.arange(0, BD)
    return tl.load(at + ks[None, :], mask=ks[None, :] < D, other=0).to(ACC)


@triton.jit
def sums_of(x_at, y_at, D, KIND, P, ACC, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Sums ``[BN, BM]`` of the rows pointed to."""
    acc = tl.zeros((BN, BM, BD), ACC)
    for k in range(0, D, BD):
        x = coordinates(x_at, k, D, ACC, BD)[:, None, :]
        y = coordinates(y_at, k, D, ACC, BD)[None, :, :]
        acc = accumulate(acc, x, y, KIND, P)
    return finish(acc, KIND)


@triton.jit(do_not_specialize=["N", "M"])
def sums_kernel(
    x, y, out, N, M, D, x_b, x_n, y_b, y_n, out_b, out_n, out_m,
    KIND: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    batch, rows, columns = tile_of(N, M, BN, BM)
    x_at = rows_at(x, batch, rows, N, x_b, x_n)
    y_at = rows_at(y, batch, columns, M, y_b, y_n)
    sums = sums_of(x_at, y_at, D, KIND, P, ACC, BN, BM, BD)
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    at = out + batch * out_b + rows * out_n + columns * out_m
    tl.store(at, sums, mask=(rows < N) & (columns < M))


@triton.jit(do_not_specialize=["N", "M"])
def shares_kernel(
    w, x, y, sums, out, N, M, D, x_b, x_n, y_b, y_n,
    SKIP: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``w`` over the number of coordinates that attain the maximum."""
    batch, rows, columns = tile_of(N, M, BN, BM)
    x_at = rows_at(x, batch, rows, N, x_b, x_n)
    y_at = rows_at(y, batch, columns, M, y_b, y_n)
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    at = (batch * N + rows) * M + columns
    inside = (rows < N) & (columns < M)
    most = tl.load(sums + at, mask=inside, other=0).to(ACC)
    count = tl.zeros((BN, BM, BD), tl.int32)
    for k in range(0, D, BD):
        x_k = coordinates(x_at, k, D, ACC, BD)[:, None, :]
        y_k = coordinates(y_at, k, D, ACC, BD)[None, :, :]
        there = (k + tl.arange(0, BD) < D)[None, None, :]
        count += ((tl.abs(x_k - y_k) == most[:, :, None]) & there).to(tl.int32)
    total = tl.sum(count, 2)
    weight = tl.load(w + at, mask=inside, other=0).to(ACC)
    # none attains a maximum that is NaN
    share = tl.where(total > 0, weight / tl.maximum(total, 1), float("nan"))
    if SKIP:
        share = tl.where(weight == 0, 0, share)
    tl.store(out + at, share, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def weights_kernel(
    a, b, x, y, sums, out, N, M, D, x_b, x_n, y_b, y_n,
    KIND: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``sum_k f'(x - y) (a - b)``, the derivative of ``a dx + b dy`` to the weights."""
    batch, rows, columns = tile_of(N, M, BN, BM)
    x_at = rows_at(x, batch, rows, N, x_b, x_n)
    y_at = rows_at(y, batch, columns, M, y_b, y_n)
    N, M = N.to(tl.int64), M.to(tl.int64)
    if a is not None:
        a_at = rows_at(a, batch, rows, N, N * D, D)
    if b is not None:
        b_at = rows_at(b, batch, columns, M, M * D, D)
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    at = (batch * N + rows) * M + columns
    inside = (rows < N) & (columns < M)
    if KIND == MAXIMUM:
        most = tl.load(sums + at, mask=inside, other=0).to(ACC)[:, :, None]
        count = tl.zeros((BN, BM, BD), ACC)
    acc = tl.zeros((BN, BM, BD), ACC)
    for k in range(0, D, BD):
        x_k = coordinates(x_at, k, D, ACC, BD)[:, None, :]
        y_k = coordinates(y_at, k, D, ACC, BD)[None, :, :]
        if KIND == PRODUCT:
            if a is not None:
                acc += coordinates(a_at, k, D, ACC, BD)[:, None, :] * y_k
            if b is not None:
                acc += coordinates(b_at, k, D, ACC, BD)[None, :, :] * x_k
        else:
            z = x_k - y_k
            if KIND == MAXIMUM:
                there = (k + tl.arange(0, BD) < D)[None, None, :]
                attains = ((tl.abs(z) == most) & there).to(ACC)
                count += attains
                derivative = attains * sign(z)
            else:
                derivative = slope(z, KIND, P)
            if b is None:
                acc += derivative * coordinates(a_at, k, D, ACC, BD)[:, None, :]
            elif a is None:
                acc -= derivative * coordinates(b_at, k, D, ACC, BD)[None, :, :]
            else:
                a_k = coordinates(a_at, k, D, ACC, BD)[:, None, :]
                b_k = coordinates(b_at, k, D, ACC, BD)[None, :, :]
                acc += derivative * (a_k - b_k)
    total = tl.sum(acc, 2)
    if KIND == MAXIMUM:
        total = total / tl.sum(count, 2)
    tl.store(out + at, total, mask=inside)


@triton.jit(do_not_specialize=["R", "Q", "part"])
def owned_kernel(
    w, r, o, sums, cr, co, out, R, Q, D, w_b, w_r, w_o, r_b, r_n, o_b, o_n, out_part, part,
    KIND: tl.constexpr, P: tl.constexpr, SECOND: tl.constexpr, SKIP: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of rows ``r [B, R, D]``: sums over the others ``o [B, Q, D]`` with weights
    ``w [B, R, Q]``; of first derivatives, or of second ones with cotangents ``cr`` and ``co``.

    As ``f'`` is odd and ``f''`` even, this serves x and y alike. A program owns rows x coordinates,
    for ``part`` others where the sum is split. ``SKIP``: a weight of 0 takes nothing, not even NaN.
    """
    along_d = tl.cdiv(D, BD)
    tiles = tl.cdiv(R, BR) * along_d
    parts = tl.cdiv(Q, part)
    program = tl.program_id(0)
    batch = (program // (tiles * parts)).to(tl.int64)
    which = program // tiles % parts
    rows = program % tiles // along_d * BR + tl.arange(0, BR)
    ks = program % along_d * BD + tl.arange(0, BD)
    R, Q = R.to(tl.int64), Q.to(tl.int64)
    rows = tl.minimum(rows, R - 1)  # past the end: the last row again, with the same value
    inside = (ks < D)[None, :]
    r_k = tl.load(r + batch * r_b + rows[:, None] * r_n + ks[None, :], mask=inside, other=0)
    r_k = r_k.to(ACC)[None, :, :]
    own = (batch * R + rows[:, None]) * D + ks[None, :]
    if cr is not None:
        cr_k = tl.load(cr + own, mask=inside, other=0).to(ACC)[None, :, :]
    acc = tl.zeros((BR, BD), ACC)
    first = which.to(tl.int64) * part
    last = tl.minimum(first + part, Q)
    for start in range(first, last, BO):
        others = start + tl.arange(0, BO).to(tl.int64)
        there = others < last
        at = batch * w_b + others[:, None] * w_o + rows[None, :] * w_r
        weight = tl.load(w + at, mask=there[:, None], other=0).to(ACC)[:, :, None]
        seen = there[:, None] & inside
        o_k = tl.load(o + batch * o_b + others[:, None] * o_n + ks[None, :], mask=seen, other=0)
        o_k = o_k.to(ACC)[:, None, :]
        if co is not None:
            co_at = co + (batch * Q + others[:, None]) * D + ks[None, :]
            co_k = tl.load(co_at, mask=seen, other=0).to(ACC)[:, None, :]
        if KIND == PRODUCT:
            term = weight * (co_k if SECOND else o_k)
        else:
            z = r_k - o_k
            if not EVEN:
                z = tl.where(there[:, None, None], z, 0)  # not 0 * inf in what is past the end
            if SECOND:
                if co is None:
                    change = cr_k
                elif cr is None:
                    change = -co_k
                else:
                    change = cr_k - co_k
                if not EVEN:
                    change = tl.where(there[:, None, None], change, 0)
                term = weight * curvature(z, KIND, P) * change
            elif KIND == MAXIMUM:
                most = tl.load(sums + at, mask=there[:, None], other=0).to(ACC)[:, :, None]
                term = weight * (tl.abs(z) == most).to(ACC) * sign(z)
            else:
                term = weight * slope(z, KIND, P)
        if SKIP:
            term = tl.where(weight == 0, 0, term)
        acc += tl.sum(term, 0)
    out_at = out + which.to(tl.int64) * out_part + own
    tl.store(out_at, acc, mask=inside)


def pair_tile(n: int, m: int, d: int, wide: bool, heavy: bool = False) -> dict[str, int]:
    """Tile of pairs: ``n`` along the first axis.

    Few rows lie in the registers of every thread, with a block of 8 x 8 pairs each and 32
    coordinates side by side, so that the many rows are read in whole cache lines, once. Else 16 x
    64 pairs are a block of 16 x 4 sums per thread of 4 warps: 20 values fetched serve 64 pairs, at
    128 registers or less, so that four programs share a multiprocessor; 32 x 64 take all 255. Half
    of it in float64, which fills two registers, and half again for ``heavy`` terms with two more
    operands or counts.
    """
    if n <= 16:
        bn = power_of_2(n, 16)
        return {
            "BN": bn,
            "BM": 256 // max(bn, 4) // (1 + wide) // (1 + heavy),
            "BD": power_of_2(d, 32),
        }
    return {
        "BN": 16 // (1 + (wide and heavy)),
        "BM": 64 // (1 + (wide or heavy)),
        "BD": power_of_2(d, 8),
    }


def pair_programs(b: int, n: int, m: int, tile: dict[str, int]) -> int:
    return b * ceil_div(n, tile["BN"]) * ceil_div(m, tile["BM"])


def pairwise_sums(x: Tensor, y: Tensor, kind: int, p: float) -> Tensor:
    """The sums of one kind of every pair."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    write_sums(out, x, y, kind, p)
    return out


def write_sums(out: Tensor, x: Tensor, y: Tensor, kind: int, p: float) -> None:
    strides = list(out.stride())
    if y.shape[1] <= 16 and y.shape[1] <= x.shape[1]:  # all kinds are symmetric: few rows first
        x, y = y, x
        strides[1:] = strides[:0:-1]
    (b, n, d), m = x.shape, y.shape[1]
    if n == 0 or m == 0:
        return
    acc = accumulator(x)
    tile = pair_tile(n, m, d, acc == tl.float64)
    launch(
        sums_kernel, pair_programs(b, n, m, tile),
        x, y, out, n, m, d, *x.stride()[:2], *y.stride()[:2], *strides,
        KIND=kind, P=float(p), ACC=acc, num_warps=4, **tile,
    )  # fmt: skip


def pairwise_sums_backward(
    w: Tensor, x: Tensor, y: Tensor, sums: Tensor | None, kind: int, p: float, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``(w * sums).sum()`` to x and y, those of the bits 1 and 2."""
    return weighted(w.contiguous(), x, y, sums, kind, p, needs, skip=False)


def weighted(w, x, y, sums, kind: int, p: float, needs: int, *, skip: bool):
    """`pairwise_sums_backward`; with ``skip`` weights of 0 take nothing, not even NaN."""
    dx, dy = empty_like(x, needs & 1), empty_like(y, needs & 2)
    if kind == reference.MAXIMUM and needs and w.numel():
        sums = sums.contiguous()
        w = shares(w, x, y, sums, skip)
    if needs & 1:
        write_owned(dx, w, x, y, sums, None, None, kind, p, skip=skip)
    if needs & 2:
        write_owned(dy, w.mT, y, x, sums, None, None, kind, p, skip=skip)
    return dx, dy


def shares(w: Tensor, x: Tensor, y: Tensor, sums: Tensor, skip: bool) -> Tensor:
    out = torch.empty_like(w)
    (b, n, d), m = x.shape, y.shape[1]
    acc = accumulator(x)
    tile = pair_tile(n, m, d, acc == tl.float64, True)
    launch(
        shares_kernel, pair_programs(b, n, m, tile),
        w, x, y, sums, out, n, m, d, *x.stride()[:2], *y.stride()[:2],
        SKIP=skip, ACC=acc, num_warps=4, **tile,
    )  # fmt: skip
    return out


def owned_tile(r: int, d: int, wide: bool, heavy: bool) -> dict[str, int]:
    """Tile of others x rows x coordinates in which the sum over others stays within a thread.

    A lane is a coordinate, so that rows are read in whole cache lines, and a weight fetched serves
    two coordinates where there are enough; 4 others x 8 rows at a time are as many weights as fit
    in registers (8 x 8 spill). Few coordinates leave lanes to rows. ``heavy`` terms, of powers,
    maxima or second derivatives, hold more values each: half as many rows, a quarter in float64.
    """
    bd = power_of_2(d, 128 if wide else 256)
    most = 8 if bd >= 128 else min(1024 // bd, 64)
    br = power_of_2(r, most // (1 + heavy * (1 + 2 * wide)))
    return {"BO": 4, "BR": br, "BD": bd}


def write_owned(
    out, w, r, o, sums, cr, co, kind: int, p: float, *, second: bool = False, skip: bool = False
) -> None:
    """The gradient ``out`` of rows ``r``, as `owned_kernel` has it; w is ``[B, R, Q]`` with any
    strides, and sums lie as w does."""
    (b, rows, d), others = r.shape, o.shape[1]
    if out.numel() == 0 or others == 0:
        out.zero_()
        return
    acc = accumulator(r)
    heavy = second or kind in (reference.POWER, reference.MAXIMUM)
    tile = owned_tile(rows, d, acc == tl.float64, heavy)
    programs = b * ceil_div(rows, tile["BR"]) * ceil_div(d, tile["BD"])
    parts = max(min(ceil_div(PROGRAMS, programs), others // TERMS), 1)
    part = ceil_div(ceil_div(others, parts), tile["BO"]) * tile["BO"]
    parts = ceil_div(others, part)
    to = out
    if parts > 1:
        to = out.new_empty(parts, *out.shape, dtype=wide_dtype(r.dtype))
    launch(
        owned_kernel, programs * parts,
        w, r, o, sums, cr, co, to, rows, others, d, *w.stride(), *r.stride()[:2],
        *o.stride()[:2], out.numel(), part,
        KIND=kind, P=float(p), SECOND=second, SKIP=skip, EVEN=others % tile["BO"] == 0,
        ACC=acc, num_warps=4, **tile,
    )  # fmt: skip
    if parts > 1:
        out.copy_(to.sum(0)) if out.dtype != to.dtype else torch.sum(to, 0, out=out)


def pairwise_sums_double_backward(
    a: Tensor | None,
    b: Tensor | None,
    w: Tensor,
    x: Tensor,
    y: Tensor,
    sums: Tensor | None,
    kind: int,
    p: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ``(a dx + b dy).sum()`` to w, x and y, by the bits 4, 1 and 2."""
    a, b = (None if t is None else t.contiguous() for t in (a, b))
    w = w.contiguous()
    dw, dx, dy = empty_like(w, needs & 4), empty_like(x, needs & 1), empty_like(y, needs & 2)
    if needs & 4 and dw.numel():
        (batch, n, d), m = x.shape, y.shape[1]
        acc = accumulator(x)
        tile = pair_tile(n, m, d, acc == tl.float64, True)
        if (a is None and b is None) or d == 0:
            dw.zero_()
        else:
            if sums is not None:
                sums = sums.contiguous()
            launch(
                weights_kernel, pair_programs(batch, n, m, tile),
                a, b, x, y, sums, dw, n, m, d,
                *x.stride()[:2], *y.stride()[:2],
                KIND=kind, P=float(p), ACC=acc, num_warps=4, **tile,
            )  # fmt: skip
    for bit, out, given in (
        (1, dx, (w, x, y, None, a, b)),
        (2, dy, (w.mT, y, x, None, b, a)),
    ):
        if not needs & bit:
            continue
        other = given[5] if kind == reference.PRODUCT else True
        if kind in (reference.ABSOLUTE, reference.MAXIMUM) or (a is None and b is None):
            other = None
        if other is None:
            out.zero_()
        else:
            write_owned(out, *given, kind, p, second=True)
    return dw, dx, dy
