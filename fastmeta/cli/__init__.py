"""The command line: ``fastmeta train | eval | adapt | tune | search | info | demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastmeta._names import near
from fastmeta.cli.errors import UserError

__all__ = ["main"]

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    """argparse, with one sentence and near matches for what it does not know."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    from fastmeta import __version__
    from fastmeta.cli import adapt, demo, evaluate, info, search, train, tune

    parser = _Parser(
        prog="fastmeta",
        description="Meta-learning over transformer models, many tasks per step.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastmeta {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, module in (
        ("train", train),
        ("eval", evaluate),
        ("adapt", adapt),
        ("tune", tune),
        ("search", search),
        ("info", info),
        ("demo", demo),
    ):
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        0, or 2 after an error of the user's (one sentence on stderr), or 130 after Ctrl-C. Anything
        unexpected raises.
    """
    from fastmeta.data import DataError
    from fastmeta.patching import PatchError
    from fastmeta.search import SearchError
    from fastmeta.training import CheckpointError, Interrupted, TrainingError

    mine = (UserError, DataError, PatchError, CheckpointError, TrainingError, SearchError, OSError)
    try:
        arguments = _parse(build_parser(), argv)
        return arguments.run(arguments)
    except mine as error:
        # OSErrors come from the files and folders that the user named: full, missing, forbidden.
        print(f"fastmeta: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        run = "" if stopped.checkpoint is None else f" {stopped.checkpoint.parent.parent}"
        print(f"fastmeta: {stopped}; go on with fastmeta train --resume{run}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("fastmeta: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(given)
    if arguments.command is None:
        raise UserError(
            "expected a command: train, eval, adapt, tune, search, info or demo; "
            "see fastmeta --help"
        )
    if unknown:
        first = unknown[0]
        flags = [f for action in arguments.parser._actions for f in action.option_strings]
        hint = near(first.split("=")[0], flags) if first.startswith("-") else ""
        raise UserError(f"{arguments.parser.prog}: unknown argument {first!r}{hint}")
    return arguments


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
