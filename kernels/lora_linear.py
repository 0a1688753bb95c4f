"""Triton kernels of a linear layer with low-rank terms, ``fastmeta.ops._lora_linear``.

Shapes: rows ``x [M, K]`` of all tasks, ``weight [N, K]`` with any strides or in few bits, ``a [T,
r, K]``, ``b [T, N, r]``. Three kernels make every operator: rows times the shared weight and a
few columns times a task's matrix, those columns alone, and sums of products over a task's rows. A
block of rows never holds two tasks. Sums over rows belong to one program, or to a number of parts
that shapes alone decide, so that two runs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels._common import (
    INTERPRETED,
    PROGRAMS,
    ceil_div,
    launch,
    multiplies_64_rows,
    power_of_2,
)
from fastmeta.reference.lora_linear import dequantise

_ROWS_OF_A_PART = 512
"""Rows that are worth a program of their own, at least."""

_HALF = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def block_of(block, starts, task_of, first_of, R, BM: tl.constexpr):
    """Task, rows and end of a block: by the tables of ragged rows, or where all tasks have R."""
    if task_of is not None:
        task = tl.load(task_of + block)
        first = tl.load(first_of + block)
        last = tl.load(starts + task + 1)
    else:
        blocks = tl.cdiv(R, BM)
        task = (block // blocks).to(tl.int64)
        first = task * R + block % blocks * BM
        last = (task + 1) * R
    return task, first + tl.arange(0, BM), last


@triton.jit
def weight_tile(w, w_scale, ks, ns, k_ok, n_ok, w_k, w_n, columns, group, BITS, FORWARD):
    """The tile ``[BK, BN]`` of the weight, in its own type or unpacked."""
    mask = k_ok[:, None] & n_ok[None, :]
    if BITS == 0:
        return tl.load(w + ks[:, None] * w_k + ns[None, :] * w_n, mask=mask, other=0)
    else:
        outs, ins = (ns[None, :], ks[:, None]) if FORWARD else (ks[:, None], ns[None, :])
        if BITS == 8:
            value = tl.load(w + outs * columns + ins, mask=mask, other=0).to(tl.float32)
        else:
            byte = tl.load(w + outs * (columns // 2) + ins // 2, mask=mask, other=0).to(tl.int32)
            value = ((byte >> (ins % 2 * 4).to(tl.int32)) & 15).to(tl.float32) - 8
        at = w_scale + outs * (columns // group) + ins // group
        scale = tl.load(at, mask=mask, other=0)
        return value.to(scale.dtype) * scale


@triton.jit
def low_rank(acc, left, right, task, rows, ns, there, n_ok, r, r_t, r_q, r_n, PREC, DOT, BR):
    """``acc`` plus ``left [BM, r]`` (stored) times a task's ``right [r, BN]``."""
    qs = tl.arange(0, BR)
    known = qs < r
    s = tl.load(
        left + rows[:, None] * r + qs[None, :], mask=there[:, None] & known[None, :], other=0
    )
    at = right + task * r_t + qs[:, None] * r_q + ns[None, :] * r_n
    m = tl.load(at, mask=known[:, None] & n_ok[None, :], other=0)
    return tl.dot(s.to(DOT), m.to(DOT), acc, input_precision=PREC, out_dtype=acc.dtype)


@triton.jit(do_not_specialize=["R"])
def rows_kernel(
    x, w, w_scale, a, s, right, left2, right2, bias, out, starts, task_of, first_of,
    R, C, N, r, w_k, w_n, columns, group, a_t, a_q, a_k, r_t, r_q, r_n, r2_t, r2_q, r2_n,
    bias_t, scale: tl.constexpr,
    BITS: tl.constexpr, FORWARD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, C] W + s right + left2 right2 + bias``; without x no product with W.

    With ``a``, the columns ``s = scale x a^T`` are summed up in the same loop and stored.
    """
    along_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    task, rows, last = block_of(program // along_n, starts, task_of, first_of, R, BM)
    ns = (program % along_n * BN + tl.arange(0, BN)).to(tl.int64)
    there, n_ok = rows < last, ns < N
    acc = tl.zeros((BM, BN), ACC)
    qs = tl.arange(0, BR)
    if x is not None:
        shrunk = tl.zeros((BM, BR), ACC)
        for k in range(0, C, BK):
            ks = (k + tl.arange(0, BK)).to(tl.int64)
            k_ok = ks < C
            at = x + rows[:, None] * C + ks[None, :]
            x_k = tl.load(at, mask=there[:, None] & k_ok[None, :], other=0).to(DOT)
            w_kn = weight_tile(
                w, w_scale, ks, ns, k_ok, n_ok, w_k, w_n, columns, group, BITS, FORWARD
            )
            acc = tl.dot(x_k, w_kn.to(DOT), acc, input_precision=PREC, out_dtype=ACC)
            if a is not None:
                at = a + task * a_t + qs[None, :] * a_q + ks[:, None] * a_k
                a_kq = tl.load(at, mask=k_ok[:, None] & (qs < r)[None, :], other=0).to(DOT)
                shrunk = tl.dot(x_k, a_kq, shrunk, input_precision=PREC, out_dtype=ACC)
        if a is not None:
            shrunk = (shrunk * scale).to(ACC)
            mask = there[:, None] & (qs < r)[None, :] & (program % along_n == 0)
            tl.store(s + rows[:, None] * r + qs[None, :], shrunk, mask=mask)
            at = right + task * r_t + qs[:, None] * r_q + ns[None, :] * r_n
            m = tl.load(at, mask=(qs < r)[:, None] & n_ok[None, :], other=0).to(DOT)
            acc = tl.dot(shrunk.to(DOT), m, acc, input_precision=PREC, out_dtype=ACC)
    if a is None:
        if s is not None:
            acc = low_rank(
                acc, s, right, task, rows, ns, there, n_ok, r, r_t, r_q, r_n, PREC, DOT, BR
            )
    if left2 is not None:
        acc = low_rank(
            acc, left2, right2, task, rows, ns, there, n_ok, r, r2_t, r2_q, r2_n, PREC, DOT, BR
        )
    if bias is not None:
        acc += tl.load(bias + task * bias_t + ns, mask=n_ok, other=0).to(ACC)[None, :]
    at = out + rows[:, None] * N + ns[None, :]
    tl.store(at, acc, mask=there[:, None] & n_ok[None, :])


@triton.jit
def shrink(acc, x, m, task, rows, there, C, r, m_t, m_q, m_k, PREC, DOT, BK, BR):
    """``acc`` plus rows of ``x [M, C]`` times a task's matrix ``[C, r]``."""
    qs = tl.arange(0, BR)
    for k in range(0, C, BK):
        ks = (k + tl.arange(0, BK)).to(tl.int64)
        at = x + rows[:, None] * C + ks[None, :]
        x_k = tl.load(at, mask=there[:, None] & (ks < C)[None, :], other=0).to(DOT)
        at = m + task * m_t + qs[None, :] * m_q + ks[:, None] * m_k
        m_k_q = tl.load(at, mask=(ks < C)[:, None] & (qs < r)[None, :], other=0).to(DOT)
        acc = tl.dot(x_k, m_k_q, acc, input_precision=PREC, out_dtype=acc.dtype)
    return acc


@triton.jit(do_not_specialize=["R"])
def columns_kernel(
    x, m, x2, m2, s, starts, task_of, first_of,
    R, C, r, m_t, m_q, m_k, m2_t, m2_q, m2_k, scale: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``s [M, r] = scale (x m^T + x2 m2^T)``, ``m [T, r, C]``."""
    task, rows, last = block_of(tl.program_id(0), starts, task_of, first_of, R, BM)
    there = rows < last
    acc = tl.zeros((BM, BR), ACC)
    if x is not None:
        acc = shrink(acc, x, m, task, rows, there, C, r, m_t, m_q, m_k, PREC, DOT, BK, BR)
    if x2 is not None:
        acc = shrink(acc, x2, m2, task, rows, there, C, r, m2_t, m2_q, m2_k, PREC, DOT, BK, BR)
    qs = tl.arange(0, BR)
    mask = there[:, None] & (qs < r)[None, :]
    tl.store(s + rows[:, None] * r + qs[None, :], (acc * scale).to(ACC), mask=mask)


@triton.jit(do_not_specialize=["R", "parts"])
def outer_kernel(
    left, x, left2, x2, out, sums, starts, R, C, r, parts, o_p, o_t, o_q, o_c, s_p,
    ACC: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out_t [r, C] = left^T x + left2^T x2`` over a part of a task's rows, and the sums of x
    there."""
    along_c = tl.cdiv(C, BC)
    part = (tl.program_id(0) % parts).to(tl.int64)
    program = tl.program_id(0) // parts
    task = (program // along_c).to(tl.int64)
    cs = (program % along_c * BC + tl.arange(0, BC)).to(tl.int64)
    qs = tl.arange(0, BR)
    c_ok, known = (cs < C)[None, :], (qs < r)[:, None]
    if starts is not None:
        first, last = tl.load(starts + task), tl.load(starts + task + 1)
    else:
        first, last = task * R, (task + 1) * R
    each = tl.cdiv(tl.cdiv(last - first, BM), parts) * BM
    first += part * each
    last = tl.minimum(first + each, last)
    acc = tl.zeros((BR, BC), ACC)
    total = tl.zeros((BC,), ACC)
    for row in range(first, last, BM):
        rows = row + tl.arange(0, BM)
        there = rows < last
        x_c = tl.load(x + rows[:, None] * C + cs[None, :], mask=there[:, None] & c_ok, other=0)
        if sums is not None:
            total += tl.sum(x_c.to(ACC), 0)
        if left is not None:
            at = left + rows[None, :] * r + qs[:, None]
            l_q = tl.load(at, mask=there[None, :] & known, other=0).to(DOT)
            acc = tl.dot(l_q, x_c.to(DOT), acc, input_precision=PREC, out_dtype=ACC)
        if left2 is not None:
            at = x2 + rows[:, None] * C + cs[None, :]
            x_c = tl.load(at, mask=there[:, None] & c_ok, other=0).to(DOT)
            at = left2 + rows[None, :] * r + qs[:, None]
            l_q = tl.load(at, mask=there[None, :] & known, other=0).to(DOT)
            acc = tl.dot(l_q, x_c, acc, input_precision=PREC, out_dtype=ACC)
    if left is not None:
        at = out + part * o_p + task * o_t + qs[:, None] * o_q + cs[None, :] * o_c
        tl.store(at, acc, mask=known & c_ok)
    if sums is not None:
        tl.store(sums + part * s_p + task * C + cs, total, mask=cs < C)


class _Rows:
    """Rows of all tasks: how they are divided into blocks, and in what precision they multiply."""

    def __init__(self, x: Tensor, tasks: int, rank: int, offsets: Tensor | None) -> None:
        self.x, self.tasks, self.rank, self.offsets = x, tasks, rank, offsets
        self.count = x.shape[0] // max(tasks, 1)
        wide, half = x.dtype == torch.float64, x.dtype in _HALF
        dot = tl.float64 if wide else tl.float32
        self.acc = dot
        self.options = {
            "ACC": dot,
            # the interpreter computes bfloat16 on raw bits
            "DOT": _HALF[x.dtype] if half and not INTERPRETED.value else dot,
            "PREC": "ieee" if wide or half else "tf32x3",
            "BR": power_of_2(max(rank, 16), 1 << 16),
        }
        # as much as the registers of 4 or 8 warps hold: less where numbers are longer
        longest = x.shape[0] if offsets is not None else self.count
        self.bm = max(power_of_2(longest, 32 if wide else 128 if half else 64), 16)
        self.bn, self.bk = (32, 16) if wide else (128, 32) if half else (64, 32)
        self.deep = 64 if half and multiplies_64_rows(x.device) else self.bk  # of plain weights
        self.known: dict[int, tuple[int, tuple]] = {}  # tables, by rows of a block

    def tables(self, bm: int) -> tuple[int, tuple]:
        """The number of blocks of `bm` rows, and tables that name each: as many as there can be at
        most, since the offsets are not read back; those that are not there have no rows."""
        if self.offsets is None:
            return self.tasks * ceil_div(self.count, bm), (None, None, None)
        if bm in self.known:
            return self.known[bm]
        starts = self.offsets
        blocks = ceil_div(self.x.shape[0], bm) + self.tasks
        counts = (starts.diff() + bm - 1) // bm
        ends = counts.cumsum(0)
        index = torch.arange(blocks, device=starts.device)
        task = torch.searchsorted(ends, index, right=True).clamp_(max=self.tasks - 1)
        first = starts[task] + (index - (ends - counts)[task]) * bm
        self.known[bm] = blocks, (starts, task, first)
        return self.known[bm]

    def product(
        self, out, x, weight, weight_scale, a, s, right, left2, right2, bias, scale, *, forward
    ) -> None:
        """`rows_kernel`; ``a`` and ``right`` are ``[T, r, columns]`` with any strides."""
        if out.numel() == 0:
            return
        outputs = out.shape[1]
        if weight_scale is not None and self.acc == tl.float64 and not INTERPRETED.value:
            # Triton does not compile products of doubles that were not loaded as such
            weight, weight_scale = dequantise(weight, weight_scale, self.columns(weight)), None
        blocks, tables = self.tables(self.bm)
        width = 0 if x is None else x.shape[1]
        columns = self.columns(weight)
        bits = 0 if weight_scale is None else 4 if weight.dtype == torch.uint8 else 8
        group = 1 if weight_scale is None else columns // max(weight_scale.shape[1], 1)
        w_n, w_k = weight.stride() if forward else weight.stride()[::-1]
        bn = min(self.bn, 64) if bits else self.bn  # unpacking takes registers
        launch(
            rows_kernel, blocks * ceil_div(outputs, bn),
            x, weight, weight_scale, a, s, right, left2, right2, bias, out, *tables,
            self.count, width, outputs, self.rank, w_k, w_n, columns, group,
            *_strides(a), *_strides(right), *_strides(right2),
            bias.stride(0) if bias is not None and bias.shape[0] > 1 else 0, scale,
            BITS=bits, FORWARD=forward, num_warps=8 if self.bm * bn > 64 * 128 else 4,
            BM=self.bm, BN=bn, BK=self.bk if bits else self.deep, **self.options,
        )  # fmt: skip

    @staticmethod
    def columns(weight: Tensor) -> int:
        return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)

    def shrink(self, x, m, x2, m2, scale) -> Tensor:
        """`columns_kernel`: ``scale (x m^T + x2 m2^T)`` in the type of accumulation."""
        some = x if x is not None else x2
        s = some.new_empty(some.shape[0], self.rank, dtype=wide_dtype(some.dtype))
        if s.numel() == 0:
            return s
        blocks, tables = self.tables(self.bm)
        launch(
            columns_kernel, blocks,
            x, m, x2, m2, s, *tables, self.count, some.shape[1], self.rank,
            *_strides(m), *_strides(m2), scale,
            BM=self.bm, BK=self.bk, num_warps=4, **self.options,
        )  # fmt: skip
        return s

    def outer(self, left, x, left2, x2, out, sums) -> None:
        """`outer_kernel`; out is ``[T, r, C]`` with any strides. Where few tasks have many rows,
        programs share the rows of each, and their parts are summed up in a fixed order."""
        columns = x.shape[1]
        if self.tasks == 0 or columns == 0:
            return
        programs = self.tasks * ceil_div(columns, self.bn)
        parts = max(1, min(PROGRAMS // programs, self.count // _ROWS_OF_A_PART))
        results = [t if t is None or parts == 1 else self.room(parts, t) for t in (out, sums)]
        launch(
            outer_kernel, programs * parts,
            left, x, left2, x2, *results, self.offsets, self.count, columns, self.rank, parts,
            *((0, *_strides(out)) if parts == 1 else _strides(results[0], 4)),
            self.tasks * columns,
            BM=min(self.deep, self.bm), BC=self.bn, num_warps=4, **self.options,
        )  # fmt: skip
        for result, found in zip((out, sums), results, strict=True):
            if result is not None and parts > 1:
                result.copy_(found.sum(0))

    def room(self, parts: int, result: Tensor) -> Tensor:
        """For the parts of a result, in the type of accumulation."""
        return result.new_empty(parts, *result.shape, dtype=wide_dtype(self.x.dtype))


def _strides(t: Tensor | None, axes: int = 3) -> tuple[int, ...]:
    return (0,) * axes if t is None else tuple(t.stride())


def _if_wanted(like: Tensor, shape: tuple[int, ...], wanted: int) -> Tensor:
    return like.new_empty(shape if wanted else 0)


def lora_linear(
    x, weight, weight_scale, bias, a, b, offsets, scale, bf16=False
) -> tuple[Tensor, Tensor]:
    """``x W^T + bias + s B^T`` and ``s = scale x A^T``, summed up in one loop. `bf16` is for CPUs:
    here rows come in it."""
    rows = _Rows(x, a.shape[0], a.shape[1], offsets)
    wide = wide_dtype(x.dtype)
    y, s = x.new_empty(x.shape[0], b.shape[1]), x.new_empty(x.shape[0], a.shape[1], dtype=wide)
    if y.numel() == 0 and s.numel():
        s = rows.shrink(x, a, None, None, scale)
    rows.product(y, x, weight, weight_scale, a, s, b.mT, None, None, bias, scale, forward=True)
    return y, s


def lora_linear_backward(
    dy, x, weight, weight_scale, a, b, s, offsets, scale, needs, bf16=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbias of every task, da, db, by the bits 1, 4, 8 and 16."""
    tasks, rank = a.shape[:2]
    rows = _Rows(x, tasks, rank, offsets)
    dx = _if_wanted(x, x.shape, needs & 1)
    d_bias = _if_wanted(x, (tasks, dy.shape[1]), needs & 4)
    d_a, d_b = _if_wanted(a, a.shape, needs & 8), _if_wanted(b, b.shape, needs & 16)
    p = None
    if needs & 1 and dx.numel():
        p = s.new_empty(s.shape)
        rows.product(
            dx, dy, weight, weight_scale, b.mT, p, a, None, None, None, scale, forward=False
        )
    if needs & 8:
        p = rows.shrink(dy, b.mT, None, None, scale) if p is None else p
        rows.outer(p, x, None, None, d_a, None)
    if needs & 20:
        left, out = (s, d_b.mT) if needs & 16 else (None, None)
        rows.outer(left, dy, None, None, out, d_bias if needs & 4 else None)
    return dx, d_bias, d_a, d_b


def lora_linear_double_backward(
    gx, gbias, ga, gb, dy, x, weight, weight_scale, a, b, s, offsets, scale, needs, bf16=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of ``gx dx + gbias dbias + ga da + gb db`` to dy, x, a and b, by the bits 4, 1, 8
    and 16. With ``u = scale (gx A^T + x gA^T)``, ``p = scale dy B``, ``q = scale dy gB``:
    ``gx W^T + u B^T + s gB^T + gbias``, ``p gA + q A``, ``p^T gx + q^T x`` and ``dy^T u``."""
    rows = _Rows(x, a.shape[0], a.shape[1], offsets)
    d_dy, d_x = _if_wanted(dy, dy.shape, needs & 4), _if_wanted(x, x.shape, needs & 1)
    d_a, d_b = _if_wanted(a, a.shape, needs & 8), _if_wanted(b, b.shape, needs & 16)
    u = p = q = None
    if needs & 20 and not (gx is None and ga is None):
        u = rows.shrink(gx, a, None if ga is None else x, ga, scale)
    if needs & 9 and not (gx is None and ga is None):
        p = rows.shrink(dy, b.mT, None, None, scale)
    if needs & 9 and gb is not None:
        q = rows.shrink(dy, gb.mT, None, None, scale)
    if needs & 4:
        left = None if gb is None else s
        right = None if gb is None else gb.mT
        rows.product(
            d_dy, gx, weight, weight_scale, None, u, None if u is None else b.mT, left, right,
            gbias, 1.0, forward=True,
        )  # fmt: skip
    if needs & 1:
        first = None if ga is None else p
        rows.product(
            d_x, None, weight, None, None, first, None if first is None else ga,
            q, None if q is None else a, None, 1.0, forward=False,
        )  # fmt: skip
    if needs & 8:
        pairs = [
            pair for pair in ((p if gx is not None else None, gx), (q, x)) if pair[0] is not None
        ]
        if pairs:
            rows.outer(*pairs[0], *(pairs[1] if len(pairs) > 1 else (None, None)), d_a, None)
        else:
            d_a.zero_()
    if needs & 16:
        if u is None:
            d_b.zero_()
        else:
            rows.outer(u, dy, None, None, d_b.mT, None)
    return d_dy, d_x, d_a, d_b
