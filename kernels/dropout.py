"""Triton kernel of dropout by a seed, ``fastmeta.ops.dropout``: its mask is never stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.kernels._common import accumulator, ceil_div, dropped_words, empty_like, launch, mixed

_BLOCK = 1024


@triton.jit
def dropout_kernel(
    x, seed_at, to, N, period, dropped,
    factor: tl.constexpr, REPEATS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    number, seed = at % period if REPEATS else at, tl.load(seed_at)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    high += (number >> 32).to(tl.uint32) * 0x9E3779B9
    word = mixed(mixed(low ^ number.to(tl.uint32)) + high)
    y = tl.load(x + at, mask=inside, other=0).to(ACC) * factor
    tl.store(to + at, tl.where(word.to(tl.int64) >= dropped, y, 0), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float, period: int) -> Tensor:
    to = empty_like(x)
    launch(
        dropout_kernel, ceil_div(x.numel(), _BLOCK),
        x, seed, to, x.numel(), period, dropped_words(p),
        factor=1 / (1 - p), REPEATS=period < x.numel(), ACC=accumulator(x), BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return to
