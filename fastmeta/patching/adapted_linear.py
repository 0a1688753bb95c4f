"""A linear layer after some steps of gradient descent on its weight.

A step's gradient is a product of what the layer read and of the gradient of what it gave, so the
weight of task t is ``W + G_t^T X_t`` with ``X_t [r, K]`` and ``G_t [r, N]`` of the steps' rows:
either written out, or applied as it is, ``y = x W^T + (x X_t^T) G_t``. Taking the gradient of an
inner loss to the layers' outputs instead of their weights leaves out the ``[T, P]`` of a gradient
and an update that reads it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta._autograd import Function, needs_autograd, transformed
from fastmeta.ops.batched_linear import (
    Now,
    multiplier,
    over_tasks,
    second_gradients,
    weight_gradient,
)


@dataclass
class Gate:
    """What the layers of one inner loop have in common.

    Attributes:
        inner: Whether the backward pass under way is that of an inner loss. It asks for gradients
            of layers' inputs and outputs only; a Function cannot see which of its inputs a pass
            asks for.
        bf16: Whether products round their factors to bfloat16.
    """

    inner: bool = False
    bf16: bool = False


class Gathering:
    """The gradient of one written-out weight while a backward pass gathers it: the products that
    contribute accumulate in one buffer. A :class:`fastmeta.ops.batched_linear.Landing`.

    Args:
        weight: It; None as long as it is not computed, see :meth:`gather_for`.

    Attributes:
        given_away: Whether nobody else holds the gradient that autograd brings.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self.like: tuple | None = None
        self.given_away = False
        self.open: dict[int, Tensor] = {}
        if weight is not None:
            self.gather_for(weight)

    def gather_for(self, weight: Tensor) -> None:
        self.like = weight.shape, weight.dtype, weight.device

    def found(self) -> Tensor | None:
        """What came so far in this backward pass."""
        return self.open.get(torch._C._current_graph_task_id())

    def place(self, differentiable: bool) -> tuple[Tensor, bool] | None:
        if differentiable or self.like is None:
            return None
        buffer = self.found()
        if buffer is not None:
            return buffer, True
        shape, dtype, device = self.like
        buffer = torch.empty(shape, dtype=dtype, device=device)
        self.open[torch._C._current_graph_task_id()] = buffer
        return buffer, False

    def give(self, gradient: Tensor) -> None:
        """Add a gradient that nobody else holds."""
        found = self.found()
        if found is None:
            self.open[torch._C._current_graph_task_id()] = gradient
        else:
            found.add_(gradient)

    def take(self, gradient: Tensor | None) -> tuple[Tensor | None, bool]:
        """Everything that came, with what autograd brought; whether nobody else holds it."""
        found = self.open.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return gradient, self.given_away and gradient is not None
        return found if gradient is None else found + gradient, True

    def finish(self, gradient: Tensor | None) -> Tensor | None:
        """Everything that came in a backward pass that is over, with what it brought."""
        _, found = self.open.popitem() if self.open else (None, None)
        if found is None or gradient is None:
            return gradient if found is None else found
        return found + gradient


@dataclass
class Descent:
    """A step of gradient descent that a layer's inner backward pass takes on its weight, in one go
    with the gradient of its input: the products read the same rows and the same weight.

    Attributes:
        landing: That of the weight before, where it has one.
        taken: The weight after, with its landing; None as long as no pass came by.
    """

    landing: Gathering | None = None
    taken: tuple[Tensor, Gathering] | None = None


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
    descent: Descent | None = None,
) -> Tensor:
    """``x W^T + (x a^T) b + base``.

    Args:
        x: ``[B, M, K]``, B tasks, or heads of tasks.
        weight: ``[N, K]`` per product, ``[K, N]`` without `nt`: ``[B, ., .]``, or ``[H, ., .]``
            that all ``B / H`` tasks share.
        a, b: ``[B, r, K]`` and ``[B, r, N]``, or None.
        base: ``[B, 1, N]``, ``[B, M, N]`` or None.
        landing: Where gradients of a weight ``[B, ., .]`` gather.
        descent: Where an inner backward pass that is differentiated leaves ``W + d_y^T x``.
    """
    return _linear(x, weight, a, b, base, nt, False, gate, landing, descent)[0]


def descend(
    weight: Tensor, x: Tensor, g: Tensor, *, nt: bool, gate: Gate, landing: Gathering | None
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
        return _Descend.forward(weight, x, g, nt, gate, landing, after), after
    return _Descend.call(weight, x, g, nt, gate, landing, after), after


def _linear(
    x, weight, a, b, base, nt, total, gate, landing, descent=None
) -> tuple[Tensor, Tensor | None]:
    """:func:`adapted_linear`, and the sum of the rows of x where `total`."""
    args = (x, weight, a, b, base, nt, total, gate, landing, descent)
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


class _Linear(Function):
    @staticmethod
    def forward(x, weight, a, b, base, nt, total, gate, landing, descent):
        mm, sums = multiplier(False, x, gate.bf16), None
        y = _times(mm.alone, x, weight.mT if nt else weight, base)
        if a is not None:
            y = mm(mm(x, a.mT), b, y, y)
        if total:
            sums = mm.sum_of_rows(x)
        mm.run()
        return y, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, a, b, base, ctx.nt, _, ctx.gate, ctx.landing, descent = inputs
        # The weight after is made of this graph, which must not hold it.
        ctx.descent = (lambda: None) if descent is None else weakref.ref(descent)
        ctx.save_for_backward(x, weight, a, b)
        ctx.base_rows = 0 if base is None else base.shape[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_total: Tensor | None) -> tuple:
        x, weight, a, b = ctx.saved_tensors
        need, nt, rest = ctx.needs_input_grad, ctx.nt, (None,) * 5
        d_x = d_weight = d_a = d_b = d_base = None
        if d_y is None:
            if d_total is not None and need[0]:
                d_x = d_total.expand_as(x)
            return d_x, None, None, None, None, *rest
        if need[4]:
            d_base = d_y
        if ctx.gate.inner:
            total = need[4] and ctx.base_rows == 1
            descent = ctx.descent()
            if need[0] and descent is not None and torch.is_grad_enabled():
                d_x, d_total = _take_step(descent, x, weight, d_y, nt, total, ctx.gate)
            elif need[0]:
                d_x, d_total = _linear(
                    d_y, weight, b, a, None, not nt, total, ctx.gate, ctx.landing
                )
            elif total:
                d_total = d_y.sum(1, keepdim=True)
            return d_x, None, None, None, d_total if total else d_base, *rest
        differentiable = torch.is_grad_enabled() or transformed(d_y, d_total)
        mm = multiplier(differentiable, d_y, ctx.gate.bf16)
        own = weight.shape[0] == x.shape[0]
        if need[0]:
            back = weight if nt else weight.mT
            d_x = mm(d_y, back, d_total) if own else _times(mm.alone, d_y, back, d_total)
        if a is not None:
            low = mm(d_y, b.mT)  # [B, M, r]
            if need[0]:
                d_x = mm(low, a, d_x, d_x)
            if need[2]:
                d_a = mm(low.mT, x)
            if need[3]:
                d_b = mm(mm(x, a.mT).mT, d_y)
        if need[1] and own:
            d_weight = weight_gradient(mm, d_y, x, nt, ctx.landing, differentiable)
        elif need[1]:
            d_weight = _over_tasks(mm, d_y, x, weight.shape[0], nt)
        if need[4] and ctx.base_rows == 1:
            d_base = mm.sum_of_rows(d_y)
        mm.run()
        return d_x, d_weight, d_a, d_b, d_base, *rest


def _over_tasks(mm: Now, d_y: Tensor, x: Tensor, heads: int, nt: bool) -> Tensor:
    """The gradient ``[H, ., .]`` of a weight that all tasks share: one sum over the rows of all."""
    left, right = (d_y, x) if nt else (x, d_y)
    if mm.lands and heads == 1:
        return over_tasks(left.mT, right, mm.bf16)
    return torch.bmm(_by_heads(left, heads).mT, _by_heads(right, heads))


def _take_step(
    descent: Descent, x: Tensor, weight: Tensor, d_y: Tensor, nt: bool, total: bool, gate: Gate
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x and the sum of d_y's rows; the weight after goes to the descent."""
    after = Gathering()
    d_x, weight, rows = _Step.call(x, weight, d_y, nt, total, gate, descent.landing, after)
    descent.taken = weight, after
    return d_x, rows


class _Step(Function):
    """``(x, W, dy) -> (dx, W + dy^T x, sum of dy's rows)``, W of each task or one that all
    share."""

    @staticmethod
    def forward(x, weight, d_y, nt, total, gate, before, after):
        mm, rows = multiplier(False, d_y, gate.bf16), None
        mine = weight.expand(x.shape[0], -1, -1)
        left, right = (d_y, x) if nt else (x, d_y)
        d_x = mm(d_y, mine if nt else mine.mT)
        stepped = mm(left.mT, right, mine)
        if total:
            rows = mm.sum_of_rows(d_y)
        mm.run()
        return d_x, stepped, rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, d_y, ctx.nt, _, ctx.gate, ctx.before, ctx.after = inputs
        stepped = output[1]
        ctx.after.gather_for(stepped)
        ctx.save_for_backward(x, weight, d_y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_rows: Tensor | None
    ) -> tuple:
        (x, weight, d_y), nt, need = ctx.saved_tensors, ctx.nt, ctx.needs_input_grad
        differentiable = torch.is_grad_enabled() or transformed(g_x, g_weight, g_rows)
        g_weight, owned = ctx.after.take(g_weight)
        shared = weight.shape[0] < x.shape[0]
        mine = weight.expand(x.shape[0], -1, -1)
        mm = multiplier(differentiable, x, ctx.gate.bf16)
        d_dy, d_x = second_gradients(
            mm, g_x, g_weight, g_rows, d_y, x, mine, nt, (need[2], need[0])
        )
        own = need[1] and not shared
        d_weight = g_weight if own else None
        if own and g_x is not None:
            left, right = (d_y, g_x) if nt else (g_x, d_y)
            d_weight = mm(left.mT, right, g_weight, g_weight if owned else None)
            owned = True
        mm.run()
        if own and owned and not differentiable and ctx.before is not None:
            # The same buffer gathers the gradient of the weight before.
            ctx.before.give(d_weight)
            d_weight = None
        if need[1] and shared:
            d_weight = None if g_weight is None else g_weight.sum(0, keepdim=True)
            if g_x is not None:
                rows = _over_tasks(mm, d_y, g_x, 1, nt)
                d_weight = rows if d_weight is None else d_weight + rows
        return d_x, d_weight, d_dy, None, None, None, None, None


class _Descend(Function):
    """``(W, x, g)`` -> the weight after a step; see :func:`descend`."""

    @staticmethod
    def forward(weight, x, g, nt, gate, before, after):
        return _descended(multiplier(False, x, gate.bf16).alone, weight, x, g, nt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, x, g, ctx.nt, ctx.gate, ctx.before, ctx.after = inputs
        ctx.after.gather_for(output)
        ctx.save_for_backward(x, g)
        ctx.shared = weight.shape[0] if weight.shape[0] < x.shape[0] else 0
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple:
        (x, g), nt = ctx.saved_tensors, ctx.nt
        differentiable = torch.is_grad_enabled() or transformed(d)
        d, owned = ctx.after.take(d)
        d_weight = d_x = d_g = None
        if d is None:
            return d_weight, d_x, d_g, None, None, None, None
        mm, need = multiplier(differentiable, x, ctx.gate.bf16), ctx.needs_input_grad
        if need[1]:
            d_x = mm(g, d if nt else d.mT)
        if need[2]:
            d_g = mm(x, d.mT if nt else d)
        mm.run()
        if need[0] and ctx.shared:
            d_weight = d.unflatten(0, (-1, ctx.shared)).sum(0)
        elif need[0] and owned and not differentiable and ctx.before is not None:
            ctx.before.give(d)  # the same buffer gathers the gradient of the weight before
        elif need[0]:
            d_weight = d
        return d_weight, d_x, d_g, None, None, None, None
