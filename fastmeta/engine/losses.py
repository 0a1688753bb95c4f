"""Task losses: each task's mean over its own labelled rows or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.batch import IGNORE_INDEX, ways_of
from fastmeta.ops.cross_entropy import rows_cross_entropy
from fastmeta.ops.linear_cross_entropy import rows_losses

MANY_CLASSES = 256
"""From here on passes over memory are what a loss costs; below, calls."""

LossFn = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""``(outputs, batch) -> [T]``; `batch` is the support or query mapping."""

WAYS = "ways"
"""Key under which a task set carries its tasks' numbers of classes, ``[T]``."""


def mask_ways(
    logits: Tensor, ways: Tensor | Sequence[int] | int | None, value: float = float("-inf")
) -> Tensor:
    """Logits ``[T, N, ..., C]`` with `value` for the classes that a task does not have."""
    if ways is None:
        return logits
    ways = ways_of(ways, logits.shape[0], logits.device)
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= ways.view(
        -1, *(1,) * (logits.dim() - 1)
    )
    return logits.masked_fill(beyond, value)


def classification(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each task's rows, ``[T]``; labels ``[T, N]``, -100 ignored."""
    logits = mask_ways(_logits(outputs, 3, "classification", batch), batch.get(WAYS))
    return _mean_cross_entropy(logits, batch["labels"])


def causal_lm(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross-entropy of each task, ``[T]``; labels ``[T, N, L]``, -100 ignored."""
    logits = _logits(outputs, 4, "causal_lm", batch)
    return _mean_cross_entropy(logits, _following(batch["labels"]))


def token_classification(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each task's tokens, ``[T]``; labels ``[T, N, L]``, -100 ignored."""
    logits = mask_ways(_logits(outputs, 4, "token_classification", batch), batch.get(WAYS))
    return _mean_cross_entropy(logits, batch["labels"])


def masked_lm(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each task's words where they stand, ``[T]``; labels ``[T, N, L]``, -100
    ignored."""
    return _mean_cross_entropy(_logits(outputs, 4, "masked_lm", batch), batch["labels"])


def seq2seq_lm(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """As :func:`masked_lm`: the decoder's inputs are the labels, moved by one word already."""
    return _mean_cross_entropy(_logits(outputs, 4, "seq2seq_lm", batch), batch["labels"])


def _following(labels: Tensor) -> Tensor:
    """The label of the next word; none of the last. The labels move, not the logits: a slice of
    those is copied, and so is its gradient."""
    return F.pad(labels[:, :, 1:], (0, 1), value=IGNORE_INDEX)


def regression(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of each task's rows, ``[T]``; labels ``[T, N]`` or ``[T, N, D]`` in
    floating point, NaN ignored."""
    values, labels = _logits(outputs, 3, "regression"), batch["labels"]
    if labels.dim() == 2:
        labels = labels.unsqueeze(2)
    if labels.shape != values.shape:
        raise ValueError(
            f"labels of a regression must have the shape of the outputs, {list(values.shape)}, "
            f"got {list(labels.shape)}"
        )
    dtype = torch.promote_types(values.dtype, torch.float32)
    values, labels = values.to(dtype), labels.to(dtype)
    ignored = labels.isnan()
    errors = (values - labels.masked_fill(ignored, 0)).masked_fill(ignored, 0)
    return errors.square().flatten(1).sum(1) / (~ignored).flatten(1).sum(1).clamp_min(1)


LOSSES: dict[str, LossFn] = {
    "classification": classification,
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "seq2seq_lm": seq2seq_lm,
    "token_classification": token_classification,
    "regression": regression,
}
"""The losses that have a name."""


_OF_WORDS: dict[LossFn, Callable[[Tensor], Tensor]] = {
    causal_lm: _following,
    masked_lm: lambda labels: labels,
    seq2seq_lm: lambda labels: labels,
}
"""Losses that can do without logits: what each makes of the labels."""


def of_words(loss_fn: LossFn) -> bool:
    """Whether :func:`words_loss` gives this loss."""
    return any(loss_fn is known for known in _OF_WORDS)


def words_loss(
    loss_fn: LossFn, states: Tensor, layer: nn.Linear, batch: Mapping[str, Tensor]
) -> Tensor:
    """The loss ``[T]`` of the logits that a frozen layer would make of states ``[T, N, L, D]``."""
    labels = batch["labels"]
    _check_labels(name_of(loss_fn), labels, [*states.shape[:-1], layer.out_features])
    labels = _OF_WORDS[loss_fn](labels)
    weight, bias = (None if t is None else t.detach() for t in (layer.weight, layer.bias))
    losses = rows_losses(states.flatten(0, 2), weight, bias, labels.flatten(), IGNORE_INDEX)
    return _mean(losses, labels)


def name_of(loss_fn: LossFn) -> str | None:
    """The name of a loss that has one."""
    return next((name for name, known in LOSSES.items() if known is loss_fn), None)


def resolve_loss(loss_fn: str | LossFn) -> LossFn:
    """The loss of that name, or the callable itself."""
    if callable(loss_fn):
        return loss_fn
    if loss_fn not in LOSSES:
        raise ValueError(
            f"loss_fn must be one of {sorted(LOSSES)} or a callable (outputs, batch) -> [T], "
            f"got {loss_fn!r}"
        )
    return LOSSES[loss_fn]


def scores(loss_fn: LossFn, outputs: Tensor | None, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Of losses of classes: the :func:`accuracy` of logits."""
    if outputs is None or name_of(loss_fn) not in ("classification", "token_classification"):
        return None
    return accuracy(outputs, batch)


def accuracy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Share of right rows or tokens per task, ``[T]``; ignored ones do not count."""
    labels = batch["labels"]
    predicted = mask_ways(logits.detach(), batch.get(WAYS)).argmax(-1)
    valid = labels != IGNORE_INDEX
    right = ((predicted == labels) & valid).flatten(1).sum(1)
    return right / valid.flatten(1).sum(1).clamp_min(1)


def logits_of(outputs: Any) -> Tensor | None:
    """The ``logits`` of what a model returns, or that itself where it is a tensor."""
    return getattr(outputs, "logits", outputs if isinstance(outputs, Tensor) else None)


def _logits(
    outputs: Any, dim: int, name: str, classified: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The logits of an output, of `dim` axes: one row of them for each label of `classified`."""
    logits = logits_of(outputs)
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
    if classified is not None:
        _check_labels(name, classified["labels"], list(logits.shape))
    return logits


def _check_labels(name: str | None, labels: Tensor, logits: list[int]) -> None:
    if list(labels.shape) != logits[:-1]:
        raise ValueError(
            f"the {name} loss needs labels {logits[:-1]} for logits {logits}, "
            f"got {list(labels.shape)}"
        )


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``[T, ..., C]`` and ``[T, ...]`` -> ``[T]``."""
    rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if logits.shape[-1] < MANY_CLASSES:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # as of many classes
        losses = F.cross_entropy(rows, flat, ignore_index=IGNORE_INDEX, reduction="none")
    else:
        losses = rows_cross_entropy(rows, flat, IGNORE_INDEX)
    return _mean(losses, labels)


def _mean(losses: Tensor, labels: Tensor) -> Tensor:
    """Of each task's labelled rows."""
    losses = losses.view(labels.shape[0], -1)
    count = (labels != IGNORE_INDEX).flatten(1).sum(1).clamp_min(1)
    return losses.sum(1) / count
