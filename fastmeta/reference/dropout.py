"""Dropout by a seed in differentiable plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.reference.hashing import dropped_words, words


def dropout(x: Tensor, seed: Tensor, p: float, period: int) -> Tensor:
    """``x / (1 - p)`` where an element is kept, else 0; `period`: elements of a sample, all of
    which drop the same ones. Narrow dtypes compute in float32."""
    wide = x.to(wide_dtype(x.dtype))
    keep = words(seed, period) >= dropped_words(p)
    rows = wide.reshape(-1, period) if period else wide.reshape(0, 1)
    y = torch.where(keep if period else keep.new_zeros(1), rows * (1 / (1 - p)), 0)
    return y.view(x.shape).to(x.dtype).contiguous()
