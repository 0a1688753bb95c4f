"""Captured steps for other sizes of the same operands, without capturing them.

Texts of real tasks have another number of tokens nearly every time. Few entries of a tape depend
on it (sizes of views and of new memory), each linear in it: what two captured steps say of a third
one, which is captured too and confirms it, they say of all others on the line through their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.graphs import Pair, TapePair
from fastmeta.engine.tape import Tape

Sizes = tuple[int, ...]
"""Of all operands, shapes and strides in turn."""

_MOST = 12
"""Captured steps of one family that others are told from."""


class Step(Protocol):
    """What was captured.

    Attributes:
        function: What autograd sees of it.
        outline: Whatever else of it depends on operands.
    """

    function: GraphFunction
    outline: object

    def with_pair(self, pair: Pair) -> Step:
        """The same with other graphs."""


class Family:
    """Captured steps that differ in the sizes of their operands.

    Attributes:
        captured: Their sizes, and the steps.
        confirmed: Which pairs of them tell others, by place.
    """

    def __init__(self) -> None:
        self.captured: list[tuple[Sizes, Step]] = []
        self.confirmed: set[tuple[int, int]] = set()

    def find(self, sizes: Sizes) -> Step | None:
        """The step of these sizes, if two others tell it."""
        for i, j in self.confirmed:
            found = self._between(i, j, sizes)
            if found is not None:
                return self.captured[i][1].with_pair(found)
        return None

    def add(self, sizes: Sizes, step: Step) -> None:
        """Note a captured step, which may confirm what others say of it."""
        if len(self.captured) == _MOST or not isinstance(step.function.pair, TapePair):
            return
        for i, j in combinations(range(len(self.captured)), 2):
            found = self._between(i, j, sizes)
            if found is not None and _same_pair(found, step.function.pair):
                self.confirmed.add((i, j))
        self.captured.append((sizes, step))

    def _between(self, i: int, j: int, sizes: Sizes) -> TapePair | None:
        """The graphs of these sizes by those of two steps; None where they do not tell them."""
        (a, first), (b, second) = self.captured[i], self.captured[j]
        place = place_on_line(a, b, sizes)
        if place is None or first.outline != second.outline:
            return None
        return _pair_at(first.function.pair, second.function.pair, place)


def place_on_line(a: Sizes, b: Sizes, sizes: Sizes) -> Fraction | None:
    """Where sizes are on the line through a, at 0, and b, at 1; None where they are not on it."""
    place = next((Fraction(s - x, y - x) for x, y, s in zip(a, b, sizes, strict=True) if x != y), 0)
    on_line = all(x + place * (y - x) == s for x, y, s in zip(a, b, sizes, strict=True))
    return place if on_line else None


def _pair_at(a: TapePair, b: TapePair, place: Fraction) -> TapePair | None:
    fixed = [([id(t) for t in p.constants], p.kept, p.outputs) for p in (a, b)]
    if fixed[0] != fixed[1] or (a.backward is None) != (b.backward is None):
        return None
    forward = _tape_at(a.forward, b.forward, place)
    backward = None if a.backward is None else _tape_at(a.backward, b.backward, place)
    if forward is None or (backward is None and a.backward is not None):
        return None
    return TapePair(a.constants, a.kept, a.outputs, forward, backward)


def _tape_at(a: Tape, b: Tape, place: Fraction) -> Tape | None:
    words = a.program.split(" "), b.program.split(" ")
    if a.order != b.order or len(words[0]) != len(words[1]) or len(a.constants) != len(b.constants):
        return None
    program = [x if x == y else _word_at(x, y, place) for x, y in zip(*words, strict=True)]
    pairs = zip(a.constants, b.constants, strict=True)
    constants = [_constant_at(x, y, place) for x, y in pairs]
    if any(part is None for part in (*program, *constants)):
        return None
    return Tape(" ".join(program), constants, a.order, a.calls)


def _word_at(x: str, y: str, place: Fraction) -> str | None:
    """A number, perhaps the last of its line and the first of the next; None for what is none."""
    lines = x.split("\n"), y.split("\n")
    if len(lines[0]) != len(lines[1]):
        return None
    found = []
    for a, b in zip(*lines, strict=True):
        if a != b:
            lead = "i" if a[:1] == b[:1] == "i" else ""
            number = _number_at(a[len(lead) :], b[len(lead) :], place)
            if number is None:
                return None
            a = f"{lead}{number}"
        found.append(a)
    return "\n".join(found)


def _number_at(a: str, b: str, place: Fraction) -> int | None:
    if not (a.isdecimal() and b.isdecimal()):
        return None
    number = int(a) + place * (int(b) - int(a))
    return int(number) if number == int(number) and number >= 0 else None


def _constant_at(a: Tensor, b: Tensor, place: Fraction) -> Tensor | None:
    """One that is the same for both, or holds one number only."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return None
    if a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b):
        return a
    numbers = [(*t.shape, *t.stride()) for t in (a, b)]
    numbers = [x + place * (y - x) for x, y in zip(*numbers, strict=True)]
    values = torch.cat([t.flatten() for t in (a, b)])
    if any(n != int(n) or n < 0 for n in numbers) or not len(values):
        return None
    if not bool((values == values[0]).all()):
        return None
    shape, strides = (tuple(map(int, part)) for part in (numbers[: a.dim()], numbers[a.dim() :]))
    room = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return values[:1].repeat(max(room, 0)).as_strided(shape, strides)


def _same_pair(a: TapePair, b: TapePair) -> bool:
    tapes = [(a.forward, b.forward)]
    if a.backward is not None:
        tapes.append((a.backward, b.backward))
    return all(_same(x, y) for x, y in tapes)


def _same(a: Tape, b: Tape | None) -> bool:
    if b is None or a.program != b.program or a.order != b.order:
        return False
    return _equal(a.constants, b.constants)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
