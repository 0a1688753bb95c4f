"""Cross-entropy of a language model's next words without their logits.

The logits of all tokens are a language model's largest tensor by far: of 2,048 tokens and 151,936
words they are 1.2 GB, and second order holds three such tensors at a time. Here a block of tokens
meets one block of words after the other; the gradient to the tokens is summed on the way, so that a
first backward pass computes nothing, and its derivative meets the words once more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
    each,
    fold,
    needs_autograd,
    pull_back,
    second_derivative,
    unfold,
)
from fastmeta._checks import describe
from fastmeta._library import define
from fastmeta.ops.cross_entropy import rows_cross_entropy
from fastmeta.reference import linear_cross_entropy as reference

_FORWARD = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignored, "
    "bool wanted, bool bf16) -> (Tensor, Tensor, Tensor)",
    reference.linear_cross_entropy,
)
_DOUBLE_BACKWARD = define(
    "linear_cross_entropy_double_backward(Tensor v, Tensor g, Tensor x, Tensor weight, "
    "Tensor? bias, Tensor labels, Tensor stats, Tensor slopes, bool bf16) -> (Tensor, Tensor)",
    fake=lambda v, g, x, *others: (torch.empty_like(g), torch.empty_like(x)),
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of the logits ``z = W x + b`` of every row, ``log sum_j exp(z_j) - z_label``.

    Args:
        x: ``[..., D]``, floating point.
        weight: ``[C, D]``, in the dtype of `x`: a vector for each class.
        labels: int64 ``[...]``, each from 0 to C - 1 or `ignore_index`.
        bias: ``[C]``, or None; -inf for a class that cannot be.
        ignore_index: Label of a row that does not count: its loss and its derivatives are 0,
            whatever its numbers. On a CPU it costs nothing. Default -100.

    Returns:
        ``[...]``, in float32 where `x` is narrower.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, no class.
        RuntimeError: On a CPU, a label out of range. (On a GPU its loss is NaN.)

    Differentiable to any order in `x`, in reverse mode, also under ``torch.func``; third order
    forms the logits. Where `weight` or `bias` requires grad they are formed, too, and it is
    differentiable in all three. Results do not depend on the number of threads or on other rows.
    Products follow autocast.

    Chunks of logits whose gradient is taken in the forward pass: Hsu et al. 2024, "Liger Kernel"
    (there, differentiable once); no logits at all: Wijmans et al. 2024, "Cut Your Losses".
    """
    check(x, weight, labels, bias)
    rows = x.reshape(labels.numel(), x.shape[-1])
    losses = rows_losses(rows, weight, bias, labels.reshape(-1), ignore_index)
    return losses.view(labels.shape)


def check(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for what :func:`linear_cross_entropy` does not take."""
    name = "linear_cross_entropy"
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{name}: x must be a floating-point tensor [..., D], got {describe(x)}")

    def like(t: Tensor) -> bool:
        return isinstance(t, Tensor) and t.dtype == x.dtype and t.device == x.device

    kind = f"{str(x.dtype).removeprefix('torch.')} on {x.device}"
    if not like(weight) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: weight must be [C, {x.shape[-1]}], {kind}, got {describe(weight)}"
        )
    if not len(weight):
        raise ValueError(f"{name}: expected at least one class, got weight {describe(weight)}")
    if bias is not None and (not like(bias) or bias.shape != weight.shape[:1]):
        raise ValueError(f"{name}: bias must be [{len(weight)}], {kind}, got {describe(bias)}")
    whole = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not whole or labels.device != x.device or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: labels must be int64 {list(x.shape[:-1])} on {x.device}, "
            f"got {describe(labels)}"
        )


def rows_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int
) -> Tensor:
    """The operator on rows ``[R, D]`` and ``[R]``, without its checks."""
    bf16 = False
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        bf16 = x.device.type == "cpu" and dtype == torch.bfloat16
        dtype = torch.float32 if bf16 else dtype  # then products round their factors
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not _backend.takes(_FORWARD, x):
        return reference.losses(x, weight, bias, labels, ignored)
    if _learned(weight) or _learned(bias):
        x = torch.where((labels != ignored).unsqueeze(1), x, 0)  # 0 times NaN would reach them
        return rows_cross_entropy(F.linear(x, weight, bias), labels, ignored)
    bias = None if bias is None else bias.contiguous()
    given = x.contiguous(), weight.contiguous(), bias, labels.contiguous()
    if needs_autograd(x):
        return _Loss.call(*given, ignored, bf16)[0]
    return _backend.kernel(_FORWARD, x.device.type)(*given, ignored, False, bf16)[0]


def _learned(t: Tensor | None) -> bool:
    """Whether a gradient of it may be asked for, at any level of functorch's transforms."""
    if t is None:
        return False
    if t.requires_grad and torch.is_grad_enabled():
        return True
    return is_functorch_wrapped_tensor(t) and _learned(get_unwrapped(t))


class _Loss(Function):
    """``(x, weight, bias, labels, ignored, bf16)``: losses, the statistics of the logits, and the
    gradient of each loss to its row, the slopes."""

    @staticmethod
    def forward(x, weight, bias, labels, ignored, bf16):
        kernel = _backend.kernel(_FORWARD, x.device.type)
        return kernel(x, weight, bias, labels, ignored, True, bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.ignored, ctx.bf16 = inputs[4:6]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple:
        found = None
        if g is not None:
            saved = ctx.saved_tensors  # read once, as checkpoints ask for it
            run = _Gradient.call if needs_autograd(g, saved[0]) else _Gradient.forward
            (found,) = run(g, *saved, ctx.ignored, ctx.bf16)
        return found, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x, weight, bias, labels, ignored, bf16):
        if in_dims[1] is not None or in_dims[2] is not None:
            return each(_Loss, info.batch_size, in_dims, (x, weight, bias, labels, ignored, bf16))
        x, labels = fold(info.batch_size, (x, labels), (in_dims[0], in_dims[3]))
        found = _Loss.call(x, weight, bias, labels, ignored, bf16)
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0, 0)


class _Gradient(Function):
    """``(g, x, weight, bias, labels, stats, slopes, ignored, bf16)``: ``g slopes``."""

    @staticmethod
    def forward(g, x, weight, bias, labels, stats, slopes, ignored, bf16):
        return ((g.unsqueeze(1) * slopes).to(x.dtype),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.ignored, ctx.bf16 = inputs[7:]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        g, x, *others = ctx.saved_tensors
        run = _Second.call if needs_autograd(v, g, x) else _Second.forward
        found = zip(
            run(v, g, x, *others, ctx.ignored, ctx.bf16), ctx.needs_input_grad, strict=False
        )
        return *(t if need else None for t, need in found), *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _by_rows(_Gradient, 1, info.batch_size, in_dims, args)


class _Second(Function):
    """``(v, g, x, weight, bias, labels, stats, slopes, ignored, bf16)``: the cotangents of g and x;
    what comes after differentiates the reference."""

    @staticmethod
    def forward(v, g, x, weight, bias, labels, stats, slopes, ignored, bf16):
        kernel = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)
        return kernel(v.contiguous(), g.contiguous(), x, weight, bias, labels, stats, slopes, bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.ignored = inputs[8]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        v, g, x, weight, bias, labels = ctx.saved_tensors

        def losses(x):
            return reference.losses(x, weight, bias, labels, ctx.ignored)

        second = partial(second_derivative, losses)
        found = pull_back(second, (v, g, x), cotangents, ctx.needs_input_grad)
        return *found, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _by_rows(_Second, 2, info.batch_size, in_dims, args)


def _by_rows(function: type[Function], first: int, size: int, in_dims: tuple, args: tuple):
    """A derivative whose `first` cotangents, x, labels, statistics and slopes get more rows; whose
    weight and bias are those of all, or one call for each place of the vmapped axis."""
    shared = (first + 1, first + 2)
    if any(in_dims[i] is not None for i in shared):
        return each(function, size, in_dims, args)
    places = [i for i in range(first + 6) if i not in shared]
    folded = fold(size, [args[i] for i in places], [in_dims[i] for i in places])
    given = list(args)
    for i, t in zip(places, folded, strict=True):
        given[i] = t
    found = function.call(*given)
    return tuple(unfold(r, size) for r in found), (0,) * len(found)
