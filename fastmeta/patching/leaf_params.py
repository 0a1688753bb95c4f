"""Fast weights of T tasks, some of them kept in another form: by leaf, which those are, and how the
rules read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmeta.patching import rules
from fastmeta.patching.fast_weights import FastTable, Leaf
from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.task_params import TaskParams
from fastmeta.patching.words import LookedUp, TextRows

if TYPE_CHECKING:
    from fastmeta.patching.plan import Plan


class UnpackedParams(TaskParams):
    """Fast weights of T tasks of which some are kept in another form.

    The packed buffer is made where somebody reads it.

    Args:
        layout: Of all adapted parameters.
        rest: Those that are packed, of a layout of their own.
        rows: How a table is read on the texts at hand; None: on any.
    """

    def __init__(self, layout: ParamLayout, rest: TaskParams, rows: TextRows | None) -> None:
        self.layout, self.rest, self.rows = layout, rest, rows
        self._views: list[Tensor] | None = None
        self._packed: Tensor | None = None

    def written_out(self) -> list[Tensor]:
        """Every adapted parameter ``[T, *shape]``."""
        raise NotImplementedError

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        if self._packed is None:
            with torch.enable_grad():  # it stays, for whoever differentiates it later
                self._packed = self.layout.pack(self.written_out())
        return self._packed

    @property
    def num_tasks(self) -> int:
        return self.rest.num_tasks

    @property
    def device(self) -> torch.device:
        return self.rest.device

    @property
    def dtype(self) -> torch.dtype:
        return self.rest.dtype


class LeafParams(UnpackedParams):
    """Fast weights of T tasks of which some are :class:`FastMatrix` and :class:`FastTable`.

    Args:
        layout: Of all adapted parameters.
        rest: Those that are no leaves, of a layout of their own.
        leaves: Slot -> what it is kept as.
        rows: How a table is read on the texts at hand; None: on any.
    """

    def __init__(
        self,
        layout: ParamLayout,
        rest: TaskParams,
        leaves: dict[int, Leaf],
        rows: TextRows | None = None,
    ) -> None:
        super().__init__(layout, rest, rows)
        self.leaves = leaves

    def query_rows(self, ids: Tensor, looked_up: LookedUp) -> TextRows | None:
        table = self.leaves.get(looked_up.slot)
        if not isinstance(table, FastTable) or table.added is None:
            return None
        return TextRows(looked_up.slot, looked_up.query, table.words.rows(ids))

    def reading(self, rows: TextRows | None) -> LeafParams:
        return LeafParams(self.layout, self.rest, self.leaves, rows)

    def written_out(self) -> list[Tensor]:
        return self.slots(lambda leaf: leaf.written_out())

    def bound(self, plan: Plan) -> list:
        if not self.leaves.keys() <= leaf_slots(plan).keys():
            return self.views
        found = self.slots(lambda leaf: leaf)
        if self.rows is not None:
            slot = self.rows.slot
            found[slot] = partial(self.rows, added=self.leaves[slot].added)
        return found

    def detach(self) -> LeafParams:
        leaves = {
            slot: leaf.at(*([t.detach() for t in part] for part in leaf.state()))
            for slot, leaf in self.leaves.items()
        }
        return LeafParams(self.layout, self.rest.detach(), leaves)

    def slots(self, of_leaf: Callable[[Leaf], Any]) -> list:
        """By slot what is made of a leaf, or the packed tensor ``[T, *shape]``."""
        rest = iter(self.rest.views)
        return [
            of_leaf(self.leaves[slot]) if slot in self.leaves else next(rest)
            for slot in range(len(self.layout))
        ]


@dataclass(frozen=True)
class LeafSlot:
    """A weight that can be kept by leaf.

    Attributes:
        module: The linear layer or embedding that reads it.
        with_bias: Whether tasks adapt its bias too, whose gradient sums those of the outputs.
    """

    module: nn.Module
    with_bias: bool


def leaf_slots(plan: Plan) -> dict[int, LeafSlot]:
    """Slots of weights that only one linear layer or embedding reads, by its rule."""
    if plan.leaf_slots is not None:
        return plan.leaf_slots
    readers = Counter(s for adapted in plan.owners.values() for s in adapted.slots.values())
    found = {}
    for name, adapted in plan.owners.items():
        slot = adapted.slots.get("weight")
        if slot is None or readers[slot] > 1 or slot in plan.read_by_units:
            continue
        if plan.modes.get(name) != "rule":
            continue
        module = plan.structure.get_submodule(name)
        rule = rules.rule_for(module, adapted)
        if rule is rules.embedding and module.num_embeddings <= rules.FEW_WORDS:
            continue  # its gradient is small
        if rule in (rules.linear, rules.conv1d_gpt2, rules.embedding):
            found[slot] = LeafSlot(module, "bias" in adapted.slots)
    plan.leaf_slots = found
    return found
