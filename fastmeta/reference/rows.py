"""Rows of a matrix in another order, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``[R, C]`` and ``[S]`` -> ``[S, C]``: row ``index[s]``, or zeros where that is -1."""
    if x.shape[0] == 0:
        return F.pad(x, (0, 0, 0, index.shape[0]))
    taken = x.index_select(0, index.clamp_min(0))
    return taken.masked_fill((index < 0).unsqueeze(1), 0.0)
