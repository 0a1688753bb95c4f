"""Distances: digits that are easily lost, torch's own semantics, points with no derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from fastmeta.ops import cdist, nearest, pairwise_distance, use_impl

METRICS = {
    "sqeuclidean": {},
    "euclidean": {},
    "cosine": {},
    "cityblock": {},
    "minkowski": {"p": 3.0},
    "chebyshev": {},
    "mahalanobis": {"precision": torch.tensor([2.0, 0.5, 1.0])},
    "dot": {},
}


def exact(x, y, metric, **own):
    own = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in own.items()}
    with use_impl("reference"):
        return pairwise_distance(x.double(), y.double(), metric, **own)


@pytest.mark.parametrize("metric", [m for m in METRICS if m not in ("dot", "cosine", "minkowski")])
@pytest.mark.parametrize("rows", [5, 70])
def test_far_from_the_origin(metric, rows):
    """Points 10^4 away keep the digits of their differences, which are exact in float32."""
    x, y = torch.randn(rows, 3) + 1e4, torch.randn(rows + 3, 3) + 1e4
    found = pairwise_distance(x, y, metric, **METRICS[metric])
    expected = exact(x, y, metric, **METRICS[metric])
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("width", [3, 64])
@pytest.mark.parametrize("rows", [5, 70])
def test_nearly_equal_points(width, rows):
    """Squares far below the squared lengths: a matrix product alone would leave no digit."""
    y = torch.randn(rows, width)
    x = y + 1e-4 * torch.randn(rows, width)
    for metric in ("sqeuclidean", "euclidean"):
        found = pairwise_distance(x, y, metric)
        torch.testing.assert_close(found.double(), exact(x, y, metric), rtol=2e-5, atol=0)
    angle = pairwise_distance(x, y, "cosine")
    torch.testing.assert_close(angle.double(), exact(x, y, "cosine"), rtol=1e-2, atol=1e-12)


def test_clusters_far_apart_and_close():
    """Two tight clusters: both the long distances and the short ones are right."""
    centres = torch.tensor([[100.0, 0.0, 0.0], [-100.0, 0.0, 0.0]]).repeat_interleave(30, 0)
    points = centres + 0.01 * torch.randn(60, 3)
    points = torch.cat([points, torch.zeros(60, 13)], 1)
    found = pairwise_distance(points, points)
    torch.testing.assert_close(
        found.double(), exact(points, points, "sqeuclidean"), rtol=1e-5, atol=0
    )
    assert bool((found.diagonal() == 0).all())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [2, 40])
def test_equal_points_have_finite_derivatives(metric, rows):
    x = torch.randn(rows, 3, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    own = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in METRICS[metric].items()}
    found = pairwise_distance(x, x.detach().clone(), metric, **own)
    (first,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    assert bool(found.isfinite().all()) and bool(first.isfinite().all())
    if metric != "dot":  # whose gradient is constant
        (second,) = torch.autograd.grad(first.square().sum(), x, allow_unused=True)
        assert second is None or bool(second.isfinite().all())
    if metric not in ("dot", "cosine"):
        assert bool((found.diagonal() == 0).all())


@pytest.mark.parametrize("metric", METRICS)
def test_third_derivative(metric):
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    own = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in METRICS[metric].items()}
    x.requires_grad_()

    def second(x):
        found = pairwise_distance(x, y, metric, **own)
        (g,) = torch.autograd.grad((found.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad((g**3).sum(), x, create_graph=True)[0]

    assert gradcheck(second, (x,))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("rows", [4, 40])
def test_cdist_is_torchs(p, rows):
    x = torch.randn(2, 1, rows, 5, dtype=torch.float64)
    y = torch.randn(3, rows + 2, 5, dtype=torch.float64)
    torch.testing.assert_close(cdist(x, y, p), torch.cdist(x, y, p))
    torch.testing.assert_close(cdist(x[0, 0], y[0], p), torch.cdist(x[0, 0], y[0], p))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn(2, 3, rows, rows + 2, dtype=torch.float64)
    (cdist(a, y, p) * upstream).sum().backward()
    (torch.cdist(b, y, p) * upstream).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_cdist_keeps_shapes_of_nothing():
    assert cdist(torch.empty(0, 3), torch.empty(4, 3)).shape == (0, 4)
    assert cdist(torch.empty(2, 5, 0), torch.empty(2, 4, 0)).eq(0).all()


def test_second_derivative_of_a_penalty():
    """A gradient penalty, which torch.cdist cannot differentiate."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64)
    assert gradgradcheck(lambda x: cdist(x, y), (x,))
    assert gradgradcheck(lambda x: cdist(x, y, 1.0), (x,))


def test_one_point_set_for_all_tasks_is_not_copied():
    x, y = torch.randn(3, 40, 20), torch.randn(30, 20)
    found = pairwise_distance(x, y, "cityblock")
    each = torch.stack([pairwise_distance(task, y, "cityblock") for task in x])
    assert torch.equal(found, each)


def test_a_nan_stays_in_its_row():
    for metric, own in METRICS.items():
        x, y = torch.randn(40, 3), torch.randn(50, 3)
        expected = pairwise_distance(x, y, metric, **own)
        x[3, 1], y[7, 2] = float("nan"), float("nan")
        found = pairwise_distance(x, y, metric, **own)
        assert bool(found[3].isnan().all()) and bool(found[:, 7].isnan().all())
        rows = [i for i in range(40) if i != 3]
        columns = [j for j in range(50) if j != 7]
        torch.testing.assert_close(found[rows][:, columns], expected[rows][:, columns])


def test_threads_do_not_change_a_bit():
    x = torch.randn(2, 300, 70, requires_grad=True)
    y = torch.randn(2, 200, 70, requires_grad=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found = pairwise_distance(x, y, "cityblock")
            results.append([found, *torch.autograd.grad(found.square().sum(), (x, y))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- nearest ---------------------------------------------------------------------------------------


def brute(x, y, k, metric="sqeuclidean", **own):
    found = exact(x, y, metric, **own)
    order = found.sort(dim=-1, stable=True).indices[..., :k]
    return found.gather(-1, order), order


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rows", [(20, 30), (700, 1500)])  # at once, and in tiles
def test_nearest_is_the_sorted_matrix(metric, k, rows):
    x, y = torch.randn(rows[0], 3), torch.randn(rows[1], 3)
    values, indices = nearest(x, y, k, metric, **METRICS[metric])
    expected, order = brute(x, y, k, metric, **METRICS[metric])
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    close = (values.double() - expected).abs() < 1e-5  # near ties may change places in float32
    assert bool(((indices == order) | close).all())
    assert (indices == order).double().mean() > 0.99


def test_nearest_among_equal_and_nearly_equal_rows():
    """Duplicates come in the order of their index, and differences of one rounding are seen."""
    y = torch.randn(60, 64).repeat(20, 1)  # every row twenty times
    x = y[:60] + 1e-3
    values, indices = nearest(x.repeat(20, 1), y, 3)
    expected = torch.arange(60).unsqueeze(1) + torch.tensor([0, 60, 120])
    assert torch.equal(indices[:60], expected)
    assert torch.equal(values[:, 0], values[:, 2])
    far = torch.randn(1200, 16) + 1e3
    moved = far.clone()
    moved[:, 0] += 1e-3
    _, indices = nearest(moved, far)
    assert torch.equal(indices.flatten(), torch.arange(1200))


def test_nearest_with_nan_and_infinite_rows():
    x, y = torch.randn(600, 8), torch.randn(900, 8)
    y[::2] = float("nan")
    y[1] = float("inf")
    x[5] = float("nan")
    values, indices = nearest(x, y, 2)
    good = torch.arange(600) != 5
    assert bool((indices[good] % 2 == 1).all()) and bool(values[good].isfinite().all())
    assert bool(values[5].isnan().all()) and indices[5].tolist() == [0, 1]
    y[3:] = float("nan")
    assert nearest(x[:600], y, 3)[1][0].tolist() == [1, 0, 2]  # inf before nan, nan by its index


def test_nearest_values_carry_gradients():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    for metric in ("sqeuclidean", "cityblock", "cosine"):
        assert gradcheck(lambda x, y, m=metric: nearest(x, y, 2, m)[0], (x, y))


def test_nearest_holds_no_matrix():
    x, y = torch.randn(1100, 8), torch.randn(2300, 8)
    seen = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            seen.extend(t.numel() for t in results if isinstance(t, torch.Tensor))
            return out

    with Largest():
        nearest(x, y, 5)
    assert max(seen) < 1100 * 2300 / 2


# -- errors ----------------------------------------------------------------------------------------

X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise_distance(X, Y[..., :3]), "y must have the dtype, device and D of x"),
        (lambda: pairwise_distance(X, Y.double()), "y must have the dtype, device and D of x"),
        (lambda: pairwise_distance(X, torch.zeros(3, 5, 4)), "leading axes of x and y"),
        (lambda: pairwise_distance(X[0, 0], Y), r"x must be a floating-point tensor \[..., N, D\]"),
        (lambda: pairwise_distance(X.long(), Y), "x must be a floating-point tensor"),
        (lambda: pairwise_distance(X, Y, "manhattan"), "metric must be one of sqeuclidean"),
        (lambda: pairwise_distance(X, Y, "minkowski"), "needs a number p > 0, got p = None"),
        (lambda: pairwise_distance(X, Y, "minkowski", p=-1.0), "needs a number p > 0, got p = -1"),
        (lambda: pairwise_distance(X, Y, "euclidean", p=3), "takes no p, got p = 3"),
        (lambda: pairwise_distance(X, Y, "mahalanobis"), "needs a precision matrix"),
        (
            lambda: pairwise_distance(X, Y, precision=torch.eye(4)),
            "metric 'sqeuclidean' takes no precision",
        ),
        (
            lambda: pairwise_distance(X, Y, "mahalanobis", precision=torch.eye(3)),
            r"precision must be \[D\], \[D, D\].*D = 4",
        ),
        (
            lambda: pairwise_distance(X, Y, "mahalanobis", precision=torch.zeros(4, 4)),
            "precision must be positive definite",
        ),
        (
            lambda: pairwise_distance(X, Y, "mahalanobis", precision=-torch.ones(4)),
            "precision must be positive definite",
        ),
        (
            lambda: pairwise_distance(X, Y, "mahalanobis", precision=torch.eye(4) * math.nan),
            "precision must be",
        ),
        (
            lambda: pairwise_distance(
                X, Y, "mahalanobis", precision=torch.eye(4) + torch.eye(4).roll(1, 0) / 9
            ),
            "precision must be symmetric",
        ),
        (lambda: cdist(X, Y, p=-1.0), "p must be a number >= 0, got -1"),
        (lambda: cdist(X, Y, compute_mode="fast"), "compute_mode must be one of"),
        (lambda: nearest(X, Y, 6), r"k must be an integer in 1..M = 5, got 6"),
        (lambda: nearest(X, Y, 0), "k must be an integer in 1..M = 5, got 0"),
        (lambda: nearest(X, Y[:, :0]), "k must be an integer in 1..M = 0, got 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_public_names():
    assert fm.ops.pairwise_distance is pairwise_distance


def test_counts_of_different_coordinates_have_no_derivative() -> None:
    x, y = (torch.randint(0, 2, (n, 3)).double().requires_grad_() for n in (4, 5))
    found = cdist(x, y, 0)
    assert torch.equal(found, (x.unsqueeze(1) != y).sum(2).double())
    first = torch.autograd.grad(found.sum(), (x, y), create_graph=True)
    second = torch.autograd.grad(sum((t * x.sum()).sum() for t in first), (x, y), allow_unused=True)
    assert not any(t.any() for t in (*first, *(s for s in second if s is not None)))
    empty = pairwise_distance(
        x[:, :0], y[:, :0], "mahalanobis", precision=torch.ones(0, 0).double()
    )
    assert torch.equal(empty, torch.zeros(4, 5, dtype=torch.float64))
