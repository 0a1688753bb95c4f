"""Rows of a matrix in another order, some left out and some new ones zero.

The derivative of a gather is a scatter, which torch runs one row after another on a CPU. Where each
row is taken at most once that is a gather too, by the inverse order: one kernel serves every
derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import Function, needs_autograd
from fastmeta._library import define
from fastmeta.reference import rows as reference

_TAKE = define("take_rows(Tensor x, Tensor index) -> Tensor", reference.take_rows)


def take_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``y_s = x_index[s]``, or zeros where ``index[s]`` is -1; no row is taken twice.

    Args:
        x: ``[R, C]``, floating point.
        index: int64 ``[S]`` of -1 to R - 1, every row at most once.
        inverse: int64 ``[R]``: where each row of x went, -1 for those left out; so
            ``inverse[index[s]] = s``. Derivatives read it; that the two fit is not checked.

    Returns:
        ``[S, C]``, contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
        RuntimeError: On a CPU, an index out of range.

    Differentiable to any order in x, also under ``torch.func``.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"take_rows: x must be a floating-point tensor [R, C], got {_checks.describe(x)}"
        )
    for name, t, size in (("index", index, "S"), ("inverse", inverse, x.shape[0])):
        fits = isinstance(t, Tensor) and t.dtype == torch.int64 and t.device == x.device
        if not fits or t.dim() != 1 or size not in ("S", t.shape[0]):
            raise ValueError(
                f"take_rows: {name} must be int64 [{size}] on {x.device}, got {_checks.describe(t)}"
            )
    return rearranged(x, index, inverse)


def rearranged(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """:func:`take_rows` without its checks."""
    if _backend.use_reference():
        return reference.take_rows(x, index)
    if needs_autograd(x):
        return _TakeRows.call(x, index, inverse)
    return _TakeRows.forward(x, index, inverse)


class _TakeRows(Function):
    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return _backend.kernel(_TAKE, x.device.type)(x.contiguous(), index.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        index, inverse = ctx.saved_tensors
        return rearranged(d_y, inverse, index), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, index: Tensor, inverse: Tensor):
        if in_dims[1] is not None or in_dims[2] is not None:
            raise ValueError("take_rows: index and inverse must be shared by all samples of vmap")
        x = x.movedim(in_dims[0], 1)  # [R, batch, C]
        y = rearranged(x.flatten(1), index, inverse)
        return y.unflatten(1, x.shape[1:]), 1
