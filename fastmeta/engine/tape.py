"""Captured graphs as tapes that C++ replays (csrc/cpu/tape.cpp): no Python between operators."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from fastmeta._library import declare

_NEW = declare("tape_new(str program, Tensor[] constants) -> int")
_RUN = declare("tape_run(int tape, int frame, bool keep, Tensor[] inputs) -> (Tensor[], int)")
_DROP = declare("tape_drop(int tape, int frame) -> ()")


class Tape:
    """A graph that C++ replays.

    Args:
        program: Its text.
        constants: Tensors that the text has places for.
        order: For each result that is not saved: its place among the outputs, or None.
    """

    def __init__(self, program: str, constants: list[Tensor], order: list[int | None]) -> None:
        self.number, self.order = _NEW(program, constants), order
        weakref.finalize(self, _DROP, self.number, 0).atexit = False

    def run(
        self, inputs: Sequence[Tensor], frame: Frame | None = None, keep: bool = False
    ) -> tuple[list[Tensor | None], Frame | None]:
        """What the graph returns, and what it saves.

        Args:
            frame: What another tape saved for this one; gone afterwards unless `keep`.
        """
        outputs, saved = _RUN(self.number, 0 if frame is None else frame.number, keep, list(inputs))
        found = [None if place is None else outputs[place] for place in self.order]
        return found, Frame(saved) if saved else None


class Frame:
    """Tensors that one tape saves for another."""

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, _DROP, 0, number).atexit = False
