"""Triton kernels of LayerNorm and RMSNorm with gains of each task, ``fastmeta.ops.layer_norm``.

A program holds a row in registers. Gradients of gains and biases are sums over a task's rows: each
program sums up a part of them, in order, and torch adds the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import accumulator, ceil_div, launch, square_root


@triton.jit
def projected(u, h, s, mean, mean_h):
    return s * (u - mean - h * mean_h)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, w, b, y, stats, rows, w_row, b_row, D,
    EPS: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    task = i // rows
    at = tl.arange(0, BD)
    inside = at < D
    row = tl.load(x + i * D + at, mask=inside, other=0).to(ACC)
    mean = tl.sum(row, 0) / D
    if RMS:
        mean = mean * 0
    centred = tl.where(inside, row - mean, 0)
    s = 1 / square_root(tl.sum(centred * centred, 0) / D + EPS)
    out = centred * s * tl.load(w + task * w_row + at, mask=inside, other=0).to(ACC)
    if BIAS:
        out += tl.load(b + task * b_row + at, mask=inside, other=0).to(ACC)
    tl.store(y + i * D + at, out, mask=inside)
    tl.store(stats + 2 * i, mean)
    tl.store(stats + 2 * i + 1, s)


@triton.jit(do_not_specialize=["rows", "parts"])
def layer_norm_backward_kernel(
    dy, x, w, stats, dx, dw, db, rows, parts, w_row, D,
    RMS: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    task, first = unit // parts, unit % parts * ROWS
    at = tl.arange(0, BD)
    inside = at < D
    gain = tl.load(w + task * w_row + at, mask=inside, other=0).to(ACC)
    sum_w, sum_b = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for k in range(first, tl.minimum(first + ROWS, rows)):
        i = task * rows + k
        mean, s = tl.load(stats + 2 * i), tl.load(stats + 2 * i + 1)
        h = tl.where(inside, s * (tl.load(x + i * D + at, mask=inside, other=0).to(ACC) - mean), 0)
        d = tl.load(dy + i * D + at, mask=inside, other=0).to(ACC)
        a = d * gain
        ma, mah = tl.sum(a, 0) / D, tl.sum(a * h, 0) / D
        if RMS:
            ma = ma * 0
        tl.store(dx + i * D + at, projected(a, h, s, ma, mah), mask=inside)
        sum_w += d * h
        sum_b += d
    tl.store(dw + unit * D + at, sum_w, mask=inside)
    tl.store(db + unit * D + at, sum_b, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def layer_norm_double_backward_kernel(
    u, gw, gb, dy, x, w, stats, d_dy, d_x, d_w, rows, parts, gw_row, gb_row, w_row, D,
    RMS: tl.constexpr, U: tl.constexpr, GW: tl.constexpr, GB: tl.constexpr,
    ACC: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See csrc/math/layer_norm.h."""
    unit = tl.program_id(0).to(tl.int64)
    task, first = unit // parts, unit % parts * ROWS
    at = tl.arange(0, BD)
    inside = at < D
    gain = tl.load(w + task * w_row + at, mask=inside, other=0).to(ACC)
    of_w, of_b = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    if GW:
        of_w = tl.load(gw + task * gw_row + at, mask=inside, other=0).to(ACC)
    if GB:
        of_b = tl.load(gb + task * gb_row + at, mask=inside, other=0).to(ACC)
    sum_w = tl.zeros((BD,), ACC)
    for k in range(first, tl.minimum(first + ROWS, rows)):
        i = task * rows + k
        mean, s = tl.load(stats + 2 * i), tl.load(stats + 2 * i + 1)
        h = tl.where(inside, s * (tl.load(x + i * D + at, mask=inside, other=0).to(ACC) - mean), 0)
        d = tl.load(dy + i * D + at, mask=inside, other=0).to(ACC)
        v = tl.zeros((BD,), ACC)
        if U:
            v = tl.load(u + i * D + at, mask=inside, other=0).to(ACC)
        a, c = d * gain, of_w * d
        mu, ma = tl.sum(v, 0) / D, tl.sum(a, 0) / D
        if RMS:
            mu, ma = mu * 0, ma * 0
        muh, mah = tl.sum(v * h, 0) / D, tl.sum(a * h, 0) / D
        q = tl.sum(v * a, 0) / D - mu * ma - muh * mah
        p = projected(v, h, s, mu, muh)
        tl.store(d_dy + i * D + at, gain * p + of_w * h + of_b, mask=inside)
        e = c - s * (v * mah + a * muh)
        me, meh = tl.sum(e, 0) / D, tl.sum(e * h, 0) / D
        if RMS:
            me = me * 0
        tl.store(d_x + i * D + at, projected(e, h, s, me, meh) - s * s * q * h, mask=inside)
        sum_w += d * p
    tl.store(d_w + unit * D + at, sum_w, mask=inside)


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, tuple[int, int], dict]:
    """Tasks, rows of each, parts of so many of them, and what every kernel is told of a row."""
    tasks, width = weight.shape
    rows = x.shape[0] // max(tasks, 1)
    size = triton.next_power_of_2(max(width, 1))
    warps = 8 if size > 2048 else 4 if size > 256 else 1
    some = 8 if rows <= 1024 else 32  # whatever the device; their sums take memory
    return (
        tasks,
        rows,
        (ceil_div(rows, some), some),
        {"ACC": accumulator(x), "BD": size, "num_warps": warps},
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    _, rows, _, row = _shape(x, weight)
    y, stats = torch.empty_like(x), x.new_empty(x.shape[0], 2, dtype=wide_dtype(x.dtype))
    launch(
        layer_norm_kernel, x.shape[0] if x.numel() else 0,
        x, weight, bias, y, stats, rows, weight.stride(0),
        0 if bias is None else bias.stride(0), x.shape[1],
        EPS=eps, RMS=rms, BIAS=bias is not None, **row,
    )  # fmt: skip
    return y, stats


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tasks, rows, (parts, some), row = _shape(x, weight)
    dx = torch.empty_like(x)
    dw, db = (x.new_empty(tasks, parts, x.shape[1], dtype=wide_dtype(x.dtype)) for _ in range(2))
    launch(
        layer_norm_backward_kernel, tasks * parts if x.numel() else 0,
        dy, x, weight, stats, dx, dw, db, rows, parts, weight.stride(0), x.shape[1],
        RMS=rms, ROWS=some, **row,
    )  # fmt: skip
    return dx, dw.sum(1).to(weight.dtype), db.sum(1).to(weight.dtype)


def layer_norm_double_backward(
    u: Tensor | None,
    gw: Tensor | None,
    gb: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tasks, rows, (parts, some), row = _shape(x, weight)
    d_dy, d_x = torch.empty_like(x), torch.empty_like(x)
    d_w = x.new_empty(tasks, parts, x.shape[1], dtype=wide_dtype(x.dtype))
    strides = [0 if g is None else g.stride(0) for g in (gw, gb)]
    launch(
        layer_norm_double_backward_kernel, tasks * parts if x.numel() else 0,
        u, gw, gb, dy, x, weight, stats, d_dy, d_x, d_w, rows, parts, *strides, weight.stride(0),
        x.shape[1], RMS=rms, U=u is not None, GW=gw is not None, GB=gb is not None,
        ROWS=some, **row,
    )  # fmt: skip
    return d_dy, d_x, d_w.sum(1).to(weight.dtype)
