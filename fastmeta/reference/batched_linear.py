"""Products of batches of matrices, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_mm(a: Tensor, b: Tensor, base: Tensor | None, bf16: bool = False) -> Tensor:
    """``a b + base``: ``[T, M, K]`` by ``[T, K, N]``; base ``[T or 1, M or 1, N]`` or None. Where
    `bf16`, the factors are rounded to bfloat16 first."""
    if bf16:
        a, b = rounded(a), rounded(b)
    return torch.bmm(a, b) if base is None else torch.baddbmm(base, a, b)


def batched_mms_(
    to: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    bases: list[Tensor],
    which: list[int],
    bf16: list[int],
) -> None:
    """Products one after the other, written to ``to_i [T, M, N]``: ``a_i b_i``, plus
    ``bases[which_i]``; plus what `to_i` held where ``which_i`` is -1, plus nothing where it is -2.
    A result ``[1, M, N]`` is the sum over tasks. Where ``bf16_i`` is not 0, factors are rounded to
    bfloat16 first.
    """
    for i, out in enumerate(to):
        left, right = (rounded(a[i]), rounded(b[i])) if bf16[i] else (a[i], b[i])
        if len(out) < len(left):
            left, right = left.transpose(0, 1).flatten(1).unsqueeze(0), right.flatten(0, 1)[None]
        if which[i] == -2:
            torch.bmm(left, right, out=out)
        else:
            base = out if which[i] == -1 else bases[which[i]]
            torch.baddbmm(base, left, right, out=out)


def rounded(x: Tensor) -> Tensor:
    """The nearest numbers of bfloat16, in the dtype of x; derivatives are those of x itself."""
    return x + (x.bfloat16().to(x.dtype) - x).detach()
