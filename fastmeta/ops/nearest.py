"""The nearest rows: fused distances and selection, streaming over the candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import needs_autograd, outside_autocast
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta._settings import is_integer
from fastmeta.ops import _pairwise
from fastmeta.ops.pairwise import (
    as_pairs,
    as_sums,
    check_metric,
    check_precision,
    distances,
    rooted,
)
from fastmeta.reference import pairwise as reference
from fastmeta.reference.pairwise import PRODUCT, SQUARES

TILE = 1024  # rows and columns of distances worked on at once: 4 MiB in float32, for a cache
_ON_GPU = 4  # times as many on a GPU, which would wait for launches


def _select_reference(values, indices, sums, offset, alpha, first):
    found = alpha * sums if offset is None else alpha * sums + offset
    order = torch.arange(first, first + sums.shape[1], device=sums.device).expand(sums.shape)
    both = torch.cat([values, found], 1)
    names = torch.cat([indices, order], 1)
    best = both.sort(dim=1, stable=True).indices[:, : values.shape[1]]
    values.copy_(both.gather(1, best))
    indices.copy_(names.gather(1, best))


# keeps in values, indices [n, k] the smallest of themselves and of alpha sums + offset [n, m],
# whose columns are named first, first + 1, ...; rising, earlier ones first among equals, NaN never
_SELECT = define(
    "nearest_select_(Tensor(a!) values, Tensor(b!) indices, Tensor sums, Tensor? offset, "
    "float alpha, int first) -> ()",
    _select_reference,
)


@outside_autocast
def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    metric: str = "sqeuclidean",
    *,
    p: float | None = None,
    precision: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of y nearest to each row of x, without the matrix of all distances.

    ``values[n, i]`` is the i-th smallest of ``d(x_n, y_m)`` over m, ``indices[n, i]`` its m.

    Args:
        x: ``[..., N, D]``, float32, float64, bfloat16 or float16 (computed in float32).
        y: ``[..., M, D]`` of the same dtype and device; leading axes broadcast.
        k: 1 to M. Default 1.
        metric: A metric of `pairwise_distance`. Default ``"sqeuclidean"``.
        p, precision: As for `pairwise_distance`.

    Returns:
        ``(values [..., N, k], indices int64 [..., N, k])``, in rising order; of equally near rows
        the one with the lower index comes first. Candidates come from matrix products, are compared
        by their distances evaluated as differences, and accepted where rounding cannot have hidden
        another; else the row is searched again with differences. A NaN distance is farther than
        any other.

    Raises:
        ValueError: as `pairwise_distance`; k out of range.

    Note:
        Values are differentiable in x, y and precision as `pairwise_distance` is (the indices held
        fixed). Two runs give equal bits.
    """
    op = "nearest"
    x, y, batch, dtype = as_pairs(op, x, y)
    metric, p = check_metric(op, metric, p, precision)
    if precision is not None:
        precision = check_precision(op, precision, x, batch)
    rows = y.shape[1]
    if not is_integer(k) or not 1 <= k <= rows:
        raise ValueError(f"{op}: k must be an integer in 1..M = {rows}, got {k!r}")
    if by_reference(_SELECT, x.device) or x.shape[0] * x.shape[1] * rows <= TILE * TILE // 4:
        values, indices = reference.nearest(distances(x, y, metric, p, precision), k)
    else:
        indices, values = _search(x, y, k, metric, p, precision)
        if values is None or needs_autograd(x, y, precision):
            values = _distances_to(x, y, indices, metric, p, precision)
    shape = (*batch, x.shape[1], k)
    return values.to(dtype).reshape(shape), indices.reshape(shape)


def _distances_to(x, y, indices, metric, p, precision) -> Tensor:
    """Distances of each row to the rows it chose, ``[B, N, k]``, differentiable."""
    batch, rows, k = indices.shape
    width = x.shape[2]
    at = torch.arange(batch, device=x.device).view(-1, 1, 1)
    chosen = y[at, indices].reshape(batch * rows, k, width)
    if precision is not None and precision.shape[0] > 1:
        precision = precision.repeat_interleave(rows, 0)
    found = distances(x.reshape(batch * rows, 1, width), chosen, metric, p, precision)
    return found.view(batch, rows, k)


@torch.no_grad()
def _search(
    x: Tensor, y: Tensor, k: int, metric: str, p: float | None, precision: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The k nearest rows of y by name, int64 ``[B, N, k]``, and their distances if known."""
    x, y, kind, order, root = as_sums(x, y, metric, p, precision)
    if kind != SQUARES:
        found = [_stream(a, b, k, kind, order)[1] for a, b in zip(x, y, strict=True)]
        return torch.stack(found), None
    pairs = [_certified(a, b, k) for a, b in zip(x, y, strict=True)]
    indices, squares = (torch.stack(t) for t in zip(*pairs, strict=True))
    return indices, None if metric == "cosine" else rooted(squares, root)


def _certified(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nearest rows of points ``[N, D]`` and ``[M, D]`` by squares, and those, ``[N, k]``.

    Some more candidates than asked for are kept. With ``error`` the most by which a matrix product
    may be off, every row that was not kept is farther than ``worst kept - error``: where the k-th
    distance, as differences give it, is below that, the choice is exact.
    """
    rows, width = y.shape
    kept = min(k + 2 + k // 8, rows)
    cx, cy = (t[0] for t in _pairwise.centred(x[None], y[None]))
    xx, yy = cx.square().sum(1), cy.square().sum(1)
    approximate, names = _stream(cx, cy, kept, SQUARES, 2.0, yy)
    names = names.sort(1).values
    # what is not there has the name -1; NaN and inf are as far as nothing
    exact = torch.where(names < 0, float("inf"), _squares_to(x, y, names.clamp_min(0)))
    exact = exact.nan_to_num(float("inf"), float("inf"))
    exact, by_value = exact.sort(dim=1, stable=True)
    found, exact = names.gather(1, by_value)[:, :k], exact[:, :k]
    if kept == rows and bool((found >= 0).all()):
        return found, _squares_to(x, y, found)
    eps = 2.0**-10 if _pairwise.rounds_products(x) else torch.finfo(x.dtype).eps
    error = eps * (8 + width**0.5) * (xx + yy.max())
    doubtful = ~(exact[:, -1] < approximate[:, -1] + xx - error)
    again = doubtful.nonzero().flatten()
    if len(again):
        found, exact = found.contiguous(), exact.contiguous()
        found[again] = _stream(x[again], y, k, SQUARES, 2.0)[1]
        exact[again] = _squares_to(x[again], y, found[again])
    return found, exact


def _squares_to(x: Tensor, y: Tensor, names: Tensor) -> Tensor:
    """Squared distances of each row to the rows of y it names, ``[N, k]``, as differences."""
    found = [
        _pairwise._Sums.forward(a.unsqueeze(1), y[n], SQUARES, 2.0).squeeze(1)
        for a, n in zip(x.split(TILE), names.split(TILE), strict=True)  # a tile stays in cache
    ]
    return torch.cat(found)


def _stream(
    x: Tensor, y: Tensor, k: int, kind: int, p: float, yy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k smallest sums of each row and their columns; for squares with ``yy = |y|^2`` by matrix
    products, less ``|x|^2``. NaN keeps no place: what is left over has the value inf."""
    rows, columns = x.shape[0], y.shape[0]
    values = torch.full((rows, k), float("inf"), dtype=x.dtype, device=x.device)
    indices = torch.full((rows, k), -1, dtype=torch.int64, device=x.device)
    select = _backend.kernel(_SELECT, x.device.type)
    products = kind == PRODUCT or yy is not None
    alpha = -2.0 if yy is not None else -1.0 if kind == PRODUCT else 1.0
    tile = TILE if x.device.type == "cpu" else _ON_GPU * TILE
    for i in range(0, rows, tile):
        some = slice(i, min(i + tile, rows))
        buffer = x.new_empty((some.stop - i) * min(tile, columns)) if products else None
        for j in range(0, columns, tile):
            part = y[j : j + tile]
            if products:
                size = (some.stop - i, part.shape[0])
                sums = torch.mm(x[some], part.mT, out=buffer[: size[0] * size[1]].view(size))
            else:
                sums = _pairwise._Sums.forward(x[None, some], part[None], kind, p)[0]
            offset = None if yy is None else yy[j : j + tile]
            select(values[some], indices[some], sums, offset, alpha, j)
    short = (indices < 0).any(1).nonzero().flatten()  # fewer than k distances are below inf
    for some in short.split(TILE):
        sums = _pairwise._Sums.forward(x[None, some], y[None], kind, p)[0]
        indices[some] = reference.nearest(-sums if kind == PRODUCT else sums, k)[1]
    return values, indices
