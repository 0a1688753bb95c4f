"""The text form of specifications: ``lora:r=8,targets=query+value + params:classifier.*``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import fastmeta as fm
from fastmeta._names import near
from fastmeta.cli.errors import UserError


def _lora(r: str = "8", alpha: str = "16", targets: str = "all-linear") -> fm.Spec:
    return fm.LoRA(r=_integer("r", r), alpha=_number("alpha", alpha), targets=targets.split("+"))


def _prefix(length: str = "16") -> fm.Spec:
    return fm.Prefix(_integer("length", length))


_WITH_OPTIONS: dict[str, tuple[Callable[..., fm.Spec], tuple[str, ...]]] = {
    "lora": (_lora, ("r", "alpha", "targets")),
    "prefix": (_prefix, ("length",)),
}
_PLAIN: dict[str, Callable[[], fm.Spec]] = {
    "all": lambda: fm.Params("*"),
    "head": fm.Head,
    "bias": fm.Bias,
    "norm": fm.Norm,
}
NAMES = (*_WITH_OPTIONS, "params", *_PLAIN)


def parse_spec(text: str) -> fm.Spec:
    """Parse a specification.

    Args:
        text: Terms joined by ``" + "`` (with spaces, since ``+`` also joins names inside a term),
            each ``name`` or ``name:options``: ``all``, ``head``, ``bias``, ``norm``,
            ``prefix:length=16``, ``params:GLOB+GLOB``, ``lora:r=8,alpha=16,targets=query+value``.

    Raises:
        UserError: An unknown term or option (with near matches), or a malformed value.
    """
    terms = re.split(r"\s+\+(?:\s+|$)", text.strip())
    if not all(terms):
        raise UserError(f"spec: expected terms such as 'lora:r=8 + head', got {text!r}")
    first, *others = (_term(t.strip()) for t in terms)
    for other in others:
        first = first + other
    return first


def options(text: str, known: Sequence[str], what: str) -> dict[str, str]:
    """Parse ``key=value,key=value``."""
    found: dict[str, str] = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (s.strip() for s in pair.partition("="))
        if key not in known:
            raise UserError(f"{what}: unknown option {key!r}{near(key, known)}")
        if not equals or not value:
            raise UserError(f"{what}: expected {key}=value, got {pair!r}")
        if key in found:
            raise UserError(f"{what}: option {key!r} is given twice")
        found[key] = value
    return found


def _term(text: str) -> fm.Spec:
    name, colon, rest = text.partition(":")
    what = f"spec {text!r}"
    if name == "params":
        patterns = [p for p in re.split(r"[+,\s]+", rest) if p]
        if not patterns:
            raise UserError(f"{what}: expected params:GLOB, for example params:classifier.*")
        terms = [p for p in patterns if p.partition(":")[0] in NAMES]
        if terms:
            raise UserError(
                f"{what}: expected spaces around + before the term {terms[0]!r}, got none"
            )
        return fm.Params(*patterns)
    if name in _PLAIN:
        if colon:
            raise UserError(f"{what}: {name!r} takes no options")
        return _PLAIN[name]()
    if name not in _WITH_OPTIONS:
        if not set(re.split(r"[+,\s]+", name)).isdisjoint(NAMES):
            raise UserError(f"{what}: expected terms joined by ' + ', as in 'lora:r=8 + head'")
        raise UserError(f"{what}: expected one of {', '.join(NAMES)}{near(name, NAMES)}")
    make, known = _WITH_OPTIONS[name]
    given: dict[str, Any] = options(rest, known, what)
    try:
        return make(**given)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected {name} to be an integer, got {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected {name} to be a number, got {text!r}") from None
