"""Activations of transformers in differentiable plain torch; narrow dtypes compute in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype

GELU, GELU_TANH, SILU = range(3)


def activation(x: Tensor, kind: int) -> Tensor:
    """``x Phi(x)``, ``x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`` or ``x sigmoid(x)``."""
    wide = x.to(wide_dtype(x.dtype))
    if kind == GELU:
        y = wide * 0.5 * torch.erfc(wide * -math.sqrt(0.5))
    elif kind == GELU_TANH:
        y = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        y = wide * torch.sigmoid(wide)
    return y.to(x.dtype).contiguous()
