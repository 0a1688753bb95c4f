"""Bounds on a candidate's cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from numbers import Real

from fastmeta.search.cost import CostModel
from fastmeta.search.errors import SearchError
from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space

_MOST = 4096
"""Candidates tried for the smallest one."""


class Budget:
    """Which candidates cost little enough.

    Args:
        space: Where they come from.
        cost: What they cost.
        bounds: Name of a cost -> its largest value.

    Raises:
        SearchError: An unknown cost, a bound that is not positive, or one that not even the
            smallest candidate meets.
    """

    def __init__(self, space: Space, cost: CostModel, bounds: Mapping[str, float]) -> None:
        self.cost, self.bounds = cost, dict(bounds)
        for name, bound in self.bounds.items():
            if name not in cost.names():
                raise SearchError(f"a budget bounds one of {', '.join(cost.names())}, got {name!r}")
            if not isinstance(bound, Real) or not bound > 0:
                raise SearchError(f"the budget of {name} must be positive, got {bound!r}")
        if not self.bounds:
            return
        smallest = smallest_candidates(space)
        for name, bound in self.bounds.items():
            least = min((cost(p)[name] for p in smallest), default=0.0)
            if least > bound:
                raise SearchError(
                    f"no candidate meets the budget {name} <= {bound:g}: the smallest one has "
                    f"{least:.4g}; raise the budget or allow fewer layers, heads or units"
                )

    def __call__(self, proposal: Proposal) -> bool:
        if not self.bounds:
            return True
        found = self.cost(proposal)
        return all(found[name] <= bound for name, bound in self.bounds.items())


def by_cost(name: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """Numbers by the names of costs; none where nothing is given.

    Args:
        name: ``"budget"`` or ``"weights"``, for the message.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name} must name costs, such as {{'relative_flops': 0.7}}, got {given!r}")
    return dict(given or {})


def cost_model(
    space: Space, bounds: Mapping[str, float], weights: Mapping[str, float]
) -> CostModel:
    """A `CostModel` that measures latency only where a bound or a weight names it."""
    return CostModel(space, latency=any("latency" in n for n in (*bounds, *weights)))


def smallest_candidates(space: Space) -> list[Proposal]:
    """Candidates of which one is the cheapest, whatever is counted; none where conditions leave too
    many to try."""
    domains = {d.name: d.domain for d in space.decisions}
    sizes = [n for n in domains if n == "layers" or n.partition(".")[0] in ("heads", "width")]
    layers = [n for n in domains if n.startswith("layer.")]
    alone = [{name: name == only for name in layers} for only in (layers or [None])]
    least = {n: min(domains[n]) for n in sizes}
    # A size may be free only under some values of other decisions: all of these are tried.
    parents = {
        w.parent
        for d in space.decisions
        if d.name in (*sizes, *layers)
        for w in d.conditions
        if w.parent.partition(".")[2] != d.name.partition(".")[2] or w.parent not in layers
    }
    values = [[(n, v) for v in domains[n]] for n in sorted(parents)]
    if math.prod(map(len, values)) * len(alone) > _MOST:
        return []
    found = [
        space.proposal(least | kept | dict(pairs))
        for kept in alone
        for pairs in itertools.product(*values)
    ]
    return [p for p in found if any(p.kept)]


def check_weights(cost: CostModel, weights: Mapping[str, float]) -> None:
    """Refuse weights of unknown costs, before anything is evaluated."""
    for name in weights:
        if name not in cost.names():
            raise ValueError(f"weights name one of {', '.join(cost.names())}, got {name!r}")
