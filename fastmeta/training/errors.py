"""What can end a run early, each with one sentence for the user."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model or specification."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because every task diverged."""


class Interrupted(Exception):
    """`Trainer.stop` was called; the state was saved first where the run has a folder.

    Attributes:
        step: Outer steps done.
        checkpoint: Folder of the checkpoint, or None.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        where = f"; saved in {checkpoint}" if checkpoint else ""
        super().__init__(f"stopped after step {step}{where}")
        self.step = step
        self.checkpoint = checkpoint
