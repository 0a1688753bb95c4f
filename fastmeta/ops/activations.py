"""Activations whose second derivative is one pass over memory.

torch differentiates the exact GELU twice through a dozen full-size temporaries; in a second-order
step of a small transformer that was a tenth of the time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import Function, needs_autograd, pull_back, second_derivative
from fastmeta._checks import describe
from fastmeta._library import define
from fastmeta.reference import activations as reference
from fastmeta.reference.activations import GELU, GELU_TANH, SILU

_FORWARD = define("activation(Tensor x, int kind) -> Tensor", reference.activation)
_BACKWARD = define(
    "activation_backward(Tensor d, Tensor x, int kind) -> Tensor",
    fake=lambda d, x, kind: torch.empty_like(x),
)
_DOUBLE_BACKWARD = define(
    "activation_double_backward(Tensor g, Tensor d, Tensor x, int kind) -> (Tensor, Tensor)",
    fake=lambda g, d, x, kind: (torch.empty_like(x), torch.empty_like(x)),
)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x Phi(x)`` with Phi the normal distribution, elementwise.

    Args:
        x: Floating point, any shape.
        approximate: ``"none"``, or ``"tanh"`` for
            ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``. Default ``"none"``.

    Returns:
        Contiguous, of the shape and dtype of x.

    Raises:
        ValueError: Another `approximate`, x no floating-point tensor.

    Differentiable to any order in reverse mode, also under ``torch.func``. Hendrycks and Gimpel
    2016, arXiv 1606.08415.
    """
    kinds = {"none": GELU, "tanh": GELU_TANH}
    if approximate not in kinds:
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _checked("gelu", x, kinds[approximate])


def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)``, elementwise.

    Args:
        x: Floating point, any shape.

    Returns:
        Contiguous, of the shape and dtype of x.

    Raises:
        ValueError: x no floating-point tensor.

    Differentiable to any order in reverse mode, also under ``torch.func``. Elfwing et al. 2017,
    arXiv 1702.03118.
    """
    return _checked("silu", x, SILU)


def _checked(op: str, x: object, kind: int) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor, got {describe(x)}")
    return activation(x, kind)


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel serves tensors like this one, rather than the reference."""
    return _backend.takes(_FORWARD, x)


def activation(x: Tensor, kind: int) -> Tensor:
    """The operators by number, without their checks."""
    if not has_kernel(x):
        return reference.activation(x, kind)
    return _Activation.call(x, kind) if needs_autograd(x) else _Activation.forward(x, kind)


def _elementwise(function: type[Function], info: Any, in_dims: tuple, args: tuple, results: int):
    """A vmapped axis is one axis more."""
    tensors = [
        t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(args, in_dims, strict=True)
        if isinstance(t, Tensor)
    ]
    found = function.call(*tensors, args[-1])
    return found, 0 if results == 1 else (0,) * results


class _Activation(Function):
    @staticmethod
    def forward(x, kind):
        return _backend.kernel(_FORWARD, x.device.type)(x.contiguous(), kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.kind = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        run = _Gradient.call if needs_autograd(d, x) else _Gradient.forward
        return run(d, x, ctx.kind), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _elementwise(_Activation, info, in_dims, args, 1)


class _Gradient(Function):
    """``(d, x, kind)`` -> ``d f'(x)``."""

    @staticmethod
    def forward(d, x, kind):
        return _backend.kernel(_BACKWARD, x.device.type)(d.contiguous(), x.contiguous(), kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.kind = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        d, x = ctx.saved_tensors
        run = _Second.call if needs_autograd(g, d, x) else _Second.forward
        found = zip(run(g, d, x, ctx.kind), ctx.needs_input_grad, strict=False)
        return *(t if need else None for t, need in found), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _elementwise(_Gradient, info, in_dims, args, 1)


class _Second(Function):
    """``(g, d, x, kind)`` -> ``g f'(x), g d f''(x)``; what comes after differentiates the
    reference."""

    @staticmethod
    def forward(g, d, x, kind):
        kernel = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)
        return kernel(g.contiguous(), d.contiguous(), x.contiguous(), kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.kind = inputs[3]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        second = partial(second_derivative, partial(reference.activation, kind=ctx.kind))
        found = pull_back(second, ctx.saved_tensors, cotangents, ctx.needs_input_grad)
        return *found, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _elementwise(_Second, info, in_dims, args, 2)
