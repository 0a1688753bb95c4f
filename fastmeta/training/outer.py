"""The outer optimizer and its schedule, as a checkpoint has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fastmeta.training.errors import CheckpointError


def parameters_beside(outer: Optimizer, learner: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves that is none of the learner's meta-parameters."""
    own = {id(p) for p in learner.parameters()}
    found = (p for group in outer.param_groups for p in group["params"])
    return [p for p in found if p.requires_grad and id(p) not in own]


def load_outer(
    outer: Optimizer,
    schedule: LRScheduler | None,
    learner: nn.Module,
    state: dict[str, Any],
    folder: Path,
) -> None:
    """Take optimizer, schedule and the parameters beside the learner's from a checkpoint.

    Args:
        state: From `read_checkpoint`.
        folder: The checkpoint's folder, for messages.

    Raises:
        CheckpointError: They are those of another optimizer or schedule.
    """
    if (state["schedule"] is None) != (schedule is None):
        raise CheckpointError(
            f"{folder} was written {'without' if state['schedule'] is None else 'with'} a "
            f"schedule, this trainer has {'none' if schedule is None else 'one'}"
        )
    saved = [sorted(group) for group in state["outer"]["param_groups"]]
    own = [sorted(group) for group in outer.state_dict()["param_groups"]]
    others = parameters_beside(outer, learner)
    values = state.get("others", others)  # an older version kept none
    if saved != own or [t.shape for t in values] != [p.shape for p in others]:
        raise CheckpointError(
            f"{folder} holds the state of another outer optimizer than "
            f"{type(outer).__name__} with {len(own)} parameter groups"
        )
    try:
        outer.load_state_dict(state["outer"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with torch.no_grad():
        for parameter, value in zip(others, values, strict=True):
            parameter.copy_(value)
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
        _follow(schedule)


def _follow(schedule: LRScheduler) -> None:
    """Rates by the schedule as it is now: with another number of steps it is another one."""
    if not isinstance(schedule, LambdaLR):
        return
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        if not isinstance(group["lr"], Tensor):
            group["lr"] = base * factor(schedule.last_epoch)
