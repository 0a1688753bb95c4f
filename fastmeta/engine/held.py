"""What a loss of the user's holds: what it is told by, and where its gradients go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType

from torch import Tensor, nn

_SHORT = 100
"""Longer containers hold data, not weights; looking through them would take time in every step."""


def carried_by(function: object) -> list[Tensor]:
    """Tensors with a gradient that a function holds, or reads by a global name: those of modules
    and short containers too, and of functions that it calls so."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    pending = [function]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found |= {id(p): p for p in value.parameters() if p.requires_grad}
        elif isinstance(value, Tensor):
            if value.requires_grad:
                found[id(value)] = value
        elif isinstance(value, list | tuple | dict):
            if len(value) <= _SHORT:
                pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, FunctionType | MethodType | partial) or value is function:
            pending += [*held_by(value), *_named_by(value)]
    return list(found.values())


def _named_by(function: object) -> Iterator[object]:
    """What a function of the same file reads by global names."""
    if isinstance(function, FunctionType):
        names = function.__code__.co_names
        for value in (function.__globals__.get(name) for name in names):
            elsewhere = isinstance(value, FunctionType) and (
                value.__globals__ is not function.__globals__
            )
            if not elsewhere:
                yield value


def held_by(function: object) -> Iterator[object]:
    """What a function or module holds, constants of a trace among it: attributes, buffers, what its
    function closes over, and arguments of a `functools.partial`."""
    if isinstance(function, nn.Module):
        yield from function.buffers()
        for module in function.modules():
            yield module
            yield from vars(module).values()
    elif isinstance(function, partial):
        yield from held_by(function.func)
        yield from (*function.args, *function.keywords.values())
    elif isinstance(function, MethodType):
        yield from held_by(function.__self__)
    else:
        yield from getattr(function, "__dict__", {}).values()
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # one that is empty
                yield cell.cell_contents
