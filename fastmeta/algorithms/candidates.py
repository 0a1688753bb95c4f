"""Candidates of a model selection: how each adapts, and all of them in as few batches as fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.batch import check_set
from fastmeta.engine.adaptation import adapted, plain_loop
from fastmeta.engine.checks import check_clip_norm, check_steps
from fastmeta.engine.chunks import split
from fastmeta.engine.head import frozen_features, head_may_serve, head_steps
from fastmeta.engine.losses import WAYS, accuracy, classification
from fastmeta.engine.optimizers import resolve_rule
from fastmeta.engine.rates import Rates, check_rate
from fastmeta.engine.update_rule import UpdateRule
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.head import linear_head
from fastmeta.patching.task_axes import is_input


@dataclass(frozen=True)
class Candidate:
    """One way to adapt to a task.

    Args:
        lr: Learning rate, positive. Default 0.01.
        steps: Update steps, at least 1. Default 5.
        optimizer: An optimizer's name or a rule object, as for `fm.adapt`. Default ``"sgd"``.
        seed: Of the noise on the initial values. Default 0.
        noise: Standard deviation of Gaussian noise added to the initial values, at least 0, the
            default.
        clip_norm: Bound on each task's gradient norm, positive, or None, the default.
        patched: Another patched model (another specification or backbone) than the one given to
            `select_models`, or None, the default.

    Raises:
        TypeError: `lr`, `steps` or `clip_norm` is no number.
        ValueError: A setting is out of range, or an unknown optimizer.
    """

    lr: float = 1e-2
    steps: int = 5
    optimizer: str | UpdateRule = "sgd"
    seed: int = 0
    noise: float = 0.0
    clip_norm: float | None = None
    patched: Patched | None = None

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_steps(self.steps)
        check_clip_norm(self.clip_norm)
        resolve_rule(self.optimizer)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise!r}")

    @classmethod
    def grid(cls, **values: Any) -> list[Candidate]:
        """Every combination of the given values; a list is varied, anything else is fixed.

        Example:
            >>> len(Candidate.grid(lr=[0.01, 0.1], seed=range(3), noise=0.02))
            6
        """
        known = {f.name for f in fields(cls)}
        if not values.keys() <= known:
            wrong = sorted(values.keys() - known)[0]
            raise ValueError(f"a candidate has {', '.join(sorted(known))}; got {wrong!r}")
        axes = [v if isinstance(v, list | tuple | range) else [v] for v in values.values()]
        return [
            cls(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*axes)
        ]


class Run:
    """Adapts and runs candidates; those that differ in rate and initial values only, at once."""

    def __init__(
        self,
        models: list[Patched],
        candidates: list[Candidate],
        ways: Tensor | None,
        task_chunk: int | None,
    ) -> None:
        self.models, self.candidates = models, candidates
        self.ways, self.task_chunk = ways, task_chunk
        groups: dict[tuple, list[int]] = {}
        for i, (model, c) in enumerate(zip(models, candidates, strict=True)):
            rule = c.optimizer if isinstance(c.optimizer, str) else id(c.optimizer)
            groups.setdefault((id(model), c.steps, rule, c.clip_norm), []).append(i)
        self.groups = list(groups.values())

    def adapt(self, support: Mapping[str, Tensor]) -> tuple[list[TaskParams], Tensor]:
        """Every candidate's fast weights of T tasks, and who diverged, bool ``[T, M]``."""
        tasks = check_set("support", support)
        params: list[TaskParams | None] = [None] * len(self.candidates)
        diverged = [None] * len(self.candidates)
        inputs = dict(support) if self.ways is None else {**support, WAYS: self.ways}
        for group in self.groups:
            packed, active = self._adapt(group, inputs, tasks)
            layout = self.models[group[0]].layout
            for i, rows, good in zip(group, packed.split(tasks), active.split(tasks), strict=True):
                params[i], diverged[i] = TaskParams(layout, rows), ~good
        return params, torch.stack(diverged, 1)

    def _adapt(self, group: list[int], inputs: Mapping[str, Tensor], tasks: int):
        """``[G * T, P]`` and bool ``[G * T]``, candidates on the slow axis."""
        model, first = self.models[group[0]], self.candidates[group[0]]
        start = torch.cat([self._start(i, tasks) for i in group])
        loop = plain_loop(
            model,
            steps=first.steps,
            lr=first.lr,
            optimizer=first.optimizer,
            loss_fn=classification,
            clip_norm=first.clip_norm,
        )
        wide = wide_dtype(start.dtype)
        rates = start.new_tensor([self.candidates[i].lr for i in group], dtype=wide)
        loop = replace(loop, rates=Rates.of_tasks(rates.repeat_interleave(tasks), model.layout))
        params = TaskParams(model.layout, start)
        features = self._features(model, inputs) if head_may_serve(loop) else None
        if features is not None:
            labels, ways = inputs["labels"], inputs.get(WAYS)
            found = head_steps(
                loop,
                params,
                _repeated(features, len(group)),
                _repeated(labels, len(group)),
                None if ways is None else _repeated(ways, len(group)),
                torch.arange(len(start), device=start.device),
            )
            return found.params.packed, found.active
        every = {k: _repeated(v, len(group)) for k, v in inputs.items()}
        found = adapted(loop, params, every, self.task_chunk)
        return found.params.packed, found.active

    def _features(self, model: Patched, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """What a head that alone adapts reads, ``[T, N, D]``: the same for every candidate."""
        rows = {k: v for k, v in inputs.items() if is_input(k) and k != WAYS}
        if linear_head(model) is None:
            return None
        params = model.init(check_set("support", rows))
        return frozen_features(model, params, rows, model.record_prefix(params, rows))

    def _start(self, i: int, tasks: int) -> Tensor:
        model, candidate = self.models[i], self.candidates[i]
        packed = model.init(tasks).packed
        if not candidate.noise:
            return packed
        # The same for every task, whatever others are in the batch.
        generator = torch.Generator().manual_seed(candidate.seed)
        noise = torch.randn(1, packed.shape[1], generator=generator, dtype=torch.float64)
        noise = model.layout.pack(model.layout.unpack(noise))  # padding stays zero
        return packed + (candidate.noise * noise).to(packed.device, packed.dtype)

    def logits(self, params: list[TaskParams], rows: Mapping[str, Tensor]) -> Tensor:
        """``[T, M, Q, C]`` of every candidate."""
        tasks = params[0].num_tasks
        inputs = {k: v for k, v in rows.items() if is_input(k)}
        found: list[Tensor | None] = [None] * len(params)
        for group in self.groups:
            model = self.models[group[0]]
            features = self._features(model, inputs)
            if features is not None:
                for i in group:
                    found[i] = _linear(model, params[i], features)
                continue
            packed = torch.cat([params[i].packed for i in group])
            every = {k: _repeated(v, len(group)) for k, v in inputs.items()}
            pieces = []
            for some in split(slice(0, len(packed)), self.task_chunk):
                fast = TaskParams(model.layout, packed[some])
                out = model(fast, **{k: v[some] for k, v in every.items()})
                pieces.append(getattr(out, "logits", out))
            for i, own in zip(group, torch.cat(pieces).split(tasks), strict=True):
                found[i] = own
        widths = {t.shape[-1] for t in found}
        if len(widths) > 1:
            raise ValueError(f"candidates must have equally many classes, got {sorted(widths)}")
        return torch.stack(found, 1)

    def judge(self, logits: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss ``[T]`` and accuracy ``[T]`` of one candidate."""
        batch = dict(rows) if self.ways is None else {**rows, WAYS: self.ways}
        return classification(logits, batch), accuracy(logits, batch)


def _repeated(t: Tensor, times: int) -> Tensor:
    return t.repeat(times, *[1] * (t.dim() - 1))


def _linear(model: Patched, params: TaskParams, features: Tensor) -> Tensor:
    """Logits ``[T, Q, C]`` of the one adapted linear layer."""
    slots = linear_head(model).slots
    logits = features @ params.views[slots["weight"]].mT
    return logits + params.views[slots["bias"]].unsqueeze(1) if "bias" in slots else logits
