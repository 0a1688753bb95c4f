"""A pass in which layers, heads, units and ranks are kept in part, so that it can be learned.

With p the probabilities of a decision's options, a layer is kept to the degree ``g = p(kept)``:
``x + g (layer(x) - x)``; head j to ``sum of p(h) over h > j``, and so are units and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.models import SentenceClassifier, pooled
from fastmeta.patching.context import current_call, running
from fastmeta.patching.rules import Adapted
from fastmeta.search.anatomy import matrices
from fastmeta.search.decisions import Range
from fastmeta.search.gates import Layers, Replaced
from fastmeta.search.passes import Pass
from fastmeta.search.space import Space


class Relaxation:
    """Degrees to which a space's parts are kept, from the probabilities of its options.

    Args:
        space: Its decisions.
        shares: Name of a decision -> probabilities of its options.
    """

    def __init__(self, space: Space, shares: Mapping[str, Tensor]) -> None:
        self.space, self.shares = space, shares
        self.domains = {d.name: d.domain for d in space.decisions}
        self._like = next(iter(shares.values()))

    def share(self, name: str) -> Tensor:
        """Probabilities of a decision's options; one where there is no choice."""
        found = self.shares.get(name)
        return self._like.new_ones(1) if found is None else found

    def kept(self, layer: int) -> Tensor:
        """How much of a layer is kept."""
        if "layers" in self.domains:
            deep = [d > layer for d in self.domains["layers"]]
            return self.share("layers")[deep].sum()
        on = [bool(v) for v in self.domains[f"layer.{layer}"]]
        return self.share(f"layer.{layer}")[on].sum()

    def prefix(self, name: str, count: int) -> Tensor:
        """How much each of `count` ordered parts is kept, where the decision is their number."""
        sizes = torch.tensor(self.domains[name], device=self._like.device)
        parts = torch.arange(count, device=self._like.device)
        return (sizes.unsqueeze(1) > parts).to(self._like.dtype).T @ self.share(name)

    def sizes(self, kind: str, layer: int, count: int) -> Tensor:
        """The same for ``"heads"`` or ``"width"`` of a layer."""
        return self.prefix(kind if kind in self.domains else f"{kind}.{layer}", count)

    def adapted(self, layer: int) -> Tensor:
        """The probability that a layer is among those with LoRA terms."""
        count = len(self.space.anatomy.layers)
        depths = self.domains.get("layers", (count,))
        tops = self.domains["adapted_layers"]
        inside = self._like.new_tensor([[d - a <= layer < d for a in tops] for d in depths])
        depth = self.share("layers") if "layers" in self.domains else self._like.new_ones(1)
        return depth @ inside @ self.share("adapted_layers")

    def mean(self, name: str) -> Tensor:
        """The expected value of a number: in the logarithm for learning rates."""
        domain, shares = self.domains[name], self.share(name)
        if isinstance(domain, Range):
            count = len(shares)
            domain = tuple(domain.at((i + 0.5) / count) for i in range(count))
        values = self._like.new_tensor(domain)
        return (shares @ values.log()).exp() if name == "lr" else shares @ values

    def arithmetic(self) -> Tensor:
        """Expected products of the layers over those of the whole model."""
        total, spent = 0, self._like.new_zeros(())
        for number, layer in enumerate(self.space.anatomy.layers):
            module = self.space.model.get_submodule(layer.name)
            products = {n: rows * columns for n, (rows, columns) in matrices(module).items()}
            whole = max(1, sum(products.values()))
            heads = sum(products[n] for n in (*layer.projections, layer.output) if layer.heads)
            units = sum(products[n] for n in (*layer.widening, layer.narrowing) if layer.width)
            part = self._like.new_tensor(whole - heads - units)
            if layer.heads:
                part = part + heads * self.sizes("heads", number, layer.heads).mean()
            if layer.width:
                part = part + units * self.sizes("width", number, layer.width).mean()
            total, spent = total + whole, spent + self.kept(number) * part
        return spent / total


class SoftPass(Pass):
    """Every layer for every task, each part to its degree.

    Args:
        layers: Of the plan that runs.
        relaxation: The degrees; differentiable.
    """

    stem = None

    def __init__(self, layers: Layers, relaxation: Relaxation) -> None:
        self.layers, self.relaxation = layers, relaxation
        self._parts = [_Parts(relaxation, number) for number in range(len(layers.live))]

    def layer(self, number: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        self.layers.look(hidden, args, kwargs)
        with running(replace(current_call(), gates=self._parts[number])):
            out = self.layers.states(self.layers.live[number](hidden, *args, **kwargs))
        return self.layers.wrap(hidden + self._parts[number].kept * (out - hidden))

    def pool(self, structure: SentenceClassifier, states: Tensor, mask: Tensor | None) -> Tensor:
        kinds = self.relaxation.domains["pooling"]
        shares = self.relaxation.share("pooling")
        return sum(s * pooled(states, mask, k) for s, k in zip(shares, kinds, strict=True))


class _Parts:
    """Degrees of one layer's parts; `Call.gates` within it."""

    def __init__(self, relaxation: Relaxation, number: int) -> None:
        space = relaxation.space
        self.layer = space.anatomy.layers[number]
        self.kept = relaxation.kept(number)
        name = self.layer.name + "."
        self.masks: dict[str, Tensor] = {}
        if self.layer.heads:
            heads = relaxation.sizes("heads", number, self.layer.heads)
            self.masks[name + self.layer.output] = heads.repeat_interleave(self.layer.head_size)
        if self.layer.width:
            units = relaxation.sizes("width", number, self.layer.width)
            self.masks[name + self.layer.narrowing] = units
        self.ranks: dict[str, Tensor] = {}
        adapted = relaxation.adapted(number)
        for target, modules in space.targets.items():
            most = max(relaxation.domains[f"rank.{target}"])
            mask = relaxation.prefix(f"rank.{target}", most) * adapted
            self.ranks |= {m: mask for m in modules if space.layer_of(m) == number}

    def adapted(self, name: str, original: Callable, adapted: Adapted, x: Tensor) -> Tensor:
        mask = self.masks.get(name)
        if mask is not None:
            x = x * mask.to(x.dtype)
        if not adapted.slots:
            return original(x)
        call = current_call()
        slot = adapted.slots["lora_A"]
        factor = call.views[slot] * self.ranks[name].to(x.dtype).unsqueeze(1)
        with running(replace(call, views=Replaced(call.views, {slot: factor}))):
            return original(x)
