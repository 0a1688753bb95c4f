"""What a search decides: named decisions, each with the values it may take."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BINS = 8
"""Parts into which a policy over choices divides a range."""


@dataclass(frozen=True)
class Range:
    """Every number between two bounds.

    Args:
        low, high: ``low < high``; above 0 where `log`.
        log: Uniform in the logarithm.
        integer: Whole numbers only, bounds included.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low above 0, got {self.low}")

    def at(self, share: float) -> float | int:
        """The number at a share of the way, in [0, 1]."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value

    def share(self, value: float) -> float:
        """The inverse of :meth:`at`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"

    @property
    def size(self) -> float:
        return self.high - self.low + 1 if self.integer else math.inf


Domain = tuple | Range


@dataclass(frozen=True)
class When:
    """A decision is taken only where another one has one of some values, else it has its first.

    Args:
        decision: The name of the decision, or of a group of them: ``"heads"`` is all layers'.
        parent: The name of an earlier decision.
        values: Those of the parent under which `decision` is free.
    """

    decision: str
    parent: str
    values: tuple

    def __init__(self, decision: str, parent: str, values: Any) -> None:
        many = isinstance(values, Sequence) and not isinstance(values, str)
        object.__setattr__(self, "decision", decision)
        object.__setattr__(self, "parent", parent)
        object.__setattr__(self, "values", tuple(values) if many else (values,))


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        name: For example ``"lr"`` or ``"width.3"``.
        domain: A tuple of values, the first is the default, or a :class:`Range`.
        conditions: All of them must hold for it to be free.
    """

    name: str
    domain: Domain
    conditions: tuple[When, ...] = ()

    @property
    def default(self) -> Any:
        return self.domain.at(0.5) if isinstance(self.domain, Range) else self.domain[0]

    @property
    def options(self) -> int:
        """How many a policy over choices distinguishes."""
        return BINS if isinstance(self.domain, Range) else len(self.domain)

    def free(self, taken: Mapping[str, Any]) -> bool:
        """Whether there is a choice after the earlier decisions."""
        if not isinstance(self.domain, Range) and len(self.domain) == 1:
            return False
        return all(taken[w.parent] in w.values for w in self.conditions)

    def draw(self, rng: random.Random) -> Any:
        """A value, uniformly."""
        if isinstance(self.domain, Range):
            return self.domain.at(rng.random())
        return rng.choice(self.domain)

    def option(self, number: int, rng: random.Random) -> Any:
        """A value of one option: that value, or a random one of that part of a range."""
        if isinstance(self.domain, Range):
            return self.domain.at((number + rng.random()) / BINS)
        return self.domain[number]

    def number(self, value: Any) -> int:
        """The option that a value belongs to."""
        if isinstance(self.domain, Range):
            return min(BINS - 1, max(0, int(self.domain.share(value) * BINS)))
        return self.domain.index(value)

    def neighbour(self, value: Any, rng: random.Random) -> Any:
        """Another value: the next or previous one of ordered values, a near one of a range."""
        if isinstance(self.domain, Range):
            share = self.domain.share(value) + rng.gauss(0, 0.15)
            return self.domain.at(min(1.0, max(0.0, share)))
        return rng.choice([v for v in self.domain if v != value])


def as_domain(name: str, given: Any, *, least: float | None = None, above: float | None = None):
    """Values as the user writes them (one, several, or a range) as a domain.

    Raises:
        ValueError: No value, a value twice, or one out of its range.
    """
    if isinstance(given, Range):
        domain: Domain = given
        values: tuple = (given.low, given.high)
    else:
        many = isinstance(given, Sequence) and not isinstance(given, str)
        domain = values = tuple(given) if many else (given,)
        if not domain:
            raise ValueError(f"the space is empty: {name} has no value to choose from")
        if len(set(domain)) < len(domain):
            raise ValueError(f"{name} names a value twice: {list(domain)}")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if least is not None and not (number and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if above is not None and not (number and value > above):
            raise ValueError(f"{name} must be above {above}, got {value!r}")
    return domain
