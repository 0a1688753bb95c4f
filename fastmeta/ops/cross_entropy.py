"""Cross-entropy that reads its logits once in each pass and keeps nothing of their size.

torch keeps the logarithms of all probabilities, and differentiates them through four tensors more
of that size. A language model's logits are its largest tensor by far.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
    fold,
    needs_autograd,
    pull_back,
    second_derivative,
    unfold,
)
from fastmeta._checks import describe
from fastmeta._library import define
from fastmeta.reference import cross_entropy as reference

_FORWARD = define(
    "cross_entropy(Tensor x, Tensor labels, int ignored) -> (Tensor, Tensor)",
    reference.cross_entropy,
)
_BACKWARD = define(
    "cross_entropy_backward(Tensor g, Tensor x, Tensor labels, Tensor stats) -> Tensor",
    fake=lambda g, x, labels, stats: torch.empty_like(x),
)
_DOUBLE_BACKWARD = define(
    "cross_entropy_double_backward(Tensor v, Tensor g, Tensor x, Tensor labels, Tensor stats) "
    "-> (Tensor, Tensor)",
    fake=lambda v, g, x, labels, stats: (torch.empty_like(g), torch.empty_like(x)),
)


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of every row, ``log sum_j exp(logits_j) - logits_label``.

    Args:
        logits: ``[..., C]``, floating point; -inf for a class that cannot be.
        labels: int64 ``[...]``, each from 0 to C - 1 or `ignore_index`.
        ignore_index: Label of a row that does not count: its loss and its derivatives are 0,
            whatever its logits. Default -100.

    Returns:
        ``[...]``, in float32 where logits are narrower.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, no class.
        RuntimeError: On a CPU, a label out of range. (On a GPU its loss is NaN.)

    Differentiable to any order in the logits, in reverse mode, also under ``torch.func``. Results
    do not depend on the number of threads or on other rows.
    """
    if not isinstance(logits, Tensor) or logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"cross_entropy: logits must be a floating-point tensor [..., C], "
            f"got {describe(logits)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: expected at least one class, got {describe(logits)}")
    like = isinstance(labels, Tensor) and labels.device == logits.device
    if not like or labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels must be int64 {list(logits.shape[:-1])} on {logits.device}, "
            f"got {describe(labels)}"
        )
    losses = rows_cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index
    )
    return losses.view(labels.shape)


def rows_cross_entropy(x: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """The operator on rows ``[R, C]`` and ``[R]``, without its checks."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # kernels for the CPU take float32 and float64
    if not _backend.takes(_FORWARD, x):
        return reference.losses(x, labels, ignored)
    run = _CrossEntropy.call if needs_autograd(x) else _CrossEntropy.forward
    return run(x, labels, ignored)[0]


class _CrossEntropy(Function):
    """``(x, labels, ignored)``: losses, and the statistics for the gradient."""

    @staticmethod
    def forward(x, labels, ignored):
        kernel = _backend.kernel(_FORWARD, x.device.type)
        return kernel(x.contiguous(), labels.contiguous(), ignored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.ignored = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple:
        if g is None:
            return None, None, None
        x, labels, stats = ctx.saved_tensors
        run = _Gradient.call if needs_autograd(g, x) else _Gradient.forward
        return run(g, x, labels, stats, ctx.ignored), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x, labels, ignored):
        folded = fold(info.batch_size, (x, labels), in_dims)
        found = _CrossEntropy.call(*folded, ignored)
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0)


class _Gradient(Function):
    """``(g, x, labels, stats, ignored)``: ``g (softmax(x) - one_hot(labels))``."""

    @staticmethod
    def forward(g, x, labels, stats, ignored):
        kernel = _backend.kernel(_BACKWARD, x.device.type)
        return kernel(g.contiguous(), x.contiguous(), labels.contiguous(), stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.ignored = inputs[4]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        g, x, labels, stats = ctx.saved_tensors
        run = _Second.call if needs_autograd(v, g, x) else _Second.forward
        found = zip(run(v, g, x, labels, stats, ctx.ignored), ctx.needs_input_grad, strict=False)
        return *(t if need else None for t, need in found), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        folded = fold(info.batch_size, args[:4], in_dims)
        return unfold(_Gradient.call(*folded, args[4]), info.batch_size), 0


class _Second(Function):
    """``(v, g, x, labels, stats, ignored)``, p the softmax of x: ``sum_j v (p - one_hot)`` and
    ``g p (v - sum_j p v)``; what comes after differentiates the reference."""

    @staticmethod
    def forward(v, g, x, labels, stats, ignored):
        kernel = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)
        return kernel(v.contiguous(), g.contiguous(), x.contiguous(), labels.contiguous(), stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.ignored = inputs[5]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        v, g, x, labels = ctx.saved_tensors

        second = partial(second_derivative, lambda x: reference.losses(x, labels, ctx.ignored))
        found = pull_back(second, (v, g, x), cotangents, ctx.needs_input_grad)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        folded = fold(info.batch_size, args[:5], in_dims)
        found = _Second.call(*folded, args[5])
        return tuple(unfold(r, info.batch_size) for r in found), (0, 0)
