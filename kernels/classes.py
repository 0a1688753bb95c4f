"""Triton kernels of the sums over classes and their adjoint, ``fastmeta.ops._classes``, which
gathers rows in any order too, ``fastmeta.ops.take_rows``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import (
    PROGRAMS,
    TERMS,
    accumulator,
    ceil_div,
    launch,
    power_of_2,
)


@triton.jit(do_not_specialize=["N", "C", "part"])
def class_sums_kernel(
    x, labels, out, N, C, D, out_part, part,
    ACC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of some classes and coordinates over ``part`` rows of one task; rows of other classes
    are not read."""
    along_d = tl.cdiv(D, BD)
    tiles = tl.cdiv(C, BC) * along_d
    parts = tl.cdiv(N, part)
    program = tl.program_id(0)
    task = (program // (tiles * parts)).to(tl.int64)
    which = program // tiles % parts
    from_class = program % tiles // along_d * BC
    classes = from_class + tl.arange(0, BC)
    ks = program % along_d * BD + tl.arange(0, BD)
    inside = (ks < D)[None, :]
    acc = tl.zeros((BC, BD), ACC)
    first = which.to(tl.int64) * part
    last = tl.minimum(first + part, N)
    for start in range(first, last, BN):
        rows = start + tl.arange(0, BN).to(tl.int64)
        label = tl.load(labels + task * N + rows, mask=rows < last, other=-1)
        known = (label >= from_class) & (label < tl.minimum(from_class + BC, C))
        row = tl.load(
            x + (task * N + rows[:, None]) * D + ks[None, :], mask=known[:, None] & inside, other=0
        ).to(ACC)
        chosen = label[:, None, None] == classes[None, :, None]
        acc += tl.sum(tl.where(chosen, row[:, None, :], 0), 0)
    at = (task * C + classes.to(tl.int64)[:, None]) * D + ks[None, :]
    tl.store(out + which * out_part + at, acc, mask=(classes < C)[:, None] & inside)


@triton.jit(do_not_specialize=["N", "C"])
def class_gather_kernel(v, labels, out, N, C, D, BN: tl.constexpr, BD: tl.constexpr):
    """Rows of each label's class, zeros for labels outside."""
    along_d = tl.cdiv(D, BD)
    tiles = tl.cdiv(N, BN) * along_d
    program = tl.program_id(0)
    task = (program // tiles).to(tl.int64)
    rows = program % tiles // along_d * BN + tl.arange(0, BN).to(tl.int64)
    ks = program % along_d * BD + tl.arange(0, BD)
    there = rows < N
    label = tl.load(labels + task * N + rows, mask=there, other=-1)
    known = (label >= 0) & (label < C)
    inside = (ks < D)[None, :]
    from_at = v + (task * C + tl.where(known, label, 0)[:, None]) * D + ks[None, :]
    row = tl.load(from_at, mask=known[:, None] & inside, other=0)
    to_at = out + (task * N + rows[:, None]) * D + ks[None, :]
    tl.store(to_at, row, mask=there[:, None] & inside)


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums of the rows of each class, ``[T, C, D]``."""
    x, labels = x.contiguous(), labels.contiguous()
    tasks, rows, d = x.shape
    out = x.new_empty(tasks, classes, d)
    if out.numel() == 0 or rows == 0:
        return out.zero_()
    # One coordinate per lane, and as many classes as keep a block of 8 rows in registers.
    bd = power_of_2(d, 128)
    acc = accumulator(x)
    most = max(1024 // bd, 8) // (1 + (acc == tl.float64))
    tile = {"BN": 8, "BC": power_of_2(classes, most), "BD": bd}
    programs = tasks * ceil_div(classes, tile["BC"]) * ceil_div(d, bd)
    parts = max(min(ceil_div(PROGRAMS, programs), rows // TERMS), 1)
    part = ceil_div(ceil_div(rows, parts), 8) * 8
    parts = ceil_div(rows, part)
    to = out
    if parts > 1:
        to = out.new_empty(parts, *out.shape, dtype=wide_dtype(x.dtype))
    launch(
        class_sums_kernel, programs * parts,
        x, labels, to, rows, classes, d, out.numel(), part, ACC=acc, num_warps=4, **tile,
    )  # fmt: skip
    return to.sum(0).to(out.dtype) if parts > 1 else out


def class_gather(v: Tensor, labels: Tensor) -> Tensor:
    """The row of each label's class, ``[T, N, D]``."""
    v, labels = v.contiguous(), labels.contiguous()
    tasks, classes, d = v.shape
    rows = labels.shape[1]
    out = v.new_empty(tasks, rows, d)
    if out.numel() == 0:
        return out
    # 2048 elements are 16 for each thread of 4 warps: four loads of 16 bytes in flight.
    bd = power_of_2(d, 512)
    bn = power_of_2(rows, 2048 // bd)
    launch(
        class_gather_kernel, tasks * ceil_div(rows, bn) * ceil_div(d, bd),
        v, labels, out, rows, classes, d, BN=bn, BD=bd, num_warps=4,
    )  # fmt: skip
    return out


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index[s]`` of ``[R, C]`` for each s, zeros for -1: ``[S, C]``."""
    return class_gather(x.unsqueeze(0), index.unsqueeze(0)).squeeze(0)
