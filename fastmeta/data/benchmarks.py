"""The few-shot intent benchmarks CLINC150 and HWU64 in their folders, with their class splits.

A folder holds ``full.jsonl`` (``sentence``, ``label``) and ``splits/01`` to ``05``, each with
``labels.train.txt``, ``labels.valid.txt`` and ``labels.test.txt``: the five disjoint class splits
of Dopierre et al. 2021 (ProtAugment). CLINC150: Larson et al. 2019; HWU64: Liu et al. 2019.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fastmeta._names import near
from fastmeta.data._errors import DataError
from fastmeta.data.readers import read_json, read_labelled, read_lines
from fastmeta.data.texts import LabelledTexts

PARTS = ("train", "valid", "test")


def clinc(
    path: str | PathLike, split: int | str | None = 1, part: str | None = "train"
) -> LabelledTexts:
    """Read CLINC150 (150 intents in 10 domains, 150 utterances each).

    Args:
        path: the folder with ``full.jsonl`` and ``splits/``.
        split: number of the class split, 1 to 5, or its folder's name; ``None`` for all classes.
        part: ``"train"``, ``"valid"`` or ``"test"`` classes of the split; ``None`` for all classes.

    Raises:
        DataError: a missing or malformed file, a split the folder does not have, a class in two
            parts of the split or in none of the data.
        ValueError: another part.
    """
    return _folder(path, split, part)


def hwu(
    path: str | PathLike, split: int | str | None = 1, part: str | None = "train"
) -> LabelledTexts:
    """Read HWU64 (64 intents ``scenario/intent``); arguments and errors as in ``clinc``."""
    return _folder(path, split, part)


def clinc_tasks(path: str | PathLike) -> dict[str, LabelledTexts]:
    """Read CLINC150 as ten whole tasks: each domain is a classification of its own 15 intents.

    Args:
        path: the folder with ``full.jsonl`` and ``domains.json`` (domain -> intents).

    Returns:
        domain -> data, classes numbered as in ``domains.json``; for ``TaskDataset``.

    Raises:
        DataError: a missing or malformed file, or an intent that does not occur.
    """
    path = Path(path)
    data = read_labelled(path / "full.jsonl", "sentence")
    domains = read_json(path / "domains.json")
    good = isinstance(domains, dict) and all(
        isinstance(intents, list) and all(isinstance(i, str) for i in intents)
        for intents in domains.values()
    )
    if not good:
        raise DataError(f"{path / 'domains.json'}: expected an object of domain -> list of intents")
    return {d: data.restrict(intents, name=d) for d, intents in domains.items()}


def hwu_tasks(path: str | PathLike) -> dict[str, LabelledTexts]:
    """Read HWU64 as whole tasks: each scenario with two or more intents is one task.

    Args:
        path: the folder with ``full.jsonl``.

    Returns:
        scenario -> data, classes sorted; the tasks have different numbers of ways.

    Raises:
        DataError: a missing or malformed file.
    """
    data = read_labelled(Path(path) / "full.jsonl", "sentence")
    scenarios: dict[str, list[str]] = {}
    for name in data.classes:
        scenarios.setdefault(name.split("/")[0], []).append(name)
    return {s: data.restrict(c, name=s) for s, c in scenarios.items() if len(c) > 1}


def read_split(path: str | PathLike, split: int | str) -> dict[str, list[str]]:
    """Read a class split and check that its parts are disjoint.

    Args:
        path: the data set's folder.
        split: number of the split, from 1, or its folder's name, as ``"01"``.

    Returns:
        part -> class names.

    Raises:
        DataError: no such split, an unreadable or empty file, a class listed twice (names both
            places).
    """
    splits = Path(path) / "splits"
    folder = splits / str(split).zfill(2)
    if not folder.is_dir():
        found = sorted(p.name for p in splits.iterdir()) if splits.is_dir() else []
        raise DataError(f"{folder}: no such split; found {', '.join(found) or 'none'}")
    parts: dict[str, list[str]] = {}
    seen: dict[str, str] = {}  # class -> where it stands
    for part in PARTS:
        file = folder / f"labels.{part}.txt"
        parts[part] = []
        for number, name in read_lines(file):
            where = f"{file}, line {number}"
            if name in seen:
                raise DataError(f"{where}: class {name!r} is already in {seen[name]}")
            seen[name] = where
            parts[part].append(name)
        if not parts[part]:
            raise DataError(f"{file}: expected one class name per line, got an empty file")
    return parts


def _folder(path: str | PathLike, split: int | str | None, part: str | None) -> LabelledTexts:
    path = Path(path)
    if part is not None and part not in PARTS:
        raise ValueError(
            f"expected part to be one of {PARTS} or None, got {part!r}{near(part, PARTS)}"
        )
    if split is None or part is None:
        return read_labelled(path / "full.jsonl", "sentence")
    classes = read_split(path, split)[part]
    data = read_labelled(path / "full.jsonl", "sentence")
    for name in classes:
        if name not in data.counts:
            raise DataError(
                f"{path}: class {name!r} of split {split}, part {part!r}, does not occur in "
                f"full.jsonl{near(name, data.classes)}"
            )
    return data.restrict(classes, name=f"{path.name} split {split} {part}")
