"""Dropout whose mask is a function of a seed, and is not kept for the backward pass.

torch draws the numbers of a mask one after another on a CPU, and keeps the mask, as large as what
it drops from: in training mode that was a tenth of a meta-step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import Function, needs_autograd
from fastmeta._library import define
from fastmeta.reference import dropout as reference

_DROPOUT = define(
    "dropout(Tensor x, Tensor seed, float p, int period) -> Tensor", reference.dropout
)


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """``y_i = x_i / (1 - p)`` with probability ``1 - p``, else 0.

    Args:
        x: Floating point, any shape.
        p: Probability in [0, 1) that an element is dropped.
        seed: Integer of 64 bits, or int64 scalar tensor. What is dropped is a function of it and of
            the element's number alone, on every device.

    Returns:
        Contiguous, of the shape and dtype of x.

    Raises:
        ValueError: x no floating-point tensor, p out of its range, a seed that is none.

    Differentiable to any order in reverse mode, also under ``torch.func``; samples of a ``vmap``
    drop the same elements. Nothing is kept but the seed. Srivastava et al. 2014, JMLR 15.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"dropout: x must be a floating-point tensor, got {_checks.describe(x)}")
    _checks.in_range("dropout", "p", p, at_least=0, below=1)
    seed = _checks.seed("dropout", seed, x.device)
    run = _run if _backend.takes(_DROPOUT, x) else reference.dropout
    return run(x, seed, float(p), x.numel())


def drawn_seed(like: Tensor) -> Tensor:
    """A seed from torch's generator of the device, so that restoring its state replays dropout."""
    return torch.randint(2**62, (), dtype=torch.int64, device=like.device)


def drop_randomly(x: Tensor, p: float) -> Tensor:
    """:func:`dropout` with a seed of torch's generator; torch's own where no kernel serves x."""
    if not _backend.takes(_DROPOUT, x):
        return F.dropout(x, p)
    return _run(x, drawn_seed(x), p, x.numel())


def _run(x: Tensor, seed: Tensor, p: float, period: int) -> Tensor:
    if needs_autograd(x):
        return _Dropout.call(x, seed, p, period)
    return _Dropout.forward(x, seed, p, period)


class _Dropout(Function):
    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float, period: int) -> Tensor:
        if x.numel() == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        return _backend.kernel(_DROPOUT, x.device.type)(x.contiguous(), seed, p, period)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, seed, *ctx.numbers = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple:
        (seed,) = ctx.saved_tensors
        return _run(d, seed, *ctx.numbers), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, seed: Tensor, p: float, period: int):
        if in_dims[1] is not None:
            raise ValueError("dropout: the seed must be shared by all samples of vmap")
        return _run(x.movedim(in_dims[0], 0), seed, p, period), 0
