"""Adapted fast weights that are put together where somebody reads them, which few do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fastmeta.patching.plan import Plan
from fastmeta.patching.task_params import TaskParams


class LaterParams(TaskParams):
    """Fast weights of T tasks, made on first use.

    Args:
        start: What they started from.
        make: Makes them; called once.
    """

    def __init__(self, start: TaskParams, make: Callable[[], TaskParams]) -> None:
        self.layout, self._num_tasks = start.layout, start.num_tasks
        self._device, self._dtype = start.device, start.dtype
        self._make: Callable[[], TaskParams] | None = make
        self._views: list[Tensor] | None = None

    @cached_property
    def made(self) -> TaskParams:
        made = self._make()
        self._make = None  # and what it holds
        return made

    @property
    def num_tasks(self) -> int:
        return self._num_tasks

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        return self.made.packed

    @property
    def compact(self) -> Tensor:
        return self.made.compact

    def change(self, start: TaskParams, which: Tensor) -> list[Tensor]:
        return self.made.change(start, which)

    def bound(self, plan: Plan) -> list:
        return self.made.bound(plan)

    def detach(self) -> TaskParams:
        return self.made.detach()
