"""Everything that later steps of a run depend on: taken from a trainer, and put back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmeta.engine.memory import MemoryPlan
from fastmeta.training.checkpoint import fingerprint, load_learner
from fastmeta.training.errors import CheckpointError
from fastmeta.training.outer import load_outer, parameters_beside
from fastmeta.training.processes import Processes

if TYPE_CHECKING:
    from fastmeta.training.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Tensors and JSON values; all processes call it."""
    learner, gather = trainer.learner, trainer.processes.gather
    cuda = trainer.device.type == "cuda"
    rng = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(trainer.device).cpu() if cuda else None,
    }
    # Unrolling and recomputing round differently: a resumed run keeps the choice made.
    plans = {key: asdict(plan) for key, plan in _known_plans(learner).items()}
    return {
        "config": trainer.config,
        "fingerprint": fingerprint(learner),
        "meta": dict(learner.state_dict()),
        "others": [p.detach() for p in parameters_beside(trainer.outer, learner)],
        "progress": learner.progress() if hasattr(learner, "progress") else {},
        "outer": trainer.outer.state_dict(),
        "schedule": None if trainer.schedule is None else trainer.schedule.state_dict(),
        "episodes": trainer.episodes.state_dict(),
        "rng": gather(rng),
        "memory_plans": gather(plans),
    }


def load_state(trainer: Trainer, state: dict[str, Any], folder: Path) -> None:
    """Put back what :func:`state_of` gave; what can fail comes before the random states.

    Args:
        folder: The checkpoint's, for messages.

    Raises:
        CheckpointError: Of another model, specification, optimizer or data.
    """
    learner, processes = trainer.learner, trainer.processes
    load_learner(learner, state, folder)
    if hasattr(learner, "load_progress"):
        learner.load_progress(state.get("progress", {}))
    load_outer(trainer.outer, trainer.schedule, learner, state, folder)
    try:
        trainer.episodes.load_state_dict(state["episodes"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    plans = _own_of(processes, state["memory_plans"])
    _known_plans(learner).update({key: MemoryPlan(**plan) for key, plan in plans.items()})
    rng = _own_of(processes, state["rng"])
    torch.set_rng_state(rng["cpu"])
    if isinstance(state["rng"], list) and processes.rank >= len(state["rng"]):
        torch.manual_seed(int(torch.randint(2**31, ())) + processes.rank)
    elif rng["cuda"] is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], trainer.device)


def _known_plans(learner: nn.Module) -> dict[Hashable, MemoryPlan]:
    """A learner's memory plans; of one that has none, an empty mapping."""
    return learner.plans.known if hasattr(learner, "plans") else {}


def _own_of(processes: Processes, saved: Any) -> Any:
    """This process's part of what all had saved; of fewer processes, another's."""
    parts = saved if isinstance(saved, list) else [saved]
    return parts[processes.rank % len(parts)]
