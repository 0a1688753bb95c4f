"""The task-batched affine map ``y_t = x_t W_t^T + b_t`` with few passes over memory in any order.

torch's own graph of a batched product leaves weight gradients transposed, copies them, and adds
the three terms of its second derivative one by one. Here every product is written in the layout it
is needed in, and the terms accumulate inside the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def affine(x: Tensor, weight: Tensor, base: Tensor | None = None, *, nt: bool = True) -> Tensor:
    """``x W^T + base`` for every task.

    Args:
        x: ``[T, M, K]``.
        weight: ``[T, N, K]``, or ``[T, K, N]`` without `nt`.
        base: ``[T, 1, N]`` (a bias) or ``[T, M, N]``.
        nt: Whether the weight is stored ``[out, in]``, as in `nn.Linear`.

    Returns:
        ``[T, M, N]``; differentiable to any order.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # Before the Function, whose backward runs outside the autocast region on what it saved.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        base = base if base is None else base.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Affine.apply(x, weight, base, nt)
    return _affine(x, weight, base, nt)


def _affine(x: Tensor, weight: Tensor, base: Tensor | None, nt: bool) -> Tensor:
    weight = weight.mT if nt else weight
    return torch.bmm(x, weight) if base is None else torch.baddbmm(base, x, weight)


def _reduce(d_y: Tensor, rows: int) -> Tensor:
    """The gradient of a base of `rows` rows."""
    return d_y.sum(1, keepdim=True) if rows == 1 else d_y


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, base: Tensor | None, nt: bool) -> Tensor:
        return _affine(x, weight, base, nt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, base, nt = inputs
        ctx.save_for_backward(x, weight)
        ctx.nt = nt
        ctx.base_rows = 0 if base is None else base.shape[1]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], ctx.base_rows if ctx.needs_input_grad[2] else 0)
        run = _AffineGrad.apply if torch.is_grad_enabled() else _affine_grad
        return (*run(d_y, x, weight, ctx.nt, needs), None)


def _affine_grad(
    d_y: Tensor, x: Tensor, weight: Tensor, nt: bool, needs: tuple[bool, bool, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_x = torch.bmm(d_y, weight if nt else weight.mT) if needs[0] else None
    d_weight = None
    if needs[1]:
        d_weight = torch.bmm(d_y.mT, x) if nt else torch.bmm(x.mT, d_y)
    return d_x, d_weight, _reduce(d_y, needs[2]) if needs[2] else None


class _AffineGrad(torch.autograd.Function):
    """``(dy, x, W) -> (dx, dW, dbase)``; its own derivative is made of differentiable products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d_y: Tensor, x: Tensor, weight: Tensor, nt: bool, needs: tuple) -> tuple:
        d_x, d_weight, d_base = _affine_grad(d_y, x, weight, nt, needs)
        # An output may not be an input as it is.
        return d_x, d_weight, d_base.view_as(d_base) if d_base is d_y else d_base

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        d_y, x, weight, nt, _ = inputs
        ctx.save_for_backward(d_y, x, weight)
        ctx.nt = nt
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_base: Tensor | None
    ) -> tuple:
        d_y, x, weight = ctx.saved_tensors
        nt = ctx.nt
        d_dy = d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_dy = g_base if g_base is None else g_base.expand_as(d_y)
            for left, right in ((g_x, weight), (x, g_weight)):
                if left is not None and right is not None:
                    d_dy = affine(left, right, d_dy, nt=nt)
        if ctx.needs_input_grad[1] and g_weight is not None:
            d_x = torch.bmm(d_y, g_weight if nt else g_weight.mT)
        if ctx.needs_input_grad[2] and g_x is not None:
            d_weight = torch.bmm(d_y.mT, g_x) if nt else torch.bmm(g_x.mT, d_y)
        return d_dy, d_x, d_weight, None, None
