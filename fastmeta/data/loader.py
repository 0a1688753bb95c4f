"""What every source of task batches shares: numbering, iteration, prefetch and exact resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastmeta._settings import integers
from fastmeta.batch import TaskBatch
from fastmeta.data.prefetch import Prefetch


class Pinned(Protocol):
    """A batch of tensors."""

    def pin_memory(self) -> Any: ...


Batch = TypeVar("Batch", bound=Pinned)


class Loader(ABC, Generic[Batch]):
    """Numbered batches: batch ``i`` depends only on the settings, the seed and ``i``.

    Iterating hands out the batches from ``position`` on. A loop that is left early goes on from
    there the next time; one that ran to the end of ``num_batches`` starts again at batch 0, so a
    finite loader gives the same batches each time.

    Args:
        tasks: tasks per batch, >= 1.
        seed: 0 to 2**64 - 1.
        num_batches: where to stop; ``None`` is endless.
        start: number of the first batch.
        prefetch: batches prepared ahead in a background thread; 0 for none.
        pin_memory: put batches in page-locked memory, for copies to a GPU that do not wait.

    Attributes:
        position: number of the next batch to be handed out.
    """

    def __init__(
        self,
        *,
        tasks: int,
        seed: int,
        num_batches: int | None,
        start: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        integers(1, tasks=tasks)
        integers(0, seed=seed, start=start, prefetch=prefetch)
        if num_batches is not None:
            integers(1, num_batches=num_batches)
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True needs a CUDA device, but torch sees none")
        self.tasks = tasks
        self.seed = seed
        self.num_batches = num_batches
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.position = start

    @abstractmethod
    def _make(self, index: int) -> Batch:
        """Build batch ``index``."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what a batch depends on besides its number, as JSON values."""

    def batch(self, index: int) -> Batch:
        """Return batch ``index`` (>= 0), whatever the position."""
        integers(0, index=index)
        batch = self._make(index)
        return batch.pin_memory() if self.pin_memory else batch

    def __iter__(self) -> Iterator[Batch]:
        first = self.position
        numbers = count(first) if self.num_batches is None else range(first, self.num_batches)
        if self.prefetch:
            batches: Iterator[Batch] = Prefetch(self.batch, numbers, self.prefetch)
        else:
            batches = (self.batch(n) for n in numbers)
        with closing(batches):
            for number, batch in enumerate(batches, first):
                self.position = number + 1
                yield batch
        self.position = 0

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("this loader is endless and has no length; give it num_batches")
        return self.num_batches

    def state_dict(self) -> dict[str, Any]:
        """Return position and settings as JSON values; batches only prefetched do not count."""
        return {"position": self.position, "settings": self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was called.

        Raises:
            ValueError: a state of other data or settings (nothing is changed).
        """
        try:
            position, saved = state["position"], dict(state["settings"])
        except (KeyError, TypeError):
            raise ValueError(
                f"expected a state with 'position' and 'settings', got {state!r}"
            ) from None
        for key, value in self.settings().items():
            found = saved.get(key)
            # what an older version did not note yet is not compared
            if found == value or (key in ("names", "tokens") and key not in saved):
                continue
            if isinstance(found, dict) and isinstance(value, dict):  # by task
                tasks = [n for n in {**value, **found} if found.get(n) != value.get(n)]
                more = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
                raise ValueError(
                    f"the saved position belongs to other {key}: that of {tasks[0]!r}{more} differs"
                )
            raise ValueError(
                f"the saved position belongs to batches with {key}={found!r}, "
                f"these have {key}={value!r}"
            )
        integers(0, position=position)
        self.position = position


EXPECTED = "a loader such as fm.data.Episodes or fm.data.TaskDataset, or a list of fm.TaskBatch"


class Batches(Loader[TaskBatch]):
    """Task batches that are there already, in their order, over and over.

    Raises:
        TypeError: Something else is among them.
        ValueError: There is none.
    """

    def __init__(self, batches: Sequence[TaskBatch]) -> None:
        for batch in batches:
            if not isinstance(batch, TaskBatch):
                raise TypeError(f"expected {EXPECTED}, got a list with {type(batch).__name__}")
        if not batches:
            raise ValueError("expected at least one task batch, got none")
        settings = {"num_batches": None, "prefetch": 0, "pin_memory": False}
        super().__init__(tasks=batches[0].num_tasks, seed=0, start=0, **settings)
        self.batches = list(batches)

    def _make(self, index: int) -> TaskBatch:
        return self.batches[index % len(self.batches)]

    def settings(self) -> dict[str, Any]:
        return {"sizes": [batch.num_tasks for batch in self.batches]}


def as_loader(episodes: Loader | Sequence[TaskBatch]) -> Loader:
    """What hands out batches and knows its position; TypeError for what does not."""
    if isinstance(episodes, Sequence):
        return Batches(episodes)
    if not all(hasattr(episodes, n) for n in ("__iter__", "state_dict", "load_state_dict")):
        raise TypeError(f"expected {EXPECTED}, got {type(episodes).__name__}")
    return episodes
