"""Tokenise once, keep the ids packed, pad only the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from fastmeta.data._errors import DataError
from fastmeta.data.texts import LabelledTexts

_CHUNK = 8192  # texts per tokenizer call: its encodings are larger than the ids


class PackedTokens(NamedTuple):
    """Token ids of many texts end to end, without padding.

    Attributes:
        ids: int32 [total tokens].
        offsets: int64 [texts + 1]; text ``i`` owns ``ids[offsets[i]:offsets[i + 1]]``.
        types: token type ids, uint8 [total tokens], empty if all are zero; ``None`` where
            the tokenizer gives none.
        pad_id: the tokenizer's padding id.
        max_length: rows are padded to no more tokens than this; ``None`` for no bound.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None
    pad_id: int
    max_length: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text, int64 [texts]."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> int:
        """Changes with the ids of any text."""
        return crc32(self.offsets.tobytes(), crc32(self.ids.tobytes()))

    def rows(self, index: np.ndarray, *, multiple: int = 8) -> dict[str, np.ndarray]:
        """Gather texts into padded arrays.

        Args:
            index: which texts, integers of any shape ``[...]``.
            multiple: the width is the longest of them, rounded up to a multiple of this, so that
                shapes repeat from batch to batch, but not beyond ``max_length``.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the tokenizer gives them,
            ``token_type_ids``: int64 ``[..., L]``, padded on the right.
        """
        start = self.offsets[index]
        length = self.offsets[np.asarray(index) + 1] - start
        longest = int(length.max(initial=1))
        width = -(-longest // multiple) * multiple
        if self.max_length is not None:
            width = max(longest, min(width, self.max_length))
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
    max_length = checked_length(tokenizer, max_length)
    if not isinstance(texts, LabelledTexts):
        return _pack(list(texts), tokenizer, max_length)
    cache = texts._tokens.setdefault(tokenizer, {})
    key = (max_length, *_settings(tokenizer))
    if key not in cache:
        cache[key] = _pack(texts.texts, tokenizer, max_length)
    return cache[key]


_SETTINGS = (
    "pad_token_id cls_token_id sep_token_id bos_token_id eos_token_id truncation_side "
    "add_bos_token add_eos_token added_tokens_decoder"
).split()


def _settings(tokenizer: Any) -> tuple[str | int, ...]:
    """What may change in a tokenizer and with it the ids of a text."""
    found = (repr(getattr(tokenizer, name, None)) for name in _SETTINGS)
    return len(tokenizer), *found  # the length grows with added tokens


def checked_length(tokenizer: Any, max_length: int) -> int:
    """The tokens at which longer texts are cut.

    Raises:
        ValueError: no padding token, or max_length < 1.
    """
    if max_length < 1:
        raise ValueError(f"expected max_length >= 1, got {max_length}")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "expected a tokenizer with a padding token, got none: set tokenizer.pad_token "
            "(for example to tokenizer.eos_token) and the model's config.pad_token_id"
        )
    return min(max_length, tokenizer.model_max_length)


def _pack(texts: Sequence[str], tokenizer: Any, max_length: int) -> PackedTokens:
    ids, types = encode(texts, tokenizer, max_length)
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise DataError(f"expected every text to have a token, got none for {text!r}")
    return packed(ids, types, tokenizer, max_length)


def encode(
    texts: Sequence[str], tokenizer: Any, max_length: int | None = None, **settings: Any
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of every text, cut to `max_length`, and, where the tokenizer gives them, token
    types."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    settings |= {"return_attention_mask": False, "verbose": False}
    settings |= {} if max_length is None else {"truncation": True, "max_length": max_length}
    for begin in range(0, len(texts), _CHUNK):
        out = tokenizer(list(texts[begin : begin + _CHUNK]), **settings)
        ids += out["input_ids"]
        types += out.get("token_type_ids", ())
    return ids, types if types or not ids else None


def packed(
    ids: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None,
    tokenizer: Any,
    max_length: int,
) -> PackedTokens:
    """Rows of token ids end to end, none longer than `max_length`."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    packed_types = None if types is None else _join(types, np.uint8)
    if packed_types is not None and not packed_types.any():
        packed_types = packed_types[:0]  # one sentence per text: nothing to store
    pad_id = int(tokenizer.pad_token_id)
    return PackedTokens(_join(ids, np.int32), offsets, packed_types, pad_id, max_length)


def _join(rows: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
    return np.fromiter((t for row in rows for t in row), dtype, sum(map(len, rows)))
