"""Tokenise once, keep the ids packed, pad only the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastmeta.data._errors import DataError
from fastmeta.data.texts import LabelledTexts

_CHUNK = 8192  # texts per tokenizer call: bounds the Python lists alive at once


class PackedTokens(NamedTuple):
    """Token ids of many texts end to end, without padding.

    Attributes:
        ids: int32 [total tokens].
        offsets: int64 [texts + 1]; text ``i`` owns ``ids[offsets[i]:offsets[i + 1]]``.
        types: token type ids, uint8 [total tokens], empty if all are zero; ``None`` where
            the tokenizer gives none.
        pad_id: the tokenizer's padding id.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text, int64 [texts]."""
        return np.diff(self.offsets)

    def rows(self, index: np.ndarray, *, multiple: int = 8) -> dict[str, np.ndarray]:
        """Gather texts into padded arrays.

        Args:
            index: which texts, integers of any shape ``[...]``.
            multiple: the width is the longest of them, rounded up to a multiple of this, so that
                shapes repeat from batch to batch.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the tokenizer gives them,
            ``token_type_ids``: int64 ``[..., L]``, padded on the right.
        """
        start = self.offsets[index]
        length = self.offsets[np.asarray(index) + 1] - start
        width = -(-int(length.max(initial=1)) // multiple) * multiple
        column = np.arange(width)
        mask = column < length[..., None]
        where = np.where(mask, start[..., None] + column, 0)
        out = {
            "input_ids": np.where(mask, self.ids[where], self.pad_id).astype(np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        if self.types is not None:
            types = self.types[where] if self.types.size else np.zeros_like(where)
            out["token_type_ids"] = np.where(mask, types, 0).astype(np.int64)
        return out


def tokenize(
    texts: LabelledTexts | Sequence[str], tokenizer: Any, *, max_length: int = 128
) -> PackedTokens:
    """Tokenise texts once; the ids of LabelledTexts are kept and returned again.

    Args:
        texts: LabelledTexts (cached per tokenizer and length) or strings (not cached).
        tokenizer: a Hugging Face tokenizer, with a padding token.
        max_length: longer texts are cut to this many tokens (to the tokenizer's own limit where
            that is smaller).

    Returns:
        PackedTokens, one entry per text.

    Raises:
        DataError: a text without a single token.
        ValueError: no padding token, or max_length < 1.
    """
    if max_length < 1:
        raise ValueError(f"expected max_length >= 1, got {max_length}")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "expected a tokenizer with a padding token, got none: set tokenizer.pad_token "
            "(for example to tokenizer.eos_token) and the model's config.pad_token_id"
        )
    max_length = min(max_length, tokenizer.model_max_length)
    if not isinstance(texts, LabelledTexts):
        return _pack(list(texts), tokenizer, max_length)
    cache = texts._tokens.setdefault(tokenizer, {})
    key = (max_length, len(tokenizer), tokenizer.pad_token_id)  # len grows with added tokens
    if key not in cache:
        cache[key] = _pack(texts.texts, tokenizer, max_length)
    return cache[key]


def _pack(texts: Sequence[str], tokenizer: Any, max_length: int) -> PackedTokens:
    ids, types, lengths = [np.zeros(0, np.int32)], [], []
    for begin in range(0, len(texts), _CHUNK):
        chunk = list(texts[begin : begin + _CHUNK])
        out = tokenizer(chunk, truncation=True, max_length=max_length, return_attention_mask=False)
        lengths += [len(row) for row in out["input_ids"]]
        ids.append(_join(out["input_ids"], np.int32))
        if "token_type_ids" in out:
            types.append(_join(out["token_type_ids"], np.uint8))
    for i, length in enumerate(lengths):
        if length == 0:
            raise DataError(f"expected every text to have a token, got none for {texts[i]!r}")
    packed_types = np.concatenate(types) if types else None
    if packed_types is not None and not packed_types.any():
        packed_types = packed_types[:0]  # one sentence per text: nothing to store
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return PackedTokens(np.concatenate(ids), offsets, packed_types, int(tokenizer.pad_token_id))


def _join(rows: list[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter((t for row in rows for t in row), dtype, sum(map(len, rows)))
