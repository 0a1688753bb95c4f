"""Commands in small, for tests of the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import fastmeta as fm
from fastmeta.cli.config import METRIC

TINY = {
    "model": "builtin:hidden=16,layers=1",
    "ways": 3,
    "queries": 2,
    "tasks": 2,
    "inner_steps": 2,
    "steps": 2,
    "eval_episodes": 4,
    "memory": "unroll",
}
SUPPORT = [("please cancel the alarm", "cancel"), ("play a song", "play"), ("send mail", "mail")]


def flags(**values) -> list[str]:
    """`TINY` and `values` as flags; of `TINY` what the method knows."""
    method = values.get("method", "maml")
    idle = {"inner_steps"} if method == "hypernet" else set()
    idle |= {"inner_steps", "memory"} if method in METRIC else set()
    given = {k: v for k, v in TINY.items() if k not in idle} | values
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if v is not None]


def write_jsonl(path: Path, pairs) -> Path:
    """A file of texts and labels."""
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in pairs))
    return path


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Make a FineTuner's step of that number receive an interrupt; one entry for each step."""
    step, calls = fm.FineTuner.step, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(fm.FineTuner, "step", counted)
    return calls
