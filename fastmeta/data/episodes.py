"""N-way K-shot episodes whose classes are sampled from one labelled data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta._sampler import sample_episodes
from fastmeta._settings import integers
from fastmeta.batch import TaskBatch
from fastmeta.data._errors import DataError
from fastmeta.data.loader import Loader
from fastmeta.data.texts import LabelledTexts
from fastmeta.data.tokens import PackedTokens, tokenize


class Episodes(Loader[TaskBatch]):
    """Batches of N-way K-shot episodes: T tasks, each of N classes drawn at random.

    Episode ``e`` (task ``e % tasks`` of batch ``e // tasks``) depends only on ``(seed, e)``. Its
    classes come in random order and are labelled 0 .. N - 1 in that order, so a label means nothing
    from one episode to the next. No example is drawn twice in an episode (Vinyals et al. 2016); a
    text that the data hold several times (``data.repeats``) may be in support and query both.

    Args:
        data: where classes and texts are drawn from.
        tokenizer: a Hugging Face tokenizer; every text is tokenised once, here.
        ways: N, classes per episode, >= 1.
        shots: K, support texts per class, >= 1.
        queries: query texts per class, >= 1.
        tasks: T, episodes per batch, >= 1.
        seed: 0 to 2**64 - 1.
        num_batches: number of batches; ``None`` (default) is endless.
        start: number of the first batch.
        max_length: longer texts are cut to this many tokens.
        bucket: widths are rounded up to a multiple of this, so that shapes repeat.
        prefetch: batches prepared ahead in a background thread; 0 for none.
        pin_memory: put batches in page-locked memory.

    Yields:
        TaskBatch with support ``[T, N * K, ...]`` and query ``[T, N * queries, ...]``:
        ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, and
        ``labels`` (int64, 0 .. N - 1, rows sorted by label).

    Raises:
        DataError: fewer classes than N, or a class with fewer texts than an episode needs.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        data: LabelledTexts,
        tokenizer: Any,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        tasks: int = 8,
        *,
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
        integers(1, ways=ways, shots=shots, queries=queries, bucket=bucket)
        check_classes(data, ways, shots, queries)
        sample_episodes(data.starts, 0, ways, shots, queries, seed)  # checks the seed
        self.data = data
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.bucket = bucket
        self.max_length = max_length
        self._tokens = tokenize(data, tokenizer, max_length=max_length)

    def settings(self) -> dict[str, Any]:
        """Return what a batch depends on besides its number, as JSON values."""
        names = ("ways", "shots", "queries", "tasks", "seed", "max_length")
        digests = {"data": self.data.digest, "tokens": self._tokens.digest}
        return {name: getattr(self, name) for name in names} | digests

    def classes(self, index: int) -> list[list[str]]:
        """Return the class names of batch ``index``: one list per task, in label order."""
        chosen, _, _ = self._sample(index)
        return [[self.data.classes[c] for c in task] for task in chosen]

    def _make(self, index: int) -> TaskBatch:
        _, support, query = self._sample(index)
        return TaskBatch(
            labelled_rows(self._tokens, support, self.bucket),
            labelled_rows(self._tokens, query, self.bucket),
        )

    def _sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return sample_episodes(
            self.data.starts,
            self.tasks,
            self.ways,
            self.shots,
            self.queries,
            self.seed,
            index * self.tasks,
        )


def labelled_rows(tokens: PackedTokens, chosen: np.ndarray, bucket: int) -> dict[str, Tensor]:
    """Gather ``chosen [..., ways, n]`` as model inputs ``[..., ways * n, L]`` with their labels."""
    *lead, ways, n = chosen.shape
    rows = tokens.rows(chosen.reshape(*lead, ways * n), multiple=bucket)
    labels = np.broadcast_to(np.repeat(np.arange(ways), n), (*lead, ways * n))
    return {k: torch.from_numpy(v) for k, v in rows.items()} | {"labels": torch.tensor(labels)}


def check_classes(data: LabelledTexts, ways: int, shots: int, queries: int) -> None:
    """Raise a DataError unless ``data`` can give every episode its classes and texts."""
    if not isinstance(data, LabelledTexts):
        raise TypeError(
            f"expected labelled texts, such as fm.data.from_lists(texts, labels) gives, "
            f"got {type(data).__name__}"
        )
    if len(data.classes) < ways:
        raise DataError(f"{data.name}: expected {ways} classes or more, got {len(data.classes)}")
    need = shots + queries
    short = [(name, n) for name, n in data.counts.items() if n < need]
    if short:
        name, n = short[0]
        others = f" ({len(short) - 1} other classes are too small, too)" if len(short) > 1 else ""
        raise DataError(
            f"{data.name}: class {name!r} has {n} example{'s' if n > 1 else ''}, but "
            f"{shots} support + {queries} query need {need}{others}"
        )
