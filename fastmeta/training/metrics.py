"""Metrics of a run: one JSON object per outer step, in a file of lines."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from fastmeta.training.files import whole_file


class MetricsLog:
    """The records of a run, in memory and, where `path` is given, in a JSONL file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._rewound = False  # since the file was written

    def append(self, record: dict[str, Any]) -> None:
        """Add one record and write its line at once."""
        self.records.append(record)
        if self.path is not None and self._rewound:
            with whole_file(self.path) as temporary:
                lines = (json.dumps(r, allow_nan=False) + "\n" for r in self.records)
                temporary.write_text("".join(lines), encoding="utf-8")
            self._rewound = False
        elif self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Keep the records up to `step`: what came after a checkpoint is done again.

        The file changes with the next record.
        """
        if self.path is not None and self.path.exists():
            self.records = read_metrics(self.path)
        self.records = [r for r in self.records if r["step"] <= step]
        self._rewound = True


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line cut short by a crash is left out."""
    records = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1}: malformed JSON") from None
    return records


def finite(value: float) -> float | None:
    """The number as JSON has it: None where it is not finite, as the interval of one episode."""
    return value if math.isfinite(value) else None


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in MiB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not a Unix system
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
