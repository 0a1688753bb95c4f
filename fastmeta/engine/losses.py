"""Task losses: each task's mean over its own labelled rows or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.batch import IGNORE_INDEX, ways_of

LossFn = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""``(outputs, batch) -> [T]``; `batch` is the support or query mapping."""

WAYS = "ways"
"""Key under which a task set carries its tasks' numbers of classes, ``[T]``."""


def mask_ways(logits: Tensor, ways: Tensor | int | None) -> Tensor:
    """Logits ``[T, N, C]`` with the classes a task does not have at -inf."""
    if ways is None:
        return logits
    ways = ways_of(ways, logits.shape[0], logits.device)
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= ways.view(-1, 1, 1)
    return logits.masked_fill(beyond, float("-inf"))


def classification(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each task's rows, ``[T]``; labels ``[T, N]``, -100 ignored."""
    logits = mask_ways(_logits(outputs, 3, "classification"), batch.get(WAYS))
    return _mean_cross_entropy(logits, batch["labels"])


def causal_lm(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross-entropy of each task, ``[T]``; labels ``[T, N, L]``, -100 ignored."""
    logits = _logits(outputs, 4, "causal_lm")
    return _mean_cross_entropy(logits[:, :, :-1], batch["labels"][:, :, 1:])


def resolve_loss(loss_fn: str | LossFn) -> LossFn:
    """The loss of that name, or the callable itself."""
    if callable(loss_fn):
        return loss_fn
    known = {"classification": classification, "causal_lm": causal_lm}
    if loss_fn not in known:
        raise ValueError(
            f"loss_fn must be one of {sorted(known)} or a callable (outputs, batch) -> [T], "
            f"got {loss_fn!r}"
        )
    return known[loss_fn]


def accuracy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Share of right answers per task, ``[T]``; ignored rows do not count."""
    labels = batch["labels"]
    predicted = mask_ways(logits.detach(), batch.get(WAYS)).argmax(-1)
    valid = labels != IGNORE_INDEX
    right = ((predicted == labels) & valid).flatten(1).sum(1)
    return right / valid.flatten(1).sum(1).clamp_min(1)


def _logits(outputs: Any, dim: int, name: str) -> Tensor:
    logits = getattr(outputs, "logits", outputs if isinstance(outputs, Tensor) else None)
    if logits is None:
        raise ValueError(
            f"the {name} loss needs a model with a head whose output has logits, "
            f"got {type(outputs).__name__}; load it with one "
            "(for example AutoModelForSequenceClassification)"
        )
    if logits.dim() != dim:
        axes = ["T", "N", "L", "C"] if dim == 4 else ["T", "N", "C"]
        raise ValueError(
            f"the {name} loss needs logits [{', '.join(axes)}], got {list(logits.shape)}"
        )
    return logits


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``[T, ..., C]`` and ``[T, ...]`` -> ``[T]``."""
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    losses = losses.view(labels.shape[0], -1)
    count = (labels != IGNORE_INDEX).flatten(1).sum(1).clamp_min(1)
    return losses.sum(1) / count
