"""Packed fast weights: every adapted parameter of every task in one ``[T, P]`` buffer."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.packing import unpack

if TYPE_CHECKING:
    from fastmeta.patching.plan import Plan
    from fastmeta.patching.words import LookedUp, TextRows


class TaskParams(Mapping[str, Tensor]):
    """Fast weights of T tasks: a mapping name -> ``[T, *shape]`` over one packed ``[T, P]`` buffer.

    The views share memory and the autograd graph with :attr:`packed`.

    Attributes:
        shared: How many of :meth:`tensors` are those of all tasks.
        looked_up: Rows of a table that the tasks' texts read, where they were looked up ahead.
    """

    shared = 0
    looked_up: LookedUp | None = None

    def __init__(self, layout: ParamLayout, packed: Tensor) -> None:
        if packed.dim() != 2 or packed.shape[1] != layout.num_params:
            raise ValueError(
                f"expected packed parameters of shape [T, {layout.num_params}], "
                f"got {list(packed.shape)}"
            )
        self.layout = layout
        self.packed = packed
        self._views: list[Tensor] | None = None

    @property
    def num_tasks(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def compact(self) -> Tensor:
        """One buffer ``[T, P']`` of what tasks have of their own."""
        return self.packed

    def again(self, start: TaskParams, compact: Tensor) -> TaskParams:
        """Such fast weights of another :attr:`compact`, which started from `start`."""
        return TaskParams(self.layout, compact)

    def compact_of(self, params: TaskParams) -> Tensor:
        """The :attr:`compact` of other fast weights, in this form."""
        return params.packed

    def change(self, start: TaskParams, which: Tensor) -> list[Tensor]:
        """By slot, what tasks added to the initial weights of all, summed over those where `which`
        ``[T]`` is True."""
        added = torch.where(which.unsqueeze(1), self.packed - start.packed, 0.0).sum(0)
        return [part[0] for part in self.layout.unpack(added.unsqueeze(0))]

    def tensors(self) -> list[Tensor]:
        """What these fast weights are made of: first :attr:`shared` tensors of all tasks, then
        some whose first axis is that of tasks."""
        return [self.packed]

    def like(self, tensors: Sequence[Tensor]) -> TaskParams:
        """Fast weights with others in place of :meth:`tensors`."""
        return TaskParams(self.layout, *tensors)

    def query_rows(self, ids: Tensor, looked_up: LookedUp) -> TextRows | None:
        """How query texts ``[T, M]`` read a table of which only what was added is held, where there
        is one."""
        return None

    def reading(self, rows: TextRows | None) -> TaskParams:
        """The same for a pass over such texts."""
        return self

    def bound(self, plan: Plan) -> list:
        """What the rules of a plan read, by slot."""
        return self.views

    @property
    def views(self) -> list[Tensor]:
        """One ``[T, *shape]`` view per segment, in layout order."""
        if self._views is None:
            with torch.enable_grad():  # they stay, for whoever differentiates them later
                self._views = unpack(self.layout, self.packed)
        return self._views

    def __getitem__(self, name: str) -> Tensor:
        return self.views[self.layout.index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout)

    @staticmethod
    def joined(parts: Sequence[TaskParams]) -> TaskParams:
        """The tasks of all parts as one batch, in their order: adapted apart, run together.

        Args:
            parts: Fast weights of one model and specification, of any numbers of tasks, on one
                device.

        Raises:
            TypeError: A part is something else.
            ValueError: There is no part, or they differ in names, shapes, dtype or device.
        """
        from fastmeta.patching.narrow_params import joined  # knows every kind, which know this one

        return joined(parts)

    def select(self, index: Tensor | slice | Sequence[int] | int) -> TaskParams:
        """The fast weights of some tasks as a batch.

        Args:
            index: Numbers of tasks in the order wanted, also several times (a list, int64 ``[S]``),
                a mask, bool ``[T]``, a slice, or one number.
        """
        if isinstance(index, Tensor) and index.dim():
            return self._select(index)
        if isinstance(index, list | tuple) and not index:
            raise ValueError("expected the number of at least one task, got none")
        if hasattr(index, "__index__"):
            index = [operator.index(index)]
        return self._select(index if isinstance(index, slice) else list(index))

    def _select(self, index: Tensor | slice | Sequence[int]) -> TaskParams:
        return TaskParams(self.layout, self.packed[index])

    def task(self, t: int) -> dict[str, Tensor]:
        """One task's parameters, name -> ``[*shape]``.

        Raises:
            IndexError: There is no such task.
        """
        if not -self.num_tasks <= t < self.num_tasks:
            raise IndexError(f"expected the number of one of {self.num_tasks} tasks, got {t}")
        return {name: view[t] for name, view in self.items()}

    def to(self, device: torch.device | str) -> TaskParams:
        """The same fast weights on `device`."""
        if self.device == torch.device(device):
            return self
        return TaskParams(self.layout, self.packed.to(device))

    def detach(self) -> TaskParams:
        return TaskParams(self.layout, self.packed.detach())

    def clone(self) -> TaskParams:
        return TaskParams(self.layout, self.packed.clone())

    def __repr__(self) -> str:
        shapes = {n: list(v.shape) for n, v in zip(self.layout.names, self.views, strict=True)}
        return f"TaskParams(tasks={self.num_tasks}, {shapes})"
