"""Cross-entropy of a linear layer's logits on a GPU, ``fastmeta.ops.linear_cross_entropy``.

Products by cuBLAS, of as many rows at a time as a bounded buffer holds; the kernels of
``cross_entropy`` do the rest. A kernel that builds logits in registers has smaller products, and
reads the words once for every few rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_double_backward,
)

_BYTES = 128 << 20
"""Of a chunk's logits."""


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(_BYTES // (len(weight) * x.element_size()) // 64 * 64, 64)
    for first in range(0, len(x), rows):
        yield slice(first, min(first + rows, len(x)))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.mT) if bias is None else torch.addmm(bias, x, weight.mT)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignored: int,
    wanted: bool,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, stats = (
        x.new_empty(*shape, dtype=wide_dtype(x.dtype)) for shape in ((len(x),), (len(x), 2))
    )
    slopes = torch.empty_like(x) if wanted else x.new_empty(0)
    one = torch.ones_like(losses)
    for some in _chunks(x, weight):
        logits, own = _logits(x[some], weight, bias), labels[some]
        losses[some], stats[some] = cross_entropy(logits, own, ignored)
        if wanted:
            rest = cross_entropy_backward(one[some], logits, own, stats[some])
            torch.mm(rest, weight, out=slopes[some])
    return losses, stats, slopes


def linear_cross_entropy_double_backward(
    v: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    stats: Tensor,
    slopes: Tensor,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    dg, dx = torch.empty_like(g), torch.empty_like(x)
    for some in _chunks(x, weight):
        logits, cotangents = _logits(x[some], weight, bias), torch.mm(v[some], weight.mT)
        dg[some], rest = cross_entropy_double_backward(
            cotangents, g[some], logits, labels[some], stats[some]
        )
        torch.mm(rest, weight, out=dx[some])
    return dg, dx
