"""What can end a search early, each with one sentence for the user."""

from __future__ import annotations

from pathlib import Path


class SearchError(ValueError):
    """A search that cannot begin or go on: a budget nothing meets, a damaged state file."""


class SearchInterrupted(Exception):
    """The search was asked to stop; its state was saved first where it has a folder."""

    def __init__(self, evaluated: int, state: Path | None) -> None:
        where = f"; saved in {state}" if state else ""
        super().__init__(f"stopped after {evaluated} candidates{where}")
        self.evaluated = evaluated
        self.state = state
