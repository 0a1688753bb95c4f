"""The prototypical loss as raw operators and Functions.

Shapes: query ``[T, Q, D]``, labels int64 ``[T, Q]``, prototypes ``[T, C, D]``, present bool
``[T, C]`` or None, scale ``[T]`` (one over the temperature). Few classes are one kernel forward and
one backward, which keep logits ``[T, Q, C]``. Many classes are worked off in chunks of rows that
fit in a cache; where a gradient is wanted each chunk leaves its part of it behind, so that nothing
of size ``Q x C`` is ever there. Second derivatives are those of the loss
written with `pairwise_sums`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import (
    Function,
    bits,
    chosen,
    dense,
    fold,
    needs_autograd,
    placed,
    pull_back,
    unfold,
)
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta.ops import _pairwise
from fastmeta.ops._pairwise import FEW, pairwise_sums
from fastmeta.reference import pairwise as reference
from fastmeta.reference.pairwise import PRODUCT, SQUARES

_METRIC = "int kind, float p, float root"
_TENSORS = "Tensor query, Tensor labels, Tensor prototypes, Tensor? present, Tensor scale"


class Metric(NamedTuple):
    """``distance = sums ** (1 / root)`` for sums of one kind, ``-sums`` for products."""

    kind: int
    p: float
    root: float


def _loss_reference(query, labels, prototypes, present, scale, kind, p, root):
    def of(query):
        sums = reference.pairwise_sums(query, prototypes, kind, p)
        return reference.prototypical(_distance(sums, kind, root), labels, present, scale)

    loss, right, _ = of(counting_rows(query, labels, prototypes))
    with torch.no_grad():
        return loss, right, of(query)[2]


def counting_rows(query: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """The query with zeros in rows that do not count: not even a NaN there reaches a product."""
    return torch.where(_counts(labels, prototypes.shape[1]).unsqueeze(-1), query, 0)


def _counts(labels: Tensor, classes: int) -> Tensor:
    """Which rows count ``[T, Q]``: those labelled with a class."""
    return (labels >= 0) & (labels < classes)


def _distance(sums: Tensor, kind: int, root: float) -> Tensor:
    if kind == PRODUCT:
        return -sums
    return sums if root == 1 else reference.zero_safe_power(sums, 1 / root)


_FORWARD = define(
    f"prototypical({_TENSORS}, {_METRIC}) -> (Tensor, Tensor, Tensor)", _loss_reference
)
_QUERY, _PROTOTYPES, _SCALE = 1, 2, 4  # bits of `needs`
_PLACES = (0, 2, 4)  # of those among the tensors
_BACKWARD = define(
    f"prototypical_backward(Tensor v_loss, Tensor logits, {_TENSORS}, {_METRIC}, int needs) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda v_loss, logits, query, labels, prototypes, present, scale, kind, p, root, needs: (
        query.new_empty(query.shape if needs & _QUERY else 0),
        query.new_empty(prototypes.shape if needs & _PROTOTYPES else 0),
        query.new_empty(scale.shape if needs & _SCALE else 0),
    ),
)


def _rows_reference(sums, labels, present, scale, kind, root, gradient):
    """The definition of ``prototypical_rows_``, which the kernels evaluate in one pass."""
    with torch.enable_grad():
        given = sums.detach().clone().requires_grad_()
        rate = scale.detach().view(-1, 1).expand(labels.shape).flatten().clone().requires_grad_()
        loss, right, _ = reference.prototypical(
            _distance(given, kind, root).flatten(0, 1).unsqueeze(1),
            labels.reshape(-1, 1),
            None if present is None else _per_row(present, labels),
            rate,
        )
        d_sums, d_scale = torch.autograd.grad(loss.sum(), (given, rate))
    if gradient:
        sums.copy_(d_sums)
    loss, right, d_scale = (t.detach().view(labels.shape) for t in (loss, right, d_scale))
    return loss, right, d_scale if gradient else d_scale[:, :0].clone()


def _per_row(present: Tensor, labels: Tensor) -> Tensor:
    return present.unsqueeze(1).expand(*labels.shape, present.shape[1]).flatten(0, 1)


# sums [t, n, C] -> loss and right answer of every row [t, n]; with `gradient` also d loss / d scale
# [t, n], and the sums become d loss / d sums (else they are spent)
_ROWS = define(
    "prototypical_rows_(Tensor(a!) sums, Tensor labels, Tensor? present, Tensor scale, int kind, "
    "float root, bool gradient) -> (Tensor, Tensor, Tensor)",
    _rows_reference,
)


def prototypical(
    query: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    present: Tensor | None,
    scale: Tensor,
    metric: Metric,
    *,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss ``[T]``, accuracy ``[T]`` and, where asked for, logits without gradient."""
    tensors = (query, labels, prototypes, present, scale)
    if by_reference(_FORWARD, query.device):
        return _loss_reference(*tensors, *metric)
    recorded = needs_autograd(query, prototypes, scale)
    if with_logits or prototypes.shape[1] <= 2 * FEW:
        function = _Prototypical.call if recorded else _Prototypical.forward
        return function(*tensors, *metric)
    if not recorded:
        return *_ManyClasses.forward(*tensors, *metric, 0)[:2], None
    given = (query, prototypes, scale)
    transformed = torch._C._are_functorch_transforms_active()
    needs = sum(1 << i for i, t in enumerate(given) if transformed or t.requires_grad)
    return *_ManyClasses.call(*tensors, *metric, needs)[:2], None


def _differentiable(query, labels, prototypes, present, scale, kind, p, root) -> Tensor:
    """The losses written with operators that autograd differentiates."""
    query = counting_rows(query, labels, prototypes)
    distances = _distance(pairwise_sums(query, prototypes, kind, p), kind, root)
    return reference.prototypical(distances, labels, present, scale)[0]


def _pull_gradient(v_loss, tensors, metric, needs: int, cotangents) -> list[Tensor | None]:
    """Derivatives of ``sum(cotangents * gradients)`` to v_loss, query, prototypes and scale, where
    the gradients are those of ``(v_loss * losses).sum()`` to what `needs` names."""
    query, labels, prototypes, present, scale = tensors
    wanted = [i for i in range(3) if needs >> i & 1]

    def gradients(v_loss, *given):
        def losses(*chosen):
            full = list(given)
            for i, t in zip(wanted, chosen, strict=True):
                full[i] = t
            query, prototypes, scale = full
            return _differentiable(query, labels, prototypes, present, scale, *metric)

        _, pull = torch.func.vjp(losses, *(given[i] for i in wanted))
        return pull(v_loss)

    return pull_back(gradients, (v_loss, query, prototypes, scale), cotangents, (True,) * 4)


class _Prototypical(Function):
    """``(query, labels, prototypes, present, scale, kind, p, root)``: the raw results."""

    @staticmethod
    def forward(query, labels, prototypes, present, scale, kind, p, root):
        tensors = _prepared(query, labels, prototypes, present, scale)
        return _backend.kernel(_FORWARD, query.device.type)(*tensors, kind, p, root)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:5], output[2])
        ctx.metric = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v_loss, *_):
        if v_loss is None:
            return (None,) * 8
        *tensors, logits = ctx.saved_tensors
        needs = bits(ctx.needs_input_grad[at] for at in _PLACES)
        recorded = needs_autograd(v_loss, tensors[0], tensors[2], tensors[4])
        function = _Gradient.call if recorded else _Gradient.forward
        results = function(v_loss, logits, *tensors, *ctx.metric, needs)
        return tuple(placed(results, needs, _PLACES, 8))

    @staticmethod
    def vmap(info, in_dims, *args):
        results = _Prototypical.call(*fold(info.batch_size, args[:5], in_dims), *args[5:])
        return tuple(unfold(r, info.batch_size) for r in results), (0, 0, 0)


class _Gradient(Function):
    """``(v_loss, logits, *tensors, kind, p, root, needs)``: the wanted gradients."""

    @staticmethod
    def forward(v_loss, logits, query, labels, prototypes, present, scale, kind, p, root, needs):
        tensors = _prepared(query, labels, prototypes, present, scale)
        kernel = _backend.kernel(_BACKWARD, query.device.type)
        results = kernel(v_loss.contiguous(), logits, *tensors, kind, p, root, needs)
        return chosen(results, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *inputs[2:7])
        ctx.metric, ctx.needs = inputs[7:10], inputs[10]

    @staticmethod
    def backward(ctx, *cotangents):
        v_loss, *tensors = ctx.saved_tensors
        pulled = _pull_gradient(v_loss, tensors, ctx.metric, ctx.needs, cotangents)
        return tuple(placed(pulled, 0b1111, (0, 2, 4, 6), 11))

    @staticmethod
    def vmap(info, in_dims, *args):
        results = _Gradient.call(*fold(info.batch_size, args[:7], in_dims), *args[7:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


def _prepared(query, labels, prototypes, present, scale) -> tuple[Tensor | None, ...]:
    return (
        dense(query),
        labels.contiguous(),
        dense(prototypes),
        None if present is None else present.contiguous(),
        scale.contiguous(),
    )


class _ManyClasses(Function):
    """``(*tensors, kind, p, root, needs)``: loss, accuracy, and the gradient of each task's loss to
    the wanted ones of query, prototypes and scale."""

    @staticmethod
    def forward(query, labels, prototypes, present, scale, kind, p, root, needs):
        return _in_chunks(query, labels, prototypes, present, scale, Metric(kind, p, root), needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:5], *output[2:])
        ctx.metric, ctx.needs = inputs[5:8], inputs[8]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v_loss, *_):
        if v_loss is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # read once, as checkpoints ask for it
        tensors, gradients = saved[:5], saved[5:]
        recorded = needs_autograd(v_loss, tensors[0], tensors[2], tensors[4])
        function = _ScaledGradient.call if recorded else _ScaledGradient.forward
        results = function(v_loss, *tensors, *gradients, *ctx.metric, ctx.needs)
        return tuple(placed(results, ctx.needs, _PLACES, 9))

    @staticmethod
    def vmap(info, in_dims, *args):
        results = _ManyClasses.call(*fold(info.batch_size, args[:5], in_dims), *args[5:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


class _ScaledGradient(Function):
    """``(v_loss, *tensors, *gradients, kind, p, root, needs)``: ``v_loss`` times the gradients,
    which are functions of the tensors."""

    @staticmethod
    def forward(v_loss, *args):
        gradients, v_loss = args[5:-4], v_loss.view(-1, 1, 1)
        return tuple(g * (v_loss if g.dim() == 3 else v_loss.view(-1)) for g in gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.metric, ctx.needs, ctx.count = inputs[-4:-1], inputs[-1], len(inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        v_loss, query, labels, prototypes, present, scale = ctx.saved_tensors
        # a task's mean loss is the sum over chunks of rows of theirs, each over the whole count
        count = _counted(labels, prototypes.shape[1])
        sums = None
        for rows in _row_chunks(query, prototypes):
            part = (query[:, rows], labels[:, rows], prototypes, present, scale)
            share = _counted(part[1], prototypes.shape[1]) / count
            given = list(cotangents)
            if ctx.needs & _QUERY:
                given[0] = given[0][:, rows]
            pulled = _pull_gradient(v_loss * share, part, ctx.metric, ctx.needs, tuple(given))
            pulled[0] = pulled[0] * share
            pulled[1] = torch.nn.functional.pad(
                pulled[1], (0, 0, rows.start, query.shape[1] - rows.stop)
            )
            sums = pulled if sums is None else [a + b for a, b in zip(sums, pulled, strict=True)]
        return tuple(placed(sums or (), 0b1111 if sums else 0, (0, 1, 3, 5), ctx.count))

    @staticmethod
    def vmap(info, in_dims, *args):
        folded = fold(info.batch_size, args[:-4], in_dims)
        results = _ScaledGradient.call(*folded, *args[-4:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


CHUNK = 1 << 20  # distances worked on at once: 4 MiB, so that they stay in a cache
_ON_GPU = 16  # times as many on a GPU, which would wait for launches


def _counted(labels: Tensor, classes: int) -> Tensor:
    """Rows that count, at least 1, of each task."""
    return _counts(labels, classes).sum(1).clamp_min(1)


def _all_count(labels: Tensor, classes: int) -> bool:
    """Whether every row is known to count: then nothing need be left out, and no copy made."""
    return _checks.readable(labels) and bool(_counts(labels, classes).all())


def _chunk(query: Tensor) -> int:
    return CHUNK if query.device.type == "cpu" else _ON_GPU * CHUNK


def _row_chunks(query: Tensor, prototypes: Tensor) -> list[slice]:
    rows = query.shape[1]
    size = min(max(_chunk(query) // max(prototypes.shape[1], 1), 1), max(rows, 1))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def _in_chunks(query, labels, prototypes, present, scale, metric: Metric, needs: int):
    """One pass over the distances in chunks of rows of as many tasks as fit."""
    tasks, _, _ = query.shape
    classes = prototypes.shape[1]
    kind, p, root = metric
    if not _all_count(labels, classes):
        query = counting_rows(query, labels, prototypes)
    centred = _pairwise.centred(query, prototypes) if kind == SQUARES else (query, prototypes)
    rows_kernel = _backend.kernel(_ROWS, query.device.type)
    count = _counted(labels, classes)
    loss, right, d_scale = (scale.new_zeros(tasks) for _ in range(3))
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_prototypes = torch.zeros_like(prototypes, memory_format=torch.contiguous_format)
    chunks = _row_chunks(query, prototypes)
    together = max(_chunk(query) // max(query.shape[1] * classes, 1), 1) if len(chunks) == 1 else 1
    for start in range(0, tasks, together):
        some = slice(start, min(start + together, tasks))
        y, cy = prototypes[some], centred[1][some]
        there = None if present is None else present[some]
        for rows in chunks:
            x, cx, target = query[some, rows], centred[0][some, rows], labels[some, rows]
            if kind == SQUARES and not _pairwise.rounds_products(x):
                sums = _pairwise.squares_by_products(x, y, cx, cy)
            elif kind == PRODUCT:
                sums = x @ y.mT
            else:
                sums = _pairwise._Sums.forward(x, y, kind, p)
            found = rows_kernel(
                sums, target.contiguous(), there, scale[some].contiguous(), kind, root, needs != 0
            )
            for total, row in zip((loss, right, d_scale), found, strict=True):
                total[some] += row.sum(1)  # nothing where no gradient is wanted
            if needs & 3:
                dx, dy = _chunk_gradient(sums, cx, cy, kind, p, needs & 3)
                if dx is not None:
                    d_query[some, rows] = dx
                if dy is not None:
                    d_prototypes[some] += dy
    shares = 1 / count.to(loss.dtype)
    results = [loss * shares, right * shares]
    if needs & _QUERY:
        results.append(d_query.mul_(shares.view(-1, 1, 1)))
    if needs & _PROTOTYPES:
        results.append(d_prototypes.mul_(shares.view(-1, 1, 1)))
    if needs & _SCALE:
        results.append(d_scale * shares)
    return tuple(results)


def _chunk_gradient(w: Tensor, x: Tensor, y: Tensor, kind: int, p: float, needs: int):
    if kind == SQUARES:
        return _pairwise.weighted_by_products(w, x, y, needs)
    if kind == PRODUCT:
        return w @ y if needs & 1 else None, w.mT @ x if needs & 2 else None
    sums = _pairwise._Sums.forward(x, y, kind, p) if kind == reference.MAXIMUM else None
    return _pairwise.weighted(w, x, y, sums, kind, p, needs)
