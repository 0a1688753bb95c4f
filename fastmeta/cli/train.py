"""``fastmeta train``: meta-train from a configuration, or go on with a run."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from fastmeta.cli import config as configs
from fastmeta.cli.build import build_parts, build_trainer
from fastmeta.cli.config import Config
from fastmeta.cli.data import announce_split, check_files
from fastmeta.cli.errors import UserError
from fastmeta.cli.processes import launched
from fastmeta.cli.signals import stopping
from fastmeta.training import CheckpointError, Trainer, find_checkpoint, read_checkpoint
from fastmeta.training.files import check_writable, whole_file
from fastmeta.training.processes import Processes

SUMMARY = (
    "Meta-train a model; --resume goes on with an interrupted run, bit by bit. On several GPUs: "
    "torchrun --nproc-per-node N -m fastmeta train ..."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of keys; flags win over it")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the newest checkpoint of this run's folder [the folder --out]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left in --out"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    configs.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    tables = [configs.read_yaml(arguments.config)] if arguments.config else []
    tables.append(configs.flag_values(arguments))
    if arguments.resume is None:
        config = configs.make_config(*tables)
        check_files(config, configs.KEYS)
        prepare_folder(config, overwrite=arguments.overwrite)
    else:
        config = _resumed_config(arguments.resume, tables)
    with launched(config.device) as processes:
        return _run(config, processes, arguments)


def _run(config: Config, processes: Processes, arguments: argparse.Namespace) -> int:
    trainer = build_trainer(config, build_parts(config), progress=not arguments.quiet)
    if processes.leads:
        announce_split(config)
    if arguments.resume is None:
        torch.manual_seed(config.seed + processes.rank)  # of dropout; the rest has its own seeds
        if arguments.overwrite and processes.leads:
            clear_run(Path(config.out))
    else:
        trainer.resume()
        if trainer.step >= config.steps:
            raise UserError(
                f"{config.out} has done {trainer.step} of {config.steps} steps already; "
                f"give more with --steps"
            )
    train(config, trainer)
    if processes.leads:
        _summarise(trainer)
    return 0


def train(config: Config, trainer: Trainer) -> None:
    """Write the configuration and run all steps; Ctrl-C saves first."""
    if trainer.processes.leads:
        with whole_file(Path(config.out) / "config.yaml") as temporary:
            configs.write_yaml(config, temporary)
    with stopping(trainer.stop):
        trainer.fit(config.steps)


def prepare_folder(config: Config, *, overwrite: bool) -> None:
    """Raise unless the run's folder can be written and holds no other run; nothing is created."""
    out = check_writable(config.out)
    if not overwrite and any((out / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise UserError(
            f"{out} already holds a run: go on with it by --resume, replace it by --overwrite, "
            "or choose another --out"
        )


def clear_run(out: Path) -> None:
    """Remove an earlier run's files, and nothing else."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    for name in ("metrics.jsonl", "curve.png", "config.yaml"):
        (out / name).unlink(missing_ok=True)


def _resumed_config(run: str, tables: list[dict]) -> Config:
    """The run's own configuration with the given changes, where they may change."""
    given = {key: value for table in tables for key, value in table.items()}
    out = run or given.get("out", Config.out)
    folder = find_checkpoint(out)
    saved = saved_config(folder)
    if folder.parent.name == "checkpoints" and Path(out) == folder:
        out = str(folder.parent.parent)  # one checkpoint was named: its run goes on
    config = configs.make_config(saved, given, {"out": str(out)})
    for key, value in config.to_dict().items():
        # A key that the run did not know yet had its default's meaning.
        if key not in configs.FREE and saved.get(key, value) != value:
            raise CheckpointError(
                f"{folder} is of a run with {key}={saved.get(key)!r}, got {value!r}: only "
                f"{', '.join(sorted(configs.FREE))} may change"
            )
    return config


def saved_config(folder: Path) -> dict:
    """The configuration that a checkpoint was trained with."""
    config = read_checkpoint(folder)["config"]
    if not config:
        raise CheckpointError(
            f"{folder} was not written by fastmeta train: it has no configuration"
        )
    return config


def _summarise(trainer: Trainer) -> None:
    last = trainer.metrics[-1]
    print(f"{last['step']} steps done, loss {last['loss']:.3f}")
    evaluated = [r for r in trainer.metrics if "valid_accuracy" in r]
    if evaluated:
        last = evaluated[-1]
        accuracy, interval = 100 * last["valid_accuracy"], 100 * last["valid_interval"]
        print(f"validation classes, step {last['step']}: {accuracy:.2f} ± {interval:.2f} %")
    print(f"run in {trainer.out}: metrics.jsonl, curve.png, checkpoints/, config.yaml")
