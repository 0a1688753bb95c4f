"""Where some of many tasks are, among the rows of a tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastmeta._names import near

Place = slice | Tensor
"""Where tasks are: adjacent ones, whose rows are views, or int64 ``[A]``."""


def place_of(names: Sequence[Hashable], every: Sequence[Hashable], device: torch.device) -> Place:
    """Where named tasks are among `every` task; ValueError for a name unknown or given twice."""
    index = {name: i for i, name in enumerate(every)}
    unknown = next((n for n in names if n not in index), None)
    if unknown is not None:
        raise ValueError(f"there is no task {unknown!r}{near(unknown, every)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"expected tasks, each once, got {list(names)}")
    places = [index[name] for name in names]
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(places, device=device)


def size(place: Place) -> int:
    return place.stop - place.start if isinstance(place, slice) else len(place)


def part_of(place: Place, part: slice) -> Place:
    """Some of the tasks at a place."""
    if isinstance(place, slice):
        return slice(place.start + part.start, place.start + part.stop)
    return place[part]


def write(whole: Tensor, place: Place, rows: Tensor) -> None:
    """Rows of some tasks, unless they were updated where they lie."""
    if not isinstance(place, slice) or rows.data_ptr() != whole[place].data_ptr():
        whole[place] = rows
