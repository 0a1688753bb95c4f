"""`fm.select_models`: train several candidates per task in one batch and pick one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta._settings import integer, is_number
from fastmeta.algorithms.candidates import Candidate, Run
from fastmeta.algorithms.disagreement import COMPARISONS, candidate_distances, check_metric
from fastmeta.batch import IGNORE_INDEX, check_set, ways_of
from fastmeta.engine.checks import check_sets
from fastmeta.engine.losses import WAYS, classification, mask_ways
from fastmeta.patching import Patched, TaskParams

CRITERIA = ("validation", "medoid", "farthest")
_ROUNDING = 32  # units in the last place


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
    logits: Tensor | None = None
    predictions: Tensor | None = None
    probabilities: Tensor | None = None
    ensemble: Tensor | None = None
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
    ways: Tensor | int | None = None,
    task_chunk: int | None = None,
) -> Selection:
    """Adapt M candidates to each of T tasks, compare them, and choose one per task.

    Candidates of one model, number of steps and optimizer run in one batch: the candidate is a
    task axis, with a learning rate and initial values per task.

    ================  ================================================================
    ``"validation"``  most right answers on rows held out of the support set (equal ones: the
                      smaller loss); the candidates are then adapted to the whole support set
    ``"medoid"``      smallest mean distance to the others: the candidate they agree with most
    ``"farthest"``    largest mean distance to the others: the one that differs most
    ================  ================================================================

    Args:
        patched: The model, from `fm.patch`, whose head is the tasks' classifier.
        support: Model inputs and ``labels``, each ``[T, N, ...]``.
        candidates: M of them, at least 1; see `Candidate.grid`.
        query: Inputs ``[T, Q, ...]`` to predict, and to compare predictions on; with ``labels``
            only to leave out rows of -100. Without it predictions are compared on the support set.
        criterion: As above. Default ``"validation"``, which needs two examples of some class.
        validation: A labelled set ``[T, V, ...]``, or the share of each class's support rows to
            hold out, the last ones, in (0, 1): at least one row of classes of two or more.
        compare: ``"probabilities"``, ``"logits"``, ``"predictions"`` (classes, as one-hot rows) or
            ``"parameters"``. Distances of predictions are means over rows.
        metric: A metric of `fm.ops.pairwise_distance`, or for probabilities ``"hellinger"`` or
            ``"js"`` (square root of the Jensen-Shannon divergence). Default: ``"hellinger"`` for
            probabilities; the share of rows that differ for predictions; else ``"euclidean"``.
        p: Order of ``"minkowski"``.
        ways: Number of classes of each task, int64 ``[T]`` or one for all, when fewer than the head
            has.
        task_chunk: Tasks times candidates adapted at once, at least 1, or None for all. Where a
            linear head alone adapts, one operator adapts all.

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
    candidates = list(candidates) if isinstance(candidates, Sequence) else [candidates]
    metric = _check(patched, candidates, criterion, compare, metric, p)
    if task_chunk is not None:
        integer("task_chunk", task_chunk, or_else=" or None")
    tasks = check_set("support", support)
    extra: dict[str, Tensor] = {}
    if ways is not None:
        ways = ways_of(ways, tasks, patched.device)
        extra = {WAYS: ways}
    models = [c.patched or patched for c in candidates]
    one_model = all(m is models[0] for m in models)
    one_layout = all(models[0].layout.difference(m.layout) is None for m in models)
    if compare == "parameters" and not one_layout:
        raise ValueError(
            "parameters can be compared between candidates of one specification; "
            "compare 'probabilities' instead"
        )
    training, held_out = support, None
    for model in {id(m): m for m in models}.values():
        check_sets(model, classification, {"support": {**support, **extra}})
        if query is not None and model.device != next(iter(query.values())).device:
            raise ValueError(f"the model is on {model.device}, but the query set is not")
    if criterion == "validation":
        training, held_out = _held_out(support, validation)
        check_sets(patched, classification, {"validation": {**held_out, **extra}})

    run = Run(models, candidates, ways, task_chunk)
    params, diverged = run.adapt(training)
    losses = right = None
    if held_out is not None:
        judged = [run.judge(own, held_out) for own in run.logits(params, held_out).unbind(1)]
        losses, right = (torch.stack(t, 1) for t in zip(*judged, strict=True))
        bad = diverged | ~losses.isfinite()
        if training is not support:
            params, diverged = run.adapt(support)
        diverged = diverged | bad

    # Predictions to hand out, and rows to compare on.
    rows = support if query is None else query
    logits, counted = run.logits(params, rows), _counted(rows)
    own = mask_ways(logits, ways, 0.0)
    finite = torch.where(counted[:, None, :, None], own, 0.0).isfinite()
    diverged = diverged | ~finite.flatten(2).all(2)
    probabilities = mask_ways(logits, ways).softmax(-1)
    packed = torch.stack([q.packed for q in params], 1) if one_layout else None
    if compare == "parameters":
        distances = candidate_distances(packed, metric, p)
    else:
        features = {"logits": own, "probabilities": probabilities}.get(compare)
        if features is None:
            classes = probabilities.nan_to_num().argmax(-1)
            features = F.one_hot(classes, logits.shape[-1]).to(logits.dtype)
        distances = candidate_distances(features, metric, p, counted)
    pair = diverged.unsqueeze(1) | diverged.unsqueeze(2)
    distances = distances.masked_fill(pair, float("nan"))
    scores = right
    if scores is None:  # the mean distance to the others
        others = (~pair).sum(2) - 1
        scores = torch.where(pair, 0.0, distances).sum(2) / others.clamp_min(1)
    index = _choose(criterion, scores, losses, diverged)

    at, nobody = torch.arange(tasks, device=index.device), diverged.all(1)
    found = Selection(
        chosen=index.masked_fill(nobody, -1),
        scores=scores.masked_fill(diverged, float("nan")),
        distances=distances,
        diverged=diverged,
        params=TaskParams(models[0].layout, packed[at, index]) if one_model else None,
        all_params=params,
        validation_losses=losses,
    )
    if query is not None:
        weight = (~diverged).to(probabilities.dtype)[:, :, None, None]
        kept = torch.where(weight != 0, probabilities, 0.0)
        found.logits = logits[at, index]
        found.predictions = mask_ways(found.logits, ways).nan_to_num(nan=0.0).argmax(-1)
        found.probabilities = probabilities
        found.ensemble = kept.sum(1) / weight.sum(1).clamp_min(1)
    return found


def _check(patched, candidates, criterion, compare, metric, p) -> str:
    """Raise one sentence for wrong settings; the metric's name otherwise."""
    if not isinstance(patched, Patched):
        raise TypeError(
            f"expected a patched model (fm.patch(model, spec)), got {type(patched).__name__}"
        )
    for candidate in candidates or [None]:
        if not isinstance(candidate, Candidate):
            raise TypeError(f"expected fm.Candidate objects, at least one, got {candidate!r}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if compare not in COMPARISONS:
        raise ValueError(f"compare must be one of {', '.join(COMPARISONS)}, got {compare!r}")
    return check_metric(compare, metric, p)


def _choose(criterion: str, scores: Tensor, losses: Tensor | None, diverged: Tensor) -> Tensor:
    """The candidate of each task, int64 ``[T]``; of equal ones the first."""
    if losses is not None:  # most right answers; of equal ones the smaller loss
        best = scores.masked_fill(diverged, -1).amax(1, keepdim=True)
        order = losses.masked_fill((scores != best) | diverged, float("inf"))
        return (order <= order.amin(1, keepdim=True)).to(torch.int64).argmax(1)
    order = scores if criterion == "medoid" else -scores
    order = order.masked_fill(diverged, float("inf"))
    # sums of the same distances in another order differ by rounding
    size = order.abs().masked_fill(order.isinf(), 0).amax(1, keepdim=True)
    slack = _ROUNDING * torch.finfo(order.dtype).eps * size
    return (order <= order.amin(1, keepdim=True) + slack).to(torch.int64).argmax(1)


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
    if not is_number(validation) or not 0 < validation < 1:
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
