"""Triton kernels of the prototypical loss, ``fastmeta.ops._prototypical``.

Shapes: query ``[T, Q, D]`` and prototypes ``[T, C, D]`` with any batch and row strides and dense
rows, labels int64 ``[T, Q]``, present bool ``[T, C]`` or None, scale ``[T]``, logits ``[T, Q, C]``.
A row labelled outside ``[0, C)`` has logits and nothing else. Classes come in tiles of up
to 32, through a running softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import (
    accumulator,
    ceil_div,
    empty_like,
    exp,
    launch,
    log,
    power,
    power_of_2,
    zero_safe_power,
)
from fastmeta.kernels.pairwise import (
    PRODUCT,
    accumulate,
    coordinates,
    finish,
    rows_at,
    weighted,
    write_sums,
)
from fastmeta.reference import pairwise as reference

NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def distance_of(sums, KIND: tl.constexpr, ROOT: tl.constexpr):
    if KIND == PRODUCT:
        return -sums
    else:
        return zero_safe_power(sums, 1 / ROOT)


@triton.jit
def slope_of_distance(distance, KIND: tl.constexpr, ROOT: tl.constexpr):
    """Derivative of the distance to its sum, 0 at 0."""
    if KIND == PRODUCT:
        return distance * 0 - 1
    elif ROOT == 1:
        return distance * 0 + 1
    else:
        zero = distance == 0
        return tl.where(zero, 0, power(tl.where(zero, 1, distance), 1 - ROOT) / ROOT)


@triton.jit
def shift_of(most):
    """What to subtract before exponentials: nothing where that is infinite."""
    return tl.where(tl.abs(most) < float("inf"), most, 0)


@triton.jit
def running_softmax(most, total, logit):
    """The largest logit of each row and the sum of exponentials relative to it, one tile later."""
    before = shift_of(most)
    most = tl.maximum(most, tl.max(tl.where(logit == logit, logit, float("-inf")), 1))
    shift = shift_of(most)
    # nothing yet: not 0 * inf
    total = tl.where(total == 0, 0, total * exp(before - shift))
    return most, total + tl.sum(exp(logit - shift[:, None]), 1)


@triton.jit
def running_choice(best, choice, nan, logit, classes):
    """The first class of largest logit, and the first whose logit is NaN, one tile later."""
    number = logit == logit
    tile_best = tl.max(tl.where(number, logit, float("-inf")), 1)
    found = tl.min(tl.where(logit == tile_best[:, None], classes[None, :], NO_CLASS), 1)
    choice = tl.where(tile_best > best, found, choice)
    nan = tl.minimum(nan, tl.min(tl.where(number, NO_CLASS, classes[None, :]), 1))
    return tl.maximum(best, tile_best), choice, nan


@triton.jit
def is_present(present, task, classes, C, MASKED: tl.constexpr):
    """Classes that take part ``[BC]``."""
    inside = classes < C
    if MASKED:
        inside = inside & (tl.load(present + task * C + classes, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["Q", "C", "tiles"])
def loss_kernel(
    query, labels, prototypes, present, scale, loss, right, logits, partial, Q, C, D, tiles,
    q_b, q_n, p_b, p_n,
    KIND: tl.constexpr, P: tl.constexpr, ROOT: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of query rows, and the sum of its losses, right answers and rows: the task's
    means where it has this one tile, else for `mean_kernel`."""
    program = tl.program_id(0)
    task = (program // tiles).to(tl.int64)
    rows = program % tiles * BQ + tl.arange(0, BQ)
    label = tl.load(labels + task * Q + rows, mask=rows < Q, other=-1)
    valid = (label >= 0) & (label < C)
    rate = -tl.load(scale + task).to(ACC)
    q_at = query + task * q_b + rows.to(tl.int64)[:, None] * q_n
    most = tl.full((BQ,), float("-inf"), ACC)
    total, target = tl.zeros((BQ,), ACC), tl.zeros((BQ,), ACC)
    choice, nan = tl.zeros((BQ,), tl.int32), tl.full((BQ,), NO_CLASS, tl.int32)
    for start in range(0, C, BC):
        classes = start + tl.arange(0, BC)
        p_at = rows_at(prototypes, task, classes, C, p_b, p_n)
        acc = tl.zeros((BC, BQ, BD), ACC)  # few classes first: see kernels/pairwise.py
        for k in range(0, D, BD):
            ks = k + tl.arange(0, BD)
            q_k = tl.load(q_at + ks[None, :], mask=(rows < Q)[:, None] & (ks < D)[None, :], other=0)
            p_k = coordinates(p_at, k, D, ACC, BD)[:, None, :]
            acc = accumulate(acc, q_k.to(ACC)[None, :, :], p_k, KIND, P)
        distance = tl.trans(distance_of(finish(acc, KIND), KIND, ROOT))
        there = is_present(present, task, classes, C, MASKED)[None, :]
        logit = tl.where(there, rate * distance, float("-inf"))
        at = logits + (task * Q + rows[:, None]) * C + classes[None, :]
        tl.store(at, logit, mask=(rows < Q)[:, None] & (classes < C)[None, :])
        _, choice, nan = running_choice(most, choice, nan, logit, classes)
        most, total = running_softmax(most, total, logit)
        target += tl.sum(tl.where(label[:, None] == classes[None, :], logit, 0), 1)
    row_loss = tl.where(valid, log(total) + shift_of(most) - target, 0)
    choice = tl.where(nan < NO_CLASS, nan, choice)
    losses = tl.sum(row_loss, 0)
    answers = tl.sum((valid & (choice == label)).to(tl.int32), 0).to(ACC)
    count = tl.sum(valid.to(tl.int32), 0).to(ACC)
    if partial is None:
        count = tl.maximum(count, 1)
        tl.store(loss + task, losses / count)
        tl.store(right + task, answers / count)
    else:
        at = partial + program.to(tl.int64) * 3
        tl.store(at, losses)
        tl.store(at + 1, answers)
        tl.store(at + 2, count)


@triton.jit(do_not_specialize=["tiles"])
def mean_kernel(partial, loss, right, tiles, ACC: tl.constexpr, BT: tl.constexpr):
    """The second stage: means of one task over its tiles."""
    task = tl.program_id(0).to(tl.int64)
    losses, answers, count = (
        tl.zeros((BT,), ACC),
        tl.zeros((BT,), ACC),
        tl.zeros((BT,), ACC),
    )
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        at = partial + (task * tiles + tile) * 3
        losses += tl.load(at, mask=tile < tiles, other=0)
        answers += tl.load(at + 1, mask=tile < tiles, other=0)
        count += tl.load(at + 2, mask=tile < tiles, other=0)
    rows = tl.maximum(tl.sum(count, 0), 1)
    tl.store(loss + task, tl.sum(losses, 0) / rows)
    tl.store(right + task, tl.sum(answers, 0) / rows)


@triton.jit
def rows_counted(labels, task, Q, C, BL: tl.constexpr):
    """Rows of the task that count, at least 1."""
    count = tl.zeros((BL,), tl.int32)
    for start in range(0, Q, BL):
        rows = start + tl.arange(0, BL)
        label = tl.load(labels + task * Q + rows, mask=rows < Q, other=-1)
        count += ((label >= 0) & (label < C)).to(tl.int32)
    return tl.maximum(tl.sum(count, 0), 1)


@triton.jit(do_not_specialize=["Q", "C", "tiles"])
def gradient_kernel(
    v_loss, logits, labels, present, scale, weights, d_scale, Q, C, tiles,
    KIND: tl.constexpr, ROOT: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
    BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums of pairs ``[T, Q, C]``, and of the scale by tiles ``[T, tiles]``, from
    logits; 0 in rows that do not count and for classes that are not present."""
    program = tl.program_id(0)
    task = (program // tiles).to(tl.int64)
    rows = program % tiles * BQ + tl.arange(0, BQ)
    label = tl.load(labels + task * Q + rows, mask=rows < Q, other=-1)
    valid = (label >= 0) & (label < C)
    rate = tl.load(scale + task).to(ACC)
    given = tl.load(v_loss + task).to(ACC) / rows_counted(labels, task, Q, C, 256).to(ACC)
    at = logits + (task * Q + rows[:, None]) * C
    most = tl.full((BQ,), float("-inf"), ACC)
    total = tl.zeros((BQ,), ACC)
    for start in range(0, C, BC):
        classes = start + tl.arange(0, BC)
        inside = valid[:, None] & (classes < C)[None, :]
        logit = tl.load(at + classes[None, :], mask=inside, other=float("-inf")).to(ACC)
        most, total = running_softmax(most, total, logit)
    shift = shift_of(most)[:, None]
    pull = tl.zeros((BQ,), ACC)
    for start in range(0, C, BC):
        classes = start + tl.arange(0, BC)
        inside = valid[:, None] & (classes < C)[None, :]
        logit = tl.load(at + classes[None, :], mask=inside, other=0).to(ACC)
        counts = inside & is_present(present, task, classes, C, MASKED)[None, :]
        logit = tl.where(counts, logit, 0)
        share = exp(logit - shift) / total[:, None]
        g = given * (share - (label[:, None] == classes[None, :]).to(ACC))
        g = tl.where(counts, g, 0)
        distance = tl.where(logit == 0, 0, -logit / rate)
        pull -= tl.sum(g * distance, 1)
        to_sums = -rate * g * slope_of_distance(distance, KIND, ROOT)
        to_at = weights + (task * Q + rows[:, None]) * C + classes[None, :]
        outside = (rows < Q)[:, None] & (classes < C)[None, :]
        tl.store(to_at, tl.where(counts, to_sums, 0), mask=outside)
    tl.store(d_scale + program, tl.sum(tl.where(valid, pull, 0), 0))


@triton.jit(do_not_specialize=["R", "N", "C"])
def rows_kernel(
    sums, labels, present, scale, loss, right, d_scale, R, N, C, s_t, s_n, s_c,
    KIND: tl.constexpr, ROOT: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr,
    ACC: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row of sums: loss, right answer and derivative to the scale; the second time the row
    comes from the cache, for the gradient over the sums."""
    row = tl.program_id(0).to(tl.int64)
    task = row // N
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < C)
    rate = tl.load(scale + task).to(ACC)
    at = sums + task * s_t + row % N * s_n
    most = tl.full((1,), float("-inf"), ACC)
    total = tl.zeros((1,), ACC)
    choice, nan = tl.zeros((1,), tl.int32), tl.full((1,), NO_CLASS, tl.int32)
    target = tl.zeros((1,), ACC)
    read = tl.where(valid, C, 0)  # nothing of a row that does not count
    for start in range(0, read, BC):
        classes = start + tl.arange(0, BC)
        there = is_present(present, task, classes, C, MASKED)
        s = tl.load(at + classes.to(tl.int64) * s_c, mask=there, other=0).to(ACC)
        logit = tl.where(there, -rate * distance_of(s, KIND, ROOT), float("-inf"))[None, :]
        _, choice, nan = running_choice(most, choice, nan, logit, classes)
        most, total = running_softmax(most, total, logit)
        target += tl.sum(tl.where(classes[None, :] == label, logit, 0), 1)
    shift = shift_of(most)
    choice = tl.where(nan < NO_CLASS, nan, choice)
    row_loss = tl.where(valid, log(tl.where(valid, total, 1)) + shift - target, 0)
    tl.store(loss + row, tl.sum(row_loss, 0))
    tl.store(right + row, tl.sum((valid & (choice == label)).to(tl.int32), 0).to(ACC))
    pull = tl.zeros((1,), ACC)
    for start in range(0, C, BC):
        classes = start + tl.arange(0, BC)
        there = is_present(present, task, classes, C, MASKED) & (classes < read)
        s_at = at + classes.to(tl.int64) * s_c
        s = tl.load(s_at, mask=there, other=0).to(ACC)
        distance = distance_of(s, KIND, ROOT)
        share = exp(tl.where(there, -rate * distance, 0) - shift) / tl.where(valid, total, 1)
        g = tl.where(there, share - (classes == label).to(ACC), 0)
        pull -= tl.sum(g * tl.where(there, distance, 0), 0)
        if GRADIENT:
            to_sums = tl.where(there, -rate * g * slope_of_distance(distance, KIND, ROOT), 0)
            tl.store(s_at, to_sums, mask=classes < C)
    tl.store(d_scale + row, tl.sum(pull, 0))


def bytes_of(present: Tensor | None) -> Tensor | None:
    return None if present is None else present.contiguous().view(torch.uint8)


def prototypical(query, labels, prototypes, present, scale, kind: int, p: float, root: float):
    """Loss ``[T]``, share of right answers ``[T]`` and logits ``[T, Q, C]``."""
    (tasks, rows, d), classes = query.shape, prototypes.shape[1]
    dtype = torch.promote_types(query.dtype, scale.dtype)
    loss, right = (query.new_zeros(tasks, dtype=dtype) if rows == 0 or classes == 0 else
                   query.new_empty(tasks, dtype=dtype) for _ in range(2))  # fmt: skip
    logits = query.new_empty(tasks, rows, classes, dtype=dtype)
    if rows == 0 or classes == 0:
        return loss, right, logits
    acc = accumulator(query, scale)
    # 256 pairs of 32 coordinates: 64 sums per thread, as a block of 8 x 8 for 8 classes, and rows
    # read once in whole cache lines. Half of it in float64.
    bc = power_of_2(classes, 32)
    bq = power_of_2(rows, 256 // max(bc, 4) // (1 + (acc == tl.float64)))
    tiles = ceil_div(rows, bq)
    partial = None
    if tiles > 1:
        wide = torch.float64 if acc == tl.float64 else torch.float32
        partial = query.new_empty(tasks, tiles, 3, dtype=wide)
    launch(
        loss_kernel, tasks * tiles,
        query, labels, prototypes, bytes_of(present), scale, loss, right, logits, partial, rows,
        classes, d, tiles, *query.stride()[:2], *prototypes.stride()[:2],
        KIND=kind, P=float(p), ROOT=float(root), MASKED=present is not None,
        ACC=acc, BQ=bq, BC=bc, BD=power_of_2(d, 32), num_warps=4,
    )  # fmt: skip
    if tiles > 1:
        launch(mean_kernel, tasks, partial, loss, right, tiles, ACC=acc, BT=32, num_warps=1)
    return loss, right, logits


def prototypical_backward(
    v_loss, logits, query, labels, prototypes, present, scale, kind: int, p: float, root: float,
    needs: int,
):  # fmt: skip
    """Gradients of ``(v_loss * loss).sum()`` to query, prototypes and scale: bits 1, 2, 4."""
    tasks, rows, classes = logits.shape
    if logits.numel() == 0:
        return tuple(
            empty_like(t, needs & bit).zero_()
            for t, bit in ((query, 1), (prototypes, 2), (scale, 4))
        )
    acc = accumulator(query, scale)
    logits = logits.contiguous()
    weights = torch.empty_like(logits)
    bc = power_of_2(classes, 128)
    bq = power_of_2(rows, 1024 // (1 + (acc == tl.float64)) // bc)  # 8 logits per thread, or 4
    tiles = ceil_div(rows, bq)
    wide = torch.float64 if acc == tl.float64 else torch.float32
    direct = tiles == 1 and scale.dtype == wide
    d_scale = empty_like(scale) if direct else scale.new_empty(tasks, tiles, dtype=wide)
    launch(
        gradient_kernel, tasks * tiles,
        v_loss, logits, labels, bytes_of(present), scale, weights, d_scale, rows, classes, tiles,
        KIND=kind, ROOT=float(root), MASKED=present is not None, ACC=acc, BQ=bq, BC=bc, num_warps=4,
    )  # fmt: skip
    if not direct:
        d_scale = d_scale.sum(1).to(scale.dtype)
    sums = None
    if kind == reference.MAXIMUM and needs & 3:
        sums = weights.new_empty(weights.shape)
        write_sums(sums, query, prototypes, kind, p)
    found = weighted(weights, query, prototypes, sums, kind, p, needs & 3, skip=True)
    return *found, d_scale if needs & 4 else scale.new_empty(0)


def prototypical_rows_(
    sums: Tensor, labels: Tensor, present: Tensor | None, scale: Tensor, kind: int, root: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, right answer and derivative to the scale of each row ``[t, n]``; with ``gradient`` the
    sums ``[t, n, C]`` become the derivative to them."""
    tasks, rows, classes = sums.shape
    loss, right, d_scale = (sums.new_empty(tasks, rows) for _ in range(3))
    # A row is many classes; 1024 at a time are 8 for each thread of 4 warps, two loads of 16 bytes.
    launch(
        rows_kernel, tasks * rows,
        sums, labels.contiguous(), bytes_of(present), scale.contiguous(), loss, right, d_scale,
        tasks * rows, rows, classes, *sums.stride(),
        KIND=kind, ROOT=float(root), MASKED=present is not None, GRADIENT=gradient,
        ACC=accumulator(sums), BC=power_of_2(classes, 1024), num_warps=4,
    )  # fmt: skip
    return loss, right, d_scale if gradient else d_scale.new_empty(tasks, 0)
