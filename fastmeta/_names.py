"""Names that somebody misspelt: hints, and settings that a class does not have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping


def near(word: object, known: Iterable[object]) -> str:
    """A hint such as `` (did you mean 'steps'?)``, or nothing."""
    word, names = str(word), [str(k) for k in known]
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if not close:
        close = [k for k in names if word and (word in k or k in word)][:3]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def refuse_unknown(owner: type, unknown: Mapping[str, object]) -> None:
    """Raise TypeError for keyword arguments that no class of `owner` takes.

    Args:
        owner: A class whose ``__init__`` hands what it does not know on to the class above.
        unknown: What was left over at the top.
    """
    name = next(iter(unknown), None)
    if name is None:
        return
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    known = {
        p.name: None
        for base in owner.__mro__
        for p in inspect.signature(base.__init__).parameters.values()
        if p.kind in kinds and p.name != "self"
    }
    hint = near(name, known) or f": it has {', '.join(known)}"
    raise TypeError(f"{owner.__name__} has no setting {name!r}{hint}")
