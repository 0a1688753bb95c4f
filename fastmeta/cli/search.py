"""``fastmeta search``: find an architecture and a recipe over many tasks, and export the winner."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastmeta as fm
from fastmeta._names import near
from fastmeta._settings import is_integer
from fastmeta.cli import config as configs
from fastmeta.cli.build import load_model
from fastmeta.cli.config import read_table
from fastmeta.cli.errors import UserError, as_user_errors
from fastmeta.cli.signals import stopping
from fastmeta.search.run import CONTROLLERS
from fastmeta.search.state import NAME
from fastmeta.training.files import check_writable, whole_file

SUMMARY = "Search architectures and recipes over many tasks; --resume goes on."
INTERRUPTED = 130

_DEFAULTS: dict[str, Any] = {
    "model": "builtin",
    "pooling": "mean",
    "pooling_scale": 30.0,
    "data": "builtin",
    "shots": 3,
    "queries": 3,
    "tasks": 8,
    "max_length": 64,
    "controller": "lstm",
    "evaluations": 256,
    "population": 32,
    "budget": {},
    "weights": {},
    "keep": None,
    "finalists": 8,
    "heal": 0,
    "seed": 0,
    "threads": None,
    "out": "fastmeta-search",
}
_SPACE = {
    "layers": "each",
    "widths": [1.0, 0.75, 0.5],
    "lr": {"low": 1e-3, "high": 1.0, "log": True},
    "optimizer": ["sgd", "adam"],
    "steps": [5, 10, 20],
}
_SPACE_KEYS = (
    "layers", "heads", "widths", "uniform", "pooling", "lora", "lora_scale", "adapted_layers",
    "lr", "optimizer", "weight_decay", "steps", "batch_size", "conditions",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file: the keys below, and space: a table of fm.search.Space's arguments, a "
        "range as {low: 1e-3, high: 1, log: true}",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the search in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the search in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("keys of --config FILE, which flags win over")
    helps = {
        "model": "builtin, builtin:hidden=64,layers=4, a folder or a hub name",
        "pooling": "mean: pooled token states under a linear head; null: the model's own head",
        "data": "builtin, or a folder as of CLINC150 (a task per domain) or HWU64 (per scenario)",
        "tasks": "tasks that candidates are judged on",
        "controller": ", ".join(CONTROLLERS),
        "evaluations": "candidates in all",
        "population": "candidates of a step, evaluated in one batch",
        "budget": "bounds such as relative_latency=0.7,parameters=2e7",
        "weights": "weights of costs in the reward, such as relative_flops=0.05",
        "heal": "steps in which the winner learns the whole model's states again, on the data's "
        "texts (healing, no labels)",
        "keep": "share that goes on to the second half of the tasks (successive halving)",
    }
    for name, default in _DEFAULTS.items():
        shown = "" if default in ({}, None) else f" [{default}]"
        group.add_argument(
            "--" + name.replace("_", "-"), metavar="X", help=helps.get(name, "") + shown
        )


def run(arguments: argparse.Namespace) -> int:
    given, space_table = _settings(arguments)
    out = check_writable(given["out"])
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if not arguments.resume and not arguments.overwrite and (out / NAME).exists():
        raise UserError(f"{out} already holds a search: --resume it, --overwrite it, or set --out")
    if given["threads"]:
        torch.set_num_threads(int(given["threads"]))
    model, tokenizer, data = _model(given)
    with as_user_errors("space: "):
        space = fm.search.Space(model, **space_table)
    batches, valid = _tasks(given, data, tokenizer)
    print(space, flush=True)
    asked: list[bool] = []
    names = ("controller", "evaluations", "population", "budget", "weights", "keep", "finalists")
    try:
        with stopping(lambda: asked.append(True)), as_user_errors():
            found = fm.search.run(
                space,
                batches,
                **{n: given[n] for n in names},
                valid=valid,
                seed=given["seed"],
                out=out,
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                progress=not arguments.quiet,
                stop=lambda: bool(asked),
            )
    except fm.search.SearchInterrupted as stopped:
        if arguments.overwrite:  # its state is the new search's by now
            _clear_results(out)
        print(f"fastmeta: {stopped}; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    healing: dict[str, Any] = {}
    if given["heal"]:
        texts = [text for task in data.values() for text in task.texts]
        healing = {"texts": texts, "steps": given["heal"], "progress": not arguments.quiet}
        healing |= {"max_length": given["max_length"], "seed": given["seed"]}
    _write(found, out, tokenizer=tokenizer, **healing)
    return 0


def _write(found: fm.search.Result, out: Path, **settings: Any) -> None:
    text = found.table()
    print(text)
    with whole_file(out / "table.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with whole_file(out / "pareto.png") as temporary:
        found.plot(temporary)
    winner = out / "winner"
    found.export(winner, overwrite=True, **settings)
    print(
        f"search in {out}: {NAME}, table.txt, pareto.png; the winner's checkpoint in {winner}, "
        f"its recipe: fastmeta train --config {winner / 'recipe.yaml'}"
    )


def _clear_results(out: Path) -> None:
    """Remove what an earlier search found, and nothing else."""
    shutil.rmtree(out / "winner", ignore_errors=True)
    for name in ("table.txt", "pareto.png"):
        (out / name).unlink(missing_ok=True)


def _settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the search, and arguments of the space."""
    table = read_table(arguments.config) if arguments.config else {}
    space = table.pop("space", _SPACE)
    for key in table:
        if key not in _DEFAULTS:
            raise UserError(f"{arguments.config}: unknown key {key!r}{near(str(key), _DEFAULTS)}")
    flags = {k: getattr(arguments, k) for k in _DEFAULTS}
    flags = {k: _parsed(k, v) for k, v in flags.items() if v is not None}
    given = _DEFAULTS | table | flags
    for key in ("shots", "queries", "tasks", "evaluations", "population", "finalists"):
        if not is_integer(given[key]) or given[key] < 1:
            raise UserError(f"{key}: expected an integer of at least 1, got {given[key]!r}")
    if not is_integer(given["heal"]) or given["heal"] < 0:
        raise UserError(f"heal: expected an integer of at least 0, got {given['heal']!r}")
    if given["controller"] not in CONTROLLERS:
        raise UserError(
            f"controller: expected one of {', '.join(CONTROLLERS)}, got {given['controller']!r}"
            + near(str(given["controller"]), CONTROLLERS)
        )
    if given["pooling"] not in (None, "mean"):
        raise UserError(f"pooling: expected null or mean, got {given['pooling']!r}")
    for key in ("budget", "weights"):
        if not isinstance(given[key], Mapping):
            raise UserError(f"{key}: expected a table cost: number, got {given[key]!r}")
        given[key] = {k: _number(f"{key} of {k}", v) for k, v in given[key].items()}
    if not isinstance(space, Mapping):
        raise UserError(f"space: expected a table, got {space!r}")
    for key in space:
        if key not in _SPACE_KEYS:
            raise UserError(f"space: unknown key {key!r}{near(str(key), _SPACE_KEYS)}")
    return given, {k: _space_value(k, v) for k, v in space.items()}


def _parsed(key: str, text: str) -> Any:
    if key in ("budget", "weights"):
        pairs = [p.partition("=") for p in text.split(",") if p.strip()]
        return {k.strip(): _number(f"{key} of {k.strip()}", v) for k, _, v in pairs}
    return configs.parse_value(text)


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{what}: expected a number, got {value!r}") from None


def _space_value(key: str, value: Any) -> Any:
    """A range from its table, conditions from theirs, numbers that YAML reads as texts."""
    with as_user_errors(f"space: {key}: "):
        if key == "conditions":
            return [fm.search.When(**one) for one in value]
        if isinstance(value, Mapping) and "low" in value:
            low, high = (_number(f"space: {key}", value.get(k)) for k in ("low", "high"))
            rest = {k: v for k, v in value.items() if k not in ("low", "high")}
            return fm.search.Range(low, high, **rest)
        if key in ("lr", "weight_decay"):
            many = isinstance(value, list)
            values = [_number(f"space: {key}", v) for v in (value if many else [value])]
            return values if many else values[0]
    return value


def _model(given: Mapping[str, Any]) -> tuple[nn.Module, Any, dict[str, fm.data.LabelledTexts]]:
    data = _data(given["data"])
    ways = max(len(texts.classes) for texts in data.values())
    keys = ("model", "pooling", "pooling_scale", "seed")
    config = configs.make_config({k: given[k] for k in keys}, {"ways": ways, "spec": "head"})
    model, tokenizer = load_model(config)
    return model.eval().requires_grad_(False), tokenizer, data


def _data(name: str) -> dict[str, fm.data.LabelledTexts]:
    if name == "builtin":
        return fm.data.builtin_tasks()
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"data {name!r}: no such folder")
    return (fm.data.clinc_tasks if (path / "domains.json").is_file() else fm.data.hwu_tasks)(path)


def _tasks(given: Mapping[str, Any], data: Mapping[str, fm.data.LabelledTexts], tokenizer: Any):
    """The batches that candidates are judged on, and others for the finalists."""
    halves = 1 if given["keep"] is None else 2
    size = max(1, given["tasks"] // halves)
    with as_user_errors():
        loader = fm.data.TaskDataset(
            data, tokenizer, given["shots"], given["queries"], size, seed=given["seed"],
            num_batches=2 * halves, max_length=given["max_length"], prefetch=0,
        )  # fmt: skip
        every = list(loader)
    return every[:halves], every[halves:]
