"""Functions that a user put on one module (``module.forward = ...``), for a copy of that module.

They may hold the module itself: bound to it, as an argument of a partial, or from around their
definition. In the hands of a copy they have to speak of the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_KINDS = (MethodType, partial, FunctionType)


def rebind(module: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """Make a copied module's own functions speak of the copies.

    Args:
        others: ``id`` of a module -> its copy.
    """
    own = vars(module)
    for name in [name for name, value in own.items() if isinstance(value, _KINDS)]:
        own[name] = _rebound(own[name], others, frozenset())


def _rebound(value: Any, others: Mapping[int, nn.Module], around: frozenset[int]) -> Any:
    """The value with copies in place of the modules that it holds; itself where it holds none."""
    if id(value) in others:
        return others[id(value)]
    if not isinstance(value, _KINDS) or id(value) in around:
        return value
    around |= {id(value)}

    def each(parts: tuple | None) -> tuple | None:
        return parts if parts is None else tuple(_rebound(v, others, around) for v in parts)

    if isinstance(value, MethodType):
        before = value.__func__, value.__self__
        after = each(before)
        return value if _same(before, after) else MethodType(*after)
    if isinstance(value, partial):
        before = (value.func, *value.args, *value.keywords.values())
        after = each(before)
        count = 1 + len(value.args)
        found = partial(*after[:count], **dict(zip(value.keywords, after[count:], strict=True)))
    else:
        plain = getattr(value, "_torchdynamo_orig_callable", None)
        if plain is not None:  # what is compiled is so of the module alone
            return _rebound(plain, others, around)
        cells = value.__closure__ or ()
        before = (*map(_content, cells), *(value.__defaults__ or ()))
        after = each(before)
        closure = tuple(
            cell if now is was else CellType(now)
            for cell, was, now in zip(cells, before, after, strict=False)
        )
        defaults = after[len(cells) :] if value.__defaults__ else None
        found = FunctionType(
            value.__code__, value.__globals__, value.__name__, defaults, closure or None
        )
        found.__kwdefaults__ = value.__kwdefaults__
    if _same(before, after):
        return value
    vars(found).update(vars(value))
    return found


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _same(before: tuple, after: tuple) -> bool:
    return all(a is b for a, b in zip(before, after, strict=True))
