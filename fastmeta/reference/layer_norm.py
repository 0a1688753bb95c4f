"""LayerNorm and RMSNorm with gains and biases of every task, in differentiable plain torch.

Shapes: rows ``x [R, D]`` of T tasks one after another, ``weight`` and ``bias [1 or T, D]``. Narrow
dtypes compute in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """``y = (x - mean) / sqrt(var + eps) * weight_t + bias_t`` in the dtype of x, and ``[R, 2]``:
    the mean and ``1 / sqrt(var + eps)`` of each row. With `rms` the mean is taken as 0."""
    dtype = wide_dtype(x.dtype)
    rows = x.to(dtype).unflatten(0, (weight.shape[0], x.shape[0] // max(weight.shape[0], 1)))
    mean = torch.zeros_like(rows[..., :1]) if rms else rows.mean(-1, keepdim=True)
    centred = rows - mean
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * scale * weight.to(dtype).unsqueeze(1)
    if bias is not None:
        y = y + bias.to(dtype).unsqueeze(1)
    return y.flatten(0, 1).to(x.dtype), torch.cat([mean, scale], -1).flatten(0, 1)
