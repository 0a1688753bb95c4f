"""Interpreted Triton kernels of pairwise and class sums and nearest rows against the references."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastmeta import _library, ops
from fastmeta.ops import use_impl
from fastmeta.reference import pairwise as reference
from fastmeta.reference import rows as rows_reference
from fastmeta.reference.pairwise import ABSOLUTE, MAXIMUM, POWER, PRODUCT, SQUARES
from fastmeta.testing.tolerance import assert_within_budget, shake

KINDS = {
    "squares": (SQUARES, 2.0),
    "absolute": (ABSOLUTE, 1.0),
    "cubes": (POWER, 3.0),
    "power2.7": (POWER, 2.7),
    "maximum": (MAXIMUM, 0.0),
    "product": (PRODUCT, 0.0),
}
SHAPES = [  # B, N, M, D
    (1, 17, 34, 9),  # both many: several tiles, none full
    (1, 35, 5, 35),  # few columns
    (1, 3, 37, 33),  # few rows
    (2, 1, 1, 1),
    (2, 4, 3, 5),
    (1, 18, 20, 3),
    (0, 2, 3, 4),
    (2, 0, 3, 4),
    (2, 3, 0, 4),
    (2, 3, 2, 0),
]


def kernel(name: str):
    return _library.OPS[name].kernels["triton"][1]


def points(*shape: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    """Values of which several are equal, so that differences of 0 and tied maxima occur."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).round().to(dtype) / 2


def strided(x: Tensor) -> Tensor:
    """The values with gaps between rows, dense in the last axis."""
    wide = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 3), float("nan"))
    wide[..., 1 : 1 + x.shape[2]] = x
    return wide[..., 1 : 1 + x.shape[2]]


def close(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-11, "atol": 1e-11, "equal_nan": True} | tolerance
    torch.testing.assert_close(actual, expected, **tolerance)


def derivatives(x, y, kind, p, w, a, b):
    """Sums, their gradients and the derivative of those by the reference."""
    x, y, w = (t.detach().requires_grad_() for t in (x, y, w))
    sums = reference.pairwise_sums(x, y, kind, p)
    first = torch.autograd.grad(sums, (x, y), w, create_graph=True)
    second = torch.autograd.grad(first, (w, x, y), (a, b), materialize_grads=True)
    return sums.detach(), [f.detach() for f in first], second


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", KINDS)
def test_sums_and_derivatives(name: str, shape):
    if name == "cubes" and shape[1] > 4:
        return  # tiles are those of the other power
    kind, p = KINDS[name]
    batch, n, m, d = shape
    x, y = strided(points(batch, n, d)), points(batch, m, d, seed=1)
    w, a, b = points(batch, n, m, seed=2), points(batch, n, d, seed=3), points(batch, m, d, seed=4)
    sums, first, second = derivatives(x, y, kind, p, w, a, b)
    got = kernel("pairwise_sums")(x, y, kind, p)
    close(got, sums)
    given = sums if kind == MAXIMUM else None
    both = kernel("pairwise_sums_backward")(w, x, y, given, kind, p, 3)
    for actual, expected in zip(both, first, strict=True):
        close(actual, expected)
    needs = 4 if kind in (ABSOLUTE, MAXIMUM) else 7
    found = kernel("pairwise_sums_double_backward")(a, b, w, x, y, given, kind, p, needs)
    for i, (actual, expected) in enumerate(zip(found, second, strict=True)):
        if i == 0 or needs == 7:
            close(actual, expected)
    for cotangents in ((a, None), (None, b)) if w.numel() < 100 else ():
        zero = [
            torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, (x, y), strict=True)
        ]
        _, _, half = derivatives(x, y, kind, p, w, *zero)
        found = kernel("pairwise_sums_double_backward")(*cotangents, w, x, y, given, kind, p, needs)
        for i, (actual, expected) in enumerate(zip(found, half, strict=True)):
            if i == 0 or needs == 7:
                close(actual, expected)
    again = kernel("pairwise_sums_backward")(w, x, y, given, kind, p, 3)
    assert all(torch.equal(u, v) for u, v in zip(again, both, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_as_exact_as_the_reference(name: str):
    kind, p = KINDS[name]
    generator = torch.Generator().manual_seed(3)
    x, y, w = (
        torch.randn(shape, generator=generator) for shape in ((2, 20, 40), (2, 18, 40), (2, 20, 18))
    )

    def run(x, y, w):
        sums, first, _ = derivatives(x, y, kind, p, w, x, y)
        return [sums, *first]

    eps = torch.finfo(torch.float32).eps
    exact, low = run(x.double(), y.double(), w.double()), run(x, y, w)
    shaken = [run(*(shake(t, eps, generator) for t in (x, y, w))) for _ in range(3)]
    got = [kernel("pairwise_sums")(x, y, kind, p)]
    given = got[0] if kind == MAXIMUM else None
    got += kernel("pairwise_sums_backward")(w, x, y, given, kind, p, 3)
    for i, (actual, *others) in enumerate(zip(got, exact, low, *shaken, strict=True)):
        assert_within_budget(f"{name} {i}", actual, others[0], others[1], others[2:])


@pytest.mark.parametrize("name", KINDS)
def test_not_finite(name: str):
    """NaN and Inf reach the sums and gradients that the reference gives them, and no others."""
    kind, p = KINDS[name]
    x, y, w = points(1, 21, 6), points(1, 19, 6, seed=1), points(1, 21, 19, seed=2)
    x[0, 3, 2], x[0, 5, 1], y[0, 7, 0] = float("nan"), float("inf"), float("-inf")
    sums, first, _ = derivatives(x, y, kind, p, w, x, y)
    close(kernel("pairwise_sums")(x, y, kind, p), sums)
    given = sums if kind == MAXIMUM else None
    dx, dy = kernel("pairwise_sums_backward")(w, x, y, given, kind, p, 3)
    clean = [i for i in range(21) if i not in (3, 5)]
    close(dx[0, clean].isfinite(), first[0][0, clean].isfinite())
    assert torch.equal(dy.isfinite(), first[1].isfinite())


def test_long_reductions_are_split():
    """The second stage: more others than one program takes."""
    x, y, w = points(1, 700, 3), points(1, 2, 3, seed=1), points(1, 700, 2, seed=2)
    _, first, _ = derivatives(x, y, SQUARES, 2.0, w, x, y)
    _, dy = kernel("pairwise_sums_backward")(w, x, y, None, SQUARES, 2.0, 2)
    close(dy, first[1])
    labels = torch.randint(-1, 3, (1, 700))
    close(kernel("class_sums")(x, labels, 2), reference.class_sums(x, labels, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_expanded_and_half_precision(dtype):
    x, y = points(1, 18, 20, dtype=dtype).expand(3, -1, -1), points(3, 33, 20, dtype=dtype, seed=1)
    for kind, p in KINDS.values():
        exact = reference.pairwise_sums(x.double(), y.double(), kind, p)
        got = kernel("pairwise_sums")(x, y, kind, p)
        assert got.dtype == dtype
        close(got.double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_by_products_keep_their_digits(dtype):
    """Pairs that cancel, overflow or are not finite are evaluated as differences."""
    x = torch.randn(2, 35, 24, dtype=dtype)
    y = torch.randn(2, 70, 24, dtype=dtype)
    y[:, :20] = x[:, :20] + 1e-4 * torch.randn(2, 20, 24, dtype=dtype)
    x[0, 30, 1], y[1, 69, 0], x[1, 9] = float("nan"), float("inf"), torch.finfo(dtype).max ** 0.6
    exact = reference.pairwise_sums(x.double(), y.double(), SQUARES, 2.0)
    dots = x @ y.mT
    kernel("pairwise_squares_")(dots, x, y, x.square().sum(-1), y.square().sum(-1))
    expected = reference.pairwise_sums(x, y, SQUARES, 2.0)
    eps = torch.finfo(dtype).eps
    finite = exact.isfinite() & expected.isfinite()
    close(dots[finite].double(), exact[finite], rtol=600 * eps, atol=0)
    close(dots[~finite], expected[~finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_take_rows(dtype: torch.dtype):
    for rows, taken, columns in ((7, 5, 3), (40, 60, 33), (3, 4, 1), (0, 2, 4), (2, 0, 3)):
        x = torch.randn(rows, columns).to(dtype)
        index = torch.randint(-1, max(rows, 1), (taken,)) if rows else torch.full((taken,), -1)
        found = kernel("take_rows")(x, index)
        assert torch.equal(found, rows_reference.take_rows(x, index)) and found.is_contiguous()


def test_class_sums_and_gather():
    for tasks, rows, d, classes in ((3, 21, 33, 5), (1, 1, 1, 1), (2, 30, 3, 40), (2, 0, 3, 2)):
        x = points(tasks, rows, d)
        labels = torch.randint(-2, classes + 2, (tasks, rows))
        x[(labels < 0) | (labels >= classes)] = float("nan")
        close(kernel("class_sums")(x, labels, classes), reference.class_sums(x, labels, classes))
        v = points(tasks, classes, d, seed=1)
        close(kernel("class_gather")(v, labels), reference.class_gather(v, labels))
    empty = torch.zeros(2, 3, 0), torch.zeros(2, 3, dtype=torch.int64)
    assert kernel("class_sums")(*empty, 4).shape == (2, 4, 0)
    assert kernel("class_gather")(torch.zeros(2, 0, 3), empty[1]).tolist() == [[[0.0] * 3] * 3] * 2


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("alpha", [1.0, -2.0])
def test_nearest_select(k: int, alpha: float):
    """Two tiles after one another, with ties, infinities and NaN."""
    rows, columns = 3, 520 if k == 1 else 70
    values = torch.full((rows, k), float("inf"), dtype=torch.float64)
    indices = torch.full((rows, k), -1)
    expected = values.clone(), indices.clone()
    for first in (0, columns):
        sums = points(rows, columns, seed=first)
        sums[0, 5::7], sums[1, 3], sums[2, ::2] = float("nan"), -float("inf"), float("inf")
        offset = None if first else points(columns, seed=9)
        kernel("nearest_select_")(values, indices, sums, offset, alpha, first)
        clean = sums.masked_fill(sums.isnan(), alpha * float("inf"))
        _library.OPS["nearest_select_"].reference(*expected, clean, offset, alpha, first)
    named = expected[0] < float("inf")
    close(values, expected[0])
    assert torch.equal(indices[named], expected[1][named])


METRICS = [
    ("sqeuclidean", {}),
    ("euclidean", {}),
    ("cosine", {}),
    ("cityblock", {}),
    ("chebyshev", {}),
    ("minkowski", {"p": 2.5}),
    ("dot", {}),
]


@pytest.mark.parametrize(
    ("metric", "options"), METRICS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_distances(metric: str, options: dict):
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    x, y = x.requires_grad_(), y.requires_grad_()

    def call(x, y):
        return ops.pairwise_distance(x, y, metric, **options)

    def run():
        out = call(x, y)
        first = torch.autograd.grad(out.square().sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(sum(f.pow(3).sum() for f in first), (x, y))
        return [out, *first, *second]

    with use_impl("reference"):
        expected = run()
    with use_impl("triton"):
        for actual, e in zip(run(), expected, strict=True):
            close(actual, e, rtol=1e-9, atol=1e-10)
        small = x[:1, :2, :3].detach().requires_grad_(), y[:1, :, :3].detach().requires_grad_()
        if metric in ("euclidean", "chebyshev"):
            assert gradcheck(call, small, fast_mode=True)
            assert gradgradcheck(call, small, fast_mode=True)
        mapped = torch.func.vmap(call)(x.detach()[:, None], y.detach()[:, None])
    close(mapped[:, 0], expected[0])


def test_public_many_rows_and_nearest(monkeypatch):
    """Sizes at which the public functions take matrix products and stream."""
    monkeypatch.setattr(sys.modules["fastmeta.ops.nearest"], "TILE", 32)
    x, y = torch.randn(9, 6), torch.randn(40, 6)
    y[::9] = x[:5]
    for k, metric in ((1, "sqeuclidean"), (4, "cityblock"), (3, "dot")):
        with use_impl("reference"):
            distances = ops.pairwise_distance(x, y, metric)
            values, indices = ops.nearest(x, y, k, metric)
        with use_impl("triton"):
            close(ops.pairwise_distance(x, y, metric), distances, rtol=1e-5, atol=1e-5)
            got = ops.nearest(x, y, k, metric)
        close(got[0], values, rtol=1e-5, atol=1e-6)
        assert torch.equal(got[1], indices)
