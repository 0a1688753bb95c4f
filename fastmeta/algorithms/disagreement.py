"""Distances between candidate models: by their predictions on the same rows, or parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.ops.pairwise import METRICS

COMPARISONS = ("probabilities", "predictions", "logits", "parameters")
OF_PROBABILITIES = ("hellinger", "js")
DIFFERENT = "different"
"""The share of rows whose predicted class differs."""

_DEFAULT = {"probabilities": "hellinger", "predictions": DIFFERENT}


def check_metric(compare: str, metric: str | None, p: float | None) -> str:
    """The metric's name, its default filled in; one that fits what is compared."""
    if metric is None:
        metric = _DEFAULT.get(compare, "euclidean")
        if p is not None:
            raise ValueError(f"p is for metric 'minkowski', got p={p!r}")
        return metric
    allowed = [m for m in METRICS if m != "mahalanobis"]
    if compare == "probabilities":
        allowed += OF_PROBABILITIES
    if metric not in allowed:
        raise ValueError(f"metric of {compare} must be one of {', '.join(allowed)}, got {metric!r}")
    if (p is not None) != (metric == "minkowski"):
        need = "takes no p" if p is not None else "needs p"
        raise ValueError(f"metric {metric!r} {need}, got p={p!r}")
    return metric


def candidate_distances(
    features: Tensor, metric: str, p: float | None = None, counted: Tensor | None = None
) -> Tensor:
    """Distances between M candidates in each of T tasks, ``[T, M, M]``.

    Args:
        features: ``[T, M, P]``, or of Q rows ``[T, M, Q, C]``: then the mean over rows.
        metric: From :func:`check_metric`.
        p: Order of ``"minkowski"``.
        counted: Which rows count, bool ``[T, Q]``.
    """
    if features.dim() == 3:
        return ops.pairwise_distance(features, features, metric, p=p)
    rows = features.transpose(1, 2)  # [T, Q, M, C]
    if counted is not None:
        rows = torch.where(counted[:, :, None, None], rows, 0.0)
    if metric == "js":
        found = _jensen_shannon(rows)
    elif metric == "hellinger":
        roots = rows.sqrt()
        found = ops.pairwise_distance(roots, roots, "euclidean") * 0.5**0.5
    elif metric == DIFFERENT:
        found = ops.pairwise_distance(rows, rows, "sqeuclidean") / 2
    else:
        found = ops.pairwise_distance(rows, rows, metric, p=p)
    if counted is None:
        return found.mean(1)
    weight = counted.to(found.dtype)[:, :, None, None]
    return torch.where(weight != 0, found, 0.0).sum(1) / weight.sum(1).clamp_min(1)


def _jensen_shannon(p: Tensor) -> Tensor:
    """``sqrt(H((p + q) / 2) - (H(p) + H(q)) / 2)`` of ``[..., M, C]`` with itself, in nats."""
    mean = (p.unsqueeze(-2) + p.unsqueeze(-3)) / 2
    own = _entropy(p)
    both = (own.unsqueeze(-1) + own.unsqueeze(-2)) / 2
    return (_entropy(mean) - both).clamp_min(0).sqrt()


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
