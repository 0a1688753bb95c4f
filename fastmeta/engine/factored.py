"""Statistics of each adapted tensor of the packed buffer: means, and factored second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.patching import ParamLayout


def by_segment(values: Tensor, layout: ParamLayout) -> Tensor:
    """Mean over each tensor's entries: ``[T, P, F]`` to ``[T, S, F]``; padding does not count."""
    pieces = values.split(layout.split_sizes, dim=1)[::2]
    return torch.stack([p.mean(1) for p in pieces], dim=1)


def spread(values: Tensor, layout: ParamLayout) -> Tensor:
    """Each tensor's number at its entries and the padding after: ``[T, S, F]`` to ``[T, P, F]``."""
    if values.shape[1] != len(layout):  # one for all, or of every entry already
        return values
    ends = (*layout.offsets[1:], layout.num_params)
    sizes = [end - start for start, end in zip(layout.offsets, ends, strict=True)]
    columns = [values[:, s : s + 1].expand(-1, size, -1) for s, size in enumerate(sizes)]
    return torch.cat(columns, dim=1)


class SecondMoments:
    """Running means of squares over rows and columns of every matrix, as in Adafactor.

    A tensor ``[R, ...]`` is a matrix of R rows; one with a single axis is its own column.

    Source: Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235
    """

    def __init__(self, layout: ParamLayout) -> None:
        self.layout = layout
        self.shapes = [
            (shape[0], numel // max(shape[0], 1)) if shape else (1, 1)
            for shape, numel in zip(layout.shapes, layout.numels, strict=True)
        ]

    def init(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros ``[T, rows of all matrices]`` and ``[T, their columns]``."""
        return tuple(
            params.new_zeros(params.shape[0], sum(shape[axis] for shape in self.shapes))
            for axis in (0, 1)
        )

    def update(self, state, squares: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The means after squares ``[T, P]``."""
        matrices = [
            v.reshape(-1, *shape)
            for v, shape in zip(self.layout.unpack(squares), self.shapes, strict=True)
        ]
        means = (torch.cat([m.mean(axis) for m in matrices], dim=1) for axis in (2, 1))
        return tuple(beta * old + (1 - beta) * new for old, new in zip(state, means, strict=True))

    def of(self, state) -> Tensor:
        """The second moments that the means stand for, ``[T, P]``: ``row column / mean``."""
        rows, columns = (
            s.split([shape[axis] for shape in self.shapes], dim=1) for axis, s in enumerate(state)
        )
        found = []
        for r, c, shape in zip(rows, columns, self.layout.shapes, strict=True):
            mean = r.mean(1).clamp_min(torch.finfo(r.dtype).tiny)
            whole = r.unsqueeze(2) * (c / mean.unsqueeze(1)).unsqueeze(1)
            found.append(whole.reshape(-1, *shape))
        return self.layout.pack(found)
