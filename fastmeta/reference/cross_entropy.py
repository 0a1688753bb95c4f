"""Cross-entropy of rows of logits, in differentiable plain torch; narrow dtypes in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(x: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """``log sum_j exp(x_rj) - x_r,labels[r]``, or 0 where the label is `ignored`, ``[R]``; and
    ``[R, 2]``: a row's largest logit m and ``1 / sum_j exp(x_rj - m)``, zeros where ignored."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    aside = (labels == ignored).unsqueeze(-1)
    wide = wide.masked_fill(aside, 0)
    losses = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="none")
    rows = wide.detach()
    largest = rows.amax(-1)
    share = 1 / (rows - largest.unsqueeze(-1)).exp().sum(-1)
    stats = torch.stack([largest, share], -1)
    return losses, stats.masked_fill(aside, 0)
