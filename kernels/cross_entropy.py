"""Triton kernels of the cross-entropy of rows and its derivatives, ``fastmeta.ops.cross_entropy``.

A program reads one row, in blocks; the first and the last kernel read it twice, the second time
from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import accumulator, exp, launch, log, power_of_2

_BLOCK = 4096  # logits of a row at a time


@triton.jit
def cross_entropy_kernel(
    x, labels, losses, stats, C, IGNORED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + r)
    if label == IGNORED:
        zero = tl.zeros((), ACC)
        tl.store(losses + r, zero)
        tl.store(stats + 2 * r, zero)
        tl.store(stats + 2 * r + 1, zero)
    else:
        row = x + r * C
        at = tl.arange(0, BLOCK)
        most = tl.full((BLOCK,), float("-inf"), ACC)
        for j in range(0, C, BLOCK):
            given = tl.load(row + j + at, mask=j + at < C, other=float("-inf")).to(ACC)
            most = tl.where(given > most, given, most)
        top = tl.max(most, 0)
        total = tl.zeros((BLOCK,), ACC)
        for j in range(0, C, BLOCK):
            given = tl.load(row + j + at, mask=j + at < C, other=float("-inf")).to(ACC)
            total += exp(given - top)
        sums = tl.sum(total, 0)
        known = (label >= 0) & (label < C)
        right = tl.load(row + label, mask=known, other=float("nan")).to(ACC)
        tl.store(losses + r, log(sums) + (top - right))
        tl.store(stats + 2 * r, top)
        tl.store(stats + 2 * r + 1, 1 / sums)


@triton.jit
def cross_entropy_backward_kernel(
    g, x, labels, stats, dx, C, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of a row."""
    blocks = tl.cdiv(C, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    label = tl.load(labels + r)
    top, share = tl.load(stats + 2 * r), tl.load(stats + 2 * r + 1)
    out = tl.zeros((BLOCK,), ACC)
    if share != 0:  # else the row does not count
        given = tl.load(g + r).to(ACC)
        e = exp(tl.load(x + r * C + at, mask=inside, other=float("-inf")).to(ACC) - top)
        out = e * (given * share) - tl.where(at == label, given, 0)
    tl.store(dx + r * C + at, out, mask=inside)


@triton.jit
def cross_entropy_double_backward_kernel(
    v, g, x, labels, stats, dg, dx, C, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + r)
    at = tl.arange(0, BLOCK)
    top, share = tl.load(stats + 2 * r), tl.load(stats + 2 * r + 1)
    known = (share != 0) & (label >= 0) & (label < C)
    total = tl.zeros((BLOCK,), ACC)
    if known:
        for j in range(0, C, BLOCK):
            inside = j + at < C
            e = exp(tl.load(x + r * C + j + at, mask=inside, other=float("-inf")).to(ACC) - top)
            total += e * tl.load(v + r * C + j + at, mask=inside, other=0).to(ACC)
    mean = tl.sum(total, 0) * share
    right = tl.load(v + r * C + label, mask=known, other=0).to(ACC)
    tl.store(dg + r, tl.where(known, mean - right, 0))
    scale = tl.load(g + r).to(ACC) * share
    for j in range(0, C, BLOCK):
        inside = j + at < C
        out = tl.zeros((BLOCK,), ACC)
        if known:
            e = exp(tl.load(x + r * C + j + at, mask=inside, other=float("-inf")).to(ACC) - top)
            out = scale * (e * (tl.load(v + r * C + j + at, mask=inside, other=0).to(ACC) - mean))
        tl.store(dx + r * C + j + at, out, mask=inside)


def _options(x: Tensor) -> dict:
    block = power_of_2(x.shape[1], _BLOCK)
    return {"ACC": accumulator(x), "BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def cross_entropy(x: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    rows, classes = x.shape
    losses, stats = (
        x.new_empty(*shape, dtype=wide_dtype(x.dtype)) for shape in ((rows,), (rows, 2))
    )
    launch(
        cross_entropy_kernel, rows,
        x, labels, losses, stats, classes, IGNORED=ignored, **_options(x),
    )  # fmt: skip
    return losses, stats


def cross_entropy_backward(g: Tensor, x: Tensor, labels: Tensor, stats: Tensor) -> Tensor:
    rows, classes = x.shape
    dx, options = torch.empty_like(x), _options(x)
    programs = rows * triton.cdiv(classes, options["BLOCK"])
    launch(cross_entropy_backward_kernel, programs, g, x, labels, stats, dx, classes, **options)
    return dx


def cross_entropy_double_backward(
    v: Tensor, g: Tensor, x: Tensor, labels: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    rows, classes = x.shape
    dg, dx = torch.empty_like(g), torch.empty_like(x)
    launch(
        cross_entropy_double_backward_kernel, rows,
        v, g, x, labels, stats, dg, dx, classes, **_options(x),
    )  # fmt: skip
    return dg, dx
