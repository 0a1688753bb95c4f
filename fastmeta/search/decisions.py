"""What a search decides: named decisions, each with the values it may take."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmeta._settings import is_number
from fastmeta.engine.optimizers import RULES

BINS = 8
"""Parts into which a policy over choices divides a range."""


@dataclass(frozen=True)
class Range:
    """Every number between two bounds.

    Args:
        low, high: ``low < high``; above 0 where `log`.
        log: Uniform in the logarithm.
        integer: Whole numbers only, both bounds included and whole numbers themselves.
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
        if self.integer:
            if self.low != int(self.low) or self.high != int(self.high):
                raise ValueError(
                    f"a range of integers needs integers as bounds, got {self.low} and {self.high}"
                )
            object.__setattr__(self, "low", int(self.low))
            object.__setattr__(self, "high", int(self.high))

    def at(self, share: float) -> float | int:
        """The number at a share of the way, in [0, 1]; an integer n stands for [n, n + 1)."""
        value = _between(self.low, self.high + self.integer, share, self.log)
        value = min(max(value, self.low), self.high)
        return math.floor(value) if self.integer else value

    def share(self, value: float) -> float:
        """The inverse of :meth:`at`; of an integer the middle of its part."""
        high = self.high + self.integer
        value = value + 0.5 * self.integer
        if self.log:
            return math.log(value / self.low) / math.log(high / self.low)
        return (value - self.low) / (high - self.low)

    def edges(self, count: int) -> list[int]:
        """The first integer of each of `count` parts, none of them empty, and the one beyond."""
        beyond = int(self.high) + 1
        found = [int(self.low)]
        for i in range(1, count):
            found.append(max(found[-1] + 1, min(int(self.at(i / count)), beyond - (count - i))))
        return [*found, beyond]

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and (not self.integer or value == int(value))

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"

    @property
    def size(self) -> float:
        return self.high - self.low + 1 if self.integer else math.inf


def _between(low: float, high: float, share: float, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


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
        if isinstance(self.domain, Range):
            return int(min(BINS, self.domain.size))
        return len(self.domain)

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
        if not isinstance(self.domain, Range):
            return self.domain[number]
        if self.domain.integer:
            low, high = self.domain.edges(self.options)[number : number + 2]
            value = int(_between(low, high, rng.random(), self.domain.log))
            return max(low, min(value, high - 1))
        return self.domain.at((number + rng.random()) / BINS)

    def number(self, value: Any) -> int:
        """The option that a value belongs to."""
        if not isinstance(self.domain, Range):
            return self.domain.index(value)
        if self.domain.integer:
            return bisect_right(self.domain.edges(self.options), value) - 1
        return min(BINS - 1, max(0, int(self.domain.share(value) * BINS)))

    def neighbour(self, value: Any, rng: random.Random) -> Any:
        """Any other value of a list; one nearby, perhaps the same, of a range."""
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
        if least is not None and not (is_number(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if above is not None and not (is_number(value) and value > above):
            raise ValueError(f"{name} must be above {above}, got {value!r}")
    return domain


def recipe_domains(
    lr: Any, optimizer: Any, weight_decay: Any, steps: Any, batch_size: Any
) -> dict[str, Domain]:
    """The domains of the inner loop, as `fm.search.Space` takes them.

    Raises:
        ValueError: A value out of its range.
    """
    found: dict[str, Domain] = {"optimizer": as_domain("optimizer", optimizer)}
    for name in found["optimizer"]:
        if name not in RULES:
            raise ValueError(f"optimizer must be one of {sorted(RULES)}, got {name!r}")
    found["lr"] = as_domain("lr", lr, above=0)
    found["weight_decay"] = as_domain("weight_decay", weight_decay, least=0)
    found["steps"] = as_domain("steps", steps, least=1)
    if isinstance(found["steps"], Range):
        if not found["steps"].integer:
            raise ValueError("a range of steps must be one of integers: Range(..., integer=True)")
    elif not all(isinstance(s, int) for s in found["steps"]):
        raise ValueError(f"steps must be integers, got {steps!r}")
    sizes = (None,) if batch_size is None else as_domain("batch_size", batch_size)
    for size in sizes:
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"batch_size must be None or at least 1, got {size!r}")
    found["batch_size"] = sizes
    return found
