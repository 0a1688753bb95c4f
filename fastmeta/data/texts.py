"""Labelled texts held in memory, grouped by class: what every episode is drawn from."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from random import Random
from weakref import WeakKeyDictionary

import numpy as np

from fastmeta._names import near
from fastmeta.data._errors import DataError


class LabelledTexts:
    """Texts and their classes, stored class by class and never changed.

    Class ``c`` owns the examples ``starts[c] .. starts[c + 1] - 1``, in the order they were given.

    Args:
        texts: the texts, strings.
        labels: one label per text: class names, or integers. With ``classes`` given, integers are
            indices into it (as in Hugging Face's ``ClassLabel``).
        classes: names of the classes in the order they are numbered; default: the labels that
            occur, sorted. Classes without an example are left out.
        name: what error messages call this data.

    Attributes:
        texts: tuple of the texts, grouped by class.
        classes: tuple of class names; a class's index is its position.
        starts: int64 array [classes + 1], where each class's examples start.

    Raises:
        DataError: no text, unequal lengths, a text that is no string, a label of another type or
            outside ``classes``, a class named twice.
    """

    def __init__(
        self,
        texts: Iterable[str],
        labels: Iterable[str | int],
        *,
        classes: Sequence[str] | None = None,
        name: str = "data",
    ) -> None:
        texts = list(texts)
        labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        if len(texts) != len(labels):
            raise DataError(
                f"{name}: expected one label per text, got {len(texts)} texts and "
                f"{len(labels)} labels"
            )
        if not texts:
            raise DataError(f"{name}: expected at least one labelled text, got none")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name}: expected text {i} to be a string, got {describe(text)}")
        numbers, names = _number(labels, classes, name)
        order = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers, minlength=len(names))
        self.name = name
        self.texts = tuple(texts[i] for i in order.tolist())
        self.classes = tuple(n for n, count in zip(names, counts, strict=True) if count)
        self.starts = np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int64)
        self._tokens: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> {key: PackedTokens}

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, str]:
        """Return example ``index`` as ``(text, class name)``."""
        index = range(len(self))[index]
        return self.texts[index], self.classes[int(self.labels[index])]

    def __repr__(self) -> str:
        return f"LabelledTexts({self.name!r}, {len(self)} texts, {len(self.classes)} classes)"

    def __getstate__(self) -> dict:
        # Token caches hang on tokenizer objects of this process; a copy makes its own.
        state = {k: v for k, v in self.__dict__.items() if k != "_tokens"}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _tokens=WeakKeyDictionary())

    @cached_property
    def labels(self) -> np.ndarray:
        """Class index of every text, int64 [len(self)]."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any text, class or their order."""
        sha = hashlib.sha256()
        for part in (*self.texts, *self.classes, *map(str, self.starts.tolist())):
            sha.update(part.encode("utf-8", "surrogatepass") + b"\0")
        return sha.hexdigest()[:16]

    @cached_property
    def repeats(self) -> int:
        """Number of texts that repeat an earlier one of their class."""
        return len(self) - sum(len(set(self.texts_of(name))) for name in self.classes)

    @property
    def counts(self) -> dict[str, int]:
        """Number of texts of each class."""
        return dict(zip(self.classes, np.diff(self.starts).tolist(), strict=True))

    def texts_of(self, name: str) -> tuple[str, ...]:
        """Return the texts of one class."""
        c = self._index([name])[0]
        return self.texts[self.starts[c] : self.starts[c + 1]]

    def restrict(self, classes: Iterable[str], *, name: str | None = None) -> LabelledTexts:
        """Return the texts of some classes only, the classes numbered in the order given.

        Args:
            classes: class names, each of them present and named once.
            name: name of the result; default: this data's name.

        Raises:
            DataError: a class that does not occur (with near matches), or is named twice, or none.
        """
        chosen = self._index(classes)
        if not chosen:
            raise DataError(f"{self.name}: expected at least one class to keep, got none")
        texts = [t for c in chosen for t in self.texts[self.starts[c] : self.starts[c + 1]]]
        sizes = np.diff(self.starts)[chosen]
        return LabelledTexts(
            texts,
            np.repeat(np.arange(len(chosen)), sizes),
            classes=[self.classes[c] for c in chosen],
            name=name or self.name,
        )

    def split(self, *fractions: float, seed: int = 0) -> tuple[LabelledTexts, ...]:
        """Split the classes at random into disjoint parts (meta-train, meta-valid, meta-test).

        Args:
            fractions: share of the classes of each part, each > 0, sum at most 1.
            seed: the same seed gives the same split.

        Returns:
            One LabelledTexts per fraction, no class in two of them.

        Raises:
            ValueError: a fraction outside (0, 1], a sum over 1, or a part left without a class.
        """
        if not fractions or any(not 0 < f <= 1 for f in fractions) or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"expected fractions in (0, 1] of sum at most 1, got {fractions}")
        order = sorted(self.classes)
        Random(f"split {seed}").shuffle(order)
        ends = [round(sum(fractions[: i + 1]) * len(order)) for i in range(len(fractions))]
        parts = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if not all(parts):
            raise ValueError(
                f"expected every part to get a class, got fractions {fractions} of "
                f"{len(order)} classes"
            )
        return tuple(self.restrict(sorted(p)) for p in parts)

    def hold_out(
        self, share: float, *, seed: int = 0
    ) -> tuple[LabelledTexts, list[tuple[str, str]]]:
        """Take texts of every class away at random, to judge by what was not trained on.

        Copies of a text within a class stay together.

        Args:
            share: of each class's different texts, at least 0 and below 1, rounded down; a class
                keeps one.
            seed: the same seed takes the same texts.

        Returns:
            The other texts, with all classes, and those taken as ``(text, class name)``.

        Raises:
            ValueError: a share out of its range.
        """
        taken = held_out(self.texts, map(range, self.starts, self.starts[1:]), share, seed)
        left = [i for i in range(len(self)) if i not in taken]
        kept = LabelledTexts(
            [self.texts[i] for i in left],
            self.labels[left],
            classes=self.classes,
            name=self.name,
        )
        return kept, [self[i] for i in sorted(taken)]

    def _index(self, names: Iterable[str]) -> list[int]:
        names = [names] if isinstance(names, str) else list(names)
        position = {n: i for i, n in enumerate(self.classes)}
        for i, n in enumerate(names):
            if n not in position:
                raise DataError(f"{self.name}: no class {n!r}{near(n, self.classes)}")
            if n in names[:i]:
                raise DataError(f"{self.name}: class {n!r} is named twice")
        return [position[n] for n in names]


def held_out(
    texts: Sequence[Hashable], groups: Iterable[Sequence[int]], share: float, seed: int
) -> set[int]:
    """A share of every group's different texts at random, rounded down, with all their copies.

    Raises:
        ValueError: a share that is not at least 0 and below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a share of at least 0 and below 1, got {share}")
    random, taken = Random(f"hold out {seed}"), set()
    for group in groups:
        copies: dict[Hashable, list[int]] = {}
        for i in group:
            copies.setdefault(texts[i], []).append(i)
        # 0.29 * 100 is a little less than 29 in floating point
        count = min(int(share * len(copies) + 1e-9), len(copies) - 1)
        for text in random.sample(list(copies), max(count, 0)):
            taken.update(copies[text])
    return taken


def from_lists(
    texts: Iterable[str],
    labels: Iterable[str | int],
    *,
    classes: Sequence[str] | None = None,
    name: str = "lists",
) -> LabelledTexts:
    """Make LabelledTexts from Python lists (or any sequences, arrays or tensors of labels).

    Args:
        texts: the texts.
        labels: class names, or integers (indices into ``classes`` where that is given).
        classes: class names in the order they are numbered; default: the sorted labels.
        name: what error messages call this data.

    Raises:
        DataError: see LabelledTexts.
    """
    return LabelledTexts(texts, labels, classes=classes, name=name)


def merge(parts: Mapping[str, LabelledTexts], *, name: str = "merged") -> LabelledTexts:
    """Join several data sets into one; a class ``c`` of part ``p`` becomes ``p/c``.

    Args:
        parts: name -> data.
        name: name of the result.

    Raises:
        DataError: no part given, or two classes of one name.
    """
    names: set[str] = set()
    for part, data in parts.items():
        for whole in (f"{part}/{c}" for c in data.classes):
            if whole in names:
                raise DataError(f"{name}: two classes would be called {whole!r}; rename a part")
            names.add(whole)
    texts = [t for data in parts.values() for t in data.texts]
    labels = [f"{p}/{data.classes[c]}" for p, data in parts.items() for c in data.labels]
    return LabelledTexts(texts, labels, name=name)


def describe(value: object) -> str:
    """Describe a wrong value in a few words, for error messages."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _number(labels: list, classes: Sequence[str] | None, name: str) -> tuple[np.ndarray, list[str]]:
    """Return each label's class index and the class names."""
    values: list[str | int] = []
    for i, label in enumerate(labels):
        if isinstance(label, str):
            values.append(label)
            continue
        try:
            if isinstance(label, bool):
                raise TypeError
            values.append(operator.index(label))
        except TypeError:
            raise DataError(
                f"{name}: expected label {i} to be a string or an integer, got {describe(label)}"
            ) from None
    if classes is None:
        plain = all(isinstance(v, int) for v in values)
        known: list = sorted(set(values) if plain else {str(v) for v in values})
        position = {str(k): i for i, k in enumerate(known)}
        return np.array([position[str(v)] for v in values], dtype=np.int64), [str(k) for k in known]
    names = [str(c) for c in classes]
    position = {n: i for i, n in enumerate(names)}
    if len(position) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise DataError(f"{name}: class {twice!r} is named twice")
    numbers = []
    for i, value in enumerate(values):
        number = value if isinstance(value, int) else position.get(value, -1)
        if not 0 <= number < len(names):
            raise DataError(
                f"{name}: label {i} is {value!r}, expected one of the {len(names)} classes"
                f"{near(value, names)}"
            )
        numbers.append(number)
    return np.array(numbers, dtype=np.int64), names
