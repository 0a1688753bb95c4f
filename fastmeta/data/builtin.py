"""A small intent data set that the project writes itself: no download, the same everywhere.

An intent is an action on an object ("cancel" x "alarm"), both said in one of several ways, in a
sentence frame with small talk around it. Every action and every object occurs in training; the
valid and test intents are *new combinations* of them. So the words of a test intent are known, the
intent is not, and what carries over is which words mean the same and which words do not matter.
"""

from __future__ import annotations

from functools import cache
from random import Random

from fastmeta._names import near
from fastmeta.data import _builtin_words as words
from fastmeta.data.benchmarks import PARTS
from fastmeta.data.texts import LabelledTexts

EXAMPLES = 60
"""Utterances per intent."""

MAX_WORDS = 14
"""Words of an utterance at most: 16 tokens with [CLS] and [SEP]."""

# Of every five intents of an object three are for training; the other two are all valid or all
# test, so that episodes on unseen intents often hold two actions on the same object.
_TRAIN_INTENTS = 3


def builtin(part: str | None = "train") -> LabelledTexts:
    """Generate the built-in data set: 120 intents ``domain/action_object``, 60 utterances each.

    Args:
        part: ``"train"`` (72 intents), ``"valid"`` (24) or ``"test"`` (24), disjoint; ``None``: all

    Raises:
        ValueError: another part.
    """
    if part is not None and part not in PARTS:
        raise ValueError(
            f"expected part to be one of {PARTS} or None, got {part!r}{near(part, PARTS)}"
        )
    return (
        _generate()
        if part is None
        else _generate().restrict(
            [f"{d}/{a}_{o}" for d, a, o, p in _intents() if p == part], name=f"builtin {part}"
        )
    )


def builtin_tasks() -> dict[str, LabelledTexts]:
    """Generate the built-in data set as whole tasks: domain -> its own 10 or 15 intents."""
    data = _generate()
    return {
        d: data.restrict([c for c in data.classes if c.split("/")[0] == d], name=d)
        for d in words.OBJECTS
    }


def vocabulary() -> list[str]:
    """Return every word of the built-in data set, sorted."""
    return sorted({w for text in _generate().texts for w in text.split()})


@cache
def _intents() -> tuple[tuple[str, str, str, str], ...]:
    """Return ``(domain, action, object, part)`` of every intent."""
    actions = list(words.ACTIONS)
    intents = []
    number = 0
    for domain, objects in words.OBJECTS.items():
        for thing in objects:
            # A step of 3 through the 10 actions gives every object another set of five.
            chosen = [actions[(number + 3 * j) % len(actions)] for j in range(5)]
            held_out = PARTS[1 + number % 2]
            for j, action in enumerate(chosen):
                part = PARTS[0] if j < _TRAIN_INTENTS else held_out
                intents.append((domain, action, thing, part))
            number += 1
    return tuple(intents)


@cache
def _generate() -> LabelledTexts:
    texts, labels = [], []
    for domain, action, thing, _ in _intents():
        name = f"{domain}/{action}_{thing}"
        random = Random(f"fastmeta builtin {name}")
        utterances: dict[str, None] = {}  # distinct, in order
        while len(utterances) < EXAMPLES:
            text = _utter(random, words.ACTIONS[action], words.OBJECTS[domain][thing])
            if len(text.split()) <= MAX_WORDS:
                utterances[text] = None
        texts += utterances
        labels += [name] * EXAMPLES
    return LabelledTexts(texts, labels, name="builtin")


def _utter(random: Random, verbs: tuple[str, ...], things: tuple[str, ...]) -> str:
    sentence = random.choice(words.FRAMES).format(
        verb=random.choice(verbs),
        thing=f"{random.choice(words.DETERMINERS)} {random.choice(things)}",
        context=random.choice(words.CONTEXTS),
    )
    if random.random() < 0.5:
        sentence = f"{random.choice(words.BEFORE)} {sentence}"
    else:
        sentence = f"{sentence} {random.choice(words.AFTER)}"
    return " ".join(sentence.split())
