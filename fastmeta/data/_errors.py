"""The error of data that cannot be used as given."""


class DataError(ValueError):
    """Labelled text that cannot be read or cannot serve the episodes asked for.

    The message is one sentence; where a file is at fault it names the file and the line.
    """
