"""Products of batches of matrices, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_mm(a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
    """``a b + base``: ``[T, M, K]`` by ``[T, K, N]``; base ``[T or 1, M or 1, N]`` or None."""
    return torch.bmm(a, b) if base is None else torch.baddbmm(base, a, b)


def batched_mms_(
    to: list[Tensor], a: list[Tensor], b: list[Tensor], bases: list[Tensor], which: list[int]
) -> None:
    """Products one after the other, written to ``to_i [T, M, N]``: ``a_i b_i``, plus
    ``bases[which_i]``; plus what `to_i` held where ``which_i`` is -1, plus nothing where it is -2.
    """
    for i, out in enumerate(to):
        if which[i] == -2:
            torch.bmm(a[i], b[i], out=out)
        else:
            base = out if which[i] == -1 else bases[which[i]]
            torch.baddbmm(base, a[i], b[i], out=out)
