"""A linear layer with low-rank terms of every task, in differentiable plain torch.

Shapes: rows ``x [M, K]`` of T tasks one after another, ``weight [N, K]``, ``bias [1 or T, N]``,
``a [T, r, K]``, ``b [T, N, r]``. Task t's rows are ``offsets[t]`` to ``offsets[t + 1]``; without
``offsets`` all tasks have equally many. Narrow dtypes compute in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.reference.batched_linear import rounded


def lora_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: Tensor | None,
    scale: float,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = x W^T + bias_t + s B_t^T`` in the dtype of x, and ``s = scale x A_t^T``, ``[M, r]``.
    Where `bf16`, x and W are rounded to bfloat16 for their product."""
    dtype = wide_dtype(x.dtype)
    wide = x.to(dtype)
    s = scale * task_rows(wide, a.to(dtype).mT, offsets)
    if weight_scale is None:
        dense = weight.to(dtype)
    else:
        dense = dequantise(weight, weight_scale.to(dtype), x.shape[1])
    left, right = (rounded(wide), rounded(dense)) if bf16 else (wide, dense)
    y = left @ right.mT + task_rows(s, b.to(dtype).mT, offsets)
    if bias is not None:
        y = y + own_rows(bias.to(dtype), x.shape[0], offsets)
    return y.to(x.dtype), s


def task_of_row(offsets: Tensor, rows: int) -> Tensor:
    """The task of each row, ``[M]``."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1


def task_rows(x: Tensor, matrices: Tensor, offsets: Tensor | None) -> Tensor:
    """Each row of ``x [M, K]`` by its task's matrix of ``[T, K, C]``: ``[M, C]``."""
    if offsets is not None:
        return (
            x.unsqueeze(1) @ matrices.index_select(0, task_of_row(offsets, x.shape[0]))
        ).squeeze(1)
    tasks = matrices.shape[0]
    return (x.reshape(tasks, x.shape[0] // max(tasks, 1), x.shape[1]) @ matrices).flatten(0, 1)


def own_rows(v: Tensor, rows: int, offsets: Tensor | None) -> Tensor:
    """The vector of each row's task from ``[1 or T, N]``."""
    if v.shape[0] == 1:
        return v
    if offsets is not None:
        return v.index_select(0, task_of_row(offsets, rows))
    return v.unsqueeze(1).expand(-1, rows // max(v.shape[0], 1), -1).flatten(0, 1)


def dequantise(weight: Tensor, scale: Tensor, width: int) -> Tensor:
    """``[N, K]`` from int8 ``[N, K]`` or uint8 ``[N, K / 2]`` with two numbers in a byte, the even
    column in the low half, and a scale ``[N, G]`` for each ``K / G`` columns."""
    if weight.dtype == torch.uint8:
        halves = torch.stack([weight & 15, weight >> 4], -1).flatten(1)
        values = halves.to(scale.dtype) - 8
    else:
        values = weight.to(scale.dtype)
    groups = scale.shape[1]
    return (values.unflatten(1, (groups, width // groups)) * scale.unsqueeze(2)).flatten(1)


def quantise(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """The nearest numbers of 8 or 4 bits, symmetric about 0: the inverse of :func:`dequantise`."""
    most = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(2) / most
    steps = torch.where(scale == 0, 1, scale).unsqueeze(2)
    values = (groups / steps).round().clamp(-most, most).flatten(1)
    if bits == 8:
        return values.to(torch.int8), scale
    halves = (values + 8).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4, scale
