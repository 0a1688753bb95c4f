"""Rows of the operator table for distances, the prototypical loss, class means and nearest rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
METRICS: dict[str, dict[str, Any]] = {
    "sqeuclidean": {},
    "euclidean": {},
    "cosine": {},
    "cityblock": {},
    "minkowski": {"p": 2.5},
    "chebyshev": {},
    "mahalanobis": {},
    "dot": {},
}

# T, N, M, D: one, odd, empty, more than a tile of every kernel, sizes that vectors divide or not
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 6, 4, 16),
    (0, 3, 2, 4),
    (2, 0, 3, 4),
    (2, 3, 0, 4),
    (2, 21, 18, 3),
    (2, 40, 37, 50),
    (1, 67, 5, 130),
    (1, 6, 140, 36),
)
SMALL = ((1, 2, 3, 2), (2, 3, 2, 3))


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _precision(generator: torch.Generator, width: int, tasks: int, form: int) -> Tensor:
    """A precision in each of its forms: full, of each task, diagonal, diagonal of each task."""
    if form in (2, 3):
        shape = (width,) if form == 2 else (tasks, 1, width)
        return _random(generator, *shape).abs() + 0.5
    factor = _random(generator, *((tasks,) if form == 1 else ()), width, width)
    return factor @ factor.mT / max(width, 1) + torch.eye(width, dtype=torch.float64)


def _laid_out(x: Tensor, layout: int) -> Tensor:
    """The same values, contiguous, with coordinates that are not adjacent, or strided rows."""
    if layout == 1:
        return x.mT.contiguous().mT
    if layout == 2:
        return x.repeat_interleave(2, 1)[:, ::2]
    return x


def _symmetric(call: Callable, places: int) -> Callable:
    """``call`` with a precision (the argument at ``places``) that finite differences, which move
    one entry at a time, keep symmetric."""

    def function(*tensors: Tensor, **more: Any):
        precision = tensors[places]
        if precision.dim() > 1 and precision.shape[-2] == precision.shape[-1]:
            precision = (precision + precision.mT) / 2
        return call(*tensors[:places], **more, precision=precision)

    return function


def distance_samples(
    metric: str, shapes, dtypes, device: str | torch.device = "cpu"
) -> Iterator[Sample]:
    for i, (tasks, rows, columns, width) in enumerate(shapes):
        if metric == "cosine" and width == 1:
            continue  # whose gradient is zero but for rounding
        generator = torch.Generator().manual_seed(i)
        x, y = _random(generator, tasks, rows, width), _random(generator, tasks, columns, width)
        tensors = [_laid_out(t, (i + k) % 3) for k, t in enumerate((x, y))]
        call = partial(ops.pairwise_distance, metric=metric, **METRICS[metric])
        if metric == "mahalanobis":
            tensors.append(_precision(generator, width, tasks, i % 4))
            call = _symmetric(call, 2)
        tensors = [t.to(device, dtypes[0]) for t in tensors]
        yield Sample(f"{tasks}x{rows}x{columns}x{width}", tuple(tensors), call)


def loss_samples(
    metric: str, shapes, dtypes, device: str | torch.device = "cpu"
) -> Iterator[Sample]:
    """Ragged rows and classes, rows that do not count, a temperature in each of its forms."""
    for i, (tasks, rows, columns, width) in enumerate(shapes):
        if metric == "cosine" and width == 1:
            continue
        generator = torch.Generator().manual_seed(i)
        classes = max(columns, 1)
        query = _random(generator, tasks, rows, width) / 2
        support = _random(generator, tasks, 2 * classes, width)
        of_support = torch.arange(2 * classes).expand(tasks, -1) % classes
        of_query = torch.randint(0, classes, (tasks, rows), generator=generator)
        if i % 2 and classes > 2:  # the last class is not there, the first has one row
            of_support = of_support.masked_fill(of_support == classes - 1, -100)
            of_support[:, 0] = -100
            of_query = of_query % (classes - 1)
        if rows > 2:
            of_query[:, 1] = -100
        shape = ((), (tasks,))[i % 2]
        temperature = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        tensors = [_laid_out(t, (i + k) % 3) for k, t in enumerate((query, support))]
        labels = (of_query.to(device), of_support.to(device))

        def call(query, support, temperature, precision=None, labels=labels, classes=classes):
            own = dict(METRICS[metric])
            if precision is not None:
                own["precision"] = precision
            return ops.prototypical_loss(
                query,
                labels[0],
                support,
                labels[1],
                metric=metric,
                temperature=temperature,
                num_classes=classes,
                **own,
            )[0]

        tensors.append(temperature)
        if metric == "mahalanobis":
            tensors.append(_precision(generator, width, tasks, i % 4))
            call = _symmetric(call, 3)
        tensors = [t.to(device, dtypes[0]) for t in tensors]
        yield Sample(f"{tasks}x{rows}x{classes}x{width}", tuple(tensors), call)


def means_samples(shapes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    for i, (tasks, rows, columns, width) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)
        labels = torch.randint(-1, columns + 1, (tasks, rows), generator=generator)
        labels = labels.masked_fill((labels < 0) | (labels >= columns + 1), -100).to(device)
        features = _laid_out(_random(generator, tasks, rows, width), i % 3).to(device, dtypes[0])

        def call(features, labels=labels, classes=columns + 1):
            return ops.class_means(features, labels, classes)[0]

        yield Sample(f"{tasks}x{rows}x{columns}x{width}", (features,), call)


def nearest_samples(
    metric: str, shapes, dtypes, device: str | torch.device = "cpu"
) -> Iterator[Sample]:
    for sample in distance_samples(metric, [s for s in shapes if s[2] > 0], dtypes, device):
        k = min(3, sample.tensors[1].shape[1])
        call = partial(ops.nearest, k=k, metric=metric, **METRICS[metric])
        yield Sample(sample.id, sample.tensors, lambda *t, call=call: call(*t)[0])


def _row(name: str, raw: tuple[str, ...], make: Callable, *, float_results: bool = False) -> OpRow:
    return OpRow(
        name=name,
        raw=raw,
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": make(SHAPES, dtypes, device),
        small=lambda device="cpu": make(SMALL, DTYPES[1], device),
        float_results=float_results,
        gpu="triton",
    )


_SUMS = tuple(f"pairwise_sums{end}" for end in ("", "_backward", "_double_backward"))
_LOSS = ("prototypical", "prototypical_backward", "class_sums", "class_gather")
TABLE = (
    *(_row(f"pairwise_distance-{m}", _SUMS, partial(distance_samples, m)) for m in METRICS),
    *(
        _row(f"prototypical_loss-{m}", _LOSS, partial(loss_samples, m), float_results=True)
        for m in METRICS
    ),
    _row("class_means", _LOSS[2:], means_samples, float_results=True),
    *(
        _row(f"nearest-{m}", _SUMS, partial(nearest_samples, m))
        for m in ("sqeuclidean", "cityblock")
    ),
)
