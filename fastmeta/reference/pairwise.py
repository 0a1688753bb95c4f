"""Pairwise distances in plain torch, differentiable to any order by autograd itself.

Shapes: ``x [B, N, D]``, ``y [B, M, D]``, results ``[B, N, M]``. Every metric is a function of one
sum (or maximum) over coordinates, of a *kind* that kernels share. Derivatives where a metric has
none: those of ``|z|``, ``|z|^p`` and of the root of a sum are 0 at 0, to all orders; a maximum
divides its gradient evenly among the coordinates that attain it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SQUARES, ABSOLUTE, POWER, MAXIMUM, PRODUCT = range(5)
"""Kinds of sums: of (x - y)^2, |x - y|, |x - y|^p, the largest |x - y|, and of x y."""


def pairwise_sums(x: Tensor, y: Tensor, kind: int, p: float) -> Tensor:
    """The sums over coordinates of every pair, ``[B, N, M]``."""
    x, y = x.unsqueeze(2), y.unsqueeze(1)
    if kind == PRODUCT:
        return (x * y).sum(-1)
    z = x - y
    if kind == SQUARES:
        return z.square().sum(-1)
    if kind == ABSOLUTE:
        return z.abs().sum(-1)
    if kind == POWER:
        return zero_safe_power(z.abs(), p).sum(-1)
    if z.shape[-1] == 0:
        return z.sum(-1)
    return z.abs().amax(-1)


def zero_safe_power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent`` for ``base >= 0``, with derivatives 0 at 0."""
    zero = base == 0
    return torch.where(zero, 0, torch.where(zero, 1, base).pow(exponent))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    length = zero_safe_power(x.square().sum(-1, keepdim=True), 0.5)
    return x / torch.where(length == 0, 1, length)


def pairwise_distance(
    x: Tensor, y: Tensor, metric: str, p: float | None, precision: Tensor | None
) -> Tensor:
    """Distances by the definition of each metric.

    ``precision`` is ``[B or 1, D, D]``, symmetric and positive definite, or its diagonal
    ``[B or 1, 1, D]``, for Mahalanobis alone.
    """
    if metric == "dot":
        return -pairwise_sums(x, y, PRODUCT, 0.0)
    if metric == "cosine":
        return 1 - pairwise_sums(unit_rows(x), unit_rows(y), PRODUCT, 0.0)
    if metric == "mahalanobis":
        z = x.unsqueeze(2) - y.unsqueeze(1)
        if precision.shape[1] == 1:
            return zero_safe_power((z.square() * precision.unsqueeze(1)).sum(-1), 0.5)
        return zero_safe_power(((z @ precision.unsqueeze(1)) * z).sum(-1), 0.5)
    if metric == "chebyshev":
        return pairwise_sums(x, y, MAXIMUM, 0.0)
    if metric == "cityblock":
        return pairwise_sums(x, y, ABSOLUTE, 1.0)
    if metric == "minkowski":
        return zero_safe_power(pairwise_sums(x, y, POWER, p), 1 / p)
    squares = pairwise_sums(x, y, SQUARES, 2.0)
    return squares if metric == "sqeuclidean" else zero_safe_power(squares, 0.5)


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums of the rows of each class, ``[T, C, D]``; of rows labelled outside nothing arrives."""
    valid = (labels >= 0) & (labels < classes)
    rows = torch.where(valid.unsqueeze(-1), x, 0)
    onehot = labels.unsqueeze(1) == torch.arange(classes, device=x.device).view(1, -1, 1)
    return onehot.to(x.dtype) @ rows


def class_gather(v: Tensor, labels: Tensor) -> Tensor:
    """Row of each label's class, ``[T, N, D]``; zeros for labels outside."""
    valid = (labels >= 0) & (labels < v.shape[1])
    if v.shape[1] == 0:
        return v.new_zeros(*labels.shape, v.shape[2])
    index = torch.where(valid, labels, 0).unsqueeze(-1).expand(*labels.shape, v.shape[2])
    return torch.where(valid.unsqueeze(-1), v.gather(1, index), 0)


def prototypical(
    distances: Tensor, labels: Tensor, present: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ``[T]``, share of right answers ``[T]`` and logits ``[T, Q, C]`` from distances.

    Logits are ``-scale_t distance``, -inf for classes that are not ``present [T, C]``. Rows
    labelled outside ``[0, C)`` do not count, and nothing of them reaches a result.
    """
    classes = distances.shape[2]
    valid = (labels >= 0) & (labels < classes)
    logits = -scale.view(-1, 1, 1) * distances
    if present is not None:
        logits = logits.masked_fill(~present.unsqueeze(1), float("-inf"))
    counted = torch.where(valid.unsqueeze(-1), logits, 0)
    target = torch.where(valid, labels, 0)
    losses = torch.logsumexp(counted, -1) - counted.gather(2, target.unsqueeze(-1)).squeeze(-1)
    count = valid.sum(1).clamp_min(1)
    loss = torch.where(valid, losses, 0).sum(1) / count
    right = ((logits.argmax(-1) == labels) & valid).sum(1).to(loss.dtype) / count
    return loss, right, logits


def nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row in rising order and their columns; NaN last, ties by column."""
    order = distances.detach().sort(dim=-1, stable=True).indices[..., :k]
    return distances.gather(-1, order), order
