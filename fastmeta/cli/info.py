"""``fastmeta info``: versions, compiled parts, and what serves each operator."""

from __future__ import annotations

import argparse

SUMMARY = "Say which versions are in use and what serves each operator, and why."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    from fastmeta.info import main

    return main()
