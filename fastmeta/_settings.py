"""Numbers that a user sets: what is wrong with one, in one sentence that names it."""

from __future__ import annotations

import math


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(name: str, value: object, least: int = 1, or_else: str = "") -> int:
    """An integer of at least `least`, or a ValueError, which also names what else there is."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}{or_else}, got {value!r}")
    return value


def integers(least: int, **values: object) -> None:
    """Raise a ValueError unless each is an integer of at least `least`."""
    for name, value in values.items():
        integer(name, value, least)


def above_0(name: str, value: object, or_else: str = "") -> float:
    """A finite number above 0, or a ValueError, which also names what else there is."""
    if not is_number(value) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0{or_else}, got {value!r}")
    return float(value)
