"""Optuna's samplers as a controller, where the package is there."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from fastmeta.search.controller import Controller
from fastmeta.search.decisions import Decision, Range
from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space


class OptunaController(Controller):
    """Candidates from an Optuna study by ask and tell.

    Its state is the history of candidates and rewards, which are told again to a new study of the
    same seed; the sampler's random numbers then go on elsewhere than without the interruption.

    Args:
        space, seed, allowed: As for `Controller`.
        sampler: An Optuna sampler; default its TPE sampler with this seed.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(self, space: Space, *, sampler: Any = None, **settings: Any) -> None:
        super().__init__(space, **settings)
        try:
            import optuna
        except ImportError:
            raise ImportError(
                "the optuna controller needs the package 'optuna' (pip install fastmeta[optuna])"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        chosen = sampler or optuna.samplers.TPESampler(seed=self.seed)
        self.study = optuna.create_study(direction="maximize", sampler=chosen)
        self.told: list[tuple[Proposal, float]] = []
        self._open: dict[tuple, list[Any]] = {}

    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        return self.gather(count, self._ask, 100 * count)

    def _ask(self) -> list[Proposal]:
        trial = self.study.ask()
        proposal = self.space.decide(partial(self._suggest, trial))
        if self.permits(proposal):
            self._open.setdefault(proposal.key, []).append(trial)
        else:
            self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return [proposal]

    def observe(self, proposals, rewards, context=None) -> None:
        for proposal, reward in zip(proposals, rewards, strict=True):
            self.told.append((proposal, float(reward)))
            trials = self._open.get(proposal.key)
            if trials:
                self.study.tell(trials.pop(), float(reward))
            else:
                self._add(proposal, float(reward))

    def _suggest(self, trial: Any, d: Decision) -> Any:
        if not isinstance(d.domain, Range):
            return d.domain[trial.suggest_categorical(d.name, list(range(len(d.domain))))]
        if d.domain.integer:
            low, high = int(d.domain.low), int(d.domain.high)
            return trial.suggest_int(d.name, low, high, log=d.domain.log)
        return trial.suggest_float(d.name, d.domain.low, d.domain.high, log=d.domain.log)

    def _add(self, proposal: Proposal, reward: float) -> None:
        """Tell of a candidate that the study did not propose."""
        kinds = self._optuna.distributions
        values, distributions = {}, {}
        for d in self.space.decisions:
            if not d.free(proposal.decisions):
                continue
            value = proposal.decisions[d.name]
            if not isinstance(d.domain, Range):
                numbers = list(range(len(d.domain)))
                value, kind = d.domain.index(value), kinds.CategoricalDistribution(numbers)
            elif d.domain.integer:
                low, high = int(d.domain.low), int(d.domain.high)
                kind = kinds.IntDistribution(low, high, log=d.domain.log)
            else:
                kind = kinds.FloatDistribution(d.domain.low, d.domain.high, log=d.domain.log)
            values[d.name], distributions[d.name] = value, kind
        self.study.add_trial(
            self._optuna.trial.create_trial(
                params=values, distributions=distributions, value=reward
            )
        )

    def state_dict(self) -> dict[str, Any]:
        told = [[dict(p.decisions), reward] for p, reward in self.told]
        return super().state_dict() | {"told": told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        told = [(self.space.proposal(d), reward) for d, reward in state["told"]]
        self.observe([p for p, _ in told], [r for _, r in told])
