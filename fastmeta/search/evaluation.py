"""Evaluate C candidates on T tasks in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta.batch import TaskBatch
from fastmeta.engine.checks import check_sets
from fastmeta.engine.episode import with_ways
from fastmeta.engine.losses import WAYS, accuracy, classification
from fastmeta.patching import Params, Patched, TaskParams
from fastmeta.patching import patch as patch_model
from fastmeta.patching.context import Call, running
from fastmeta.patching.head import Tap
from fastmeta.patching.spec import Head
from fastmeta.patching.task_axes import is_input
from fastmeta.search.adaptation import adapt_candidates
from fastmeta.search.passes import FrozenPass, LivePass
from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space
from fastmeta.search.supernet import Supernet, repeated
from fastmeta.training.evaluation import half_width

TOKENS = 1 << 16
"""Tokens times adapted layers that a batch of candidates holds: what bounds its memory."""

KEPT_FEATURES = 1024
"""Architectures whose features of a batch are remembered, for candidates with other recipes."""


@dataclass
class Score:
    """What one candidate reached.

    Attributes:
        proposal: The candidate.
        accuracies: Query accuracy of each task it was evaluated on; 0 where it diverged.
        losses: Query loss of each of them.
        diverged: On how many of them it diverged.
        stopped: Whether successive halving ended it before the last rung.
        cost: Numbers by name, see `CostModel`; empty without one.
    """

    proposal: Proposal
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: int = 0
    stopped: bool = False
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Mean over tasks."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def interval(self) -> float:
        """Half width of the 95 % interval of the mean over tasks, or 0 for a single task."""
        if len(self.accuracies) < 2:
            return 0.0
        return half_width(torch.tensor(self.accuracies, dtype=torch.float64))

    def reward(self, weights: Mapping[str, float]) -> float:
        """``accuracy - sum_k weights[k] cost[k]``."""
        return self.accuracy - sum(w * self.cost[n] for n, w in weights.items())


class _FeatureHead(nn.Module):
    """The model's head, on the features that it reads."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)


def as_batches(batches: TaskBatch | Sequence[TaskBatch]) -> list[TaskBatch]:
    """One batch of tasks or several, as a list."""
    found = [batches] if isinstance(batches, TaskBatch | Mapping) else list(batches)
    if not found:
        raise ValueError("expected at least one batch of tasks, got none")
    for batch in found:
        if not isinstance(batch, TaskBatch):
            raise TypeError(f"expected a fm.TaskBatch or several, got {type(batch).__name__}")
    return found


class Evaluator:
    """Adapts candidates to tasks and judges them on the tasks' query sets.

    Args:
        space: Where the candidates come from.
        seed: Of the LoRA terms' initial values and of smaller batches' rows.
        calibration: Inputs ``[T, N, ...]`` on which the importance of heads and units is measured;
            without, it is that of the weights alone.
        tokens: Bound on tokens times adapted layers of one batch of candidates; more candidates are
            evaluated in several batches. Never changes a result.

    Attributes:
        net: The network that holds every candidate.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        calibration: Mapping[str, Tensor] | None = None,
        tokens: int = TOKENS,
    ) -> None:
        self.space, self.seed, self.tokens = space, seed, tokens
        self.net = Supernet(space, seed=seed, calibration=calibration)
        self._head = self._feature_head()
        self._features: WeakKeyDictionary[TaskBatch, dict] = WeakKeyDictionary()

    @torch.no_grad()
    def evaluate(
        self,
        candidates: Sequence[Proposal],
        batches: TaskBatch | Sequence[TaskBatch],
        *,
        keep: float | None = None,
    ) -> list[Score]:
        """Adapt each candidate to each task's support set and score it on the query set.

        Args:
            candidates: C of them, at least 1.
            batches: Tasks, each batch a rung: ``[T, N, ...]``, labels within the model's classes.
            keep: Successive halving: the share of candidates, in (0, 1), that goes on from each
                batch to the next, by mean accuracy (equal ones: the smaller loss). None keeps all.

        Returns:
            One `Score` for each candidate, in their order. A candidate's numbers do not depend on
            the others.

        Raises:
            TypeError: Something else than batches of tasks.
            ValueError: No candidate, `keep` out of its range, inputs or labels that do not fit.
        """
        if not candidates:
            raise ValueError("expected at least one candidate to evaluate, got none")
        if keep is not None and not 0 < keep < 1:
            raise ValueError(f"keep must be a share in (0, 1) or None, got {keep!r}")
        batches = as_batches(batches)
        for batch in batches:
            support, query = with_ways(batch.to(self.net.device))
            check_sets(self.net, classification, {"support": support, "query": query})
        scores = [Score(c) for c in candidates]
        alive = list(range(len(candidates)))
        for number, batch in enumerate(batches):
            self._rung([scores[i] for i in alive], batch)
            if keep is not None and number + 1 < len(batches):
                order = sorted(alive, key=lambda i: _rank(scores[i]))
                going_on = set(order[: max(1, math.ceil(keep * len(alive)))])
                for i in alive:
                    scores[i].stopped = i not in going_on
                alive = [i for i in alive if i in going_on]
        return scores

    def _rung(self, scores: list[Score], batch: TaskBatch) -> None:
        depth = len(self.space.anatomy.layers)
        heads: list[Score] = []
        live: list[Score] = []
        for score in scores:
            alone = self._head is not None and score.proposal.first_adapted == depth
            (heads if alone else live).append(score)
        if heads and not self._heads(heads, batch):
            live += heads
        live.sort(key=lambda s: s.proposal.first_adapted)
        for some in self._chunks(live, batch):
            self._live(some, batch.to(self.net.device))

    def _chunks(self, scores: list[Score], batch: TaskBatch) -> list[list[Score]]:
        """Scores in their order, divided so that each batch fits."""
        depth = len(self.space.anatomy.layers)
        rows = max(t.numel() for t in (batch.support["labels"], batch.query["labels"]))
        ids = next(v for v in batch.support.values() if v.dim() > 2)
        size = rows * ids.shape[2]
        chunks: list[list[Score]] = []
        used = 0
        for score in scores:
            mine = size * max(1, depth - score.proposal.first_adapted)
            if not chunks or used + mine > self.tokens:
                chunks.append([])
                used = 0
            chunks[-1].append(score)
            used += mine
        return chunks

    def _live(self, scores: list[Score], batch: TaskBatch) -> None:
        """Candidates whose layers adapt."""
        proposals = [s.proposal for s in scores]
        support, query = _inputs(batch.support), _inputs(batch.query)
        frozen = FrozenPass(self.net, support, proposals)

        def inputs_of(left: Sequence[int], rows: Tensor):
            chosen = {k: _rows(v, rows) for k, v in support.items()}
            return repeated(chosen, len(left)), LivePass(frozen, left, rows)

        fast, finite = adapt_candidates(
            self.net, proposals, self.net.start(proposals, batch.num_tasks),
            batch.support["labels"], batch.ways, inputs_of, seed=self.seed,
        )  # fmt: skip
        judged = FrozenPass(self.net, query, proposals)
        live = LivePass(judged, range(len(scores)))
        logits = self.net.run(fast, repeated(query, len(scores)), live)
        _judge(scores, logits, finite, batch)

    def _heads(self, scores: list[Score], batch: TaskBatch) -> bool:
        """Candidates whose head alone adapts, on features that are computed once.

        Returns:
            False where the head reads anything but one row per text.
        """
        known = self._features.setdefault(batch, {})
        missing = {_shape_key(s.proposal): s for s in scores if _shape_key(s.proposal) not in known}
        for some in self._chunks(list(missing.values()), batch):
            proposals = [s.proposal for s in some]
            pairs = [self.features(proposals, rows) for rows in (batch.support, batch.query)]
            if None in pairs:
                self._head = None
                return False
            known |= dict(zip(map(_shape_key, proposals), zip(*pairs, strict=True), strict=True))
        batch = batch.to(self.net.device)
        proposals = [s.proposal for s in scores]
        support, query = zip(*(known[_shape_key(p)] for p in proposals), strict=True)

        def inputs_of(left: Sequence[int], rows: Tensor):
            return {"features": torch.cat([_rows(support[i], rows) for i in left])}, None

        head: Patched = self._head
        start = head.init(len(scores) * batch.num_tasks)
        fast, finite = adapt_candidates(
            head, proposals, TaskParams(head.layout, start.packed.detach().contiguous()),
            batch.support["labels"], batch.ways, inputs_of, seed=self.seed,
        )  # fmt: skip
        _judge(scores, head(fast, features=torch.cat(query)), finite, batch)
        while len(known) > KEPT_FEATURES:
            del known[next(iter(known))]
        return True

    def features(
        self, proposals: Sequence[Proposal], rows: Mapping[str, Tensor]
    ) -> list[Tensor] | None:
        """What the head reads before adaptation, ``[T, N, D]`` of each candidate.

        Args:
            proposals: Candidates whose LoRA terms, if any, are as they start.
            rows: ``[T, N, ...]``.

        Returns:
            None where the head is more than one linear layer on one row of each text.
        """
        if self._head is None:
            return None
        inputs = {k: v.to(self.net.device) for k, v in _inputs(rows).items()}
        count = len(proposals)
        order = sorted(range(count), key=lambda i: proposals[i].first_adapted)
        frozen = FrozenPass(self.net, inputs, [proposals[i] for i in order])
        gates = LivePass(frozen, range(count))
        params = self.net.init(count * gates.tasks)
        flat, units, n = self.net.flatten(params, repeated(inputs, count))
        tap = Tap()
        with running(Call(params.views, units, n, prefix=gates.stem, gates=gates, tap=tap)):
            out = self.net.plan(inputs).run(flat)
        logits = getattr(out, "logits", out)
        for name, x, y, version in tap.calls:
            if name == _head_name(self.net) and x.dim() == 2 and y is logits:
                if y._version == version:
                    found = x.view(count, gates.tasks, n, -1)
                    return [found[order.index(i)] for i in range(count)]
        return None

    def _feature_head(self) -> Patched | None:
        """The head alone, or None where it is more than one linear layer."""
        name = _head_name(self.net)
        if name is None:
            return None
        head = self.net.model.get_submodule(name)
        return patch_model(_FeatureHead(head), Params("*"))


def _head_name(net: Supernet) -> str | None:
    owners = {r.name.rpartition(".")[0] for r in Head().resolve(net.model)}
    if len(owners) != 1:
        return None
    name = owners.pop()
    plain = type(net.model.get_submodule(name)).forward is nn.Linear.forward
    return name if plain else None


def _judge(scores: list[Score], logits: Tensor, finite: Tensor, batch: TaskBatch) -> None:
    tasks = batch.num_tasks
    rows: dict[str, Any] = {"labels": batch.query["labels"].repeat(len(scores), 1)}
    if batch.ways is not None:
        rows[WAYS] = batch.ways.repeat(len(scores))
    right, losses = accuracy(logits, rows), classification(logits, rows)
    good = finite & torch.isfinite(losses)
    for i, score in enumerate(scores):
        own = slice(i * tasks, (i + 1) * tasks)
        score.accuracies += torch.where(good[own], right[own], 0.0).tolist()
        score.losses += losses[own].nan_to_num(math.inf).tolist()
        score.diverged += int((~good[own]).sum())


def _inputs(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in rows.items() if is_input(k)}


def _shape_key(proposal: Proposal) -> tuple:
    """Candidates of one key have the same frozen features."""
    return proposal.shape, proposal.pooling


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """``[T, N, ...]`` and ``[T, b]`` -> ``[T, b, ...]``."""
    tasks = torch.arange(len(t), device=t.device).unsqueeze(1)
    return t[tasks, index]


def _rank(score: Score) -> tuple[float, float]:
    return -score.accuracy, sum(score.losses)
