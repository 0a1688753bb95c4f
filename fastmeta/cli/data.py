"""From a configuration to texts and episodes of the training, validation and test classes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fastmeta as fm
from fastmeta.cli.config import Config
from fastmeta.cli.errors import UserError, as_user_errors
from fastmeta.data import Episodes, LabelledTexts

# Fixed, different from a training run's own seeds: evaluation episodes are the same for all runs on
# the same classes (data that is split at random is split by the run's seed).
_EVAL_SEED = {"train": 10_000_001, "valid": 10_000_002, "test": 10_000_003}
_SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}
"""Of the classes of data that has no parts of its own."""


def build_episodes(
    config: Config, tokenizer: Any, part: str, *, seed: int | None = None, **changes: Any
) -> Episodes:
    """Endless episodes of the training, validation or test classes."""
    texts = load_texts(config, part)
    if seed is None:
        seed = config.seed if part == "train" else _EVAL_SEED[part]
    settings = {k: getattr(config, k) for k in ("ways", "shots", "queries", "tasks", "max_length")}
    with as_user_errors():
        return Episodes(texts, tokenizer, seed=seed, **{**settings, **changes})


def load_texts(config: Config, part: str) -> LabelledTexts:
    """The labelled texts of the training, validation or test classes."""
    own = _own_file(config, part)
    with as_user_errors():
        if own is not None:
            return _from_file(config, Path(own).expanduser())
        if config.data == "builtin":
            return fm.data.builtin(part)
        path = _path(config.data)
        if path is not None and path.is_dir():
            return fm.data.clinc(path, split=config.split, part=part)
        split = is_split(config)
        if part != "train" and not split:
            raise UserError(f"no {part} classes: {config.data} has no split, give --{part} FILE")
        texts = _from_hub(config) if path is None else _from_file(config, path)
        return _split(texts, config.seed, part) if split else texts


def source(config: Config, part: str) -> str:
    """What the classes of a part are read from: a file of their own, or the data."""
    return _own_file(config, part) or config.data


def is_split(config: Config) -> bool:
    """Whether the data is one set of classes, of which each part gets some at random."""
    if config.data == "builtin" or config.valid is not None or config.test is not None:
        return False
    return not Path(config.data).expanduser().is_dir()


def announce_split(config: Config) -> None:
    """Say in one line on standard error where classes are split at random."""
    if is_split(config):
        shares = ", ".join(f"{100 * share:.0f} % {part}" for part, share in _SHARES.items())
        print(
            f"fastmeta: the classes of {config.data} are split at random: {shares}; "
            "--valid FILE and --test FILE give your own",
            file=sys.stderr,
        )


def announce_overlap(config: Config, train: LabelledTexts, parts: Iterable[str]) -> None:
    """Say in one line on standard error where a file of validation or test classes shares classes
    or texts with the data.

    Args:
        train: The data's, all that is trained on.
        parts: Those whose files are read.
    """
    for part in parts:
        file = _own_file(config, part)
        if file is None:
            continue
        own = load_texts(config, part)
        classes = len({*own.classes}.intersection(train.classes))
        texts = len({*own.texts}.intersection(train.texts))
        if classes or texts:
            print(
                f"fastmeta: {file} shares {classes} of its {len(own.classes)} classes and {texts} "
                f"of its {len(own)} texts with {config.data}, which is trained on",
                file=sys.stderr,
            )


def check_files(config: Config, keys: Iterable[str]) -> None:
    """Raise unless the files that these keys of the configuration name are there; keys other than
    data, valid and test name none."""
    for key in ("data", "valid", "test"):
        if key not in keys:
            continue
        file = getattr(config, key)
        if key == "data":
            _path(file)
        elif file is not None and not Path(file).expanduser().is_file():
            raise UserError(f"{key} {file!r}: no such file")


def _own_file(config: Config, part: str) -> str | None:
    return {"train": None, "valid": config.valid, "test": config.test}[part]


def _path(data: str) -> Path | None:
    """The file or folder that data names; None where it can only be the name of something else."""
    path = Path(data).expanduser()
    if path.exists():
        return path
    if path.suffix in (".jsonl", ".json") or data.startswith((".", "/", "~")):
        raise UserError(f"data {data!r}: no such file or folder")
    return None


def _from_file(config: Config, path: Path) -> LabelledTexts:
    return fm.data.from_jsonl(path, text=config.text_key, label=config.label_key)


def _from_hub(config: Config) -> LabelledTexts:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data {config.data!r} is no file or folder, and reading it from the hub needs the "
            "package 'datasets' (pip install fastmeta[data])"
        ) from None
    try:
        dataset = datasets.load_dataset(config.data, split="train")
    except Exception as error:  # whatever the hub, the network or the format have to say
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"data {config.data!r} cannot be loaded: {reason}") from error
    return fm.data.from_huggingface(dataset, config.text_key or "text", config.label_key)


def _split(data: LabelledTexts, seed: int, part: str) -> LabelledTexts:
    try:
        found = dict(zip(_SHARES, data.split(*_SHARES.values(), seed=seed), strict=True))[part]
    except ValueError:
        raise UserError(
            f"{data.name}: expected enough classes to split at random into "
            f"{', '.join(_SHARES)}, got {len(data.classes)}; give --valid FILE and --test FILE"
        ) from None
    share = f"{100 * _SHARES[part]:.0f} % of its classes, at random, for {part}"
    return found.restrict(found.classes, name=f"{data.name} ({share})")
