"""Texts for a language model: a prompt, which is given, and what is to follow it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastmeta.data._errors import DataError
from fastmeta.data.readers import field, read_objects
from fastmeta.data.texts import describe, held_out
from fastmeta.data.tokens import PackedTokens, checked_length, encode, packed, tokenize

Prompted = tuple[str, str]
"""A prompt and what is to follow it."""


def prompts_from_jsonl(
    path: str | PathLike,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    text: str = "text",
) -> list[str | Prompted]:
    """Read a file of JSON lines, in each an object with a prompt and what follows, or with a text.

    Args:
        path: the file, UTF-8; blank lines are skipped.
        prompt: key of the prompt, which is given and not learned; may be empty.
        completion: key of what is to follow it.
        text: key of a text all of whose words are learned, in lines with neither.

    Returns:
        ``(prompt, completion)`` or the text of every line, as `Minibatches` takes them.

    Raises:
        DataError: an unreadable or empty file, or a line that is no such object; names file and
            line.
    """
    path = Path(path)
    found: list[str | Prompted] = []
    for where, row in read_objects(path):
        if text in row and prompt not in row and completion not in row:
            found.append(field(row, text, (str,), where))
            continue
        given, following = (field(row, k, (str,), where, blank=True) for k in (prompt, completion))
        found.append((given, following))
    if not found:
        raise DataError(f"{path}: expected lines of JSON, got an empty file")
    return found


def hold_out(
    texts: Sequence[str | Prompted], share: float, *, seed: int = 0
) -> tuple[list[str | Prompted], list[str | Prompted]]:
    """Take texts away at random, to judge by; see `LabelledTexts.hold_out`.

    Returns:
        The other texts, and those taken.
    """
    distinct = [t if isinstance(t, str) else tuple(t) for t in texts]
    taken = held_out(distinct, [range(len(texts))], share, seed)
    parts = ([], [])
    for i, text in enumerate(texts):
        parts[i in taken].append(text)
    return parts


def tokenize_prompted(
    texts: Sequence[str | Prompted], tokenizer: Any, *, max_length: int = 128
) -> tuple[PackedTokens, np.ndarray]:
    """Tokenise texts whose prompts are given.

    A prompt's tokens are those that a tokenizer makes of it alone, as when a model is asked to go
    on, without what the tokenizer adds at the end; those of what follows, and an end token, come
    after them.

    Args:
        texts: ``(prompt, completion)``, or texts alone, which have no prompt and get no end token
            but the tokenizer's own.
        tokenizer: as for `tokenize`.
        max_length: longer texts are cut to this many tokens; a warning says how many lose an end
            that a model is to learn.

    Returns:
        One entry per text, and how many of its tokens are its prompt's, int64 ``[texts]``.

    Raises:
        DataError: a text without a token, a prompt that leaves no room for what follows it.
    """
    max_length = checked_length(tokenizer, max_length)
    pairs = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    given = np.zeros(len(texts), np.int64)
    if not pairs:
        tokens = tokenize(texts, tokenizer, max_length=max_length)
        full = np.flatnonzero(tokens.lengths == max_length)
        _warn_of_cut(_longer([texts[i] for i in full], tokenizer, max_length), texts, max_length)
        return tokens, given
    alone = [i for i, text in enumerate(texts) if isinstance(text, str)]
    whole, _ = encode([texts[i] for i in alone], tokenizer, max_length)
    full = [i for i, row in zip(alone, whole, strict=True) if len(row) == max_length]
    cut = _longer([texts[i] for i in full], tokenizer, max_length)
    prompts, types = encode([texts[i][0] for i in pairs], tokenizer)
    after, _ = encode([texts[i][1] for i in pairs], tokenizer, add_special_tokens=False)
    rows = dict(zip(alone, whole, strict=True))
    end = tokenizer.eos_token_id
    end = tokenizer.sep_token_id if end is None else end
    last = [] if end is None else [end]
    added = _added_after(tokenizer)
    for i, prompt, following in zip(pairs, prompts, after, strict=True):
        prompt = prompt[: len(prompt) - added]
        if not following:
            raise DataError(f"expected what follows a prompt to have a token: {describe(texts[i])}")
        if len(prompt) >= max_length:
            raise DataError(
                f"a prompt of {len(prompt)} tokens leaves no room for what follows it "
                f"(max_length={max_length}): {describe(texts[i])}"
            )
        whole_row = prompt + following + last
        cut += len(whole_row) > max_length
        rows[i] = whole_row[:max_length]
        given[i] = len(prompt)
    _warn_of_cut(cut, texts, max_length)
    ordered = [rows[i] for i in range(len(texts))]
    return packed(ordered, None if types is None else [], tokenizer, max_length), given


def _longer(texts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many texts have more tokens than that."""
    return sum(len(row) > max_length for row in encode(texts, tokenizer, max_length + 1)[0])


def _warn_of_cut(cut: int, texts: Sequence[Any], max_length: int) -> None:
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} texts are longer than max_length={max_length} and lose their "
            "ends, of which nothing is learned",
            stacklevel=4,
        )


def _added_after(tokenizer: Any) -> int:
    """How many tokens a tokenizer adds at the end of a text."""
    (whole,), _ = encode(["a"], tokenizer)
    (bare,), _ = encode(["a"], tokenizer, add_special_tokens=False)
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return len(whole) - first - len(bare)
    return 0
