"""The derivative of attention's gradients: of ``a dq + b dk + c dv`` in d_out, q, k and v.

Shapes as in ``attention.py``; ``a [B, H, Lq, D]``, ``b [B, Hk, Lk, D]``, ``c [B, Hk, Lk, E]``, each
may be missing. With weights p, their gradient dp, the cotangent g of the scores' gradient and r of
the weights, all but p dropped: ``h = p (g - mean g)`` is the cotangent of dp and ``w = p (u - mean
u)`` that of the scores, for ``u = dp (g - mean g) - g mean dp + r`` and means weighted by p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.kernels._common import ceil_div, launch
from fastmeta.kernels.attention import (
    VARYING,
    check_padded,
    constants_of,
    fits,
    key_range,
    laid_out_as,
    numbers,
    product,
    put_tile,
    readable,
    sizes,
    stats_of,
    steps,
    there,
    tile_of,
    weights_of,
)


@triton.jit
def parts_of(
    q, d_out, a, k, v, k_cotangent, v_cotangent, keep, scale: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dp, g and r of a tile; A, B and C say which cotangents are there."""
    dp = product(d_out, tl.trans(v), PREC, ACC) * keep
    g, r = tl.zeros(dp.shape, ACC), tl.zeros(dp.shape, ACC)
    if A:
        g += product(a, tl.trans(k), PREC, ACC)
    if B:
        g += product(q, tl.trans(k_cotangent), PREC, ACC)
    if C:
        r += product(d_out, tl.trans(v_cotangent), PREC, ACC) * keep
    return dp, g * scale, r


@triton.jit
def combined(p, dp, g, r, dp_mean, g_mean, u_mean):
    """The gradient of the scores, and the cotangents of dp and of the scores."""
    centred = g - g_mean[:, None]
    u = dp * centred - dp_mean[:, None] * g + r
    return p * (dp - dp_mean[:, None]), p * centred, p * (u - u_mean[:, None])


@triton.jit
def optional_tile(
    at, like, rows, columns, row_step, ROWS, WIDTH, THERE: tl.constexpr, ACC: tl.constexpr
):
    """`tile_of`, or `like` for a tensor that is not there and that nothing will read."""
    if THERE:
        return tile_of(at, rows, columns, row_step, ROWS, WIDTH, ACC)
    else:
        return like


@triton.jit(do_not_specialize=[*VARYING, "ROWS"])
def second_rows_kernel(
    a_at, b_at, c_at, d_out_at, q_at, k_at, v_at, stats_at, mask_at, seed_at, means_at,
    dd_at, dq_at, dk_at, dv_at,
    H, GROUP, LQ, LK, a_b, a_h, a_l, b_b, b_h, b_l, c_b, c_h, c_l,
    d_b, d_h, d_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    dd_b, dd_h, dd_l, dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    m_b, m_h, m_l, m_k, lower, upper, dropped, period, BLOCKS, ROWS,
    scale: tl.constexpr, factor: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BOOLEAN: tl.constexpr, WHOLE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a block of queries receives, and the means ``[3, B, H, Lq]`` of its rows; what keys
    receive too where the block and one tile of keys are the WHOLE head."""
    A: tl.constexpr = a_at is not None
    B: tl.constexpr = b_at is not None
    C: tl.constexpr = c_at is not None
    program = tl.program_id(0)
    head = program // BLOCKS
    batch, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    group = h // GROUP
    first, rows = program % BLOCKS * BM, tl.cast(ROWS, tl.int64)
    i = first + tl.arange(0, BM)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k_at += batch * k_b + group * k_h
    v_at += batch * v_b + group * v_h
    if A:
        a_at += batch * a_b + h * a_h
    if B:
        b_at += batch * b_b + group * b_h
    if C:
        c_at += batch * c_b + group * c_h
    if mask_at is not None:
        mask_at += batch * m_b + h * m_h
    q = tile_of(q_at + batch * q_b + h * q_h, i, d, q_l, LQ, D, ACC)
    d_out = tile_of(d_out_at + batch * d_b + h * d_h, i, e, d_l, LQ, E, ACC)
    a = optional_tile(a_at, q, i, d, a_l, LQ, D, A, ACC)
    row = head.to(tl.int64) * LQ
    top, share = stats_of(stats_at, row, i, LQ)
    if WHOLE:
        j = tl.arange(0, BN)
        k = tile_of(k_at, j, d, k_l, LK, D, ACC)
        v = tile_of(v_at, j, e, v_l, LK, E, ACC)
        kc = optional_tile(b_at, k, j, d, b_l, LK, D, B, ACC)
        vc = optional_tile(c_at, v, j, e, c_l, LK, E, C, ACC)
        p, keep = weights_of(
            q, k, top, share, mask_at, seed_at, m_l, m_k, batch, h, i, j, LQ, LK, scale, lower,
            upper, dropped, factor, period, BOOLEAN, PREC, ACC,
        )  # fmt: skip
        dp, g, r = parts_of(q, d_out, a, k, v, kc, vc, keep, scale, A, B, C, PREC, ACC)
        dp_mean, g_mean = tl.sum(p * dp, 1), tl.sum(p * g, 1)
        u_mean = tl.sum(p * (dp * g + r), 1) - 2 * dp_mean * g_mean
        ds, hs, ws = combined(p, dp, g, r, dp_mean, g_mean, u_mean)
        hs, kept_p = hs * keep, p * keep
        if dd_at is not None:
            dd = product(hs, v, PREC, ACC)
            if C:
                dd += product(kept_p, vc, PREC, ACC)
            put_tile(dd_at + batch * dd_b + h * dd_h, dd, i, e, dd_l, LQ, E)
        if dq_at is not None:
            dq = product(ws, k, PREC, ACC)
            if B:
                dq += product(ds, kc, PREC, ACC)
            put_tile(dq_at + batch * dq_b + h * dq_h, dq * scale, i, d, dq_l, LQ, D)
        if dk_at is not None:
            dk = product(tl.trans(ws), q, PREC, ACC)
            if A:
                dk += product(tl.trans(ds), a, PREC, ACC)
            put_tile(dk_at + batch * dk_b + h * dk_h, dk * scale, j, d, dk_l, LK, D)
        if dv_at is not None:
            dv = product(tl.trans(hs), d_out, PREC, ACC)
            put_tile(dv_at + batch * dv_b + h * dv_h, dv, j, e, dv_l, LK, E)
    else:
        start, end = key_range(first, first + BM - 1, lower, upper, LK, BN)
        dp_mean, g_mean = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC)
        u_mean = tl.zeros((BM,), ACC)
        for at in range(start, end, BN):
            j = at + tl.arange(0, BN)
            k = tile_of(k_at, j, d, k_l, LK, D, ACC)
            v = tile_of(v_at, j, e, v_l, LK, E, ACC)
            kc = optional_tile(b_at, k, j, d, b_l, LK, D, B, ACC)
            vc = optional_tile(c_at, v, j, e, c_l, LK, E, C, ACC)
            p, keep = weights_of(
                q, k, top, share, mask_at, seed_at, m_l, m_k, batch, h, i, j, LQ, LK, scale, lower,
                upper, dropped, factor, period, BOOLEAN, PREC, ACC,
            )  # fmt: skip
            dp, g, r = parts_of(q, d_out, a, k, v, kc, vc, keep, scale, A, B, C, PREC, ACC)
            dp_mean += tl.sum(p * dp, 1)
            g_mean += tl.sum(p * g, 1)
            u_mean += tl.sum(p * (dp * g + r), 1)
        u_mean -= 2 * dp_mean * g_mean
        tl.store(means_at + row + i, dp_mean, mask=i < LQ)
        tl.store(means_at + rows + row + i, g_mean, mask=i < LQ)
        tl.store(means_at + 2 * rows + row + i, u_mean, mask=i < LQ)
        dd, dq = tl.zeros((BM, BE), ACC), tl.zeros((BM, BD), ACC)
        for at in range(start, end, BN):
            j = at + tl.arange(0, BN)
            k = tile_of(k_at, j, d, k_l, LK, D, ACC)
            v = tile_of(v_at, j, e, v_l, LK, E, ACC)
            kc = optional_tile(b_at, k, j, d, b_l, LK, D, B, ACC)
            vc = optional_tile(c_at, v, j, e, c_l, LK, E, C, ACC)
            p, keep = weights_of(
                q, k, top, share, mask_at, seed_at, m_l, m_k, batch, h, i, j, LQ, LK, scale, lower,
                upper, dropped, factor, period, BOOLEAN, PREC, ACC,
            )  # fmt: skip
            dp, g, r = parts_of(q, d_out, a, k, v, kc, vc, keep, scale, A, B, C, PREC, ACC)
            ds, hs, ws = combined(p, dp, g, r, dp_mean, g_mean, u_mean)
            dd += product(hs * keep, v, PREC, ACC)
            dq += product(ws, k, PREC, ACC)
            if C:
                dd += product(p * keep, vc, PREC, ACC)
            if B:
                dq += product(ds, kc, PREC, ACC)
        if dd_at is not None:
            put_tile(dd_at + batch * dd_b + h * dd_h, dd, i, e, dd_l, LQ, E)
        if dq_at is not None:
            put_tile(dq_at + batch * dq_b + h * dq_h, dq * scale, i, d, dq_l, LQ, D)


@triton.jit(do_not_specialize=[*VARYING, "ROWS"])
def second_keys_kernel(
    a_at, b_at, c_at, d_out_at, q_at, k_at, v_at, stats_at, mask_at, seed_at, means_at,
    dk_at, dv_at,
    H, GROUP, LQ, LK, a_b, a_h, a_l, b_b, b_h, b_l, c_b, c_h, c_l,
    d_b, d_h, d_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    m_b, m_h, m_l, m_k, lower, upper, dropped, period, BLOCKS, ROWS,
    scale: tl.constexpr, factor: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BOOLEAN: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from the queries of the heads that share it."""
    A: tl.constexpr = a_at is not None
    B: tl.constexpr = b_at is not None
    C: tl.constexpr = c_at is not None
    program = tl.program_id(0)
    head = program // BLOCKS
    groups = H // GROUP
    batch, group = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    first, rows = program % BLOCKS * BN, tl.cast(ROWS, tl.int64)
    j = first + tl.arange(0, BN)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k = tile_of(k_at + batch * k_b + group * k_h, j, d, k_l, LK, D, ACC)
    v = tile_of(v_at + batch * v_b + group * v_h, j, e, v_l, LK, E, ACC)
    if B:
        b_at += batch * b_b + group * b_h
    if C:
        c_at += batch * c_b + group * c_h
    kc = optional_tile(b_at, k, j, d, b_l, LK, D, B, ACC)
    vc = optional_tile(c_at, v, j, e, c_l, LK, E, C, ACC)
    dk, dv = tl.zeros((BN, BD), ACC), tl.zeros((BN, BE), ACC)
    start = tl.maximum(first - upper, 0) // BM * BM
    end = tl.minimum(first + BN - lower, LQ)
    for one in range(0, GROUP):
        h = group * GROUP + one
        row = (batch * H + h) * LQ
        m_at, given_at = mask_at, a_at
        if mask_at is not None:
            m_at += batch * m_b + h * m_h
        if A:
            given_at += batch * a_b + h * a_h
        for at in range(start, end, BM):
            i = at + tl.arange(0, BM)
            q = tile_of(q_at + batch * q_b + h * q_h, i, d, q_l, LQ, D, ACC)
            d_out = tile_of(d_out_at + batch * d_b + h * d_h, i, e, d_l, LQ, E, ACC)
            a = optional_tile(given_at, q, i, d, a_l, LQ, D, A, ACC)
            top, share = stats_of(stats_at, row, i, LQ)
            dp_mean = tl.load(means_at + row + i, mask=i < LQ, other=0.0)
            g_mean = tl.load(means_at + rows + row + i, mask=i < LQ, other=0.0)
            u_mean = tl.load(means_at + 2 * rows + row + i, mask=i < LQ, other=0.0)
            p, keep = weights_of(
                q, k, top, share, m_at, seed_at, m_l, m_k, batch, h, i, j, LQ, LK, scale, lower,
                upper, dropped, factor, period, BOOLEAN, PREC, ACC,
            )  # fmt: skip
            dp, g, r = parts_of(q, d_out, a, k, v, kc, vc, keep, scale, A, B, C, PREC, ACC)
            ds, hs, ws = combined(p, dp, g, r, dp_mean, g_mean, u_mean)
            dk += product(tl.trans(ws), q, PREC, ACC)
            if A:
                dk += product(tl.trans(ds), a, PREC, ACC)
            dv += product(tl.trans(hs * keep), d_out, PREC, ACC)
    if dk_at is not None:
        put_tile(dk_at + batch * dk_b + group * dk_h, dk * scale, j, d, dk_l, LK, D)
    if dv_at is not None:
        put_tile(dv_at + batch * dv_b + group * dv_h, dv, j, e, dv_l, LK, E)


# As in `attention.py`: tiles that are a head, and those of the kernels that own queries and keys.
WHOLE_HEADS = {32: (32, 32), 64: (16, 16)}
OF_QUERIES = {64: (16, 32)}
OF_KEYS = {32: (16, 16), 64: (16, 32)}


def attention_double_backward(
    a,
    b,
    c,
    d_out,
    q,
    k,
    v,
    stats,
    mask,
    seed,
    places,
    scale,
    lower,
    upper,
    dropout_p,
    period,
    needs,
):
    check_padded(places)
    mask = readable(mask, q)
    dd, dq, dk, dv = (
        laid_out_as(t, t.shape[3], needs >> i & 1) for i, t in enumerate((d_out, q, k, v))
    )

    def constants_for(tiles: dict[int, tuple[int, int]]) -> dict:
        found = constants_of(q, v, mask, k.shape[2], scale, dropout_p, tiles)
        # what a whole head, and wider heads, hold leaves no registers for products in parts
        parts = tiles is not WHOLE_HEADS and max(found["BD"], found["BE"]) <= 64
        return found if parts else found | {"PREC": "ieee"}

    constants = constants_for(WHOLE_HEADS)
    whole = fits(q, k, constants)
    if not whole:
        constants = constants_for(OF_QUERIES)
    setting = numbers(mask, lower, upper, dropout_p, period)
    means = stats.new_empty(3, *q.shape[:3])
    given = (a, b, c, d_out, q, k, v, stats, mask, seed, means)
    strided = (a, b, c, d_out, q, k, v)
    blocks = ceil_div(q.shape[2], constants["BM"])
    launch(
        second_rows_kernel,
        q.shape[0] * q.shape[1] * blocks,
        *(*given, there(dd), there(dq), there(dk), there(dv)),
        *sizes(q, k),
        *steps(*strided, dd, dq, dk, dv),
        *setting,
        *(blocks, means[0].numel()),
        WHOLE=whole,
        **constants,
    )
    if needs & 12 and not whole:
        constants = constants_for(OF_KEYS)
        blocks = ceil_div(k.shape[2], constants["BN"])
        launch(
            second_keys_kernel,
            k.shape[0] * k.shape[1] * blocks,
            *(*given, there(dk), there(dv)),
            *sizes(q, k),
            *steps(*strided, dk, dv),
            *setting,
            *(blocks, means[0].numel()),
            **constants,
        )
    return dd, dq, dk, dv
