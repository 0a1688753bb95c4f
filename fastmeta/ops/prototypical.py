"""Class means and the prototypical loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._autograd import outside_autocast
from fastmeta._checks import describe
from fastmeta._dtypes import wide_dtype
from fastmeta._settings import integer, is_number
from fastmeta.ops import _classes, _prototypical
from fastmeta.ops.pairwise import (
    as_sums,
    check_metric,
    check_points,
    check_precision,
    check_same_space,
)
from fastmeta.reference.pairwise import PRODUCT, unit_rows

IGNORED = -100


@outside_autocast
def class_means(
    features: Tensor, labels: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of each class's rows: the prototypes.

    ``means[t, c] = mean of features[t, n] over n with labels[t, n] = c``.

    Args:
        features: ``[T, N, D]``, float32, float64, bfloat16 or float16.
        labels: int64 ``[T, N]``; rows labelled -100 belong to no class, and nothing of them, not
            even a NaN, reaches a mean.
        num_classes: C, at least 1. Default: the largest label + 1 (which reads the labels back from
            a GPU).

    Returns:
        ``(means [T, C, D], counts int64 [T, C])``; float64 for float64 features, else float32. A
        class without rows has a mean of zero and a count of 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label out of range.

    Differentiable in reverse mode to any order in features, also under ``torch.func`` transforms.

    Source: Snell et al. 2017, https://arxiv.org/abs/1703.05175
    """
    op = "class_means"
    check_points(op, "features", features, dim=3)
    _check_labels(op, "labels", labels, features)
    classes = _num_classes(op, num_classes, labels)
    _check_range(op, "labels", labels, classes)
    return _means(features, labels, classes)


def _means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    features = features.to(wide_dtype(features.dtype))
    counts = _classes.count_classes(labels, classes)
    sums = _classes.class_sums(features, labels, classes)
    return sums / counts.clamp_min(1).to(sums.dtype).unsqueeze(-1), counts


@outside_autocast
def prototypical_loss(
    query: Tensor,
    query_labels: Tensor,
    support: Tensor,
    support_labels: Tensor | None,
    *,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    p: float | None = None,
    precision: Tensor | None = None,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the nearest class mean, for all tasks at once.

    ``loss_t = mean_q -log softmax_c(-d(x_q, mean_c) / temperature)[label_q]``.

    Args:
        query: ``[T, Q, D]``, float32, float64, bfloat16 or float16 (computed in float32).
        query_labels: int64 ``[T, Q]``; -100 for rows that do not count, of which nothing, not even
            a NaN, reaches a result. So tasks may be ragged in rows and classes.
        support: ``[T, N, D]`` in the dtype of query; or, without support_labels, the prototypes
            themselves, ``[T, C, D]``.
        support_labels: int64 ``[T, N]``, any number of rows per class; -100 for rows that do not
            count. A class that a task has no rows of is none of its classes. Or None.
        metric: A metric of `pairwise_distance`. Default ``"sqeuclidean"``.
        temperature: > 0: a number, or a tensor that is a scalar or ``[T]``. Default 1.
        p: Order of ``minkowski``.
        precision: That of ``mahalanobis``: ``[D]``, ``[D, D]``, ``[T, 1, D]`` or ``[T, D, D]``.
        num_classes: C, for support_labels on a GPU, which are read back without it. Default: the
            largest support label + 1.

    Returns:
        ``(loss [T], accuracy [T])``, float64 for float64 inputs, else float32: the mean over the
        query rows that count (0 where none do), and the share of them whose nearest prototype is
        theirs (of several equally near ones the first); accuracy carries no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a label out of range or, on the CPU,
            of a class without support in its task (elsewhere that task's loss is inf); a metric's
            argument missing or out of range.

    Note:
        Differentiable in reverse mode to any order in query, support, temperature and precision,
        also under ``torch.func.grad`` and ``vmap``; forward mode raises. With few classes nothing
        of size N x M x D is there, with many nothing of size Q x C either; second derivatives hold
        one chunk of Q x C at a time. Two runs give equal bits.

    Source: Snell et al. 2017, https://arxiv.org/abs/1703.05175
    """
    loss, accuracy, _ = prototypical_logits(
        query,
        query_labels,
        support,
        support_labels,
        metric=metric,
        temperature=temperature,
        p=p,
        precision=precision,
        num_classes=num_classes,
        with_logits=False,
    )
    return loss, accuracy


@outside_autocast
def prototypical_logits(
    query: Tensor,
    query_labels: Tensor,
    support: Tensor,
    support_labels: Tensor | None,
    *,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    p: float | None = None,
    precision: Tensor | None = None,
    num_classes: int | None = None,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`prototypical_loss` that also returns the logits ``[T, Q, C]``, without gradient.

    They are ``-d / temperature`` (for ``cosine`` plus a constant), -inf for classes a task has not.
    """
    op = "prototypical_loss"
    check_points(op, "query", query, dim=3)
    check_points(op, "support", support, dim=3)
    check_same_space(op, ("query", "support"), query, support)
    tasks = query.shape[0]
    if support.shape[0] != tasks:
        raise ValueError(f"{op}: support must have T = {tasks} tasks, got {describe(support)}")
    _check_labels(op, "query_labels", query_labels, query)
    metric, p = check_metric(op, metric, p, precision)
    if precision is not None:
        precision = check_precision(op, precision, query, (tasks,))
    dtype = wide_dtype(query.dtype)
    scale = _scale(op, temperature, tasks, query, dtype)
    present = None
    if support_labels is None:
        if num_classes is not None and num_classes != support.shape[1]:
            raise ValueError(
                f"{op}: prototypes must be [T, C, D] with C = num_classes = {num_classes}, "
                f"got {describe(support)}"
            )
        if support.shape[1] == 0:
            raise ValueError(
                f"{op}: prototypes must be [T, C, D] with C >= 1, got {describe(support)}"
            )
        prototypes = support.to(dtype)
    else:
        _check_labels(op, "support_labels", support_labels, support)
        classes = _num_classes(op, num_classes, support_labels)
        _check_range(op, "support_labels", support_labels, classes)
        prototypes, counts = _means(support, support_labels, classes)
        present = counts > 0
        if _checks.readable(present) and bool(present.all()):
            present = None
    _check_range(op, "query_labels", query_labels, prototypes.shape[1])
    if present is not None:
        _check_present(op, query_labels, present)
    query = query.to(dtype)
    if metric in ("cosine", "mahalanobis"):  # what prepares rows is differentiated for all of them
        query = _prototypical.counting_rows(query, query_labels, prototypes)
    if metric == "cosine":  # 1 - u v: the 1 changes no loss
        query, prototypes, settings = unit_rows(query), unit_rows(prototypes), (PRODUCT, 0.0, 1.0)
    else:
        query, prototypes, *settings = as_sums(query, prototypes, metric, p, precision)
    return _prototypical.prototypical(
        query,
        query_labels,
        prototypes,
        present,
        scale,
        _prototypical.Metric(*settings),
        with_logits=with_logits,
    )


def _check_labels(op: str, name: str, labels: Tensor, rows: Tensor) -> None:
    shape = tuple(rows.shape[:2])
    if (
        not isinstance(labels, Tensor)
        or labels.dtype != torch.int64
        or tuple(labels.shape) != shape
        or labels.device != rows.device
    ):
        raise ValueError(
            f"{op}: {name} must be int64 {list(shape)} on {rows.device}, got {describe(labels)}"
        )


def _num_classes(op: str, given: int | None, labels: Tensor) -> int:
    if given is None:
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            raise ValueError(
                f"{op}: num_classes must be given under torch.func transforms, got None"
            )
        classes = int(labels.max()) + 1 if labels.numel() else 0
        if classes < 1 and labels.shape[0] > 0:
            raise ValueError(f"{op}: expected support rows of at least one class, got none")
        return max(classes, 1)
    return integer(f"{op}: num_classes", given, or_else=" or None")


def _check_range(op: str, name: str, labels: Tensor, classes: int) -> None:
    if not _checks.readable(labels) or labels.numel() == 0:
        return
    least, most = labels.aminmax()
    if 0 <= int(least) and int(most) < classes:
        return
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORED))
    if bool(wrong.any()):
        task, row = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {name} must be in 0..{classes - 1} or {IGNORED} to ignore, "
            f"got {int(labels[task, row])} in task {task}"
        )


def _check_present(op: str, labels: Tensor, present: Tensor) -> None:
    if not (_checks.readable(labels) and _checks.readable(present)):
        return
    wrong = (labels >= 0) & ~present.gather(1, labels.clamp_min(0))
    if bool(wrong.any()):
        task, row = wrong.nonzero()[0].tolist()
        own = present[task].nonzero().flatten().tolist()
        raise ValueError(
            f"{op}: query_labels must be classes with support rows, {own} in task {task}, "
            f"got {int(labels[task, row])}"
        )


def _scale(
    op: str, temperature: float | Tensor, tasks: int, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """One over the temperature, ``[T]``."""
    if not isinstance(temperature, Tensor):
        good = is_number(temperature)
        if not good or not math.isfinite(temperature) or not temperature > 0:
            raise ValueError(f"{op}: temperature must be a finite number > 0, got {temperature!r}")
        return torch.full((tasks,), 1 / temperature, dtype=dtype, device=like.device)
    if not temperature.is_floating_point() or tuple(temperature.shape) not in ((), (1,), (tasks,)):
        raise ValueError(
            f"{op}: temperature must be a number, a scalar tensor or [T] with T = {tasks}, "
            f"got {describe(temperature)}"
        )
    if temperature.device != like.device and temperature.dim() > 0:
        raise ValueError(f"{op}: temperature must be on {like.device}, got {describe(temperature)}")
    _checks.in_range(op, "temperature", temperature, above=0.0)
    return (1 / temperature.to(like.device, dtype)).reshape(-1).expand(tasks)
