"""Products of batches of matrices, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_mm(a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
    """``a b + base``: ``[T, M, K]`` by ``[T, K, N]``; base ``[T or 1, M or 1, N]`` or None."""
    return torch.bmm(a, b) if base is None else torch.baddbmm(base, a, b)


def batched_mm_(to: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """The product written over `to` ``[T, M, N]``, or added to it."""
    if accumulate:
        to.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=to)


def batched_mms_(
    to: list[Tensor], a: list[Tensor], b: list[Tensor], bases: list[Tensor], which: list[int]
) -> None:
    """Products one after the other: ``to_i = a_i b_i``, plus ``bases[which_i]``, or plus what
    `to_i` held where ``which_i`` is -1; nothing where it is less."""
    for i, out in enumerate(to):
        if which[i] >= 0:
            torch.baddbmm(bases[which[i]], a[i], b[i], out=out)
        else:
            batched_mm_(out, a[i], b[i], which[i] == -1)
