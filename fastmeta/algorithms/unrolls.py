"""Meta-training an inner optimizer on unrolls that are too long to differentiate at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._settings import above_0, integer
from fastmeta.algorithms.hypernetwork import HyperNetwork
from fastmeta.algorithms.learner import GradientLearner
from fastmeta.algorithms.protomaml import ProtoMAML
from fastmeta.batch import TaskBatch
from fastmeta.engine.conditions import computing
from fastmeta.engine.episode import MetaOutput, with_ways, zero_loss
from fastmeta.engine.inner import InnerLoop, Support, inner_step, model_inputs, task_losses
from fastmeta.engine.losses import logits_of, scores
from fastmeta.engine.update_rule import State
from fastmeta.meta_module import MetaModule
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.prefix import PrefixCache


@dataclass
class _Position:
    """Where the inner loops of one batch of tasks stand."""

    params: Tensor
    state: State
    active: Tensor
    step: int

    def map(self, fn: Callable[[Tensor], Tensor]) -> _Position:
        """The position with `fn` applied to every tensor."""
        return _Position(fn(self.params), tuple(map(fn, self.state)), fn(self.active), self.step)

    def select(self, index: Tensor) -> _Position:
        """That of the tasks at `index`."""
        return self.map(lambda t: t.index_select(0, index))


_Prefixes = tuple[PrefixCache | None, PrefixCache | None]
"""Of support and query set."""


class _Unrolls(MetaModule):
    """What both share: a batch of tasks whose inner loops go on from call to call."""

    def __init__(self, learner: GradientLearner, horizon: int, truncation: int) -> None:
        super().__init__()
        if not isinstance(learner, GradientLearner):
            raise TypeError(f"expected a learner such as fm.MAML, got {type(learner).__name__}")
        if not any(p.requires_grad for p in learner.rule.parameters()):
            raise ValueError(
                "expected a learner whose optimizer learns, such as fm.LearnedOptimizer(), got "
                f"{type(learner.rule).__name__}"
            )
        if isinstance(learner, HyperNetwork | ProtoMAML):
            raise ValueError(
                "expected a learner that starts from the model's own weights, such as fm.MAML, got "
                f"{type(learner).__name__}"
            )
        self.learner = learner
        self.horizon = integer("horizon", horizon)
        self.truncation = integer("truncation", truncation)
        if horizon % truncation:
            raise ValueError(
                f"horizon must be a multiple of truncation={truncation}, got {horizon}"
            )
        self.train(learner.training)
        self.batch: TaskBatch | None = None
        self.prefixes: _Prefixes = (None, None)

    @property
    def device(self) -> torch.device:
        return self.learner.device

    @property
    def patched(self) -> Patched:
        return self.learner.patched

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.learner.model

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What learns: the optimizer and learned rates; initial values stay as they are."""
        return self.learner._own()

    # The state is the whole learner's.
    def _save_to_state_dict(self, *args: Any) -> None:
        self.learner._save_to_state_dict(*args)

    def restart(self) -> None:
        """Forget the batch in hand: the next call starts on the one it is given."""
        self.batch = None

    def progress(self) -> dict[str, Any]:
        """The unroll under way, for a checkpoint; empty where there is none."""
        if self.batch is None:
            return {}
        batch = {"support": self.batch.support, "query": self.batch.query, "ways": self.batch.ways}
        return {"batch": batch, "positions": [vars(p) for p in self._positions()]}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Go on with an unroll that :meth:`progress` described."""
        self.restart()
        if progress:
            batch = TaskBatch(**progress["batch"]).to(self.device)
            with self._computing():
                self._begin(self._loop(), batch)  # the frozen prefix
            self.batch = batch
            device = self.device
            positions = [_Position(**p) for p in progress["positions"]]
            self._set_positions([p.map(lambda t: t.to(device)) for p in positions])

    def forward(self, batch: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Take the next window of inner steps of the tasks in hand.

        Args:
            batch: T tasks, which are taken up where no unroll is under way, and else ignored.
            steps: For evaluation, inner steps when other than the learner's.

        Returns:
            A `MetaOutput` of the window; under ``torch.no_grad()`` that of ``learner(batch)``.
        """
        if not torch.is_grad_enabled():
            return self.learner(batch, steps=steps)
        with self._computing():
            if self.batch is None:
                self.learner.check(batch)
                self.batch = batch
                self._start(self._loop(), batch)
            out = self._window(self._loop(), self.batch)
        if self._positions()[0].step >= self.horizon:
            self.restart()
        return out

    def _computing(self) -> AbstractContextManager:
        return computing(self.device, self.learner.compute_dtype)

    def _loop(self) -> InnerLoop:
        return self.learner.inner_loop(self.truncation)

    def _begin(self, loop: InnerLoop, batch: TaskBatch) -> _Position:
        """Every task at its initial values, and the frozen prefix run once."""
        with torch.no_grad():
            start = self.patched.init(batch.num_tasks)
            self.prefixes = self._prefixes(loop, batch, start)
            params = start.packed.contiguous()
            active = torch.ones(batch.num_tasks, dtype=torch.bool, device=params.device)
            return _Position(params, loop.rule.init(params), active, 0)

    def _prefixes(self, loop: InnerLoop, batch: TaskBatch, params: TaskParams) -> _Prefixes:
        support, query = (
            self.patched.record_prefix(params, model_inputs(s), widths=loop.widths)
            for s in with_ways(batch)
        )
        return support, query

    def _advance(
        self,
        loop: InnerLoop,
        batch: TaskBatch,
        at: _Position,
        prefixes: _Prefixes,
        tasks: Tensor | None = None,
    ) -> tuple[_Position, list[Tensor], list[Tensor], Any]:
        """One window on: query losses after every step, support losses before, last outputs.

        Args:
            tasks: Which of the learner's tasks these are, int64 ``[T]``; None: all.
        """
        support, query = with_ways(batch)
        given = Support(support, prefixes[0], tasks)
        packed, state, active = at.params, at.state, at.active
        if torch.is_grad_enabled():
            packed = packed.detach().requires_grad_()  # for gradients that are differentiated
        found, before, outputs = [], [], None
        for step in range(loop.steps):
            packed, state, active, losses = inner_step(
                loop, at.step + step, packed, state, given, active,
                create_graph=torch.is_grad_enabled() and loop.create_graph(step),
            )  # fmt: skip
            params = TaskParams(self.patched.layout, packed)
            after, outputs = task_losses(loop, params, query, prefixes[1])
            active = active & torch.isfinite(after.detach())
            found.append(after)
            before.append(losses)
        return _Position(packed, state, active, at.step + loop.steps), found, before, outputs

    def _output(self, loss, losses, before, logits, at: _Position) -> MetaOutput:
        return MetaOutput(
            loss=loss,
            task_losses=losses.masked_fill(~at.active, float("nan")),
            logits=logits,
            params=TaskParams(self.patched.layout, at.params.detach()),
            diverged=~at.active,
            support_losses=torch.stack(before),
            accuracy=scores(self.learner.loss_fn, logits, with_ways(self.batch)[1]),
        )

    def _start(self, loop: InnerLoop, batch: TaskBatch) -> None:
        raise NotImplementedError

    def _window(self, loop: InnerLoop, batch: TaskBatch) -> MetaOutput:
        raise NotImplementedError

    def _positions(self) -> list[_Position]:
        raise NotImplementedError

    def _set_positions(self, positions: list[_Position]) -> None:
        raise NotImplementedError


class TruncatedUnroll(_Unrolls):
    """Truncated backpropagation through the inner loop, for learned optimizers.

    A batch of tasks takes `horizon` inner steps, `truncation` of them in every call; the loss of a
    call is the mean query loss after each of its steps, and its gradient reaches the optimizer
    through these steps alone (it is biased for what they do later; `fm.PES` is not). Then the next
    batch is taken up. Initial values do not learn.

    Args:
        learner: A learner whose optimizer learns, such as ``fm.MAML(patched,
            optimizer=fm.LearnedOptimizer(), order=1)``. Its `memory` and `task_chunk` hold where
            it is evaluated: a window's graph is kept whole.
        horizon: Inner steps of a task, a multiple of `truncation`.
        truncation: Inner steps of a call, at least 1.

    Raises:
        TypeError: `learner` is no gradient-based learner.
        ValueError: Its optimizer does not learn, or a setting is out of range.

    Source: Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474
    """

    def __init__(self, learner: GradientLearner, *, horizon: int = 100, truncation: int = 10):
        super().__init__(learner, horizon, truncation)
        self.at: _Position | None = None

    def _start(self, loop: InnerLoop, batch: TaskBatch) -> None:
        self.at = self._begin(loop, batch)

    def _window(self, loop: InnerLoop, batch: TaskBatch) -> MetaOutput:
        with torch.set_grad_enabled(bool(self.at.active.all())):  # else its graph would be of NaN
            at, found, before, outputs = self._advance(loop, batch, self.at, self.prefixes)
        losses = torch.stack(found).mean(0)
        logits = logits_of(outputs)
        if bool(at.active.all()):
            loss = losses.mean()
        else:  # lets go of the graph before another one is built
            at, losses, found, outputs = at.map(torch.detach), losses.detach(), None, None
            logits = None if logits is None else logits.detach()
            loss = self._of_sound(loop, batch, at.active)
        self.at = replace(at, params=at.params.detach(), state=tuple(s.detach() for s in at.state))
        return self._output(loss, losses, before, logits, at)

    def _of_sound(self, loop: InnerLoop, batch: TaskBatch, sound: Tensor) -> Tensor:
        """The loss of sound tasks alone, run again: no NaN may be in their graph."""
        while bool(sound.any()):
            index = sound.nonzero().flatten()
            own = batch.select(index)
            at = self.at.select(index)
            prefixes = self._prefixes(loop, own, TaskParams(self.patched.layout, at.params))
            at, found, *_ = self._advance(loop, own, at, prefixes, index)
            if bool(at.active.all()):
                return torch.stack(found).mean()
            # Other dropout masks, another task lost: fewer tasks each time, so this ends.
            sound = sound.index_copy(0, index, at.active)
        return zero_loss(list(self.parameters()))

    def _positions(self) -> list[_Position]:
        return [self.at]

    def _set_positions(self, positions: list[_Position]) -> None:
        (self.at,) = positions


class PES(_Unrolls):
    """Persistent evolution strategies: an unbiased meta-gradient of long unrolls, window by window.

    N pairs of particles run the inner loops of the same tasks, each with the optimizer's parameters
    moved by ``+-eps_i``, drawn anew for every window from a normal distribution of deviation
    `std`. With ``xi_i`` the sum of a particle's draws since its start and ``L`` the mean query loss
    of a window, the estimate is ``sum_i xi_i (L_i^+ - L_i^-) / (2 N std^2)``. No graph is built, so
    the horizon may be as long as one likes. ``out.loss.backward()`` fills ``.grad`` with it.

    Args:
        learner: As for `fm.TruncatedUnroll`.
        horizon: Inner steps of a task, a multiple of `truncation`.
        truncation: Inner steps of a call, at least 1.
        pairs: N, at least 1.
        std: Above 0.
        seed: Seed of the draws.

    Raises:
        TypeError: `learner` is no gradient-based learner.
        ValueError: Its optimizer does not learn, or a setting is out of range.

    Source: Vicol et al. 2021, https://arxiv.org/abs/2112.13835
    """

    def __init__(
        self,
        learner: GradientLearner,
        *,
        horizon: int = 100,
        truncation: int = 10,
        pairs: int = 4,
        std: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(learner, horizon, truncation)
        self.pairs = integer("pairs", pairs)
        self.std = above_0("std", std)
        self.generator = torch.Generator().manual_seed(seed)
        self.particles: list[_Position] = []
        self.sums: list[list[Tensor]] = []

    def _start(self, loop: InnerLoop, batch: TaskBatch) -> None:
        start = self._begin(loop, batch)
        self.particles = [start.map(torch.clone) for _ in range(2 * self.pairs)]
        self.sums = [[torch.zeros_like(p) for p in self.parameters()] for _ in range(self.pairs)]

    def _window(self, loop: InnerLoop, batch: TaskBatch) -> MetaOutput:
        own = list(self.parameters())
        center = [p.detach().clone() for p in own]
        gradient = [torch.zeros_like(p) for p in own]
        every, results = [], None
        try:
            for i in range(self.pairs):
                draw = [self._draw(p) for p in own]
                torch._foreach_add_(self.sums[i], draw)
                windows = []
                for sign, particle in ((1, 2 * i), (-1, 2 * i + 1)):
                    with torch.no_grad():
                        for p, c, d in zip(own, center, draw, strict=True):
                            p.copy_(c + sign * d)
                        at = self.particles[particle]
                        results = self._advance(loop, batch, at, self.prefixes)
                    self.particles[particle] = results[0]
                    windows.append(torch.stack(results[1]).mean(0))
                # a task counts while both particles of the pair are sound
                good = self.particles[2 * i].active & self.particles[2 * i + 1].active
                up, down = (
                    w[good].mean() if bool(good.any()) else w.new_zeros(()) for w in windows
                )
                scale = (up - down) / (2 * self.pairs * self.std**2)
                gradient = [g + scale * s for g, s in zip(gradient, self.sums[i], strict=True)]
                every += windows
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, center)
        losses = torch.stack(every).mean(0)
        at, _, before, outputs = results
        active = torch.stack([p.active for p in self.particles]).all(0)
        value = losses[active].mean() if bool(active.any()) else losses.new_zeros(())
        surrogate = sum((p * g).sum() for p, g in zip(own, gradient, strict=True))
        loss = value + (surrogate - surrogate.detach())
        logits = logits_of(outputs)
        return self._output(loss, losses, before, logits, replace(at, active=active))

    def _draw(self, like: Tensor) -> Tensor:
        draw = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return (self.std * draw).to(like)

    def progress(self) -> dict[str, Any]:
        found = super().progress()
        if found:
            found["sums"] = [[t.clone() for t in sums] for sums in self.sums]
        return {**found, "generator": self.generator.get_state()}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        rest = {k: v for k, v in progress.items() if k in ("batch", "positions")}
        super().load_progress(rest)
        if "generator" in progress:
            self.generator.set_state(progress["generator"])
        self.sums = [[t.to(self.device) for t in sums] for sums in progress.get("sums", ())]

    def _positions(self) -> list[_Position]:
        return self.particles

    def _set_positions(self, positions: list[_Position]) -> None:
        self.particles = positions
