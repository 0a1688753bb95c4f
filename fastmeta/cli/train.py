"""``fastmeta train``: meta-train from a configuration, or go on with a run."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from fastmeta.cli import config as configs
from fastmeta.cli.applies import check_given
from fastmeta.cli.build import build_parts, build_trainer
from fastmeta.cli.config import Config
from fastmeta.cli.data import announce_overlap, announce_split, check_files
from fastmeta.cli.errors import UserError
from fastmeta.cli.processes import launched
from fastmeta.cli.signals import stopping
from fastmeta.training import CheckpointError, Trainer, find_checkpoint
from fastmeta.training.checkpoint import holds_run, read_config
from fastmeta.training.files import check_writable, sweep, whole_file
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
        help="go on with the newest checkpoint of this run's folder, or with the checkpoint named "
        "[the folder --out]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left in --out"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    configs.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    tables = [configs.read_yaml(arguments.config)] if arguments.config else []
    tables.append(configs.flag_values(arguments))
    checkpoint = None
    if arguments.resume is None:
        config = configs.make_config(*tables)
        check_given(config, tables[-1], tables[0])
        check_files(config, configs.KEYS)
        prepare_folder(config, overwrite=arguments.overwrite)
    else:
        config, checkpoint = _resumed(arguments.resume, tables)
    with launched(config.device) as processes:
        return _run(config, checkpoint, processes, arguments)


def _run(
    config: Config, checkpoint: Path | None, processes: Processes, arguments: argparse.Namespace
) -> int:
    trainer = build_trainer(config, build_parts(config), progress=not arguments.quiet)
    if processes.leads:
        announce_split(config)
        announce_overlap(config, trainer.episodes.data, ("valid", "test"))
    if checkpoint is None:
        torch.manual_seed(config.seed + processes.rank)  # of dropout; the rest has its own seeds
        if arguments.overwrite and processes.leads:
            clear_run(Path(config.out))
    else:
        trainer.resume(checkpoint)
        if trainer.is_done(config.steps):
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


def prepare_folder(
    config: Config,
    *,
    overwrite: bool,
    ways_out: str = "go on with it by --resume, replace it by --overwrite, or choose another --out",
) -> None:
    """Raise unless the run's folder can be written and holds no other run; nothing is created."""
    out = check_writable(config.out)
    if not overwrite and holds_run(out):
        raise UserError(f"{out} already holds a run: {ways_out}")


def clear_run(out: Path) -> None:
    """Remove an earlier run's files, and nothing else."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    for name in ("metrics.jsonl", "curve.png", "config.yaml"):
        (out / name).unlink(missing_ok=True)


def _resumed(run: str, tables: list[dict]) -> tuple[Config, Path]:
    """A run's own configuration with the given changes, where they may change, and the checkpoint
    to go on from."""
    given = {key: value for table in tables for key, value in table.items()}
    out = Path(run or given.get("out", Config.out))
    for folder in (out / "checkpoints", out, out.parent):  # whichever of them was named
        if folder.name == "checkpoints":
            sweep(folder)  # a checkpoint that was being replaced comes back
    folder = find_checkpoint(out)
    if folder.parent.name == "checkpoints":  # it, or the folder around it, may have been named
        out = folder.parent.parent
    other = tables[-1].get("out", out)
    if Path(other).resolve() != out.resolve():
        raise UserError(f"--resume {run} goes on in {out}: expected no other --out, got {other}")
    saved = saved_config(folder)
    config = configs.make_config(saved, given, {"out": str(out)})
    check_given(config, tables[-1])
    for key, value in config.to_dict().items():
        # A key that the run did not know yet had its default's meaning.
        if key not in configs.FREE and saved.get(key, value) != value:
            raise CheckpointError(
                f"{folder} is of a run with {key}={saved.get(key)!r}, got {value!r}: only "
                f"{', '.join(sorted(configs.FREE))} may change"
            )
    return config, folder


def saved_config(folder: Path) -> dict:
    """The configuration that a checkpoint was trained with."""
    config = read_config(folder)
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
        accuracy, interval = 100 * last["valid_accuracy"], last["valid_interval"]
        known = "" if interval is None else f" ± {100 * interval:.2f}"
        print(f"validation classes, step {last['step']}: {accuracy:.2f}{known} %")
    print(f"run in {trainer.out}: metrics.jsonl, curve.png, checkpoints/, config.yaml")
