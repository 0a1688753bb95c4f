"""Activations whose second derivative is one short expression.

torch differentiates the exact GELU twice through a dozen full-size temporaries; in a second-order
step of a small transformer that is a tenth of the time. Here it is
``gelu''(x) = phi(x) (2 - x^2)`` with phi the normal density.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class _Gelu(torch.autograd.Function):
    """``x -> x Phi(x)``, derivative :class:`_GeluGrad`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _GeluGrad.apply(d_out, x) if torch.is_grad_enabled() else _grad(d_out, x)


class _GeluGrad(torch.autograd.Function):
    """``(d, x) -> d gelu'(x)``; its own derivative is made of differentiable torch operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d_out: Tensor, x: Tensor) -> Tensor:
        return _grad(d_out, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dd: Tensor) -> tuple[Tensor | None, Tensor | None]:
        d_out, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            pdf = torch.exp(-0.5 * x.square()) * _INV_SQRT_2PI
            return _GeluGrad.apply(dd, x), dd * d_out * (pdf * (2 - x.square()))
        d_d = _grad(dd, x) if ctx.needs_input_grad[0] else None
        d_x = None
        if ctx.needs_input_grad[1]:
            square = x.square()
            d_x = torch.mul(square, -0.5).exp_().mul_(_INV_SQRT_2PI).mul_(dd).mul_(d_out)
            d_x = d_x.mul_(square.neg_().add_(2))
        return d_d, d_x


def _grad(d_out: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d_out, x)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, ``x Phi(x)``; differentiable to any order."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Gelu.apply(x)
    return F.gelu(x)


def use_in(structure: nn.Module) -> None:
    """Run every exact GELU module of a copied structure through :func:`gelu`."""
    for module in structure.modules():
        exact = isinstance(module, nn.GELU) and module.approximate == "none"
        if exact or (type(module) is GELUActivation and module.act is F.gelu):
            module.forward = gelu
