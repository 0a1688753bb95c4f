"""What a loss of the user's holds: what it is told by, and where its gradients go."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn

_SHORT = 100
"""Longer containers hold data, not weights; looking through them would take time in every step."""


def carried_by(function: object) -> list[Tensor]:
    """Tensors with a gradient that a function reads: those it closes over or knows by a global
    name, parameters of modules, leaves in attributes and short containers; of functions of its file
    that it calls, too. What it writes there itself, as a log of losses, is none of them."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    pending = [(function, True)]
    while pending:
        value, by_name = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found |= {id(p): p for p in value.parameters() if p.requires_grad}
        elif isinstance(value, Tensor):
            if value.requires_grad and (by_name or value.is_leaf):
                found[id(value)] = value
        elif isinstance(value, list | tuple | dict):
            if len(value) <= _SHORT:
                parts = value.values() if isinstance(value, dict) else value
                pending += [(part, False) for part in parts]
        elif isinstance(value, FunctionType):
            pending += [(read, True) for read in _read_by(value)]
            pending += [(own, False) for own in vars(value).values()]
        elif isinstance(value, partial):
            pending += [(v, True) for v in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, MethodType):
            pending += [(value.__func__, True), (value.__self__, True)]
        elif by_name and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType):
            pending += [(own, False) for own in vars(value).values()]  # an object's
            if callable(value):
                pending.append((type(value).__call__, True))
    return list(found.values())


def _read_by(function: FunctionType) -> Iterator[object]:
    """What a function reads around it and by global names, without functions of other files."""
    code, everywhere = function.__code__, function.__globals__
    reads, writes = _names_in(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # one that is empty
            if name not in writes:
                yield cell.cell_contents
    yield from function.__defaults__ or ()
    for value in (everywhere.get(name) for name in reads - writes):
        elsewhere = isinstance(value, FunctionType) and value.__globals__ is not everywhere
        if not (elsewhere or isinstance(value, type | ModuleType)):
            yield value


@cache
def _names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Global names that code reads, and names outside of it that it writes to."""
    reads, writes = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            reads.add(step.argval)
        elif step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            writes.add(step.argval)
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        more = _names_in(inner)
        reads |= more[0]
        writes |= more[1]
    return frozenset(reads), frozenset(writes)


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
