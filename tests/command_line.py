"""Commands in small, for tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path

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
    """`TINY` and `values` as flags."""
    given = TINY | values
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if v is not None]


def write_jsonl(path: Path, pairs) -> Path:
    """A file of texts and labels."""
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in pairs))
    return path
