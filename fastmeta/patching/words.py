"""The words of tasks' texts, and what is added to their rows of an embedding's table.

A task's support set holds few of a model's words, and no inner step changes the row of another.
What steps add to a table ``[V, D]`` is then ``[M + 1, D]`` for texts of M places: each word's in
the place where it comes first, and a last row of zeros that all other words read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WORTH = 1 / 2
"""Share of a table's rows up to which others are left out."""


def are_few(places: int, vocabulary: int) -> bool:
    """Whether texts of so many places hold few of a table's words."""
    return places + 1 <= _WORTH * vocabulary


@dataclass(frozen=True)
class Words:
    """The words of each task's texts, by the places where they come first.

    Attributes:
        ids: int64 ``[T, M]``.
        ordered, order: The ids in ascending order, and their places.
        padding: The word whose row has no gradient, or None.
    """

    ids: Tensor
    ordered: Tensor
    order: Tensor
    padding: int | None

    @classmethod
    def of(cls, ids: Tensor, padding: int | None) -> Words:
        return cls(ids, *ids.sort(dim=1, stable=True), padding)

    def tensors(self) -> list[Tensor]:
        return [self.ids, self.ordered, self.order]

    @property
    def task(self) -> Tensor:
        """The numbers of tasks ``[T, 1]``."""
        return torch.arange(len(self.ids), device=self.ids.device).unsqueeze(1)

    def rows(self, ids: Tensor) -> Tensor:
        """For task-major ids ``[T * N, ...]`` the rows of added tables ``[T * (M + 1), D]``."""
        tasks, places = self.ids.shape
        mine = ids.reshape(tasks, -1)
        at = torch.searchsorted(self.ordered, mine).clamp_max(places - 1)
        known = self.ordered.gather(1, at) == mine
        if self.padding is not None:
            known = known & (mine != self.padding)
        found = self.order.gather(1, at) + self.task * (places + 1)
        return found.masked_fill(~known, places).view(ids.shape)  # else a row that stays zero

    def written_out(self, table: Tensor, added: Tensor) -> Tensor:
        """``[T, V, D]`` of the initial table ``[V, D]``."""
        every = table.expand(len(added), -1, -1)
        return every.index_put((self.task, self.ids), added[:, :-1], accumulate=True)


def take(added: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``[T, M + 1, D]``; the first task's last one is zero and has no gradient."""
    return F.embedding(rows, added.flatten(0, 1), padding_idx=added.shape[1] - 1)


def collect(g: Tensor, rows: Tensor, places: int) -> Tensor:
    """What ``[T, M, D]`` adds to rows of ``[T, M + 1, D]``."""
    tasks = len(g)
    found = torch.ops.aten.embedding_dense_backward(
        g.flatten(0, 1), rows.flatten(), tasks * (places + 1), places, False
    )
    return found.view(tasks, places + 1, -1)


@dataclass(frozen=True)
class LookedUp:
    """Rows of the initial table that the texts of tasks read, all looked up at once: that gradient
    is as large as the table.

    Attributes:
        slot: The table's.
        support, query: ``[T, M, D]`` for texts of M places.
    """

    slot: int
    support: Tensor
    query: Tensor


@dataclass(frozen=True)
class TextRows:
    """A table on texts whose words are known.

    Attributes:
        slot: The table's.
        base: Rows of the initial table, ``[T, M, D]``.
        rows: See :meth:`Words.rows`.
    """

    slot: int
    base: Tensor
    rows: Tensor

    def __call__(self, ids: Tensor, *, added: Tensor) -> Tensor:
        if ids.numel() != self.rows.numel():
            raise RuntimeError(
                f"the model looks up {list(ids.shape)} words where its inputs have "
                f"{list(self.rows.shape)}"
            )
        return (self.base + take(added, self.rows)).view(*ids.shape, -1)
