"""Errors that are the user's to mend: one sentence, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input to a command; the message is one sentence."""


@contextmanager
def as_user_errors(prefix: str = "") -> Iterator[None]:
    """Turn the library's own refusals of an argument into user errors.

    Only for code that puts a run together from what the user wrote: a ValueError from the middle
    of a computation is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(prefix + str(error)) from error


def near(word: str, known: Iterable[str]) -> str:
    """A hint such as `` (did you mean 'steps'?)``, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if not close:
        close = [k for k in known if word and (word in k or k in word)][:3]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
