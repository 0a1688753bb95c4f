"""Captured graphs as tapes that C++ replays (csrc/cpu/tape.cpp): no Python between operators."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

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
        calls: What it calls of Python.

    All are kept, for who compares tapes.
    """

    def __init__(
        self,
        program: str,
        constants: list[Tensor],
        order: list[int | None],
        calls: Sequence[PythonCall] = (),
    ) -> None:
        self.program, self.constants, self.order, self.calls = program, constants, order, calls
        self.number = _NEW(program, constants)
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


class PythonCall:
    """An operator that a tape calls by Python; one object for the same operator and arguments.

    Attributes:
        name: How tapes name it.
    """

    def __init__(self, target: Callable, given: Any, name: str) -> None:
        self.target, self.given, self.name = target, given, name

    @classmethod
    def of(
        cls,
        target: Callable,
        places: Mapping[fx.Node, int],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> PythonCall:
        """That of a graph's node.

        Args:
            target: The operator, of one result.
            places: Of nodes among the arguments: where the tape gives their tensors.
            args, kwargs: Its arguments.
        """
        given = fx.map_arg((tuple(args), dict(kwargs)), lambda node: _Given(places[node]))
        name = hashlib.sha1(repr((target, given)).encode()).hexdigest()
        return _CALLS.setdefault(name, cls(target, given, name))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        args, kwargs = _filled(self.given, tensors)
        return self.target(*args, **kwargs)


class _Given:
    """The place of a tensor that a tape gives."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"tensor {self.place}"


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Arguments with tensors in their places."""
    if isinstance(value, _Given):
        return tensors[value.place]
    if isinstance(value, dict):
        return {k: _filled(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(v, tensors) for v in value]
    return value


_CALLS: weakref.WeakValueDictionary[str, PythonCall] = weakref.WeakValueDictionary()


@torch.no_grad()
def _call(name: str, tensors: Sequence[Tensor]) -> Tensor:
    return _CALLS[name](tensors)


PYTHON_CALL = declare("python_call(str name, Tensor[] tensors) -> Tensor", _call)
