"""Passes over a supernet: the frozen layers once for all candidates, the adapted ones for each.

Below its first adapted layer a candidate's states do not depend on its fast weights, and all
candidates read the same texts. So candidates that agree on the layers below share their states: the
frozen pass keeps one node for every distinct history of kept layers and sizes. A live pass starts
each candidate at its first adapted layer from its node, so that the batch grows from the bottom up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastmeta.models import SentenceClassifier, pooled
from fastmeta.patching.context import Call, current_call, running
from fastmeta.patching.prefix import PrefixCache
from fastmeta.patching.task_axes import flat_inputs
from fastmeta.search.gates import Chosen, Layers, Sizes, with_rows
from fastmeta.search.proposal import Proposal

if TYPE_CHECKING:
    from fastmeta.search.supernet import Supernet

TOKENS = 8192
"""Tokens that one product of a frozen layer takes: more would leave the cache."""


class _Done(Exception):
    """No candidate needs a higher layer."""


class Pass:
    """How a call of the supernet runs its layers; `Call.gates` of the whole model.

    Attributes:
        stem: Stored outputs of the modules below the layers, or None to run them.
    """

    stem: Any = None

    def layer(self, number: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """Called in place of a layer of the model."""
        raise NotImplementedError

    def pool(self, structure: SentenceClassifier, states: Tensor, mask: Tensor | None) -> Tensor:
        """Called in place of a SentenceClassifier's pooling."""
        raise NotImplementedError


class FrozenPass(Pass):
    """States of C candidates at their first adapted layers, on T tasks of N rows.

    Args:
        net: The network.
        inputs: ``[T, N, ...]``, without labels.
        candidates: C of them.

    Attributes:
        entries: For each candidate: where it goes on, (layer, node).
        levels: Layer -> states before it, ``[nodes, T * N, L, D]``, where a candidate goes on.
        computed: Nodes that each layer computed; C for each without sharing.
    """

    def __init__(
        self, net: Supernet, inputs: Mapping[str, Tensor], candidates: Sequence[Proposal]
    ) -> None:
        self.candidates = list(candidates)
        self.tasks, self.rows = next(iter(inputs.values())).shape[:2]
        self.depth = len(net.anatomy.layers)
        self.nodes = [0] * len(self.candidates)
        self.entries = [(c.first_adapted, 0) for c in self.candidates]
        self.levels: dict[int, Tensor] = {}
        self.computed = [0] * self.depth
        plan = net.plan(inputs)
        self.layers: Layers = net.layers(plan)
        cache = PrefixCache()
        with (
            torch.no_grad(),
            running(Call([], self.tasks, self.rows, prefix=cache.replay(), gates=self)),
        ):
            try:
                plan.run(flat_inputs(net.model, inputs))
            except _Done:
                pass
        self.stem = cache.outputs

    def layer(self, number: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """One layer for every node that needs it; called in place of the model's own."""
        if number == 0:
            self.layers.look(hidden, args, kwargs)
            self.first = hidden
            self.levels[0] = hidden.unsqueeze(0)
            self._enter(0)
        states = self.levels[number]
        keys: dict[tuple[int, Sizes | None], int] = {}
        for c, candidate in enumerate(self.candidates):
            if candidate.first_adapted > number:
                key = (self.nodes[c], candidate.shape[number])
                self.nodes[c] = keys.setdefault(key, len(keys))
        if not keys:
            raise _Done
        by_sizes: dict[Sizes | None, list[tuple[int, int]]] = {}
        for (parent, sizes), node in keys.items():
            by_sizes.setdefault(sizes, []).append((parent, node))
        found = states.new_empty(len(keys), *states.shape[1:])
        for sizes, pairs in by_sizes.items():
            parents, nodes = (
                torch.tensor(x, device=states.device) for x in zip(*pairs, strict=True)
            )
            if sizes is None:
                found[nodes] = states[parents]
                continue
            self.computed[number] += len(pairs)
            count = max(1, TOKENS // max(1, states[0, ..., 0].numel()))
            for some in zip(parents.split(count), nodes.split(count), strict=True):
                found[some[1]] = self._run(number, states[some[0]], sizes, args, kwargs)
        self.levels[number + 1] = found
        if not any(level == number for level, _ in self.entries):
            del self.levels[number]
        self._enter(number + 1)
        if number + 1 == self.depth:
            raise _Done
        return self.layers.wrap(hidden)

    def _enter(self, number: int) -> None:
        for c, (level, _) in enumerate(self.entries):
            if level == number:
                self.entries[c] = (level, self.nodes[c])

    def _run(self, number: int, states: Tensor, sizes: Sizes, args: tuple, kwargs: dict) -> Tensor:
        """``[n, T * N, L, D]`` through a layer of these sizes."""
        count, have = states.shape[:2]
        args, kwargs = with_rows(args, kwargs, have, count * have)
        gates = self.layers.cut(number, sizes)
        with running(Call([], count * self.tasks, self.rows, gates=gates)):
            out = self.layers.frozen[number](states.flatten(0, 1), *args, **kwargs)
        return self.layers.states(out).view(states.shape)


class LivePass(Pass):
    """Adapted layers of some candidates, in the order of their first adapted layers.

    Args:
        frozen: Their states below.
        chosen: Which candidates of the frozen pass, first adapted layer ascending.
        rows: Which rows of each task, int64 ``[T, b]``, or None for all of them.

    Raises:
        ValueError: The candidates come in another order.
    """

    def __init__(
        self, frozen: FrozenPass, chosen: Sequence[int], rows: Tensor | None = None
    ) -> None:
        self.frozen, self.layers, self.depth = frozen, frozen.layers, frozen.depth
        self.candidates = [frozen.candidates[c] for c in chosen]
        self.entries = [frozen.entries[c] for c in chosen]
        levels = [level for level, _ in self.entries]
        if levels != sorted(levels):
            raise ValueError(f"candidates must come by their first adapted layer, got {levels}")
        self.tasks = frozen.tasks
        device = frozen.first.device
        if rows is None:
            rows = torch.arange(frozen.rows, device=device).expand(self.tasks, -1)
        offset = torch.arange(self.tasks, device=device).unsqueeze(1) * frozen.rows
        self.flat = (offset + rows).flatten()
        self.entered = [sum(e <= n for e, _ in self.entries) for n in range(self.depth + 1)]
        self.stem = _Stem(tree_map(self._stem_output, frozen.stem))

    def _stem_output(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[0] != len(self.frozen.first):
            return t
        times = len(self.candidates)
        if t is self.frozen.first:  # nobody reads it, the layers have states of their own
            return t[:1].expand(times * len(self.flat), *t.shape[1:])
        return t[self.flat].repeat(times, *[1] * (t.dim() - 1))

    def layer(self, number: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """One layer for the candidates that have entered; called in place of the model's own."""
        outer = current_call()
        every = outer.tasks * outer.rows
        count = self.entered[number]
        before = self.entered[number - 1] if number else 0
        states = [hidden.unflatten(0, (before, -1))] if before else []
        if count > before:
            states.append(self._entering(number, before, count))
        out = torch.cat(states) if len(states) > 1 else states[0] if states else None
        if out is not None:
            out = self._run(number, out, args, kwargs, every)
        if number + 1 == self.depth and self.entered[self.depth] > count:
            last = self._entering(self.depth, count, self.entered[self.depth])
            out = last if out is None else torch.cat([out, last])
        return self.layers.wrap(hidden if out is None else out.flatten(0, 1))

    def _entering(self, number: int, start: int, stop: int) -> Tensor:
        """States ``[n, T * b, L, D]`` of the candidates that enter before a layer."""
        states = self.frozen.levels[number]
        nodes = torch.tensor([n for _, n in self.entries[start:stop]], device=states.device)
        return states[nodes.unsqueeze(1), self.flat]

    def _run(self, number: int, states: Tensor, args: tuple, kwargs: dict, every: int) -> Tensor:
        """``[n, T * b, L, D]`` through a layer, each candidate's sizes of it."""
        groups: dict[Sizes | None, list[int]] = {}
        for c in range(len(states)):
            groups.setdefault(self.candidates[c].shape[number], []).append(c)
        pieces, order = [], []
        for sizes, members in groups.items():
            whole = len(groups) == 1
            index = torch.tensor(members, device=states.device)
            x = states if whole else states[index]
            if sizes is not None:
                x = self._run_some(number, x, None if whole else index, sizes, args, kwargs, every)
            pieces.append(x)
            order += members
        if len(pieces) == 1:
            return pieces[0]
        back = torch.tensor(order, device=states.device).argsort()
        return torch.cat(pieces)[back]

    def _run_some(self, number, states, index, sizes, args, kwargs, every: int) -> Tensor:
        outer = current_call()
        count = len(states)
        units: Tensor | slice = slice(0, count * self.tasks)
        if index is not None:
            tasks = torch.arange(self.tasks, device=index.device)
            units = (index.unsqueeze(1) * self.tasks + tasks).flatten()
        args, kwargs = with_rows(args, kwargs, every, count * len(self.flat))
        views: Any = Chosen(outer.views, units)
        gates = self.layers.cut(number, sizes)
        with running(Call(views, count * self.tasks, outer.rows, gates=gates)):
            out = self.layers.live[number](states.flatten(0, 1), *args, **kwargs)
        return self.layers.states(out).view(states.shape)

    def pool(self, structure: SentenceClassifier, states: Tensor, mask: Tensor | None) -> Tensor:
        """Every candidate's own pooling, ``[C * T * b, D]``."""
        kinds = {c.pooling for c in self.candidates}
        if len(kinds) == 1:
            return pooled(states, mask, kinds.pop())
        own = torch.tensor([c.pooling == "cls" for c in self.candidates], device=states.device)
        own = own.repeat_interleave(len(self.flat)).unsqueeze(1)
        return torch.where(own, pooled(states, mask, "cls"), pooled(states, mask, "mean"))


class _Stem:
    """Stored outputs of the modules below the layers, in the order of their calls."""

    def __init__(self, outputs: Mapping[str, list[Any]]) -> None:
        self.outputs, self.position = outputs, dict.fromkeys(outputs, 0)

    def run(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
        position = self.position[name]
        self.position[name] = (position + 1) % len(self.outputs[name])
        return self.outputs[name][position]
