"""`fm.search.Space`: which architectures and recipes a search may propose for a model."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastmeta.patching import Head, LoRA, Spec
from fastmeta.search.anatomy import Anatomy, anatomy_of
from fastmeta.search.decisions import Decision, Domain, Range, When, as_domain, recipe_domains
from fastmeta.search.proposal import Proposal

_TRIES = 500


class Space:
    """Architectures and recipes for one classifier, as a list of decisions.

    Every argument is one value (fixed), a list of them, or where numbers are meant a
    `fm.search.Range`. What is not given stays as it is in the model.

    Args:
        model: A classifier: `AutoModelForSequenceClassification` or
            `fm.models.SentenceClassifier`. Never modified.
        layers: Depths: a candidate keeps the lowest that many layers; or ``"each"``: every layer
            is kept or left out.
        heads: Numbers of attention heads, of which the most important are kept.
        widths: Feed-forward units, as numbers or as shares of the model's own in (0, 1].
        uniform: Whether all layers have one number of heads and one width, as the configurations
            of nearly all models in transformers require; else every layer decides for itself.
        pooling: Of a SentenceClassifier: ``"mean"``, ``"cls"``.
        lora: Target -> ranks, 0 for none, or ranks alone for ``query`` and ``value`` (whatever the
            model calls them). Targets are named as for `fm.LoRA`, within the layers.
        lora_scale: ``alpha / r`` of every term, so that the rank does not change it.
        adapted_layers: How many of the kept layers, from the top, get LoRA terms; default all.
        lr, optimizer, weight_decay, steps: Of the inner loop, as for `fm.adapt`.
        batch_size: Support rows per inner step; None for all of them.
        conditions: `fm.search.When` objects.
        constraint: A function of a `Proposal` that says whether it may be proposed.
        seed: Of the sample that tests the space, and that is printed.

    Attributes:
        decisions: In the order in which a policy takes them.
        anatomy: Where the model keeps its layers, heads and units.

    Raises:
        ValueError: An empty or contradictory space, values out of range, modules that the model
            does not have.

    Example:
        >>> space = fm.search.Space(model, layers=[3, 4, 6], widths=[0.5, 1.0], lora=[0, 4, 8],
        ...                         lr=fm.search.Range(1e-3, 1, log=True), steps=[5, 10])
        >>> print(space)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        widths: float | Sequence[float] | None = None,
        uniform: bool = True,
        pooling: str | Sequence[str] | None = None,
        lora: Mapping[str, int | Sequence[int]] | int | Sequence[int] | None = None,
        lora_scale: float = 2.0,
        adapted_layers: int | Sequence[int] | None = None,
        lr: float | Sequence[float] | Range = 1e-2,
        optimizer: str | Sequence[str] = "sgd",
        weight_decay: float | Sequence[float] | Range = 0.0,
        steps: int | Sequence[int] | Range = 5,
        batch_size: int | Sequence[int | None] | None = None,
        conditions: Sequence[When] = (),
        constraint: Callable[[Proposal], bool] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.anatomy: Anatomy = anatomy_of(model)
        self.uniform, self.constraint, self.seed = uniform, constraint, seed
        if not lora_scale > 0:
            raise ValueError(f"lora_scale must be positive, got {lora_scale!r}")
        self.lora_scale = float(lora_scale)
        self._conditions: list[When] = []
        found: dict[str, Domain] = self._layer_domains(layers)
        found |= self._size_domains("heads", heads)
        found |= self._size_domains("width", widths)
        found["pooling"] = self._pooling(pooling)
        self.targets = self._targets(lora)
        found |= self._terms(adapted_layers, lora)
        found |= recipe_domains(lr, optimizer, weight_decay, steps, batch_size)
        names = sorted(found, key=_order)  # stable: the rest as written
        self.decisions = self._with_conditions({n: found[n] for n in names}, conditions)
        self.sample(1, seed=seed)

    # -- what may be decided -----------------------------------------------------------------

    def _layer_domains(self, layers: Any) -> dict[str, Domain]:
        count = len(self.anatomy.layers)
        self._each = layers == "each"
        if self._each:
            return {f"layer.{i}": (True, False) for i in range(count)}
        if isinstance(layers, str):
            raise ValueError(f"layers must be 'each' or numbers of layers, got {layers!r}")
        depths = as_domain("layers", count if layers is None else layers, least=1)
        if isinstance(depths, Range):
            raise ValueError("layers takes a list of depths, not a range")
        for depth in depths:
            if not isinstance(depth, int) or depth > count:
                raise ValueError(f"layers must be integers from 1 to {count}, got {depth!r}")
        return {"layers": depths}

    def _size_domains(self, kind: str, given: Any) -> dict[str, Domain]:
        attribute = "heads" if kind == "heads" else "width"
        own = [getattr(layer, attribute) for layer in self.anatomy.layers]
        full = own[0]
        if given is None and len(set(own)) > 1:  # a model that was pruned keeps its sizes
            return {f"{kind}.{i}": (size,) for i, size in enumerate(own)}
        if given is None:
            return {kind: (full,)}
        if len(set(own)) > 1:
            raise ValueError(
                f"{kind} must be left out for {type(self.model).__name__}, whose layers have "
                f"unequal ones: {own}"
            )
        if not full:
            raise ValueError(
                f"the {'attention heads' if kind == 'heads' else 'feed-forward layers'} of "
                f"{type(self.model).__name__} cannot be narrowed: their linear layers are not "
                "among those that are known, or share keys, values or a norm"
            )
        values = []
        if isinstance(given, Range):
            raise ValueError(f"{kind} takes a list, not a range")
        for value in as_domain(kind, given, above=0):
            size = round(value * full) if isinstance(value, float) else value
            if not 1 <= size <= full:
                raise ValueError(
                    f"{kind} must be an integer from 1 to {full} or a share of it in (0, 1], "
                    f"got {value!r}"
                )
            values.append(size)
        domain = as_domain(kind, values)
        if self.uniform:
            return {kind: domain}
        names = {f"{kind}.{i}": domain for i in range(len(self.anatomy.layers))}
        for i, name in enumerate(names):  # no choice for a layer that is left out
            if self._each:
                self._conditions.append(When(name, f"layer.{i}", True))
            else:
                self._conditions.append(When(name, "layers", tuple(range(i + 1, len(names) + 1))))
        return names

    def _pooling(self, given: Any) -> Domain:
        known = self.anatomy.poolings
        domain = as_domain("pooling", known[0] if given is None else given)
        for value in domain:
            if value not in known:
                raise ValueError(
                    f"pooling of {type(self.model).__name__} must be one of {', '.join(known)}, "
                    f"got {value!r}"
                )
        return domain

    def _targets(self, lora: Any) -> dict[str, tuple[str, ...]]:
        """Target -> the modules it names."""
        if lora is None:
            return {}
        if isinstance(lora, Mapping):
            names = list(lora)
        else:
            first = self.anatomy.layers[0]
            if not first.projections:
                raise ValueError("lora needs a mapping target -> ranks for this model")
            names = [first.projections[i].rpartition(".")[2] for i in (0, 2)]
        found: dict[str, tuple[str, ...]] = {}
        taken: dict[str, str] = {}
        for target in names:
            requests = LoRA(targets=target).resolve(self.model)
            inside = [r.module for r in requests if self.layer_of(r.module) is not None]
            if not inside:
                raise ValueError(f"LoRA target {target!r} names no module within the layers")
            for module in inside:
                if module in taken:
                    raise ValueError(
                        f"LoRA targets {taken[module]!r} and {target!r} both name {module!r}"
                    )
                taken[module] = target
            found[target] = tuple(inside)
        return found

    def _terms(self, adapted_layers: Any, lora: Any) -> dict[str, Domain]:
        found: dict[str, Domain] = {}
        count = len(self.anatomy.layers)
        given = count if adapted_layers is None else adapted_layers
        layers = as_domain("adapted_layers", given, least=1)
        if isinstance(layers, Range) or not all(isinstance(n, int) and n <= count for n in layers):
            raise ValueError(
                f"adapted_layers must be integers from 1 to {count}, got {adapted_layers!r}"
            )
        if adapted_layers is not None and not self.targets:
            raise ValueError("adapted_layers says where LoRA terms are, and the space has none")
        found["adapted_layers"] = layers
        for target in self.targets:
            ranks = lora[target] if isinstance(lora, Mapping) else lora
            domain = as_domain(f"the LoRA rank of {target!r}", ranks, least=0)
            if isinstance(domain, Range) or not all(isinstance(r, int) for r in domain):
                raise ValueError(f"the LoRA ranks of {target!r} must be integers, got {ranks!r}")
            found[f"rank.{target}"] = domain
        return found

    def _with_conditions(self, domains: dict[str, Domain], given) -> tuple[Decision, ...]:
        names = list(domains)
        for when in given:
            if not isinstance(when, When):
                raise TypeError(f"a condition must be a fm.search.When, got {when!r}")
            subjects = [n for n in names if n == when.decision or n.startswith(when.decision + ".")]
            unknown = when.decision if not subjects else when.parent
            if not subjects or when.parent not in names:
                raise ValueError(
                    f"a condition names the decision {unknown!r}; there are {', '.join(names)}"
                )
            if names.index(when.parent) >= names.index(subjects[0]):
                raise ValueError(
                    f"a condition on {when.decision!r} must name an earlier decision, "
                    f"and {when.parent!r} is not"
                )
            domain = domains[when.parent]
            if isinstance(domain, Range) or not set(when.values) <= set(domain):
                raise ValueError(
                    f"the space is contradictory: a condition on {when.decision!r} needs "
                    f"{when.parent} to be one of {list(when.values)}, and it is one of {domain}"
                )
            self._conditions += [When(n, when.parent, when.values) for n in subjects]
        return tuple(
            Decision(n, d, tuple(w for w in self._conditions if w.decision == n))
            for n, d in domains.items()
        )

    # -- proposals ---------------------------------------------------------------------------

    def proposal(self, decisions: Mapping[str, Any] | None = None, **more: Any) -> Proposal:
        """The candidate of these decisions; those left out have their defaults, the first values.

        Raises:
            ValueError: An unknown decision, or a value that the space does not have.
        """
        given = {**(decisions or {}), **more}
        known = {d.name for d in self.decisions}
        if not given.keys() <= known:
            wrong = sorted(given.keys() - known)[0]
            raise ValueError(f"the space decides {', '.join(sorted(known))}; got {wrong!r}")
        taken: dict[str, Any] = {}
        for d in self.decisions:
            value = given.get(d.name, d.default)
            if value not in d.domain:
                ranged = isinstance(d.domain, Range)
                kinds = f"within {d.domain}" if ranged else f"one of {list(d.domain)}"
                raise ValueError(f"{d.name} must be {kinds}, got {value!r}")
            taken[d.name] = value if d.free(taken) else d.default
        return self.resolve(taken)

    def allows(self, proposal: Proposal) -> bool:
        """Whether a candidate keeps a layer and satisfies the constraint."""
        return any(proposal.kept) and (self.constraint is None or self.constraint(proposal))

    def decide(self, choose: Callable[[Decision], Any]) -> Proposal:
        """The candidate of a choice for every decision that is free after the earlier ones."""
        taken: dict[str, Any] = {}
        for d in self.decisions:
            taken[d.name] = choose(d) if d.free(taken) else d.default
        return self.resolve(taken)

    def draw(self, rng: random.Random) -> Proposal:
        """A candidate, every free decision uniform.

        Raises:
            ValueError: No candidate was found that the constraint allows.
        """
        for _ in range(_TRIES):
            proposal = self.decide(lambda d: d.draw(rng))
            if self.allows(proposal):
                return proposal
        raise ValueError(
            f"the space is contradictory: of {_TRIES} candidates drawn none satisfies the "
            "constraint"
        )

    def sample(self, count: int = 1, *, seed: int = 0) -> list[Proposal]:
        """Candidates drawn at random."""
        rng = random.Random(seed)
        return [self.draw(rng) for _ in range(count)]

    def resolve(self, taken: dict[str, Any]) -> Proposal:
        """The candidate of these values of all decisions, whether or not the space has them."""
        layers = range(len(self.anatomy.layers))
        if self._each:
            kept = tuple(taken[f"layer.{i}"] for i in layers)
        else:
            kept = tuple(i < taken["layers"] for i in layers)

        def sizes(kind: str) -> tuple[int, ...]:
            return tuple(taken[kind] if kind in taken else taken[f"{kind}.{i}"] for i in layers)

        return Proposal(
            decisions=taken,
            kept=kept,
            heads=sizes("heads"),
            widths=sizes("width"),
            pooling=taken["pooling"],
            ranks={t: taken[f"rank.{t}"] for t in self.targets},
            adapted_layers=min(taken["adapted_layers"], sum(kept)),
            lr=taken["lr"],
            optimizer=taken["optimizer"],
            weight_decay=taken["weight_decay"],
            steps=taken["steps"],
            batch_size=taken["batch_size"],
        )

    # -- what it is --------------------------------------------------------------------------

    @property
    def size(self) -> float:
        """How many candidates there are, before the constraint; infinite with a range."""
        last = {w.parent: i for i, d in enumerate(self.decisions) for w in d.conditions}
        counts: Counter = Counter({((), False): 1})  # (values that count later, any layer kept)
        for i, d in enumerate(self.decisions):
            after: Counter = Counter()
            layer = d.name.startswith("layer.")
            for (known, kept), number in counts.items():
                free = d.free(dict(known))
                known = tuple((n, v) for n, v in known if last[n] > i)
                if isinstance(d.domain, Range):
                    after[known, kept] += number * d.domain.size if free else number
                elif d.name in last or layer:
                    for value in d.domain if free else (d.default,):
                        more = ((d.name, value),) if d.name in last else ()
                        after[known + more, kept or (layer and value)] += number
                else:
                    after[known, kept] += number * (len(d.domain) if free else 1)
            counts = after
        return sum(n for (_, kept), n in counts.items() if kept or not self._each)

    @property
    def free(self) -> tuple[Decision, ...]:
        """The decisions that have a choice at all."""
        return tuple(d for d in self.decisions if isinstance(d.domain, Range) or len(d.domain) > 1)

    def spec(self) -> Spec:
        """What a task may change: LoRA terms of the largest ranks, and the head."""
        spec: Spec = Head()
        domains = {d.name: d.domain for d in self.decisions}
        lowest = max(
            0, (1 if self._each else min(domains["layers"])) - max(domains["adapted_layers"])
        )
        for target, modules in self.targets.items():
            rank = max(domains[f"rank.{target}"])
            names = [m for m in modules if self.layer_of(m) >= lowest]
            if rank and names:
                spec = LoRA(r=rank, alpha=self.lora_scale * rank, targets=names) + spec
        return spec

    def layer_of(self, module: str) -> int | None:
        """The number of the layer that holds a module."""
        stack = self.anatomy.stack + "."
        return int(module[len(stack) :].split(".")[0]) if module.startswith(stack) else None

    def __str__(self) -> str:
        size = self.size
        discrete = "infinitely many" if math.isinf(size) else f"{size:,}"
        lines = [f"Space over {type(self.model).__name__}: {discrete} candidates"]
        for d in self.decisions:
            if d in self.free:
                shown = (
                    str(d.domain) if isinstance(d.domain, Range) else ", ".join(map(str, d.domain))
                )
                only = "".join(f" if {w.parent} in {list(w.values)}" for w in d.conditions)
                lines.append(f"  {d.name:18s} {shown}{only}")
        lines.append(f"  for example: {self.sample(1, seed=self.seed)[0]}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Space({type(self.model).__name__}, {len(self.free)} decisions)"


def _order(name: str) -> tuple[int, int]:
    """Layers from the bottom, each with its heads and width, so that candidates agree below."""
    kind, _, number = name.partition(".")
    if name == "layers":
        return 0, 0
    if kind in ("layer", "heads", "width"):
        return 1, int(number or 0)
    return 2, 0
