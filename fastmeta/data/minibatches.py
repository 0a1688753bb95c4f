"""Minibatches of many tasks at once, each from texts of its own: what `fm.FineTuner` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fastmeta._sampler import sample_episodes
from fastmeta._settings import integers
from fastmeta.batch import IGNORE_INDEX, stack_sets
from fastmeta.data._errors import DataError
from fastmeta.data.loader import Loader
from fastmeta.data.prompts import Prompted, tokenize_prompted
from fastmeta.data.texts import LabelledTexts, describe
from fastmeta.data.tokens import PackedTokens, tokenize


@dataclass(frozen=True)
class Minibatch:
    """One batch of each of A tasks.

    Attributes:
        tasks: Their names.
        inputs: ``input_ids``, ``attention_mask`` and, where the tokenizer gives them,
            ``token_type_ids``, int64 ``[A, N, L]``; and ``labels``, for classes ``[A, N]``. Rows
            beyond a task's own have labels of -100.
    """

    tasks: tuple[str, ...]
    inputs: dict[str, Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Minibatch:
        """The same batch with every tensor on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self.inputs.items()}
        return Minibatch(self.tasks, moved)

    def pin_memory(self) -> Minibatch:
        """The same batch in page-locked memory."""
        return Minibatch(self.tasks, {k: v.pin_memory() for k, v in self.inputs.items()})


class Minibatches(Loader[Minibatch]):
    """Batches of all tasks' texts, epoch after epoch, each task in random orders of its own.

    What a task reads depends on its name, its texts and the seed alone. Every batch holds the next
    rows of each task that has any left; an epoch's last batch may have fewer rows. Tasks are in the
    order of how long they take, so those that end leave the others adjacent.

    Args:
        data: Task name -> its texts: labelled ones for classification, or a list of texts for a
            language model, whose labels are the words themselves: strings, or ``(prompt,
            completion)``, in which those of the prompt do not count. All tasks of one kind.
        tokenizer: A Hugging Face tokenizer; every text is tokenised once, here.
        batch_size: Rows of a task in a batch, at least 1.
        epochs: How often each task reads all its texts, at least 1; None: all tasks go on until
            `num_batches`, and take as many steps.
        seed: 0 to 2**64 - 1.
        num_batches: Where to stop; None: where the longest task ends, or endless.
        start: Number of the first batch.
        max_length: Longer texts are cut to this many tokens.
        bucket: Widths are rounded up to a multiple of this, so that shapes repeat.
        prefetch: Batches prepared ahead in a background thread; 0 for none.
        pin_memory: Put batches in page-locked memory.

    Attributes:
        names: Of the tasks, in the order of every batch.
        ways: Number of classes of each, in that order; None for texts without labels.
        steps: Batches that each reads in all epochs, in that order; None where they do not end.

    Yields:
        Minibatch.

    Raises:
        DataError: No task, a task without texts or with fewer than two classes, a text without
            labels of one token, a prompt that leaves no room for what follows it.
        IndexError: From `batch`, beyond the last.
        TypeError: Tasks with and without labels, a name that is no text.
        ValueError: A number out of its range.
    """

    def __init__(
        self,
        data: Mapping[str, LabelledTexts | Sequence[str | Prompted]],
        tokenizer: Any,
        batch_size: int = 8,
        *,
        epochs: int | None = 1,
        seed: int = 0,
        num_batches: int | None = None,
        start: int = 0,
        max_length: int = 128,
        bucket: int = 8,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        integers(1, batch_size=batch_size, bucket=bucket)
        if epochs is not None:
            integers(1, epochs=epochs)
        self.labelled = _kind(data)
        self.batch_size, self.epochs = batch_size, epochs
        self.max_length, self.bucket = max_length, bucket
        sizes = {name: -(-len(texts) // batch_size) for name, texts in data.items()}
        self.names = tuple(sorted(data, key=lambda name: -sizes[name]))
        self._per_epoch = [sizes[name] for name in self.names]
        self.steps = None if epochs is None else [epochs * size for size in self._per_epoch]
        most = None if self.steps is None else self.steps[0]
        super().__init__(
            tasks=len(self.names),
            seed=seed,
            num_batches=most if num_batches is None else min(num_batches, most or num_batches),
            start=start,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )
        sample_episodes([0, 1], 0, 1, 1, 0, seed)  # checks the seed
        self.data = {name: data[name] for name in self.names}
        self.ways = [len(t.classes) for t in self.data.values()] if self.labelled else None
        self._tokens: list[PackedTokens] = []
        self._given: list[np.ndarray] = []  # of each text, how many tokens are its prompt's
        for name, texts in self.data.items():
            if self.labelled:
                self._tokens.append(tokenize(texts, tokenizer, max_length=max_length))
                continue
            try:
                tokens, given = tokenize_prompted(texts, tokenizer, max_length=max_length)
            except DataError as error:
                raise DataError(f"task {name!r}: {error}") from None
            if int(tokens.lengths.min()) < 2:
                text = texts[int(tokens.lengths.argmin())]
                raise DataError(
                    f"task {name!r}: a text of one token has no next word: {describe(text)}"
                )
            self._tokens.append(tokens)
            self._given.append(given)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each task's epoch

    def settings(self) -> dict[str, Any]:
        """Return what a batch depends on besides its number, as JSON values."""
        names = ("batch_size", "epochs", "seed", "max_length")
        digests = {}
        for task, (name, texts) in enumerate(self.data.items()):
            digest = self._tokens[task].digest
            if self.labelled:
                digests[name] = [digest, texts.digest]
            else:
                given = self._given[task]
                digests[name] = [crc32(given.tobytes(), digest) if given.any() else digest]
        return {name: getattr(self, name) for name in names} | {"data": digests}

    def _order(self, task: int, epoch: int) -> np.ndarray:
        """A task's texts in the order of an epoch."""
        kept = self._orders.get(task)
        if kept is None or kept[0] != epoch:
            count = len(self._tokens[task])
            name = self.names[task].encode("utf-8", "surrogatepass")
            seed = (self.seed + (crc32(name) << 32)) % 2**64
            _, order, _ = sample_episodes([0, count], 1, 1, count, 0, seed, epoch)
            kept = self._orders[task] = (epoch, order.reshape(-1))
        return kept[1]

    def _make(self, index: int) -> Minibatch:
        parts = []
        for task, size in enumerate(self._per_epoch):
            epoch, at = divmod(index, size)
            if self.epochs is not None and epoch >= self.epochs:
                break  # the others have fewer
            order = self._order(task, epoch)
            parts.append(self._rows(task, order[at * self.batch_size : (at + 1) * self.batch_size]))
        if not parts:
            raise IndexError(f"there is no batch {index}: expected 0 to {len(self) - 1}")
        inputs = stack_sets("batch", parts, self._tokens[0].pad_id)
        return Minibatch(self.names[: len(parts)], inputs)

    def _rows(self, task: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Texts of a task and their labels, ``[N, L]`` and ``[N]`` or ``[N, L]``."""
        found = self._tokens[task].rows(chosen, multiple=self.bucket)
        if self.labelled:
            labels = self.data[self.names[task]].labels[chosen]
        else:
            counted = found["attention_mask"] == 1
            counted &= np.arange(counted.shape[1]) >= self._given[task][chosen, None]
            labels = np.where(counted, found["input_ids"], IGNORE_INDEX)
        return {k: torch.from_numpy(v) for k, v in (found | {"labels": labels}).items()}


def _kind(data: Mapping[str, LabelledTexts | Sequence[str | Prompted]]) -> bool:
    """Whether tasks have labels; raises unless all are of one kind and have texts."""
    if not data:
        raise DataError("expected at least one task, got none")
    kinds = {isinstance(texts, LabelledTexts) for texts in data.values()}
    if len(kinds) > 1:
        raise TypeError("expected labelled texts of every task or of none, got both")
    for name, texts in data.items():
        if not isinstance(name, str):
            raise TypeError(f"expected names of tasks to be texts, got {name!r}")
        if isinstance(texts, LabelledTexts):
            if len(texts.classes) < 2:
                raise DataError(f"task {name!r}: expected 2 classes or more, got 1")
        elif isinstance(texts, str) or not all(map(_is_text, texts)):
            raise TypeError(
                f"task {name!r}: expected labelled texts, or a list of strings or of "
                "(prompt, completion)"
            )
        elif not len(texts):
            raise DataError(f"task {name!r}: expected at least one text, got none")
    return kinds.pop()


def _is_text(text: object) -> bool:
    """Whether it is a text, or a prompt and what is to follow it."""
    if isinstance(text, tuple | list):
        return len(text) == 2 and all(isinstance(t, str) for t in text)
    return isinstance(text, str)
