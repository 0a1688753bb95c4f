"""LayerNorm and RMSNorm whose gains and biases may differ from task to task.

torch differentiates its normalisation twice through some twenty full-size temporaries; here that
is one pass, as the forward pass and the gradient are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import Function, dense, fold, needs_autograd, pull_back, unfold
from fastmeta._checks import describe
from fastmeta._library import define
from fastmeta._settings import is_number
from fastmeta.reference import layer_norm as reference

_FORWARD = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor)",
    reference.layer_norm,
)
_BACKWARD = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor stats, bool rms) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, stats, rms: (
        torch.empty_like(x),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
)
_DOUBLE_BACKWARD = define(
    "layer_norm_double_backward(Tensor? u, Tensor? gw, Tensor? gb, Tensor dy, Tensor x, "
    "Tensor weight, Tensor stats, bool rms) -> (Tensor, Tensor, Tensor)",
    fake=lambda u, gw, gb, dy, x, weight, stats, rms: (
        torch.empty_like(x),
        torch.empty_like(x),
        weight.new_empty(weight.shape),
    ),
)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation over the last axis, with a gain and a bias of each task.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight_t + bias_t``

    Args:
        x: ``[T, ..., D]``, or ``[..., D]`` where gain and bias are shared; floating point.
        weight: Gain, ``[T, D]``, or ``[D]`` shared by all tasks. Default None: 1.
        bias: Of the shape of the gain. Default None: 0.
        eps: Above 0. Default 1e-5, as in `torch.nn.LayerNorm`.

    Returns:
        Of the shape and dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, eps not positive.

    Differentiable to any order in x, weight and bias, in reverse mode, also under ``torch.func``.
    Results do not depend on the number of threads. Ba et al. 2016, arXiv 1607.06450.
    """
    return _norm("layer_norm", x, weight, bias, eps, rms=False)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Normalisation by the root mean square over the last axis, with a gain of each task.

    ``y = x / sqrt(mean(x^2) + eps) * weight_t``

    Args:
        x: ``[T, ..., D]``, or ``[..., D]`` where the gain is shared; floating point.
        weight: Gain, ``[T, D]``, or ``[D]`` shared by all tasks. Default None: 1.
        eps: Above 0. Default 1e-6.

    Returns:
        Of the shape and dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, eps not positive.

    Differentiable as :func:`layer_norm`. Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return _norm("rms_norm", x, weight, None, eps, rms=True)


def _norm(op: str, x: Tensor, weight, bias, eps: float, rms: bool) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor [..., D], got {describe(x)}")
    if not is_number(eps) or not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps must be a finite number above 0, got {eps!r}")
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        like = isinstance(vector, Tensor) and (vector.dtype, vector.device) == (x.dtype, x.device)
        shapes = [[width]] + ([[x.shape[0], width]] if x.dim() > 1 else [])
        if not like or list(vector.shape) not in shapes:
            forms = " or ".join(map(str, shapes))
            raise ValueError(
                f"{op}: {name} must be {forms}, {x.dtype} on {x.device} like x, "
                f"got {describe(vector)}"
            )
    if weight is None:
        weight = x.new_ones(width)
    if bias is not None and bias.dim() != weight.dim():
        weight, bias = (v.expand(x.shape[0], width) if v.dim() == 1 else v for v in (weight, bias))
    weight, bias = (v.unsqueeze(0) if v is not None and v.dim() == 1 else v for v in (weight, bias))
    return norm_rows(x.reshape(x.shape[:-1].numel(), width), weight, bias, eps, rms).view(x.shape)


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel serves rows like these, rather than the reference."""
    return _backend.takes(_FORWARD, x)


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """The operators on rows ``[R, D]`` and ``[1 or T, D]``, without their checks."""
    if not has_kernel(x):
        return reference.layer_norm(x, weight, bias, eps, rms)[0]
    if needs_autograd(x, weight, bias):
        return _Norm.call(x, weight, bias, eps, rms)[0]
    return _Norm.forward(x, weight, bias, eps, rms)[0]


class _Norm(Function):
    """``(x, weight, bias, eps, rms)``: y, and the statistics for the gradient."""

    @staticmethod
    def forward(x, weight, bias, eps, rms):
        kernel = _backend.kernel(_FORWARD, x.device.type)
        return kernel(x.contiguous(), dense(weight), dense(bias), eps, rms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.eps, ctx.rms = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
        if dy is None:
            return (None,) * 5
        x, weight, stats = ctx.saved_tensors
        args = (dy, x, weight, stats, ctx.eps, ctx.rms)
        run = _Gradient.call if needs_autograd(dy, x, weight) else _Gradient.forward
        found = run(*args)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in wanted), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x, weight, bias, eps, rms):
        x, weight, bias = fold(info.batch_size, (x, weight, bias), in_dims)
        found = _Norm.call(x, weight, bias, eps, rms)
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0)


class _Gradient(Function):
    """``(dy, x, weight, stats, eps, rms)``: dx, dweight and dbias."""

    @staticmethod
    def forward(dy, x, weight, stats, eps, rms):
        kernel = _backend.kernel(_BACKWARD, x.device.type)
        return kernel(dy.contiguous(), x.contiguous(), dense(weight), stats, rms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.eps, ctx.rms = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        if all(c is None for c in cotangents):
            return (None,) * 6
        *given, stats = ctx.saved_tensors
        run = _Second.call if needs_autograd(*cotangents, *given) else _Second.forward
        found = run(*cotangents, *given, stats, ctx.eps, ctx.rms)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in wanted), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        folded = fold(info.batch_size, args[:4], in_dims)
        found = _Gradient.call(*folded, *args[4:])
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0, 0)


class _Second(Function):
    """``(u, gw, gb, dy, x, weight, stats, eps, rms)``: the derivatives of ``u dx + gw dw + gb db``
    to dy, x and the weight. What comes after differentiates the reference."""

    @staticmethod
    def forward(u, gw, gb, dy, x, weight, stats, eps, rms):
        kernel = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)
        u = u if u is None else u.contiguous()
        given = (dy.contiguous(), x.contiguous(), dense(weight), stats, rms)
        return kernel(u, dense(gw), dense(gb), *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.eps, ctx.rms = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        def second(*given: Tensor | None) -> tuple[Tensor, ...]:
            return _second_of_reference(*given, ctx.eps, ctx.rms)

        found = pull_back(second, ctx.saved_tensors, cotangents, ctx.needs_input_grad)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        folded = fold(info.batch_size, args[:7], in_dims)
        found = _Second.call(*folded, *args[7:])
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0, 0)


def _second_of_reference(u, gw, gb, dy, x, weight, eps, rms) -> tuple[Tensor, ...]:
    def gradient(dy, x, weight):
        bias = torch.zeros_like(weight)
        _, pull = torch.func.vjp(
            lambda x, w, b: reference.layer_norm(x, w, b, eps, rms)[0], x, weight, bias
        )
        return pull(dy)

    found, pull = torch.func.vjp(gradient, dy, x, weight)
    return pull(
        tuple(
            torch.zeros_like(f) if c is None else c for f, c in zip(found, (u, gw, gb), strict=True)
        )
    )
