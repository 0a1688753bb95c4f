"""What dropout drops: a hash of a seed and of an element's place, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def mixed(word: Tensor) -> Tensor:
    """A hash of 32 bits (lowbias32: xor-shifts and two odd factors) in int64."""
    word = word & WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def dropped_words(p: float) -> int:
    """How many of the words from 0 mean that an element is dropped."""
    return min(int(p * 2**32), WORD)


def words(seed: Tensor, count: int) -> Tensor:
    """Words of `count` elements, int64 ``[count]``, a function of the seed and of their numbers."""
    i = torch.arange(count, device=seed.device)
    high = ((seed >> 32) & WORD) + (i >> 32) * 0x9E3779B9
    return mixed(mixed((seed & WORD) ^ (i & WORD)) + high)
