"""Attention: results, gradients and the derivative of those, the weights rebuilt tile by tile.

Shapes: ``q, d_out [B, H, Lq, .]``, ``k, v [B, Hk, Lk, .]``, ``stats [B, H, Lq, 2]``. A program
owns a block of queries (or of keys, for what keys receive) and walks over the others in a fixed
order, so that two runs are bit-equal. Where one tile holds a whole head, one program does it all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import (
    INTERPRETED,
    accumulator,
    ceil_div,
    dropped_words,
    exp,
    launch,
    mixed,
    multiplies_64_rows,
    power_of_2,
)

# What differs from batch to batch: kernels are not compiled again for it.
VARYING = ["LQ", "LK", "m_b", "m_h", "m_l", "lower", "upper", "dropped", "period", "BLOCKS"]


@triton.jit
def kept(seed_at, b, h, i, j, dropped, factor: tl.constexpr, period, ACC: tl.constexpr):
    """Factors of dropout of a tile: 0 or ``1 / (1 - p)``."""
    seed = tl.load(seed_at)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word = mixed(mixed(low ^ (b % period).to(tl.uint32)) + high)
    word = mixed(mixed(word ^ h.to(tl.uint32)) + i.to(tl.uint32))
    word = mixed(word[:, None] + (j.to(tl.uint32) * 0x9E3779B9)[None, :])
    return (word.to(tl.int64) >= dropped).to(ACC) * factor


@triton.jit
def tile_of(at, rows, columns, row_step, ROWS, WIDTH, ACC: tl.constexpr):
    """``[rows, columns]`` of a matrix with adjacent columns, zeros outside of it."""
    inside = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_step + columns[None, :]
    return tl.load(at + offsets, mask=inside, other=0.0).to(ACC)


@triton.jit
def put_tile(at, value, rows, columns, row_step, ROWS, WIDTH):
    inside = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_step + columns[None, :]
    tl.store(at + offsets, value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def product(x, y, PREC: tl.constexpr, ACC: tl.constexpr):
    """``x y`` with the digits of float32, which second derivatives need: by fused multiply-adds, or
    on tensor cores as three products of TF32."""
    return tl.dot(x, y, input_precision=PREC, out_dtype=ACC)


@triton.jit
def scores_of(
    q, k, mask_at, mask_row, mask_column, i, j, LQ, LK, scale: tl.constexpr, lower, upper,
    BOOLEAN: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``scale q k^T`` and what a mask adds, -inf where a key is not attended."""
    s = product(q, tl.trans(k), PREC, ACC) * scale
    ahead = j[None, :] - i[:, None]
    inside = (i < LQ)[:, None] & (j < LK)[None, :]
    attended = inside & (ahead >= lower) & (ahead <= upper)
    if mask_at is not None:
        offsets = i.to(tl.int64)[:, None] * mask_row + j.to(tl.int64)[None, :] * mask_column
        if BOOLEAN:
            attended = attended & (tl.load(mask_at + offsets, mask=inside, other=0) != 0)
        else:
            s += tl.load(mask_at + offsets, mask=inside, other=0.0).to(ACC)
    return tl.where(attended, s, float("-inf"))


@triton.jit
def key_range(first, last, lower, upper, LK, BN: tl.constexpr):
    """Which keys queries first..last attend, in whole tiles: start and end."""
    start = tl.maximum(first + lower, 0) // BN * BN
    return start, tl.minimum(last + upper + 1, LK)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_at, k_at, v_at, mask_at, seed_at, out_at, stats_at,
    H, GROUP, LQ, LK, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l,
    m_b, m_h, m_l, m_k, lower, upper, dropped, period, BLOCKS,
    scale: tl.constexpr, factor: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BOOLEAN: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = program % BLOCKS * BM + tl.arange(0, BM)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k_at += b * k_b + h // GROUP * k_h
    v_at += b * v_b + h // GROUP * v_h
    if mask_at is not None:
        mask_at += b * m_b + h * m_h
    q = tile_of(q_at + b * q_b + h * q_h, i, d, q_l, LQ, D, ACC)
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    out = tl.zeros((BM, BE), ACC)
    start, end = key_range(
        program % BLOCKS * BM, program % BLOCKS * BM + BM - 1, lower, upper, LK, BN
    )
    for at in range(start, end, BN):
        j = at + tl.arange(0, BN)
        k = tile_of(k_at, j, d, k_l, LK, D, ACC)
        s = scores_of(
            q, k, mask_at, m_l, m_k, i, j, LQ, LK, scale, lower, upper, BOOLEAN, PREC, ACC
        )
        above = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        p = exp(s - shift[:, None])
        shrink = exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        if seed_at is not None:
            p *= kept(seed_at, b, h, i, j, dropped, factor, period, ACC)
        v = tile_of(v_at, j, e, v_l, LK, E, ACC)
        out = out * shrink[:, None] + product(p, v, PREC, ACC)
        top = above
    empty = total == 0
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    out = out * share[:, None]
    put_tile(out_at + b * o_b + h * o_h, out, i, e, o_l, LQ, E)
    stats_at += 2 * (head.to(tl.int64) * LQ + i)
    tl.store(stats_at, tl.where(empty, 0.0, top), mask=i < LQ)
    tl.store(stats_at + 1, share, mask=i < LQ)


@triton.jit
def stats_of(at, row, i, LQ):
    """Of rows ``row + i``: the largest score, and what ``exp(score - it)`` is multiplied with. As
    one number they would lose all digits where a mask adds a large negative number to a row."""
    at += 2 * (row + i)
    return tl.load(at, mask=i < LQ, other=0.0), tl.load(at + 1, mask=i < LQ, other=0.0)


@triton.jit
def weights_of(
    q, k, top, share, mask_at, seed_at, m_l, m_k, b, h, i, j, LQ, LK, scale: tl.constexpr, lower,
    upper, dropped, factor: tl.constexpr, period, BOOLEAN: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Weights of a tile and the factors of dropout."""
    s = scores_of(q, k, mask_at, m_l, m_k, i, j, LQ, LK, scale, lower, upper, BOOLEAN, PREC, ACC)
    p = exp(s - top[:, None]) * share[:, None]
    if seed_at is not None:
        keep = kept(seed_at, b, h, i, j, dropped, factor, period, ACC)
    else:
        keep = tl.full(p.shape, 1.0, ACC)
    return p, keep


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    d_out_at, q_at, k_at, v_at, stats_at, mask_at, seed_at, delta_at, dq_at, dk_at, dv_at,
    H, GROUP, LQ, LK, d_b, d_h, d_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    m_b, m_h, m_l, m_k, lower, upper, dropped, period, BLOCKS,
    scale: tl.constexpr, factor: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BOOLEAN: tl.constexpr, WHOLE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and the mean gradient ``delta`` of their weights; dk and dv too
    where the block and one tile of keys are the WHOLE head."""
    program = tl.program_id(0)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = program % BLOCKS * BM + tl.arange(0, BM)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k_at += b * k_b + h // GROUP * k_h
    v_at += b * v_b + h // GROUP * v_h
    if mask_at is not None:
        mask_at += b * m_b + h * m_h
    q = tile_of(q_at + b * q_b + h * q_h, i, d, q_l, LQ, D, ACC)
    d_out = tile_of(d_out_at + b * d_b + h * d_h, i, e, d_l, LQ, E, ACC)
    top, share = stats_of(stats_at, head.to(tl.int64) * LQ, i, LQ)
    if WHOLE:
        j = tl.arange(0, BN)
        k = tile_of(k_at, j, d, k_l, LK, D, ACC)
        v = tile_of(v_at, j, e, v_l, LK, E, ACC)
        p, keep = weights_of(
            q, k, top, share, mask_at, seed_at, m_l, m_k, b, h, i, j, LQ, LK, scale, lower, upper,
            dropped, factor, period, BOOLEAN, PREC, ACC,
        )  # fmt: skip
        dp = product(d_out, tl.trans(v), PREC, ACC) * keep
        ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
        if dq_at is not None:
            put_tile(dq_at + b * dq_b + h * dq_h, product(ds, k, PREC, ACC), i, d, dq_l, LQ, D)
        if dk_at is not None:
            dk = product(tl.trans(ds), q, PREC, ACC)
            put_tile(dk_at + b * dk_b + h * dk_h, dk, j, d, dk_l, LK, D)
        if dv_at is not None:
            dv = product(tl.trans(p * keep), d_out, PREC, ACC)
            put_tile(dv_at + b * dv_b + h * dv_h, dv, j, e, dv_l, LK, E)
    else:
        first = program % BLOCKS * BM
        start, end = key_range(first, first + BM - 1, lower, upper, LK, BN)
        delta = tl.zeros((BM,), ACC)
        for at in range(start, end, BN):
            j = at + tl.arange(0, BN)
            k = tile_of(k_at, j, d, k_l, LK, D, ACC)
            v = tile_of(v_at, j, e, v_l, LK, E, ACC)
            p, keep = weights_of(
                q, k, top, share, mask_at, seed_at, m_l, m_k, b, h, i, j, LQ, LK, scale, lower,
                upper, dropped, factor, period, BOOLEAN, PREC, ACC,
            )  # fmt: skip
            delta += tl.sum(p * (product(d_out, tl.trans(v), PREC, ACC) * keep), 1)
        tl.store(delta_at + head.to(tl.int64) * LQ + i, delta, mask=i < LQ)
        if dq_at is not None:
            dq = tl.zeros((BM, BD), ACC)
            for at in range(start, end, BN):
                j = at + tl.arange(0, BN)
                k = tile_of(k_at, j, d, k_l, LK, D, ACC)
                v = tile_of(v_at, j, e, v_l, LK, E, ACC)
                p, keep = weights_of(
                    q, k, top, share, mask_at, seed_at, m_l, m_k, b, h, i, j, LQ, LK, scale, lower,
                    upper, dropped, factor, period, BOOLEAN, PREC, ACC,
                )  # fmt: skip
                dp = product(d_out, tl.trans(v), PREC, ACC) * keep
                dq += product(p * (dp - delta[:, None]), k, PREC, ACC)
            put_tile(dq_at + b * dq_b + h * dq_h, dq * scale, i, d, dq_l, LQ, D)


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    d_out_at, q_at, k_at, v_at, stats_at, mask_at, seed_at, delta_at, dk_at, dv_at,
    H, GROUP, LQ, LK, d_b, d_h, d_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    m_b, m_h, m_l, m_k, lower, upper, dropped, period, BLOCKS,
    scale: tl.constexpr, factor: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BOOLEAN: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, summed over the queries of the heads that share them."""
    program = tl.program_id(0)
    head = program // BLOCKS
    groups = H // GROUP
    b, group = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    first = program % BLOCKS * BN
    j = first + tl.arange(0, BN)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k = tile_of(k_at + b * k_b + group * k_h, j, d, k_l, LK, D, ACC)
    v = tile_of(v_at + b * v_b + group * v_h, j, e, v_l, LK, E, ACC)
    dk, dv = tl.zeros((BN, BD), ACC), tl.zeros((BN, BE), ACC)
    start = tl.maximum(first - upper, 0) // BM * BM
    end = tl.minimum(first + BN - lower, LQ)
    for one in range(0, GROUP):
        h = group * GROUP + one
        row = (b * H + h) * LQ
        m_at = mask_at
        if mask_at is not None:
            m_at += b * m_b + h * m_h
        for at in range(start, end, BM):
            i = at + tl.arange(0, BM)
            q = tile_of(q_at + b * q_b + h * q_h, i, d, q_l, LQ, D, ACC)
            d_out = tile_of(d_out_at + b * d_b + h * d_h, i, e, d_l, LQ, E, ACC)
            top, share = stats_of(stats_at, row, i, LQ)
            delta = tl.load(delta_at + row + i, mask=i < LQ, other=0.0)
            p, keep = weights_of(
                q, k, top, share, m_at, seed_at, m_l, m_k, b, h, i, j, LQ, LK, scale, lower, upper,
                dropped, factor, period, BOOLEAN, PREC, ACC,
            )  # fmt: skip
            if dk_at is not None:
                dp = product(d_out, tl.trans(v), PREC, ACC) * keep
                dk += product(tl.trans(p * (dp - delta[:, None])), q, PREC, ACC)
            if dv_at is not None:
                dv += product(tl.trans(p * keep), d_out, PREC, ACC)
    if dk_at is not None:
        put_tile(dk_at + b * dk_b + group * dk_h, dk * scale, j, d, dk_l, LK, D)
    if dv_at is not None:
        put_tile(dv_at + b * dv_b + group * dv_h, dv, j, e, dv_l, LK, E)


# ---- launchers


def steps(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of rows of a batch, heads and rows of each tensor; zeros for one that is missing."""
    return tuple(
        t.stride(axis) if t is not None and t.dim() == 4 else 0
        for t in tensors
        for axis in range(3)
    )


def laid_out_as(t: Tensor, width: int, wanted: int = 1) -> Tensor:
    """A new result whose heads lie within rows exactly if those of t do."""
    if not wanted:
        return t.new_empty(0)
    batch, heads, rows, _ = t.shape
    if heads > 1 and rows > 1 and t.stride(1) < t.stride(2):
        return t.new_empty(batch, rows, heads, width).transpose(1, 2)
    return t.new_empty(batch, heads, rows, width)


def there(t: Tensor | None) -> Tensor | None:
    """A result, or None where it is not wanted."""
    return None if t is None or t.dim() != 4 else t


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """H, heads of queries for one of keys, Lq, Lk."""
    return q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2]


def numbers(mask, lower, upper, dropout_p, period) -> tuple:
    """Strides of the mask (0 where all share), and the integers of a setting."""
    strides = (0,) * 4
    if mask is not None:
        strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return *strides, lower, upper, dropped_words(dropout_p), max(period, 1)


def readable(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A boolean mask as bytes; beside doubles as numbers to add, since Triton compiles no product
    of doubles that narrow loads decide about."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    if q.dtype != torch.float64 or INTERPRETED.value:
        return mask.view(torch.uint8)
    return mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, float("-inf"))


# Most queries and keys of a tile, by the wider head size: what the registers of 4 warps hold while
# each has tiles of its own to multiply (counted in what is compiled). Wider heads and doubles have
# 16 of each.
OF_QUERIES = {64: (32, 32), 128: (16, 32)}
OF_QUERIES_64 = {64: (64, 32), 128: (16, 32)}
OF_KEYS = {32: (32, 64), 64: (32, 32), 128: (16, 32)}


def tiles_of_queries(q: Tensor) -> dict[int, tuple[int, int]]:
    return OF_QUERIES_64 if multiplies_64_rows(q.device) else OF_QUERIES


def blocks_of(q: Tensor, v: Tensor, keys: int, tiles: dict[int, tuple[int, int]]) -> dict:
    """Sizes of tiles; those of head sizes are whole heads, since whole rows of the operands of a
    product lie in registers."""
    width, width_v = q.shape[3], v.shape[3]
    bd, be = (max(16, triton.next_power_of_2(n)) for n in (width, width_v))
    if max(bd, be) > 256:
        raise ValueError(
            "attention: the Triton kernels take head sizes up to 256, got D = "
            f"{width} and E = {width_v}"
        )
    known = [n for n in tiles if n >= max(bd, be) and q.dtype != torch.float64]
    most = tiles[min(known)] if known else (16, 16)
    bm, bn = (max(16, power_of_2(*n)) for n in zip((q.shape[2], keys), most, strict=True))
    warps = 4 if known or max(bd, be) <= 64 else 8
    return {"D": width, "E": width_v, "BM": bm, "BN": bn, "BD": bd, "BE": be, "num_warps": warps}


def constants_of(
    q: Tensor, v: Tensor, mask: Tensor | None, keys: int, scale: float, dropout_p: float,
    tiles: dict[int, tuple[int, int]],
) -> dict:  # fmt: skip
    """What is compiled in; numbers among it, because as arguments they would be float32."""
    found = blocks_of(q, v, keys, tiles) | {"scale": scale, "factor": 1 / (1 - dropout_p)}
    # three products of TF32 hold more in registers: of wider heads it would not fit
    wide = q.dtype == torch.float64 or max(found["BD"], found["BE"]) > 128
    found["PREC"] = "ieee" if wide else "tf32x3"
    found["BOOLEAN"] = mask is not None and mask.dtype == torch.uint8
    return found | {"ACC": accumulator(q)}


def check_padded(places: Tensor | None) -> None:
    if places is not None:
        raise ValueError(
            "attention: the Triton kernels take padded texts [B, H, L, D], got texts one after "
            "another with their places"
        )


def attention(
    q, k, v, mask, seed, places, scale, lower, upper, dropout_p, period
) -> tuple[Tensor, Tensor]:
    check_padded(places)
    mask = readable(mask, q)
    out = laid_out_as(q, v.shape[3])
    wide = wide_dtype(q.dtype)
    stats = q.new_empty(*q.shape[:3], 2, dtype=wide)
    constants = constants_of(q, v, mask, k.shape[2], scale, dropout_p, tiles_of_queries(q))
    blocks = ceil_div(q.shape[2], constants["BM"])
    launch(
        forward_kernel,
        q.shape[0] * q.shape[1] * blocks,
        *(q, k, v, mask, seed, out, stats),
        *sizes(q, k),
        *steps(q, k, v, out),
        *numbers(mask, lower, upper, dropout_p, period),
        blocks,
        **constants,
    )
    return out, stats


def attention_backward(
    d_out, q, k, v, stats, mask, seed, places, scale, lower, upper, dropout_p, period, needs
) -> tuple[Tensor, Tensor, Tensor]:
    check_padded(places)
    mask = readable(mask, q)
    dq, dk, dv = (laid_out_as(t, t.shape[3], needs >> i & 1) for i, t in enumerate((q, k, v)))
    constants = constants_of(q, v, mask, k.shape[2], scale, dropout_p, tiles_of_queries(q))
    setting = numbers(mask, lower, upper, dropout_p, period)
    whole = fits(q, k, constants)
    delta = stats.new_empty(q.shape[:3])
    given = (d_out, q, k, v, stats, mask, seed, delta)
    blocks = ceil_div(q.shape[2], constants["BM"])
    launch(
        rows_kernel,
        q.shape[0] * q.shape[1] * blocks,
        *(*given, there(dq), there(dk), there(dv)),
        *sizes(q, k),
        *steps(d_out, q, k, v, dq, dk, dv),
        *setting,
        blocks,
        WHOLE=whole,
        **constants,
    )
    if needs & 6 and not whole:
        constants = constants_of(q, v, mask, k.shape[2], scale, dropout_p, OF_KEYS)
        blocks = ceil_div(k.shape[2], constants["BN"])
        launch(
            keys_kernel,
            k.shape[0] * k.shape[1] * blocks,
            *(*given, there(dk), there(dv)),
            *sizes(q, k),
            *steps(d_out, q, k, v, dk, dv),
            *setting,
            blocks,
            **constants,
        )
    return dq, dk, dv


def fits(q: Tensor, k: Tensor, constants: dict) -> bool:
    """Whether one tile holds a head, and no other head shares its keys."""
    one = 0 < q.shape[2] <= constants["BM"] and k.shape[2] <= constants["BN"]
    return one and q.shape[1] == k.shape[1]
