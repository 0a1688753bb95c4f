"""Triton kernels of the LSTM cell that all coordinates share, ``fastmeta.ops._coordinate_lstm``.

A program takes a block of coordinates: inputs, states and the four gates stay in registers, and
the weights, a few kilobytes, in the cache. Weight gradients are summed by programs that each walk
over a strip of blocks, for one gate, and then over the strips: an order that depends on M alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import (
    accumulator,
    ceil_div,
    launch,
    power_of_2,
    sigmoid,
    tanh,
)

_STRIPS = 256  # of coordinates, whose sums are added at last


@triton.jit
def block_of(at, rows, columns, M, C, ACC):
    """A block ``[rows, columns]`` of a tensor ``[M, C]``; zeros outside, or without a tensor."""
    if at is None:
        return tl.zeros((rows.shape[0], columns.shape[0]), ACC)
    else:
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        return tl.load(at + rows[:, None] * C + columns[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def keep(at, value, rows, columns, M, C):
    if at is not None:
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        tl.store(at + rows[:, None] * C + columns[None, :], value, mask=mask)


@triton.jit
def weight_of(w, gate, js, H, C, BC: tl.constexpr, ACC):
    """One gate's rows `js` of a weight ``[4H, C]``, transposed: ``[BC, BJ]``."""
    k = tl.arange(0, BC)
    mask = (k < C)[:, None] & (js < H)[None, :]
    return tl.load(w + (gate * H + js)[None, :] * C + k[:, None], mask=mask, other=0).to(ACC)


@triton.jit
def through(total, x, h, w_ih, w_hh, bias, gate, js, F, H, BF, BH, ACC, PREC):
    """``total + x W_ih^T + h W_hh^T + b`` of a gate's units `js`; what is None is left out."""
    if w_ih is not None:
        if x is not None:
            of_x = weight_of(w_ih, gate, js, H, F, BF, ACC)
            total = tl.dot(x, of_x, total, input_precision=PREC, out_dtype=ACC)
    if w_hh is not None:
        if h is not None:
            of_h = weight_of(w_hh, gate, js, H, H, BH, ACC)
            total = tl.dot(h, of_h, total, input_precision=PREC, out_dtype=ACC)
    if bias is not None:
        total += tl.load(bias + gate * H + js, mask=js < H, other=0).to(ACC)[None, :]
    return total


@triton.jit
def gates_of(x, h, c, w_ih, w_hh, bias, js, F, H, BF, BH, ACC, PREC):
    """i, f, g, o, the new cell state and its tanh."""
    zero = tl.zeros_like(c)
    i = sigmoid(through(zero, x, h, w_ih, w_hh, bias, 0, js, F, H, BF, BH, ACC, PREC))
    f = sigmoid(through(zero, x, h, w_ih, w_hh, bias, 1, js, F, H, BF, BH, ACC, PREC))
    g = tanh(through(zero, x, h, w_ih, w_hh, bias, 2, js, F, H, BF, BH, ACC, PREC))
    o = sigmoid(through(zero, x, h, w_ih, w_hh, bias, 3, js, F, H, BF, BH, ACC, PREC))
    cell = f * c + i * g
    return i, f, g, o, cell, tanh(cell)


@triton.jit
def along(x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, like, gate, js, F, H, BF, BH, ACC, PREC):
    """The derivative of a gate's sums along directions of inputs, states and weights."""
    total = tl.zeros_like(like)
    total = through(total, ux, uh, w_ih, w_hh, None, gate, js, F, H, BF, BH, ACC, PREC)
    return through(total, x, h, uw_ih, uw_hh, ub, gate, js, F, H, BF, BH, ACC, PREC)


@triton.jit
def gradient_of(i, f, g, o, c, t, gh, gc):
    """The gradient to the gates' sums and c, and q, that to the new cell state."""
    q = gc + gh * o * (1 - t * t)
    di = q * g * i * (1 - i)
    df = q * c * f * (1 - f)
    dg = q * i * (1 - g * g)
    do = gh * t * o * (1 - o)
    return di, df, dg, do, q * f, q


@triton.jit
def second_of(i, f, g, o, c, t, gh, q, ai, af, ag, ao, uc):
    """That gradient's derivative along directions, and those of h and the cell state."""
    ii, ff, gg, oo, tt = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o), 1 - t * t
    di, df, dg, do = ii * ai, ff * af, gg * ag, oo * ao
    d_cell = df * c + f * uc + di * g + i * dg
    dt = tt * d_cell
    dh = do * t + o * dt
    dq = gh * (do * tt - 2 * o * t * dt)
    si = dq * g * ii + q * (dg * ii + g * di * (1 - 2 * i))
    sf = dq * c * ff + q * (uc * ff + c * df * (1 - 2 * f))
    sg = dq * i * gg + q * (di * gg - 2 * i * g * dg)
    so = gh * (dt * oo + t * do * (1 - 2 * o))
    return si, sf, sg, so, dq * f + q * df, dh, d_cell


@triton.jit
def back_of(total, d, w, gate, js, H, C, BC, ACC, PREC):
    """``total`` plus one gate's gradient of units `js` times their rows of a weight."""
    rows_of_w = tl.trans(weight_of(w, gate, js, H, C, BC, ACC))
    return tl.dot(d, rows_of_w, total, input_precision=PREC, out_dtype=ACC)


@triton.jit
def back(total, di, df, dg, do, w, js, H, C, BC, ACC, PREC):
    """``total`` plus that of all gates, ``[rows, BC]``."""
    total = back_of(total, di, w, 0, js, H, C, BC, ACC, PREC)
    total = back_of(total, df, w, 1, js, H, C, BC, ACC, PREC)
    total = back_of(total, dg, w, 2, js, H, C, BC, ACC, PREC)
    return back_of(total, do, w, 3, js, H, C, BC, ACC, PREC)


@triton.jit(do_not_specialize=["M"])
def cell_kernel(
    x, h, c, w_ih, w_hh, bias, new_h, new_c, M, F, H,
    ACC: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    x_b = block_of(x, rows, tl.arange(0, BF), M, F, ACC)
    h_b = block_of(h, rows, tl.arange(0, BH), M, H, ACC)
    for first in tl.range(0, H, BJ, num_stages=1):
        js = first + tl.arange(0, BJ)
        c_b = block_of(c, rows, js, M, H, ACC)
        _, _, _, o, cell, t = gates_of(x_b, h_b, c_b, w_ih, w_hh, bias, js, F, H, BF, BH, ACC, PREC)
        keep(new_c, cell, rows, js, M, H)
        keep(new_h, o * t, rows, js, M, H)


@triton.jit
def second_parts(
    x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, i, f, g, o, c, t, gh, q, uc,
    js, F, H, BF, BH, ACC, PREC,
):  # fmt: skip
    """`second_of` along the directions of everything."""
    ai = along(x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, c, 0, js, F, H, BF, BH, ACC, PREC)
    af = along(x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, c, 1, js, F, H, BF, BH, ACC, PREC)
    ag = along(x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, c, 2, js, F, H, BF, BH, ACC, PREC)
    ao = along(x, h, ux, uh, w_ih, w_hh, uw_ih, uw_hh, ub, c, 3, js, F, H, BF, BH, ACC, PREC)
    return second_of(i, f, g, o, c, t, gh, q, ai, af, ag, ao, uc)


@triton.jit(do_not_specialize=["M"])
def gradient_kernel(
    ux, uh, uc, uw_ih, uw_hh, ub, gh, gc, x, h, c, w_ih, w_hh, bias,
    dgh, dgc, dx, dh, dc, M, F, H,
    SECOND: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's inputs and states, or with directions u their derivative."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    fs, hs = tl.arange(0, BF), tl.arange(0, BH)
    x_b, h_b = block_of(x, rows, fs, M, F, ACC), block_of(h, rows, hs, M, H, ACC)
    ux_b = block_of(ux, rows, fs, M, F, ACC) if ux is not None else None
    uh_b = block_of(uh, rows, hs, M, H, ACC) if uh is not None else None
    of_x, of_h = tl.zeros((BM, BF), ACC), tl.zeros((BM, BH), ACC)
    for first in tl.range(0, H, BJ, num_stages=1):
        js = first + tl.arange(0, BJ)
        c_b, gh_b = block_of(c, rows, js, M, H, ACC), block_of(gh, rows, js, M, H, ACC)
        gc_b = block_of(gc, rows, js, M, H, ACC)
        i, f, g, o, _, t = gates_of(x_b, h_b, c_b, w_ih, w_hh, bias, js, F, H, BF, BH, ACC, PREC)
        di, df, dg, do, d_c, q = gradient_of(i, f, g, o, c_b, t, gh_b, gc_b)
        if SECOND:
            if uw_ih is not None:
                of_x = back(of_x, di, df, dg, do, uw_ih, js, H, F, BF, ACC, PREC)
            if uw_hh is not None:
                of_h = back(of_h, di, df, dg, do, uw_hh, js, H, H, BH, ACC, PREC)
            di, df, dg, do, d_c, d_h, d_cell = second_parts(
                x_b, h_b, ux_b, uh_b, w_ih, w_hh, uw_ih, uw_hh, ub, i, f, g, o, c_b, t, gh_b, q,
                block_of(uc, rows, js, M, H, ACC), js, F, H, BF, BH, ACC, PREC,
            )  # fmt: skip
            keep(dgh, d_h, rows, js, M, H)
            keep(dgc, d_cell, rows, js, M, H)
        keep(dc, d_c, rows, js, M, H)
        if dx is not None:
            of_x = back(of_x, di, df, dg, do, w_ih, js, H, F, BF, ACC, PREC)
        if dh is not None:
            of_h = back(of_h, di, df, dg, do, w_hh, js, H, H, BH, ACC, PREC)
    keep(dx, of_x, rows, fs, M, F)
    keep(dh, of_h, rows, hs, M, H)


@triton.jit
def outer(total, d, x, PREC):
    """``total [BJ, C] + d^T x``."""
    return tl.dot(tl.trans(d), x, total, input_precision=PREC, out_dtype=total.dtype)


@triton.jit
def keep_weights(out, of_x, of_h, of_one, gate, js, F, H, BF, BH):
    """One gate's rows `js` of ``[4H, F + H + 1]``."""
    fs, hs = tl.arange(0, BF), tl.arange(0, BH)
    at, known = out + (gate * H + js) * (F + H + 1), (js < H)[:, None]
    tl.store(at[:, None] + fs[None, :], of_x, mask=known & (fs < F)[None, :])
    tl.store(at[:, None] + F + hs[None, :], of_h, mask=known & (hs < H)[None, :])
    tl.store(at + F + H, of_one, mask=js < H)


@triton.jit(do_not_specialize=["M", "blocks"])
def weights_kernel(
    ux, uh, uc, uw_ih, uw_hh, ub, gh, gc, x, h, c, w_ih, w_hh, bias, out, M, F, H, blocks,
    SECOND: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A few units' weight gradients over a strip of blocks: ``out [strips, 4H, F + H + 1]``."""
    groups = tl.cdiv(H, BJ)
    strip = tl.program_id(0) // groups
    js = tl.program_id(0) % groups * BJ + tl.arange(0, BJ)
    fs, hs = tl.arange(0, BF), tl.arange(0, BH)
    xi, hi = tl.zeros((BJ, BF), ACC), tl.zeros((BJ, BH), ACC)
    xf, hf, xg, hg, xo, ho = xi, hi, xi, hi, xi, hi
    bi = tl.zeros((BJ,), ACC)
    bf, bg, bo = bi, bi, bi
    for block in tl.range(strip * blocks, (strip + 1) * blocks, num_stages=1):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        x_b, h_b = block_of(x, rows, fs, M, F, ACC), block_of(h, rows, hs, M, H, ACC)
        c_b, gh_b = block_of(c, rows, js, M, H, ACC), block_of(gh, rows, js, M, H, ACC)
        gc_b = block_of(gc, rows, js, M, H, ACC)
        i, f, g, o, _, t = gates_of(x_b, h_b, c_b, w_ih, w_hh, bias, js, F, H, BF, BH, ACC, PREC)
        di, df, dg, do, _, q = gradient_of(i, f, g, o, c_b, t, gh_b, gc_b)
        if SECOND:
            ux_b = block_of(ux, rows, fs, M, F, ACC) if ux is not None else None
            uh_b = block_of(uh, rows, hs, M, H, ACC) if uh is not None else None
            if ux is not None:
                xi, xf = outer(xi, di, ux_b, PREC), outer(xf, df, ux_b, PREC)
                xg, xo = outer(xg, dg, ux_b, PREC), outer(xo, do, ux_b, PREC)
            if uh is not None:
                hi, hf = outer(hi, di, uh_b, PREC), outer(hf, df, uh_b, PREC)
                hg, ho = outer(hg, dg, uh_b, PREC), outer(ho, do, uh_b, PREC)
            di, df, dg, do, _, _, _ = second_parts(
                x_b, h_b, ux_b, uh_b, w_ih, w_hh, uw_ih, uw_hh, ub, i, f, g, o, c_b, t, gh_b, q,
                block_of(uc, rows, js, M, H, ACC), js, F, H, BF, BH, ACC, PREC,
            )  # fmt: skip
        xi, xf = outer(xi, di, x_b, PREC), outer(xf, df, x_b, PREC)
        xg, xo = outer(xg, dg, x_b, PREC), outer(xo, do, x_b, PREC)
        hi, hf = outer(hi, di, h_b, PREC), outer(hf, df, h_b, PREC)
        hg, ho = outer(hg, dg, h_b, PREC), outer(ho, do, h_b, PREC)
        bi += tl.sum(di, 0)
        bf += tl.sum(df, 0)
        bg += tl.sum(dg, 0)
        bo += tl.sum(do, 0)
    out += strip.to(tl.int64) * 4 * H * (F + H + 1)
    keep_weights(out, xi, hi, bi, 0, js, F, H, BF, BH)
    keep_weights(out, xf, hf, bf, 1, js, F, H, BF, BH)
    keep_weights(out, xg, hg, bg, 2, js, F, H, BF, BH)
    keep_weights(out, xo, ho, bo, 3, js, F, H, BF, BH)


_UNITS = 16  # whose gates are in registers at once


def _settings(x: Tensor, h: Tensor) -> dict:
    """Precision and sizes of a launch."""
    acc = accumulator(x)
    wide = acc == tl.float64
    return {
        "ACC": acc,
        "PREC": "ieee" if wide else "tf32x3",
        "BM": 32 if wide else 64,
        "BF": power_of_2(max(x.shape[1], 16), 1 << 16),
        "BH": power_of_2(max(h.shape[1], 16), 1 << 16),
        "BJ": _UNITS,
        "num_warps": 8,
    }


def coordinate_lstm(x, h, c, w_ih, w_hh, bias) -> tuple[Tensor, Tensor]:
    """``h'`` and ``c'``."""
    new_h, new_c = torch.empty_like(h), torch.empty_like(c)
    if h.numel():
        options = _settings(x, h)
        launch(
            cell_kernel, ceil_div(h.shape[0], options["BM"]),
            x, h, c, w_ih, w_hh, bias, new_h, new_c, h.shape[0], x.shape[1], h.shape[1], **options,
        )  # fmt: skip
    return new_h, new_c


def _derivative(directions, gh, gc, x, h, c, w_ih, w_hh, bias, needs, second: bool):
    """Wanted derivatives to gh, gc, x, h, c, w_ih, w_hh and bias: the bits 16, 1, 2, 4 and 8."""
    (rows, features), hidden = x.shape, h.shape[1]

    def wanted(bit: int, like: Tensor) -> Tensor | None:
        return like.new_empty(like.shape) if needs & bit else None

    found = [wanted(16, h), wanted(16, h), wanted(1, x), wanted(2, h), wanted(4, c)]
    given = (*directions, gh, gc, x, h, c, w_ih, w_hh, bias)
    options = _settings(x, h) | {"SECOND": second}
    blocks = ceil_div(rows, options["BM"])
    there = [t for t in found if t is not None]
    if h.numel() == 0:
        for t in there:
            t.zero_()
    elif there:
        launch(gradient_kernel, blocks, *given, *found, rows, features, hidden, **options)
    weights = [x.new_empty(0)] * 3
    if needs & 8:
        per_strip = max(ceil_div(blocks, _STRIPS), 1)
        strips = ceil_div(blocks, per_strip)
        wide = wide_dtype(x.dtype)
        parts = x.new_empty(strips, 4 * hidden, features + hidden + 1, dtype=wide)
        if parts.numel():
            launch(
                weights_kernel, strips * ceil_div(hidden, _UNITS),
                *given, parts, rows, features, hidden, per_strip, **options,
            )  # fmt: skip
        sums = parts.sum(0).to(x.dtype)
        weights = [t.contiguous() for t in sums.split([features, hidden, 1], dim=1)]
        weights[2] = weights[2].flatten()
    return (*(x.new_empty(0) if t is None else t for t in found), *weights)


def coordinate_lstm_backward(gh, gc, x, h, c, w_ih, w_hh, bias, needs) -> tuple[Tensor, ...]:
    """Gradients of x, h, c, w_ih, w_hh and bias."""
    none = (None,) * 6
    return _derivative(none, gh, gc, x, h, c, w_ih, w_hh, bias, needs & 15, False)[2:]


def coordinate_lstm_double_backward(
    ux, uh, uc, uw_ih, uw_hh, ub, gh, gc, x, h, c, w_ih, w_hh, bias, needs
) -> tuple[Tensor, ...]:
    """Derivatives of ``<u, gradient>`` to gh, gc, x, h, c, w_ih, w_hh and bias."""
    directions = (ux, uh, uc, uw_ih, uw_hh, ub)
    return _derivative(directions, gh, gc, x, h, c, w_ih, w_hh, bias, needs, True)
