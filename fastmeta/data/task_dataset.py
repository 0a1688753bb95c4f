"""Whole tasks: each task is a classification problem of its own, with its own label set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastmeta._sampler import sample_episodes
from fastmeta._settings import integers
from fastmeta.batch import TaskBatch
from fastmeta.data._errors import DataError
from fastmeta.data.episodes import check_classes, labelled_rows
from fastmeta.data.loader import Loader
from fastmeta.data.texts import LabelledTexts
from fastmeta.data.tokens import tokenize

_ORDER_STREAM = (
    0x7461736B6F726465  # keeps the order of tasks independent of what is drawn from them
)


class TaskDataset(Loader[TaskBatch]):
    """Batches of whole tasks: a task is drawn with all its classes, K shots and Q queries of each.

    Draw ``d`` (task ``d % tasks`` of batch ``d // tasks``) depends only on ``(seed, d)``. The tasks
    come in random order, each once before any comes again. Tasks may differ in their number of
    ways; the batch is then padded exactly and ``batch.ways`` says how many each has.

    Args:
        data: task name -> its labelled texts, at least 2 classes in each.
        tokenizer: a Hugging Face tokenizer; every text is tokenised once, here.
        shots: K, support texts per class, >= 1.
        queries: query texts per class, >= 1.
        tasks: T, tasks per batch, >= 1; may exceed the number of different tasks.
        permute_labels: number a task's classes at random in every draw. Off (default), the label of
            a class is its index in ``data[name].classes``.
        seed: 0 to 2**64 - 1.
        num_batches: number of batches; ``None`` (default) is endless.
        start: number of the first batch.
        max_length: longer texts are cut to this many tokens.
        bucket: widths are rounded up to a multiple of this, so that shapes repeat.
        prefetch: batches prepared ahead in a background thread; 0 for none.
        pin_memory: put batches in page-locked memory.

    Yields:
        TaskBatch with support ``[T, max ways * K, ...]``, query ``[T, max ways * queries, ...]``
        and ``ways`` ``[T]``.

    Raises:
        DataError: no task, a task of one class, or a class with fewer texts than a draw needs.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        data: Mapping[str, LabelledTexts],
        tokenizer: Any,
        shots: int = 1,
        queries: int = 5,
        tasks: int = 8,
        *,
        permute_labels: bool = False,
        seed: int = 0,
        num_batches: int | None = None,
        start: int = 0,
        max_length: int = 128,
        bucket: int = 8,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            tasks=tasks,
            seed=seed,
            num_batches=num_batches,
            start=start,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )
        integers(1, shots=shots, queries=queries, bucket=bucket)
        if not data:
            raise DataError("expected at least one task, got none")
        for name, texts in data.items():
            if not isinstance(texts, LabelledTexts):
                raise DataError(
                    f"expected task {name!r} to be LabelledTexts, got {type(texts).__name__}"
                )
            if len(texts.classes) < 2:
                raise DataError(f"task {name!r}: expected 2 classes or more, got 1")
            check_classes(texts, 2, shots, queries)
        sample_episodes([0, len(data)], 0, 1, 1, 0, seed)  # checks the seed
        self.data = dict(data)
        self.names = tuple(self.data)
        self.shots = shots
        self.queries = queries
        self.permute_labels = permute_labels
        self.bucket = bucket
        self.max_length = max_length
        self.max_ways = max(len(t.classes) for t in self.data.values())
        self._tokens = {
            n: tokenize(t, tokenizer, max_length=max_length) for n, t in self.data.items()
        }
        self._turn: tuple[int, np.ndarray] | None = None  # and its order of tasks

    def settings(self) -> dict[str, Any]:
        """Return what a batch depends on besides its number, as JSON values."""
        names = ("shots", "queries", "tasks", "permute_labels", "seed", "max_length")
        digests = {
            "data": {name: texts.digest for name, texts in self.data.items()},
            "tokens": {name: tokens.digest for name, tokens in self._tokens.items()},
            "names": list(self.names),  # their order decides which is drawn
        }
        return {name: getattr(self, name) for name in names} | digests

    def tasks_of(self, index: int) -> list[str]:
        """Return the names of the tasks of batch ``index``."""
        return [self._name(index * self.tasks + t) for t in range(self.tasks)]

    def _name(self, draw: int) -> str:
        turn, place = divmod(draw, len(self.names))
        kept = self._turn
        if kept is None or kept[0] != turn:
            count, seed = len(self.names), self.seed ^ _ORDER_STREAM
            _, order, _ = sample_episodes([0, count], 1, 1, count, 0, seed, turn)
            kept = self._turn = (turn, order.reshape(-1))
        return self.names[kept[1][place]]

    def _make(self, index: int) -> TaskBatch:
        pairs, ways = [], []
        for draw in range(index * self.tasks, (index + 1) * self.tasks):
            name = self._name(draw)
            texts, tokens = self.data[name], self._tokens[name]
            classes, support, query = sample_episodes(
                texts.starts, 1, len(texts.classes), self.shots, self.queries, self.seed, draw
            )
            if not self.permute_labels:
                order = np.argsort(classes[0])
                support, query = support[:, order], query[:, order]
            pairs.append([labelled_rows(tokens, s[0], self.bucket) for s in (support, query)])
            ways.append(len(texts.classes))
        return TaskBatch.collate([(s, q) for s, q in pairs], pad_token_id=tokens.pad_id, ways=ways)
