"""Packed fast weights without the rows of an embedding's table that no inner step changes.

A word without a gradient stays where it is under every rule without weight decay. So the packed
buffer need not hold tables ``[V, D]``: it holds what is added to the rows of each task's words
(`fastmeta.patching.words`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.patching.fast_weights import FastTable
from fastmeta.patching.initial_params import InitialParams
from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.leaf_params import LeafParams, UnpackedParams, leaf_slots
from fastmeta.patching.task_params import TaskParams
from fastmeta.patching.unpadded import IDS
from fastmeta.patching.words import LookedUp, TextRows, Words, are_few, take

if TYPE_CHECKING:
    from fastmeta.patching.patched import Patched
    from fastmeta.patching.plan import Plan


@dataclass(frozen=True)
class WordTable:
    """A table after the inner loop, for any ids.

    Attributes:
        table: The initial one ``[V, D]``, of all tasks.
        words: Those that may have changed.
    """

    table: Tensor
    words: Words

    def __call__(self, ids: Tensor, *, added: Tensor) -> Tensor:
        base = F.embedding(ids, self.table, self.words.padding)
        return base + take(added, self.words.rows(ids))


@dataclass(frozen=True)
class Narrowing:
    """How fast weights are held while tasks adapt on some support set.

    Attributes:
        layout, narrow: Of all adapted parameters, and with added rows in place of a table.
        slot: The table's.
        table: The initial one ``[V, D]``.
        words: Those of the support set.
    """

    layout: ParamLayout
    narrow: ParamLayout
    slot: int
    table: Tensor
    words: Words

    def start(self, parts: Sequence[Tensor]) -> Tensor:
        """Initial fast weights ``[T, P']`` from those of all tasks, by slot."""
        parts = list(parts)
        parts[self.slot] = self.table.new_zeros(self.narrow.shapes[self.slot])
        return self.narrow.pack(parts).expand(len(self.words.ids), -1)

    def support_rows(self, looked_up: LookedUp | None) -> TextRows:
        """How the table is read on the support set."""
        ids = self.words.ids
        if looked_up is None:
            base = F.embedding(ids, self.table, self.words.padding)
        else:
            base = looked_up.support
        return TextRows(self.slot, base, self.words.rows(ids))

    def per_entry(self, values: Tensor) -> Tensor:
        """Values of every adapted scalar, ``[1 or T, P]`` -> ``[T, P']``."""
        tasks, ids = len(self.words.ids), self.words.ids
        parts = self.layout.unpack(values)
        table = parts[self.slot]
        mine = F.embedding(ids, table[0]) if len(table) == 1 else table[self.words.task, ids]
        parts = [part.expand(tasks, *part.shape[1:]) for part in parts]
        parts[self.slot] = F.pad(mine, (0, 0, 0, 1))
        return self.narrow.pack(parts)


class NarrowParams(UnpackedParams):
    """Fast weights of T tasks with added rows in place of one embedding's table.

    Args:
        narrowing: How they are held.
        compact: The narrow buffer ``[T, P']``.
        rows: How the table is read on the texts at hand; None: on any.
    """

    def __init__(self, narrowing: Narrowing, compact: Tensor, rows: TextRows | None = None) -> None:
        super().__init__(narrowing.layout, TaskParams(narrowing.narrow, compact), rows)
        self.narrowing = narrowing

    def query_rows(self, ids: Tensor, looked_up: LookedUp) -> TextRows | None:
        return TextRows(looked_up.slot, looked_up.query, self.narrowing.words.rows(ids))

    def reading(self, rows: TextRows | None) -> NarrowParams:
        return NarrowParams(self.narrowing, self.compact, rows)

    @property
    def compact(self) -> Tensor:
        return self.rest.packed

    def again(self, start: InitialParams, compact: Tensor) -> NarrowParams:
        table = start.parts[self.narrowing.slot]
        return NarrowParams(replace(self.narrowing, table=table), compact)

    def compact_of(self, params: TaskParams) -> Tensor:
        return held_apart(params).compact

    def change(self, start: InitialParams, which: Tensor) -> list[Tensor]:
        held, ids = self.narrowing, self.narrowing.words.ids
        change = torch.where(which.unsqueeze(1), self.compact - held.start(start.parts), 0.0)
        parts = [part[0] for part in held.narrow.unpack(change.sum(0, keepdim=True))]
        added = held.narrow.unpack(change)[held.slot][:, :-1]
        parts[held.slot] = torch.zeros_like(held.table).index_put((ids,), added, accumulate=True)
        return parts

    def _select(self, index: Tensor | slice | Sequence[int]) -> NarrowParams:
        words = self.narrowing.words
        words = Words.of(words.ids[index], words.padding)
        return NarrowParams(replace(self.narrowing, words=words), self.compact[index])

    def detach(self) -> NarrowParams:
        held = replace(self.narrowing, table=self.narrowing.table.detach())
        return NarrowParams(held, self.compact.detach())

    def bound(self, plan: Plan) -> list:
        slot = self.narrowing.slot
        if word_slot(plan) != slot:
            return self.views
        table = self.rows or WordTable(self.narrowing.table, self.narrowing.words)
        return self._with(partial(table, added=self.rest.views[slot]))

    def written_out(self) -> list[Tensor]:
        held, added = self.narrowing, self.rest.views[self.narrowing.slot]
        return self._with(held.words.written_out(held.table, added))

    def _with(self, table: object) -> list:
        views = list(self.rest.views)
        views[self.narrowing.slot] = table
        return views


def joined(parts: Sequence[TaskParams]) -> TaskParams:
    """See :meth:`TaskParams.joined`."""
    _check_layouts(parts)
    parts = [held_apart(part) for part in parts]
    if len(parts) == 1:
        return parts[0]
    buffers = [part.compact for part in parts]
    for what in ("dtype", "device"):
        kinds = sorted({str(getattr(buffer, what)) for buffer in buffers})
        if len(kinds) > 1:
            raise ValueError(f"expected all parts of one {what}, got {', '.join(kinds)}")
    if all(isinstance(part, NarrowParams) for part in parts) and _alike(parts):
        words = [part.narrowing.words for part in parts]
        all_words = Words.of(torch.cat([w.ids for w in words]), words[0].padding)
        narrowing = replace(parts[0].narrowing, words=all_words)
        return NarrowParams(narrowing, torch.cat(buffers))
    return TaskParams(parts[0].layout, torch.cat([part.packed for part in parts]))


def _check_layouts(parts: Sequence[TaskParams]) -> None:
    if isinstance(parts, TaskParams):
        raise TypeError("expected a list of fast weights (fm.TaskParams), got one")
    for part in parts:
        if not isinstance(part, TaskParams):
            raise TypeError(
                "expected fast weights (fm.TaskParams), such as fm.adapt(...).params, "
                f"got {type(part).__name__}"
            )
    if not parts:
        raise ValueError("expected fast weights of at least one task, got none")
    for i, part in enumerate(parts):
        difference = parts[0].layout.difference(part.layout)
        if difference is not None:
            raise ValueError(f"part {i} is of another model or specification: {difference}")


def _alike(parts: Sequence[NarrowParams]) -> bool:
    """Whether parts add to the same rows of one table."""
    held = [part.narrowing for part in parts]
    return len({(h.narrow, h.slot, h.table.data_ptr()) for h in held}) == 1


def look_up(
    patched: Patched,
    start: InitialParams,
    support: Mapping[str, Any],
    query: Mapping[str, Any],
    most: float,
) -> InitialParams:
    """The start with the rows that both sets' texts read of a table of words; without, where there
    is none, the support set holds many of its words, or it is more than `most` times the table."""
    found = _few_words(patched, support)
    if found is None or word_slot(patched.plan(query)) != found[0]:
        return start
    slot, ids, module = found
    both = ids, query[IDS].flatten(1)
    sizes = [each.numel() for each in both]
    if sum(sizes) > most * module.num_embeddings:
        return start
    every = torch.cat([each.flatten() for each in both])
    rows = F.embedding(every, start.parts[slot], module.padding_idx).split(sizes)
    rows = [r.view(*each.shape, -1) for r, each in zip(rows, both, strict=True)]
    return InitialParams(start.layout, start.parts, start.num_tasks, LookedUp(slot, *rows))


def narrowing(
    patched: Patched, start: InitialParams, inputs: Mapping[str, Any]
) -> tuple[Narrowing, Tensor] | None:
    """How fast weights are best held while tasks adapt on `inputs` ``[T, N, ...]``, and their
    start ``[T, P']``; None: as they are."""
    found = _few_words(patched, inputs)
    if found is None:
        return None
    (slot, ids, module), layout = found, patched.layout
    narrow, words = layout.with_rows(slot, ids.shape[1] + 1), Words.of(ids, module.padding_idx)
    held = Narrowing(layout, narrow, slot, start.parts[slot], words)
    return held, held.start(start.parts)


def _few_words(
    patched: Patched, inputs: Mapping[str, Any]
) -> tuple[int, Tensor, nn.Embedding] | None:
    """The slot of a table of which texts ``[T, N, ...]`` read few words, these ``[T, M]``, and the
    module that looks them up; None where there is none."""
    plan = patched.plan(inputs)
    slot = word_slot(plan)
    if slot is None:
        return None
    ids, module = inputs[IDS].flatten(1), plan.structure.get_submodule(plan.word_table)
    return (slot, ids, module) if are_few(ids.shape[1], module.num_embeddings) else None


def held_apart(params: TaskParams) -> TaskParams:
    """Fast weights in one buffer :attr:`TaskParams.compact`, that holds no whole table where they
    know what was added to one."""
    if not isinstance(params, LeafParams):
        return params
    tables = [(s, t) for s, t in params.leaves.items() if isinstance(t, FastTable)]
    tables = [(s, t) for s, t in tables if t.added is not None]
    if not tables:
        return TaskParams(params.layout, params.packed)
    slot, table = max(tables, key=lambda pair: len(pair[1].weight))
    narrow = params.layout.with_rows(slot, table.added.shape[1])
    views = params.slots(lambda leaf: leaf.added if leaf is table else leaf.written_out())
    held = Narrowing(params.layout, narrow, slot, table.weight, table.words)
    return NarrowParams(held, narrow.pack(views))


def word_slot(plan: Plan) -> int | None:
    """The slot of the table that only the model's words read, or None."""
    adapted = plan.owners.get(plan.word_table)
    slot = None if adapted is None else adapted.slots.get("weight")
    return slot if slot in leaf_slots(plan) else None
