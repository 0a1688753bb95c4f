"""Layers of a supernet that run as each candidate wants them: narrower, or not at all.

A candidate that keeps h heads and w units of a layer reads the first rows and columns of the
layer's weights, so nothing is computed that it does not have. Candidates of equal sizes run
together; how many sizes there are, and not how many candidates, decides how many products a layer
takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmeta.patching.bind import install
from fastmeta.patching.context import Call, current_call, running
from fastmeta.patching.plan import Plan
from fastmeta.patching.rules import Adapted, linear
from fastmeta.search.anatomy import Anatomy, Layer

Sizes = tuple[int, int]
"""Heads and units of a layer."""


class Narrow:
    """A linear layer that reads the first rows and columns of another's weight."""

    def __init__(self, module: nn.Linear, rows: int | None, columns: int | None) -> None:
        # Contiguous, so that no product copies it again: a copy where columns are cut.
        self.weight = module.weight[:rows, :columns].contiguous()
        self.bias = None if module.bias is None else module.bias[:rows]
        self.rows, self.columns = rows, columns


class Cut:
    """What is left of one layer for the candidates that are running; `Call.gates` within it.

    Attributes:
        modules: Name of a linear module in the model -> what is left of it.
    """

    def __init__(self, modules: dict[str, Narrow]) -> None:
        self.modules = modules

    def plain(self, name: str, original: Callable, x: Tensor) -> Tensor:
        """A frozen module."""
        narrow = self.modules.get(name)
        return original(x) if narrow is None else F.linear(x, narrow.weight, narrow.bias)

    def adapted(self, name: str, original: Callable, adapted: Adapted, x: Tensor) -> Tensor:
        """A module with LoRA terms, whose factors lose the same rows and columns."""
        narrow = self.modules.get(name)
        if narrow is None:
            return original(x)
        call = current_call()
        views: Any = call.views
        if adapted.slots:
            a, b = adapted.slots["lora_A"], adapted.slots["lora_B"]
            cut = {a: views[a][:, :, : narrow.columns], b: views[b][:, : narrow.rows]}
            views = Replaced(views, {s: t.contiguous() for s, t in cut.items()})
        return linear(narrow, adapted, replace(call, views=views), x)  # type: ignore[arg-type]


class Replaced(Sequence):
    """Views, some of which are others."""

    def __init__(self, views: Sequence[Tensor], others: dict[int, Tensor]) -> None:
        self.views, self.others = views, others

    def __getitem__(self, slot: int) -> Tensor:  # type: ignore[override]
        other = self.others.get(slot)
        return self.views[slot] if other is None else other

    def __len__(self) -> int:
        return len(self.views)


class Chosen(Sequence):
    """Views of some tasks, taken when they are read."""

    def __init__(self, views: Sequence[Tensor], tasks: Tensor | slice) -> None:
        self.views, self.tasks = views, tasks

    def __getitem__(self, slot: int) -> Tensor:  # type: ignore[override]
        view = self.views[slot]
        if isinstance(self.tasks, slice) and self.tasks.stop == len(view):
            return view  # itself, so that its gradient lands where it belongs
        return view[self.tasks]

    def __len__(self) -> int:
        return len(self.views)


class Layers:
    """The layers of one plan, and all cuts that were made of them.

    Attributes:
        frozen: Layers without LoRA terms.
        live: The originals of the layers that run with every candidate's terms.
    """

    def __init__(self, plan: Plan, anatomy: Anatomy, owners: dict[str, Adapted]) -> None:
        self.anatomy = anatomy
        self.frozen = [plan.pristine.get_submodule(layer.name) for layer in anatomy.layers]
        self.live: list[Callable] = []
        self._extras: int | None = None  # what a layer returns beside its states; -1: no tuple
        self._cuts: dict[tuple[int, Sizes], Cut | None] = {}
        for number, layer in enumerate(anatomy.layers):
            module = plan.structure.get_submodule(layer.name)
            self.live.append(module.forward)
            install(module, "forward", _gated_layer(number, module.forward))
            for name in layer.linears:
                full = f"{layer.name}.{name}"
                module, plain = (s.get_submodule(full) for s in (plan.structure, plan.pristine))
                owner = owners.get(full) or Adapted(full)
                install(module, "forward", _gated_linear(full, module.forward, owner))
                install(plain, "forward", _gated_linear(full, plain.forward, None))

    def cut(self, number: int, sizes: Sizes) -> Cut | None:
        """What these sizes leave of a layer, or None where they leave all."""
        key = (number, sizes)
        if key not in self._cuts:
            layer: Layer = self.anatomy.layers[number]
            modules = {}
            for name, (rows, columns) in layer.sizes(*sizes).items():
                module = self.frozen[number].get_submodule(name)
                modules[f"{layer.name}.{name}"] = Narrow(module, rows, columns)
            self._cuts[key] = Cut(modules) if modules else None
        return self._cuts[key]

    @torch.no_grad()
    def look(self, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Learn from one run of the lowest layer what layers return: all may be left out."""
        if self._extras is None:
            call = current_call()
            with running(Call([], call.tasks, call.rows)):
                out = self.frozen[0](hidden, *args, **kwargs)
            self._extras = len(out) - 1 if isinstance(out, tuple) else -1

    def states(self, out: Any) -> Tensor:
        """A layer's output without the tuple around it."""
        return out[0] if isinstance(out, tuple) else out

    def wrap(self, states: Tensor) -> Any:
        """The states as a layer returns them, without weights of attention beside them."""
        return states if self._extras == -1 else (states, *[None] * self._extras)


def with_rows(args: tuple, kwargs: dict, have: int, want: int) -> tuple[tuple, dict]:
    """Every tensor of `have` rows with `want` of them; all candidates' rows are alike."""

    def fit(t: Any, per_text: int = 1) -> Any:
        rows, wanted = have * per_text, want * per_text
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[0] != rows or have == want:
            return t
        return t[:wanted] if want < have else t.repeat(want // have, *[1] * (t.dim() - 1))

    fitted = tree_map(fit, kwargs)
    alibi, table = kwargs.get("alibi"), kwargs.get("rel_embeddings")
    if alibi is not None:  # BLOOM's has a row for each head of each text
        fitted["alibi"] = fit(alibi, alibi.shape[0] // have)
    if table is not None:  # DeBERTa's has a row for each distance
        fitted["rel_embeddings"] = table
    return tree_map(fit, args), fitted


def _gated_layer(number: int, original: Callable) -> Callable:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call: Call = current_call()
        if call.gates is None:
            return original(hidden, *args, **kwargs)
        return call.gates.layer(number, hidden, args, kwargs)

    return forward


def _gated_linear(name: str, original: Callable, adapted: Adapted | None) -> Callable:
    def forward(x: Tensor) -> Tensor:
        gates = current_call().gates
        if gates is None:
            return original(x)
        if adapted is None:
            return gates.plain(name, original, x)
        return gates.adapted(name, original, adapted, x)

    return forward
