"""Captured steps for other numbers of tokens, without capturing them.

Texts of real tasks have another number of tokens nearly every time. Few numbers of a tape depend on
it (sizes of views and of new memory), each linear in it. So some captured steps say what a tape is
for other sizes of its operands, on the line or plane through theirs; one more that is captured
there has to confirm it first.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.graphs import Pair, TapePair
from fastmeta.engine.tape import Tape

Sizes = tuple[int, ...]
"""Of all operands, shapes and strides in turn."""

Weights = dict[int, Fraction]
"""By the places of some sizes: how much of each others are made of, 1 in all; without zeros."""

_NUMBER = re.compile(r"(?<=[ \n])i?\d+(?=[ \n]|$)")
"""Of a tape's text: what may depend on sizes; slots among them are the same for all."""


class Step(Protocol):
    """What was captured.

    Attributes:
        function: What autograd sees of it.
        outline: Whatever else of it depends on operands.
    """

    function: GraphFunction
    outline: Hashable

    def with_pair(self, pair: Pair) -> Step:
        """The same with other graphs."""


class Family:
    """Captured steps that differ in the sizes of their operands.

    Attributes:
        kinds: Those whose tapes differ in numbers alone, by what is the same.
        told: Steps that were told, by their sizes.
    """

    def __init__(self) -> None:
        self.kinds: dict[Hashable, _Kind] = {}
        self.told: dict[Sizes, Step] = {}

    def find(self, sizes: Sizes) -> Step | None:
        """The step of these sizes, if others tell it."""
        if sizes not in self.told:
            for kind in [*self.kinds.values()]:
                found = kind.find(sizes)
                if found is not None:
                    self.told[sizes] = found
                    break
        return self.told.get(sizes)

    def add(self, sizes: Sizes, step: Step) -> None:
        """Note a captured step, which may confirm what others say of it."""
        pair = step.function.pair
        if isinstance(pair, TapePair):
            texts = tuple(_NUMBER.sub("#", tape.program) for tape in _tapes(pair))
            same = (step.outline, texts, _fixed(pair))
            self.kinds.setdefault(same, _Kind()).add(sizes, step)


class _Kind:
    """Captured steps whose tapes differ in numbers alone.

    Attributes:
        sizes, steps: Of those that tell others; none of them is told by the rest.
        confirmed: Which of them told another one that was then captured, and were right.
    """

    def __init__(self) -> None:
        self.sizes: list[Sizes] = []
        self.steps: list[Step] = []
        self.confirmed: list[frozenset[int]] = []

    def find(self, sizes: Sizes) -> Step | None:
        weights = weights_of(self.sizes, sizes)
        if weights is None or not any(weights.keys() <= known for known in self.confirmed):
            return None
        pair = self._pair(weights)
        return None if pair is None else self.steps[0].with_pair(pair)

    def add(self, sizes: Sizes, step: Step) -> None:
        weights = weights_of(self.sizes, sizes)
        if weights is None:
            self.sizes.append(sizes)
            self.steps.append(step)
            return
        pair = self._pair(weights)
        if pair is not None and _same(pair, step.function.pair):
            self.confirmed.append(frozenset(weights))

    def _pair(self, weights: Weights) -> TapePair | None:
        """Graphs made of those of some steps; None where numbers do not come out whole."""
        pairs = {i: self.steps[i].function.pair for i in weights}
        tapes = zip(*map(_tapes, pairs.values()), strict=True)
        found = [_tape_of(dict(zip(weights, each, strict=True)), weights) for each in tapes]
        if None in found:
            return None
        like = next(iter(pairs.values()))
        backward = found[1] if len(found) > 1 else None
        return TapePair(like.constants, like.kept, like.outputs, found[0], backward)


def weights_of(points: Sequence[Sizes], sizes: Sizes) -> Weights | None:
    """What sizes are made of, by points none of which is made of others; None where they are not
    on the line or plane through them."""
    if not points:
        return None
    columns = dict.fromkeys(zip(*points, sizes, strict=True))
    # each row: sum_i w_i (p_i - p_0) = s - p_0
    rows = [[Fraction(x - p[0]) for x in p[1:]] for p in columns if len(set(p)) > 1]
    pivots: list[list[Fraction]] = []
    for place in range(len(points) - 1):
        pivot = next((row for row in rows if row[place]), None)
        if pivot is None:
            return None
        pivot = [x / pivot[place] for x in pivot]
        rows, pivots = (
            [[x - row[place] * y for x, y in zip(row, pivot, strict=True)] for row in part]
            for part in (rows, pivots)
        )
        rows = [row for row in dict.fromkeys(map(tuple, rows)) if any(row)]
        pivots.append(pivot)
    if rows:
        return None
    weights = {place: pivot[-1] for place, pivot in enumerate(pivots, 1)}
    weights[0] = 1 - sum(weights.values())
    return {place: weight for place, weight in weights.items() if weight}


def _tapes(pair: TapePair) -> list[Tape]:
    return [pair.forward] if pair.backward is None else [pair.forward, pair.backward]


def _fixed(pair: TapePair) -> Hashable:
    """What is the same for all sizes."""
    orders = tuple(tuple(tape.order) for tape in _tapes(pair))
    return tuple(map(id, pair.constants)), tuple(pair.kept), pair.outputs, orders


def _tape_of(tapes: Mapping[int, Tape], weights: Weights) -> Tape | None:
    like = next(iter(tapes.values()))
    numbers = zip(*(_NUMBER.findall(tape.program) for tape in tapes.values()), strict=True)
    found = [_number_of(each, weights.values()) for each in numbers]
    constants = zip(*(tape.constants for tape in tapes.values()), strict=True)
    constants = [_constant_of(each, weights.values()) for each in constants]
    if any(x is None for x in (*found, *constants)):
        return None
    numbers = iter(found)
    program = _NUMBER.sub(lambda _: next(numbers), like.program)
    return Tape(program, constants, like.order, like.calls)


def _number_of(words: Sequence[str], weights: Sequence[Fraction]) -> str | None:
    if len(set(words)) == 1:
        return words[0]
    lead = "i" if words[0][0] == "i" else ""
    found = _whole([int(word[len(lead) :]) for word in words], weights)
    return None if found is None else f"{lead}{found}"


def _whole(numbers: Sequence[int], weights: Sequence[Fraction]) -> int | None:
    found = sum(n * weight for n, weight in zip(numbers, weights, strict=True))
    return int(found) if found == int(found) and found >= 0 else None


def _constant_of(values: Sequence[Tensor], weights: Sequence[Fraction]) -> Tensor | None:
    """One that is the same for all, or holds one number only."""
    first, *others = values
    layouts = [(*t.shape, *t.stride()) for t in values]
    if len({(t.dtype, t.dim()) for t in values}) > 1:
        return None
    if len(set(layouts)) == 1 and all(torch.equal(first, t) for t in others):
        return first
    held = torch.cat([t.flatten() for t in values])
    found = [_whole(each, weights) for each in zip(*layouts, strict=True)]
    if None in found or not len(held) or not bool((held == held[0]).all()):
        return None
    shape, strides = found[: first.dim()], found[first.dim() :]
    room = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return held[:1].repeat(max(room, 0)).as_strided(shape, strides)


def _same(a: TapePair, b: TapePair) -> bool:
    pairs = zip(_tapes(a), _tapes(b), strict=True)
    return all(x.program == y.program and _equal(x.constants, y.constants) for x, y in pairs)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
