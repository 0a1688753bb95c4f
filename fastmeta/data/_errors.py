"""The error of data that cannot be used as given."""


class DataError(ValueError):
    """Labelled text that cannot be read or cannot serve the episodes asked for.

    The message is one sentence; where a file is at fault it names the file and the line.
    """


def near(name: object, known: object) -> str:
    """Return a hint `` (did you mean 'a' or 'b'?)`` for a misspelt name, or ``""``."""
    from difflib import get_close_matches

    close = get_close_matches(str(name), [str(k) for k in known], n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
