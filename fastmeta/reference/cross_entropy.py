"""Cross-entropy of rows of logits, in differentiable plain torch; narrow dtypes in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta._dtypes import wide_dtype


def losses(x: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """``log sum_j exp(x_rj) - x_r,labels[r]``, or 0 where the label is `ignored`, ``[R]``."""
    return F.cross_entropy(
        _counted(x, labels, ignored), labels, ignore_index=ignored, reduction="none"
    )


def cross_entropy(x: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """:func:`losses`; and ``[R, 2]``: a row's largest logit m and ``1 / sum_j exp(x_rj - m)``,
    zeros where ignored."""
    rows = _counted(x.detach(), labels, ignored)
    largest = rows.amax(-1)
    share = 1 / (rows - largest.unsqueeze(-1)).exp().sum(-1)
    stats = torch.stack([largest, share], -1)
    stats = stats.masked_fill((labels == ignored).unsqueeze(-1), 0)
    return losses(x, labels, ignored), stats


def _counted(x: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Wide logits, zeros in rows that do not count: those may hold anything."""
    wide = x.to(wide_dtype(x.dtype))
    return wide.masked_fill((labels == ignored).unsqueeze(-1), 0)
