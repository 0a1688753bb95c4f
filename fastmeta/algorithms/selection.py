"""`fm.select_models`: train several candidates per task in one batch and pick one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.algorithms.candidates import Candidate, Run
from fastmeta.algorithms.disagreement import COMPARISONS, candidate_distances, check_metric
from fastmeta.batch import IGNORE_INDEX, check_set, check_ways
from fastmeta.engine.checks import check_sets
from fastmeta.engine.losses import WAYS, classification, mask_ways
from fastmeta.patching import Patched, TaskParams

CRITERIA = ("validation", "medoid", "farthest")
_TINY = 1e-12


@dataclass
class Selection:
    """What `fm.select_models` returns, for T tasks and M candidates; nothing carries a gradient.

    Attributes:
        chosen: int64 ``[T]``, each task's candidate; -1 where all diverged.
        scores: ``[T, M]``: validation accuracy, or mean distance to the others; NaN for diverged
            candidates.
        distances: ``[T, M, M]``, NaN to and from diverged candidates.
        diverged: bool ``[T, M]``.
        params: The chosen candidates' fast weights (the first's where all diverged); None where
            candidates are of different models, see `all_params`.
        all_params: Fast weights of all T tasks for every candidate.
        logits: The chosen candidates' logits on the query set, ``[T, Q, C]``, or None without one.
        predictions: Their classes int64 ``[T, Q]``, or None.
        probabilities: Those of every candidate, ``[T, M, Q, C]``, or None.
        ensemble: Mean probabilities of the candidates that did not diverge, ``[T, Q, C]``, or None.
        validation_losses: ``[T, M]``, or None where the criterion is another.
    """

    chosen: Tensor
    scores: Tensor
    distances: Tensor
    diverged: Tensor
    params: TaskParams | None
    all_params: list[TaskParams]
    logits: Tensor | None
    predictions: Tensor | None
    probabilities: Tensor | None
    ensemble: Tensor | None
    validation_losses: Tensor | None = None


@torch.no_grad()
def select_models(
    patched: Patched,
    support: Mapping[str, Tensor],
    candidates: Sequence[Candidate],
    *,
    query: Mapping[str, Tensor] | None = None,
    criterion: str = "validation",
    validation: Mapping[str, Tensor] | float = 0.5,
    compare: str = "probabilities",
    metric: str | None = None,
    p: float | None = None,
    ways: Tensor | None = None,
    task_chunk: int | None = None,
) -> Selection:
    """Adapt M candidates to each of T tasks, compare them, and choose one per task.

    Candidates of one model, number of steps and optimizer run in one batch: the candidate is a
    task axis, with a learning rate and initial values per task.

    ===============  ================================================================
    ``"validation"``  most right answers on rows held out of the support set (equal ones: the
                      smaller loss); the candidates are then adapted to the whole support set
    ``"medoid"``      smallest mean distance to the others: the candidate they agree with most
    ``"farthest"``    largest mean distance to the others: the one that differs most
    ===============  ================================================================

    Args:
        patched: The model, from `fm.patch`, whose head is the tasks' classifier.
        support: Model inputs and ``labels``, each ``[T, N, ...]``.
        candidates: M of them, at least 1; see `Candidate.grid`.
        query: Inputs ``[T, Q, ...]`` to predict, and to compare predictions on; with ``labels``
            only to leave out rows of -100. Without it predictions are compared on the support set.
        criterion: As above.
        validation: A labelled set ``[T, V, ...]``, or the share of each class's support rows to
            hold out, the last ones, in (0, 1): at least one row of classes of two or more.
        compare: ``"probabilities"``, ``"logits"``, ``"predictions"`` (classes, as one-hot rows) or
            ``"parameters"``. Distances of predictions are means over rows.
        metric: A metric of `fm.ops.pairwise_distance`, or for probabilities ``"hellinger"`` or
            ``"js"`` (square root of the Jensen-Shannon divergence). Default: ``"hellinger"`` for
            probabilities; the share of rows that differ for predictions; else ``"euclidean"``.
        p: Order of ``"minkowski"``.
        ways: Number of classes of each task, int64 ``[T]``, when fewer than the head has.
        task_chunk: Tasks times candidates adapted at once, at least 1, or None for all.

    Returns:
        A `Selection`. Of equal candidates the first is chosen. A candidate that becomes NaN or Inf
        is left out of everything and reported.

    Raises:
        TypeError: `patched` is no patched model, a candidate is none.
        ValueError: An unknown criterion, comparison or metric; nothing to hold out; labels out of
            range.

    Not differentiable.

    Example:
        >>> grid = fm.Candidate.grid(lr=[0.01, 0.1, 1.0], steps=[5, 20])
        >>> found = fm.select_models(patched, support, grid, query=query)
        >>> found.chosen, found.predictions, found.ensemble.argmax(-1)
    """
    if not isinstance(patched, Patched):
        raise TypeError(
            f"expected a patched model (fm.patch(model, spec)), got {type(patched).__name__}"
        )
    candidates = list(candidates)
    for candidate in candidates or [None]:
        if not isinstance(candidate, Candidate):
            raise TypeError(f"expected fm.Candidate objects, at least one, got {candidate!r}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if compare not in COMPARISONS:
        raise ValueError(f"compare must be one of {', '.join(COMPARISONS)}, got {compare!r}")
    metric = check_metric(compare, metric, p)
    tasks = check_set("support", support)
    extra: dict[str, Tensor] = {}
    if ways is not None:
        check_ways(ways, tasks)
        extra = {WAYS: ways}
    models = [c.patched or patched for c in candidates]
    if compare == "parameters" and any(m.layout.shapes != patched.layout.shapes for m in models):
        raise ValueError(
            "parameters can be compared between candidates of one specification; "
            "compare 'probabilities' instead"
        )
    for model in {id(m): m for m in models}.values():
        check_sets(model, classification, {"support": {**support, **extra}})
        if query is not None and model.device != next(iter(query.values())).device:
            raise ValueError(f"the model is on {model.device}, but the query set is not")
    run = Run(models, candidates, ways, task_chunk)

    validated = None
    if criterion == "validation":
        training, held_out = _held_out(support, validation)
        check_sets(patched, classification, {"validation": {**held_out, **extra}})
        params, diverged = run.adapt(training)
        logits = run.logits(params, held_out)
        judged = [run.judge(lg, held_out) for lg in logits.unbind(1)]
        validated = [torch.stack(t, 1) for t in zip(*judged, strict=True)]
        bad = diverged | ~validated[0].isfinite()
        if training is not support:
            params, diverged = run.adapt(support)
        diverged = diverged | bad
    else:
        params, diverged = run.adapt(support)

    # Predictions to hand out, and rows to compare on.
    rows = support if query is None else query
    logits = run.logits(params, rows)
    counted = _counted(rows)
    finite = torch.where(counted[:, None, :, None], mask_ways_of(logits, ways, 0.0), 0.0)
    diverged = diverged | ~finite.isfinite().flatten(2).all(2)
    probabilities = mask_ways_of(logits, ways, float("-inf")).softmax(-1)
    if compare == "parameters":
        found = candidate_distances(torch.stack([q.packed for q in params], 1), metric, p)
    else:
        features = {"logits": lambda: mask_ways_of(logits, ways, 0.0)}
        features["probabilities"] = lambda: probabilities
        features["predictions"] = lambda: F.one_hot(
            probabilities.nan_to_num().argmax(-1), logits.shape[-1]
        ).to(logits.dtype)
        found = candidate_distances(features[compare](), metric, p, counted)
    pair = diverged.unsqueeze(1) | diverged.unsqueeze(2)
    distances = found.masked_fill(pair, float("nan"))

    if validated is not None:
        losses, scores = validated
        # most right answers; of equal ones the smaller loss; of equal ones the first
        best = (scores == scores.masked_fill(diverged, -1).amax(1, keepdim=True)) & ~diverged
        order = losses.masked_fill(~best, float("inf"))
    else:
        others = (~pair).sum(2) - 1
        scores = torch.where(pair, 0.0, distances).sum(2) / others.clamp_min(1)
        # the sums of equal candidates may differ by rounding
        order = scores if criterion == "medoid" else -scores
        order = order.masked_fill(diverged, float("inf"))
    least = order.amin(1, keepdim=True)
    slack = _TINY * order.abs().masked_fill(order.isinf(), 0).amax(1, keepdim=True)
    first = (order <= least + slack).to(torch.int64).argmax(1)
    nobody = diverged.all(1)
    index = torch.where(nobody, 0, first)
    at = torch.arange(tasks, device=index.device)

    one = all(m.layout.shapes == patched.layout.shapes for m in models)
    chosen_params = None
    if one:
        chosen_params = TaskParams(
            patched.layout, torch.stack([q.packed for q in params], 1)[at, index]
        )
    weight = (~diverged).to(probabilities.dtype)[:, :, None, None]
    kept = torch.where(weight != 0, probabilities, 0.0)
    chosen_logits = logits[at, index]
    return Selection(
        chosen=index.masked_fill(nobody, -1),
        scores=scores.masked_fill(diverged, float("nan")),
        distances=distances,
        diverged=diverged,
        params=chosen_params,
        all_params=params,
        logits=None if query is None else chosen_logits,
        predictions=None
        if query is None
        else mask_ways(chosen_logits, ways).nan_to_num(nan=0.0).argmax(-1),
        probabilities=None if query is None else probabilities,
        ensemble=None if query is None else kept.sum(1) / weight.sum(1).clamp_min(1),
        validation_losses=None if validated is None else validated[0],
    )


def mask_ways_of(logits: Tensor, ways: Tensor | None, value: float) -> Tensor:
    """Logits ``[T, M, Q, C]`` with `value` for classes a task does not have."""
    if ways is None:
        return logits
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= ways.view(-1, 1, 1, 1)
    return logits.masked_fill(beyond, value)


def _counted(rows: Mapping[str, Tensor]) -> Tensor:
    """Which rows count, bool ``[T, Q]``."""
    if "labels" in rows:
        return rows["labels"] != IGNORE_INDEX
    first = next(iter(rows.values()))
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def _held_out(
    support: Mapping[str, Tensor], validation: Mapping[str, Tensor] | float
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The set to adapt to and the set to judge on; rows keep their places, labels become -100."""
    if isinstance(validation, Mapping):
        return support, validation
    number = isinstance(validation, int | float) and not isinstance(validation, bool)
    if not number or not 0 < validation < 1:
        raise ValueError(
            "validation must be a labelled set or a share of the support rows in (0, 1), "
            f"got {validation!r}"
        )
    labels = support["labels"]
    same = (labels.unsqueeze(1) == labels.unsqueeze(2)) & (labels >= 0).unsqueeze(1)
    size = same.sum(2)  # of the row's class
    after = same.triu(1).sum(2)  # rows of its class that come later
    taken = (size * validation).floor().to(torch.int64).clamp_min(1).minimum(size - 1)
    held = (after < taken) & (labels >= 0)
    if not bool(held.any(1).all()):
        task = int((~held.any(1)).nonzero()[0])
        raise ValueError(
            f"task {task} has one support row per class, and none to hold out: give a validation "
            "set, or use criterion 'medoid'"
        )
    training = {**support, "labels": labels.masked_fill(held, IGNORE_INDEX)}
    return training, {**support, "labels": labels.masked_fill(~held, IGNORE_INDEX)}
