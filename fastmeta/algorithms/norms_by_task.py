"""BatchNorm in a model that embeds rows of many tasks at once: each task's by themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastmeta.patching.bind import copy_structure, install
from fastmeta.patching.context import Call
from fastmeta.patching.rules import Adapted, isolating_rule


class _Rows(threading.local):
    tasks: int | None = None


_rows = _Rows()
"""Of how many tasks the rows are that an embedding computes in this thread, task-major."""


def batch_norms(model: nn.Module | None) -> list[_BatchNorm]:
    """Those in a module; none in none."""
    return [] if model is None else [m for m in model.modules() if isinstance(m, _BatchNorm)]


def normalises(module: nn.Module) -> bool:
    """Whether statistics of rows are taken in it."""
    return any(isinstance(m, _BatchNorm | _InstanceNorm) for m in module.modules())


def tasks_of_rows() -> int:
    """Of how many tasks the rows are that are computed now."""
    return _rows.tasks or 1


@contextmanager
def rows_of(tasks: int) -> Iterator[None]:
    """Within, rows are of so many tasks."""
    outer, _rows.tasks = _rows.tasks, tasks
    try:
        yield
    finally:
        _rows.tasks = outer


def kept_apart(model: nn.Module) -> nn.Module:
    """A copy of the model's structure, sharing its tensors, that does not mix tasks in BatchNorm
    and moves no running statistics: they are the user's model's."""
    structure = copy_structure(model)
    norms = batch_norms(structure)
    for module in structure.modules():
        if isinstance(module, _InstanceNorm):
            module.momentum = 0.0
        if norms and getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # would run norms again outside of the call
    for norm in norms:
        norm.track_running_stats = False
        install(norm, "forward", partial(_by_task, norm))  # which copies and pickles follow
    return structure


def _by_task(norm: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm of ``[T * N, ...]`` as of each task alone."""
    own, tasks = type(norm).forward, _rows.tasks
    if not (norm.training or norm.running_mean is None):
        return own(norm, x)
    if tasks is None and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "BatchNorm ran again in a backward pass, as under torch.utils.checkpoint, where it "
            "cannot tell tasks apart: switch that off in the model"
        )
    if tasks is None or tasks == 1:
        return own(norm, x)
    rule = isolating_rule(norm)
    if rule is not None:
        return rule(norm, Adapted(""), Call([], tasks, len(x) // tasks), x)
    return torch.cat([own(norm, rows) for rows in x.unflatten(0, (tasks, -1))])
