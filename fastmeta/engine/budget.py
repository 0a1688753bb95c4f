"""Memory budgets: numbers of bytes, or texts such as ``"8GiB"``."""

from __future__ import annotations

import re

from fastmeta._settings import is_integer

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", 1)}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*")


def budget_bytes(budget: int | str | None) -> int | None:
    """The bytes that a budget names, or None for None.

    Args:
        budget: Bytes, or a number with a unit: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB,
            GB, TB (powers of 1000). Above 0.

    Raises:
        TypeError: Neither an integer nor a text.
        ValueError: Not above 0, or a text of another form.
    """
    if budget is None:
        return None
    expected = "memory_budget must be a number of bytes above 0, or a text such as '8GiB'"
    if not (is_integer(budget) or isinstance(budget, str)):
        raise TypeError(f"{expected}, got {budget!r}")
    found: float = 0
    if isinstance(budget, int):
        found = budget
    elif match := _FORM.fullmatch(budget):
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        found = float(match[1]) * units.get(match[2].lower(), 0)
    if found < 1:
        raise ValueError(f"{expected}, got {budget!r}")
    return int(found)


def readable(size: int) -> str:
    """Bytes as people write them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
