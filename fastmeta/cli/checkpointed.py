"""What `eval` and `adapt` share: a trained learner, from its checkpoint."""

from __future__ import annotations

import argparse

from fastmeta.cli import config as configs
from fastmeta.cli.applies import check_given
from fastmeta.cli.build import Parts, build_parts
from fastmeta.cli.data import check_files
from fastmeta.cli.train import saved_config
from fastmeta.training import find_checkpoint, load_learner, read_checkpoint


def add_arguments(parser: argparse.ArgumentParser, keys: tuple[str, ...]) -> None:
    """``--checkpoint``, and flags for the configuration keys that may differ from training."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its newest) or one of its checkpoints",
    )
    configs.add_flags(parser, keys, "changes to the checkpoint's configuration")


def load(arguments: argparse.Namespace) -> Parts:
    """Rebuild the learner that the checkpoint was trained with and load its meta-parameters."""
    folder = find_checkpoint(arguments.checkpoint)
    saved, given = saved_config(folder), configs.flag_values(arguments)
    if "data" in given:
        saved |= {"valid": None, "test": None}  # files of the run's own data
    config = configs.make_config(saved, given)
    check_given(config, given)
    check_files(config, given)
    parts = build_parts(config)
    load_learner(parts.learner, read_checkpoint(folder), folder)
    return parts
