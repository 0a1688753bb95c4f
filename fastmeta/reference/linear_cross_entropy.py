"""Cross-entropy of the logits of a linear layer, in differentiable plain torch, logits and all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmeta.reference import cross_entropy
from fastmeta.reference.batched_linear import rounded


def losses(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int) -> Tensor:
    """Cross-entropy of the rows of ``x W^T + b``, 0 where the label is `ignored`, ``[R]``."""
    # rows that do not count may hold anything
    x = x.masked_fill((labels == ignored).unsqueeze(-1), 0)
    return cross_entropy.losses(F.linear(x, weight, bias), labels, ignored)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignored: int,
    wanted: bool,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`losses`; their logits' statistics ``[R, 2]``; and, where `wanted`, the gradient of
    each loss to its row, ``[R, D]``, else nothing ``[0]``."""
    if bf16:
        x, weight = rounded(x), rounded(weight)
    logits = F.linear(x, weight, bias).detach()
    found, stats = cross_entropy.cross_entropy(logits, labels, ignored)
    slopes = x.new_empty(0)
    if wanted:
        p = (logits.to(stats.dtype) - stats[:, :1]).exp() * stats[:, 1:]
        p = p.masked_fill((labels == ignored).unsqueeze(-1), 0)
        own = weight[labels.clamp_min(0)].masked_fill((labels == ignored).unsqueeze(-1), 0)
        slopes = p.to(x.dtype) @ weight - own
    return found, stats, slopes
