"""Initial fast weights: those that all tasks share before any step, each where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta._autograd import Function, transformed
from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.task_params import TaskParams


class InitialParams(TaskParams):
    """Fast weights of T tasks before any step, which are the same tensors for all of them.

    Nothing is copied: neither for every task nor into a packed buffer.

    Args:
        layout: Of all adapted parameters.
        parts: Initial values by slot, ``[*shape]``.
        num_tasks: T.
    """

    def __init__(self, layout: ParamLayout, parts: Sequence[Tensor], num_tasks: int) -> None:
        self.layout, self.parts, self._num_tasks = layout, list(parts), num_tasks
        self._views: list[Tensor] | None = None

    @property
    def num_tasks(self) -> int:
        return self._num_tasks

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        """Made anew at every reading; all rows share memory."""
        return self.layout.pack(self.parts).expand(self.num_tasks, -1)

    @property
    def views(self) -> list[Tensor]:
        if self._views is None:
            self._views = [part.expand(self.num_tasks, *part.shape) for part in self.parts]
        return self._views

    def tensors(self) -> list[Tensor]:
        return self.parts

    def like(self, tensors: Sequence[Tensor]) -> InitialParams:
        return InitialParams(self.layout, tensors, self.num_tasks)

    def select(self, index: Tensor | slice) -> InitialParams:
        if isinstance(index, Tensor):
            tasks = len(index) if index.dtype != torch.bool else int(index.sum())
        else:
            tasks = len(range(*index.indices(self.num_tasks)))
        return InitialParams(self.layout, self.parts, tasks)

    def detach(self) -> InitialParams:
        return self.like([part.detach() for part in self.parts])


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
