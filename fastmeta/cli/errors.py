"""Errors that are the user's to mend: one sentence, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
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
