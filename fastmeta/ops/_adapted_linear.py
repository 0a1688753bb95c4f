"""A linear layer after some steps of gradient descent on its weight.

A step's gradient is a product of what the layer read and of the gradient of what it gave, so the
weight of task t is ``W + G_t^T X_t`` with ``X_t [r, K]`` and ``G_t [r, N]`` of the steps' rows:
either written out, or applied as it is, ``y = x W^T + (x X_t^T) G_t``. Taking the gradient of an
inner loss to the layers' outputs instead of their weights leaves out the ``[T, P]`` of a gradient
and an update that reads it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta._autograd import Function, needs_autograd, transformed
from fastmeta.ops.batched_linear import _land, affine, product


@dataclass
class Gate:
    """Whether the backward pass under way is that of an inner loss.

    It asks for gradients of layers' inputs and outputs only; a Function cannot see which of its
    inputs a pass asks for.
    """

    inner: bool = False


class Gathering:
    """The gradient of one written-out weight while a backward pass gathers it: the products that
    contribute accumulate in one buffer. A :class:`fastmeta.ops.batched_linear.Landing`."""

    def __init__(self) -> None:
        self.like: Tensor | None = None
        self.buffer: Tensor | None = None
        self.key: int | None = None

    def found(self) -> Tensor | None:
        """What came so far in this backward pass."""
        key = torch._C._current_graph_task_id()
        if key != self.key:
            self.buffer, self.key = None, key
        return self.buffer

    def place(self, differentiable: bool) -> tuple[Tensor, bool] | None:
        if differentiable or self.like is None:
            return None
        more = self.found() is not None
        if not more:
            shape, dtype, device = self.like
            self.buffer = torch.empty(shape, dtype=dtype, device=device)
        return self.buffer, more

    def give(self, gradient: Tensor) -> None:
        """Add a gradient that nobody else holds."""
        if self.found() is None:
            self.buffer = gradient
        else:
            self.buffer.add_(gradient)

    def take(self, gradient: Tensor | None) -> Tensor | None:
        """Everything that came, with what autograd brought."""
        found, self.buffer = self.found(), None
        if found is None or gradient is None:
            return gradient if found is None else found
        return found + gradient


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    base: Tensor | None,
    *,
    nt: bool,
    gate: Gate,
    landing: Gathering | None = None,
) -> Tensor:
    """``x W^T + (x a^T) b + base``.

    Args:
        x: ``[B, M, K]``, B tasks, or heads of tasks.
        weight: ``[N, K]`` per product, ``[K, N]`` without `nt`: ``[B, ., .]``, or ``[H, ., .]``
            that all ``B / H`` tasks share.
        a, b: ``[B, r, K]`` and ``[B, r, N]``, or None.
        base: ``[B, 1, N]``, ``[B, M, N]`` or None.
        landing: Where gradients of a weight ``[B, ., .]`` gather.
    """
    return _linear(x, weight, a, b, base, nt, False, gate, landing)[0]


def descend(
    weight: Tensor, x: Tensor, g: Tensor, *, nt: bool, landing: Gathering | None
) -> tuple[Tensor, Gathering]:
    """``W + g^T x`` written out, ``[B, N, K]`` (``W + x^T g``, ``[B, K, N]``, without `nt`).

    Args:
        weight: As in :func:`adapted_linear`.
        x, g: ``[B, M, K]`` and ``[B, M, N]``.
        landing: That of the weight, where it has one.

    Returns:
        The weight and its landing.
    """
    after = Gathering()
    if not needs_autograd(weight, x, g):
        return _descended(product, weight, x, g, nt), after
    return _Descend.call(weight, x, g, nt, landing, after), after


def _linear(x, weight, a, b, base, nt, total, gate, landing) -> tuple[Tensor, Tensor | None]:
    """:func:`adapted_linear`, and the sum of the rows of x where `total`."""
    args = (x, weight, a, b, base, nt, total, gate, landing)
    if needs_autograd(x, weight, a, b, base):
        return _Linear.call(*args)
    return _Linear.forward(*args)


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """``[T * H, M, K]`` -> ``[H, T * M, K]``."""
    if heads == 1:
        return x.reshape(1, -1, x.shape[2])
    return x.unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2)


def _times(mm: Callable, x: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    """``x W + base`` for ``[B, M, K]`` and ``[B or H, K, N]``."""
    heads = weight.shape[0]
    if heads in (1, x.shape[0]):
        return mm(x, weight.expand(x.shape[0], -1, -1), base)
    y = mm(_by_heads(x, heads), weight).unflatten(1, (-1, x.shape[1]))  # [H, T, M, N]
    y = y.transpose(0, 1).flatten(0, 1)
    return y if base is None else y + base


def _descended(mm: Callable, weight: Tensor, x: Tensor, g: Tensor, nt: bool) -> Tensor:
    left, right = (g, x) if nt else (x, g)
    copies = x.shape[0] // weight.shape[0]
    if weight.shape[0] == 1:
        weight = weight.expand(copies, -1, -1)
    elif copies > 1:
        weight = weight.repeat(copies, 1, 1)
    return mm(left.mT, right, weight)


def _mm(differentiable: bool) -> Callable:
    """``a b + base``, recorded by autograd where it must be."""
    return partial(affine, nt=False) if differentiable else product


class _Linear(Function):
    @staticmethod
    def forward(x, weight, a, b, base, nt, total, gate, landing):
        y = _times(product, x, weight.mT if nt else weight, base)
        if a is not None:
            y = product(product(x, a.mT), b, y)
        return y, x.sum(1, keepdim=True) if total else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, a, b, base, ctx.nt, _, ctx.gate, ctx.landing = inputs
        ctx.save_for_backward(x, weight, a, b)
        ctx.base_rows = 0 if base is None else base.shape[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_total: Tensor | None) -> tuple:
        x, weight, a, b = ctx.saved_tensors
        need, nt = ctx.needs_input_grad, ctx.nt
        d_x = d_weight = d_a = d_b = d_base = None
        if d_y is None:
            if d_total is not None and need[0]:
                d_x = d_total.expand_as(x)
            return d_x, None, None, None, None, None, None, None, None
        if need[4]:
            d_base = d_y
        if ctx.gate.inner:
            total = need[4] and ctx.base_rows == 1
            if need[0]:
                d_x, d_total = _linear(
                    d_y, weight, b, a, None, not nt, total, ctx.gate, ctx.landing
                )
            elif total:
                d_total = d_y.sum(1, keepdim=True)
            return d_x, None, None, None, d_total if total else d_base, None, None, None, None
        differentiable = torch.is_grad_enabled() or transformed(d_y, d_total)
        mm = _mm(differentiable)
        low = None if a is None else mm(d_y, b.mT)  # [B, M, r]
        if need[0]:
            d_x = _times(mm, d_y, weight if nt else weight.mT, d_total)
            d_x = d_x if a is None else mm(low, a, d_x)
        if need[1]:
            left, right = (d_y, x) if nt else (x, d_y)
            if weight.shape[0] < x.shape[0]:
                left, right = (_by_heads(t, weight.shape[0]) for t in (left, right))
                # A library's product: one sum over the rows of all tasks.
                d_weight = torch.bmm(left.mT, right)
            elif differentiable:
                d_weight = mm(left.mT, right)
            else:
                d_weight = _land(left, right, ctx.landing, False)
        if need[2]:
            d_a = mm(low.mT, x)
        if need[3]:
            d_b = mm(mm(x, a.mT).mT, d_y)
        if need[4] and ctx.base_rows == 1:
            d_base = d_y.sum(1, keepdim=True)
        return d_x, d_weight, d_a, d_b, d_base, None, None, None, None


class _Descend(Function):
    """``(W, x, g)`` -> the weight after a step; see :func:`descend`."""

    @staticmethod
    def forward(weight, x, g, nt, before, after):
        return _descended(product, weight, x, g, nt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, x, g, ctx.nt, ctx.before, ctx.after = inputs
        ctx.after.like = (output.shape, output.dtype, output.device)
        ctx.save_for_backward(x, g)
        ctx.shared = weight.shape[0] if weight.shape[0] < x.shape[0] else 0
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple:
        (x, g), nt = ctx.saved_tensors, ctx.nt
        differentiable = torch.is_grad_enabled() or transformed(d)
        owned = d is None
        d = ctx.after.take(d)
        d_weight = d_x = d_g = None
        if d is None:
            return d_weight, d_x, d_g, None, None, None
        mm, need = _mm(differentiable), ctx.needs_input_grad
        if need[1]:
            d_x = mm(g, d if nt else d.mT)
        if need[2]:
            d_g = mm(x, d.mT if nt else d)
        if need[0] and ctx.shared:
            d_weight = d.unflatten(0, (-1, ctx.shared)).sum(0)
        elif need[0] and owned and not differentiable and ctx.before is not None:
            ctx.before.give(d)  # the same buffer gathers the gradient of the weight before
        elif need[0]:
            d_weight = d
        return d_weight, d_x, d_g, None, None, None
