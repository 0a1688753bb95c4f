"""The interface of controllers, and the two that need no gradient."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space

if TYPE_CHECKING:
    from fastmeta.batch import TaskBatch
    from fastmeta.search.evaluation import Evaluator

_TRIES = 2000


class Controller:
    """Proposes candidates and learns from their rewards.

    Args:
        space: What may be proposed.
        seed: Of all random numbers.
        allowed: Which candidates may be proposed, for example those within a budget; default all.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        allowed: Callable[[Proposal], bool] | None = None,
    ) -> None:
        self.space, self.seed = space, seed
        self.rng = random.Random(seed)
        self.allowed = allowed or (lambda proposal: True)

    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        """New candidates.

        Args:
            count: How many, at least 1.
            context: Embedding ``[D]`` of the task that they are for, where the controller reads it.
        """
        raise NotImplementedError

    def observe(
        self,
        proposals: Sequence[Proposal],
        rewards: Sequence[float],
        context: Tensor | None = None,
    ) -> None:
        """Learn from what candidates reached; larger rewards are better."""

    def learn(self, evaluator: Evaluator, batch: TaskBatch) -> None:
        """Learn from tasks themselves, where the controller does."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on; plain values and tensors."""
        version, numbers, gauss = self.rng.getstate()
        return {"rng": [version, list(numbers), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))

    def permits(self, proposal: Proposal) -> bool:
        """Whether a candidate may be proposed."""
        return self.space.allows(proposal) and self.allowed(proposal)

    def draw(self) -> Proposal:
        """A random candidate that is allowed.

        Raises:
            ValueError: None was found.
        """
        for _ in range(_TRIES):
            proposal = self.space.draw(self.rng)
            if self.allowed(proposal):
                return proposal
        raise ValueError(f"of {_TRIES} candidates drawn none is within the budget")

    def gather(
        self, count: int, more: Callable[[], Sequence[Proposal]], tries: int
    ) -> list[Proposal]:
        """Those of `more` candidates that are allowed, asked `tries` times, then random ones."""
        found: list[Proposal] = []
        for _ in range(tries):
            if len(found) >= count:
                break
            found += [p for p in more() if self.permits(p)]
        return found[:count] + [self.draw() for _ in range(count - len(found))]


class RandomSearch(Controller):
    """Candidates drawn uniformly; one that was proposed before is drawn again up to 50 times."""

    def __init__(self, space: Space, **settings: Any) -> None:
        super().__init__(space, **settings)
        self.seen: set[tuple] = set()

    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        found = []
        for _ in range(count):
            proposal = self.draw()
            for _ in range(50):
                if proposal.key not in self.seen:
                    break
                proposal = self.draw()
            self.seen.add(proposal.key)
            found.append(proposal)
        return found

    def observe(self, proposals, rewards, context=None) -> None:
        self.seen |= {p.key for p in proposals}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": [dict(key) for key in sorted(self.seen, key=str)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = {tuple(sorted(d.items())) for d in state["seen"]}


class Evolution(Controller):
    """Regularised evolution: mutate the best of a random few, forget the oldest.

    Args:
        space, seed, allowed: As for `Controller`.
        population: Candidates remembered, at least 2; new ones are random until half of them are
            there. `fm.search.run` calls a step's candidates its population, so that this one is set
            by giving it the object: ``controller=Evolution(space, population=64)``.
        tournament: How many of them compete to be the parent, at least 1.
        mutations: Decisions changed in a child: one, and each further one with this probability.

    Source: Real et al. 2019, https://arxiv.org/abs/1802.01548
    """

    def __init__(
        self,
        space: Space,
        *,
        population: int = 32,
        tournament: int = 8,
        mutations: float = 0.3,
        **settings: Any,
    ) -> None:
        super().__init__(space, **settings)
        if population < 2 or not 1 <= tournament <= population:
            raise ValueError(
                "population must be at least 2 and tournament from 1 to population, "
                f"got {population} and {tournament}"
            )
        if not 0 <= mutations < 1:
            raise ValueError(f"mutations must be in [0, 1), got {mutations}")
        self.population, self.tournament, self.mutations = population, tournament, mutations
        self.alive: deque[tuple[Proposal, float]] = deque(maxlen=population)

    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        new = self.draw if len(self.alive) < self.population // 2 else self._child
        return [new() for _ in range(count)]

    def observe(self, proposals, rewards, context=None) -> None:
        self.alive.extend(zip(proposals, rewards, strict=True))

    def _child(self) -> Proposal:
        group = self.rng.sample(list(self.alive), min(self.tournament, len(self.alive)))
        parent = max(group, key=lambda pair: pair[1])[0]
        for _ in range(_TRIES):
            child = mutated(self.space, parent, self.rng, self.mutations)
            if child.key != parent.key and self.permits(child):
                return child
        return self.draw()

    def state_dict(self) -> dict[str, Any]:
        alive = [[dict(p.decisions), reward] for p, reward in self.alive]
        return super().state_dict() | {"alive": alive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.alive.clear()
        self.alive.extend((self.space.proposal(d), reward) for d, reward in state["alive"])


def mutated(space: Space, parent: Proposal, rng: random.Random, more: float) -> Proposal:
    """A candidate that differs from its parent in one free decision, or a few."""
    taken = dict(parent.decisions)
    free = [d for d in space.free if d.free(taken)]
    rng.shuffle(free)
    for number, d in enumerate(free):
        if number and rng.random() >= more:
            break
        taken[d.name] = d.neighbour(taken[d.name], rng)
    return space.proposal(taken)
