"""Initial fast weights: those that all tasks share before any step, each where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta._autograd import Function, transformed
from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.task_params import TaskParams
from fastmeta.patching.words import LookedUp


class InitialParams(TaskParams):
    """Fast weights of T tasks before any step, which are the same tensors for all of them.

    Nothing is copied: neither for every task nor into a packed buffer.

    Args:
        layout: Of all adapted parameters.
        parts: Initial values by slot, ``[*shape]``.
        num_tasks: T.
        looked_up: Rows of a table that the tasks' texts read.
    """

    def __init__(
        self,
        layout: ParamLayout,
        parts: Sequence[Tensor],
        num_tasks: int,
        looked_up: LookedUp | None = None,
    ) -> None:
        self.layout, self.parts, self._num_tasks = layout, list(parts), num_tasks
        self.looked_up = looked_up
        self._views: list[Tensor] | None = None

    @property
    def num_tasks(self) -> int:
        return self._num_tasks

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        """Made anew at every reading; all rows share memory."""
        return self.layout.pack(self.parts).expand(self.num_tasks, -1)

    @property
    def views(self) -> list[Tensor]:
        if self._views is None:
            with torch.enable_grad():
                self._views = [part.expand(self.num_tasks, *part.shape) for part in self.parts]
        return self._views

    @property
    def shared(self) -> int:  # type: ignore[override]
        return len(self.parts)

    def tensors(self) -> list[Tensor]:
        rows = self.looked_up
        return self.parts if rows is None else [*self.parts, rows.support, rows.query]

    def like(self, tensors: Sequence[Tensor]) -> InitialParams:
        parts, rows = tensors[: self.shared], self.looked_up
        if rows is not None:
            rows = LookedUp(rows.slot, *tensors[self.shared :])
        return InitialParams(self.layout, parts, self.num_tasks, rows)

    def _select(self, index: Tensor | slice | Sequence[int]) -> InitialParams:
        every, rows = self.parts[0].new_empty(self.num_tasks, 0), self.looked_up
        if rows is not None:
            rows = LookedUp(rows.slot, rows.support[index], rows.query[index])
        return InitialParams(self.layout, self.parts, len(every[index]), rows)

    def detach(self) -> InitialParams:
        return self.like([t.detach() for t in self.tensors()])


def with_zeros(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors; where some of them are used, the others' gradients are zeros."""
    if not torch.is_grad_enabled() or transformed():
        return parts
    return _WithZeros.call(*parts)


class _WithZeros(Function):
    """Identity, whose backward pass gets every missing gradient as zeros."""

    @staticmethod
    def forward(*parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.detach() for part in parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
