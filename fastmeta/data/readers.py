"""Readers of labelled text: JSON lines, CLINC's own JSON, Hugging Face data sets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastmeta._names import near
from fastmeta.data._errors import DataError
from fastmeta.data.texts import LabelledTexts, describe


def from_jsonl(
    path: str | PathLike,
    *,
    text: str | None = None,
    label: str = "label",
    classes: Iterable[str] | None = None,
) -> LabelledTexts:
    """Read a file of JSON lines, one object with a text and a label in each.

    Warns where texts repeat within a class.

    Args:
        path: the file, UTF-8; blank lines are skipped.
        text: key of the text; default: ``"sentence"`` or ``"text"``, whichever the first line has.
        label: key of the label, a string or an integer.
        classes: keep these classes only, numbered in this order; default: all, sorted.

    Raises:
        DataError: an unreadable or empty file, or a line that is no such object; names file and
            line.
    """
    data = read_labelled(Path(path), text, label)
    if data.repeats:
        warnings.warn(
            f"{path}: {data.repeats} of {len(data)} texts repeat another of their class; a task "
            "may have the same text in support and query",
            stacklevel=2,
        )
    return data if classes is None else data.restrict(classes)


def read_labelled(path: Path, text: str | None, label: str = "label") -> LabelledTexts:
    """As :func:`from_jsonl`, whatever repeats."""
    texts, labels = [], []
    for where, row in read_objects(path):
        if text is None:
            text = next((k for k in ("sentence", "text") if k in row), "text")
        texts.append(field(row, text, (str,), where))
        labels.append(field(row, label, (str, int), where))
    if not texts:
        raise DataError(f"{path}: expected lines of JSON, got an empty file")
    return LabelledTexts(texts, labels, name=str(path))


def from_clinc_json(
    path: str | PathLike,
    *,
    parts: str | Sequence[str] | None = None,
    classes: Iterable[str] | None = None,
) -> LabelledTexts:
    """Read JSON as CLINC150 was published: ``{"train": [["text", "label"], ...], ...}``.

    Args:
        path: the file.
        parts: key or keys to read; default: all but those starting with ``oos`` (out of scope).
        classes: keep these classes only, numbered in this order; default: all, sorted.

    Raises:
        DataError: an unreadable or malformed file, a part it does not have, or an entry that is no
            pair of strings (names part and entry).
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected a JSON object of parts, got {describe(content)}")
    if parts is None:
        parts = [p for p in content if not p.startswith("oos")]
    texts, labels = [], []
    for part in [parts] if isinstance(parts, str) else parts:
        if part not in content:
            raise DataError(f"{path}: no part {part!r}; it has {', '.join(map(repr, content))}")
        if not isinstance(content[part], list):
            raise DataError(f"{path}: expected part {part!r} to be a list of [text, label]")
        for i, pair in enumerate(content[part]):
            good = isinstance(pair, list) and [type(x) for x in pair] == [str, str]
            if not good or not pair[0].strip():
                raise DataError(
                    f"{path}: expected entry {i} of {part!r} to be [text, label], "
                    f"got {describe(pair)}"
                )
            texts.append(pair[0])
            labels.append(pair[1])
    data = LabelledTexts(texts, labels, name=str(path))
    return data if classes is None else data.restrict(classes)


def from_huggingface(
    dataset: Any,
    text: str = "text",
    label: str = "label",
    *,
    classes: Iterable[str] | None = None,
) -> LabelledTexts:
    """Take a text and a label column of a Hugging Face data set.

    Args:
        dataset: one split: a ``datasets.Dataset`` or ``IterableDataset`` (read to its end).
        text: name of the text column.
        label: name of the label column: strings, integers, or a ``ClassLabel``, whose names then
            are the classes.
        classes: keep these classes only, numbered in this order; default: all.

    Raises:
        DataError: several splits at once, a column that does not exist (with near matches), rows
            without a label, texts that are no strings.
    """
    if isinstance(dataset, dict):  # DatasetDict is one
        raise DataError(
            f"expected one split of a data set, got a mapping with {', '.join(map(repr, dataset))}"
        )
    columns = getattr(dataset, "column_names", None)
    for column in (text, label):
        if columns is not None and column not in columns:
            raise DataError(
                f"the data set has no column {column!r}; it has {', '.join(map(repr, columns))}"
                f"{near(column, columns)}"
            )
    name = str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "data set")
    if hasattr(dataset, "__getitem__"):
        texts, labels = list(dataset[text]), list(dataset[label])
    else:
        try:
            pairs = [(row[text], row[label]) for row in dataset]
        except KeyError as error:
            raise DataError(f"{name}: a row has no column {error.args[0]!r}") from None
        texts, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    names = getattr((getattr(dataset, "features", None) or {}).get(label), "names", None)
    if names is not None and any(n is None or n < 0 for n in labels):
        i = next(i for i, n in enumerate(labels) if n is None or n < 0)
        raise DataError(f"{name}: row {i} has no label (got {labels[i]!r})")
    data = LabelledTexts(texts, labels, classes=names, name=name)
    return data if classes is None else data.restrict(classes)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line)`` of a UTF-8 text file, blank lines skipped, numbers from 1."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: expected UTF-8 text, got byte "
                        f"0x{raw[error.start]:02x} at column {error.start + 1}"
                    ) from None
                if line.strip():
                    yield number, line.strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield where it is and the JSON object of every line."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: malformed JSON ({error.msg}, column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {describe(row)}")
        yield where, row


def read_json(path: Path) -> Any:
    """Read a file that is one JSON document."""
    try:
        document = path.read_bytes().decode("utf-8-sig").rstrip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error.reason})") from None
    if not document:
        raise DataError(f"{path}: expected JSON, got an empty file")
    try:
        return json.loads(document)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None


def field(row: dict, key: str, types: tuple[type, ...], where: str, *, blank: bool = False) -> Any:
    """What a line has under `key`: a string, not a blank one unless allowed, or an integer where
    allowed."""
    if key not in row:
        raise DataError(
            f"{where}: no key {key!r}; the line has {', '.join(map(repr, row)) or 'none'}"
        )
    value = row[key]
    wanted = "a string or an integer" if int in types else "a string"
    if not isinstance(value, types) or isinstance(value, bool):
        raise DataError(f"{where}: expected {key!r} to be {wanted}, got {describe(value)}")
    if isinstance(value, str) and not value.strip() and not blank:
        raise DataError(f"{where}: expected {key!r} to be {wanted}, got an empty one")
    return value
