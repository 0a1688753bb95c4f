"""Sums over the coordinates of pairs as raw operators, and the Functions that differentiate them.

Shapes: ``x [B, N, D]``, ``y [B, M, D]``, sums and their cotangents ``w [B, N, M]``, cotangents of
the gradients ``a [B, N, D]`` and ``b [B, M, D]``; float32 or float64 throughout. Kernels serve the
sums, their gradient and its derivative; what comes after differentiates the reference. Squares and
products of many pairs are matrix products instead, differentiable to any order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
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
from fastmeta.reference import pairwise as reference
from fastmeta.reference.pairwise import ABSOLUTE, MAXIMUM, PRODUCT, SQUARES

_SUMS = define(
    "pairwise_sums(Tensor x, Tensor y, int kind, float p) -> Tensor", reference.pairwise_sums
)
_X, _Y, _W = 1, 2, 4  # bits of `needs`


def _empty_unless(wanted: int, like: Tensor) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


_BACKWARD = define(
    "pairwise_sums_backward(Tensor w, Tensor x, Tensor y, Tensor? sums, int kind, float p, "
    "int needs) -> (Tensor, Tensor)",
    fake=lambda w, x, y, sums, kind, p, needs: (
        _empty_unless(needs & _X, x),
        _empty_unless(needs & _Y, y),
    ),
)
_DOUBLE_BACKWARD = define(
    "pairwise_sums_double_backward(Tensor? a, Tensor? b, Tensor w, Tensor x, Tensor y, "
    "Tensor? sums, int kind, float p, int needs) -> (Tensor, Tensor, Tensor)",
    fake=lambda a, b, w, x, y, sums, kind, p, needs: (
        _empty_unless(needs & _W, w),
        _empty_unless(needs & _X, x),
        _empty_unless(needs & _Y, y),
    ),
)


def _finish_reference(dots: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor) -> None:
    dots.copy_(reference.pairwise_sums(x, y, SQUARES, 2.0))


# dots x y^T -> squares |x|^2 + |y|^2 - 2 dots; evaluated as (x - y)^2 where that would cancel
_FINISH = define(
    "pairwise_squares_(Tensor(a!) dots, Tensor x, Tensor y, Tensor xx, Tensor yy) -> ()",
    _finish_reference,
)

FEW = 16  # rows or columns up to which matrix products are slower than the kernels


def pairwise_sums(x: Tensor, y: Tensor, kind: int, p: float = 2.0) -> Tensor:
    """Sums of one kind over the coordinates of every pair, ``[B, N, M]``."""
    if by_reference(_SUMS, x.device):
        return reference.pairwise_sums(x, y, kind, p)
    few = min(x.shape[1], y.shape[1]) <= FEW
    if kind == PRODUCT and not few:
        return x @ y.mT
    products = kind == SQUARES and not few and x.shape[2] > 4 and not rounds_products(x)
    function = _SquaresByProducts if products else _Sums
    if needs_autograd(x, y):
        return function.call(x, y, kind, p)
    return function.forward(x, y, kind, p)


def rounds_products(x: Tensor) -> bool:
    """Whether torch's matrix products round what they multiply: a user may let a GPU take TF32."""
    tf32 = x.device.type == "cuda" and x.dtype == torch.float32
    return tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


class _Sums(Function):
    """``(x, y, kind, p)`` by the kernel."""

    @staticmethod
    def forward(x, y, kind, p):
        return _backend.kernel(_SUMS, x.device.type)(dense(x), dense(y), kind, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.kind, ctx.p = inputs
        ctx.save_for_backward(x, y, output if ctx.kind == MAXIMUM else None)

    @staticmethod
    def backward(ctx, w):
        x, y, sums = ctx.saved_tensors
        needs = _X * ctx.needs_input_grad[0] + _Y * ctx.needs_input_grad[1]
        return *weighted(w, x, y, sums, ctx.kind, ctx.p, needs), None, None

    @staticmethod
    def vmap(info, in_dims, x, y, kind, p):
        x, y = fold(info.batch_size, (x, y), in_dims[:2])
        return unfold(_Sums.call(x, y, kind, p), info.batch_size), 0


def weighted(
    w: Tensor, x: Tensor, y: Tensor, sums: Tensor | None, kind: int, p: float, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``(w * sums).sum()`` with respect to x and y, those that are wanted."""
    function = _Weighted.call if needs_autograd(w, x, y) else _Weighted.forward
    return tuple(placed(function(w, x, y, sums, kind, p, needs), needs, range(2), 2))


class _Weighted(Function):
    """``(w, x, y, sums, kind, p, needs)``: the wanted ones of dx and dy."""

    @staticmethod
    def forward(w, x, y, sums, kind, p, needs):
        results = _backend.kernel(_BACKWARD, x.device.type)(
            w.contiguous(), dense(x), dense(y), sums, kind, p, needs
        )
        return chosen(results, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.kind, ctx.p, ctx.needs = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        w, x, y, sums = ctx.saved_tensors
        a, b = placed(cotangents, ctx.needs, range(2), 2)
        needs = _W * ctx.needs_input_grad[0]
        if ctx.kind not in (ABSOLUTE, MAXIMUM):  # whose second derivative is zero
            needs += _X * ctx.needs_input_grad[1] + _Y * ctx.needs_input_grad[2]
        found: list[Tensor | None] = [None] * 7
        if needs and not (a is None and b is None):
            arguments = (a, b, w, x, y, sums, ctx.kind, ctx.p, needs)
            tensors = (a, b, w, x, y)
            function = _Second.call if needs_autograd(*tensors) else _Second.forward
            wanted = [i for i, bit in enumerate((_W, _X, _Y)) if needs & bit]
            for i, result in zip(wanted, function(*arguments), strict=True):
                found[i] = result
        return tuple(found)

    @staticmethod
    def vmap(info, in_dims, *args):
        folded = fold(info.batch_size, args[:4], in_dims[:4])
        results = _Weighted.call(*folded, *args[4:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


class _Second(Function):
    """``(a, b, w, x, y, sums, kind, p, needs)``: the wanted derivatives of ``a dx + b dy``."""

    @staticmethod
    def forward(a, b, w, x, y, sums, kind, p, needs):
        a, b = (None if t is None else t.contiguous() for t in (a, b))
        results = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)(
            a, b, w.contiguous(), dense(x), dense(y), sums, kind, p, needs
        )
        return tuple(r for r, bit in zip(results, (_W, _X, _Y), strict=True) if needs & bit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.kind, ctx.p, ctx.needs = inputs[6:]

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = [i for i, bit in enumerate((_W, _X, _Y)) if ctx.needs & bit]

        def second(*given: Tensor | None) -> tuple[Tensor, ...]:
            results = _second_of_reference(*given, ctx.kind, ctx.p)
            return tuple(results[i] for i in wanted)

        found = pull_back(second, ctx.saved_tensors, cotangents, ctx.needs_input_grad)
        return (*found, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        folded = fold(info.batch_size, args[:6], in_dims[:6])
        results = _Second.call(*folded, *args[6:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


def _second_of_reference(a, b, w, x, y, kind: int, p: float):
    def first(w, x, y):
        _, pull = torch.func.vjp(partial(reference.pairwise_sums, kind=kind, p=p), x, y)
        return pull(w)

    _, pull = torch.func.vjp(first, w, x, y)
    a, b = (torch.zeros_like(t) if c is None else c for c, t in ((a, x), (b, y)))
    return pull((a, b))


class _SquaresByProducts(Function):
    """``(x, y, kind, p)`` for squares: one matrix product, exact where it would cancel."""

    @staticmethod
    def forward(x, y, kind, p):
        return squares_by_products(x, y, *centred(x, y))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, w):
        needs = _X * ctx.needs_input_grad[0] + _Y * ctx.needs_input_grad[1]
        return *weighted_by_products(w, *centred(*ctx.saved_tensors), needs), None, None

    @staticmethod
    def vmap(info, in_dims, x, y, kind, p):
        x, y = fold(info.batch_size, (x, y), in_dims[:2])
        return unfold(_SquaresByProducts.call(x, y, kind, p), info.batch_size), 0


def squares_by_products(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Squared distances of x and y by the products of their centred rows cx and cy; where those
    cancel, by the differences of x and y themselves, which centring would have rounded."""
    dots = cx @ cy.mT
    finish = _backend.kernel(_FINISH, x.device.type)
    finish(dots, dense(x), dense(y), cx.square().sum(-1), cy.square().sum(-1))
    return dots


def weighted_by_products(
    w: Tensor, x: Tensor, y: Tensor, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """`weighted` for squares, in plain differentiable torch."""
    dx = 2 * (w.sum(2, keepdim=True) * x - w @ y) if needs & _X else None
    dy = 2 * (w.sum(1).unsqueeze(2) * y - w.mT @ x) if needs & _Y else None
    return dx, dy


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both relative to the mean of y, so that no digits are lost to a common offset.

    No derivative passes through the mean: what is computed of the results does not depend on it.
    """
    centre = y.detach().mean(1, keepdim=True)
    centre = torch.where(centre.isfinite(), centre, 0)  # one NaN must not reach the other rows
    return x - centre, y - centre
