"""Interpreted Triton kernels of the prototypical loss against the references."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastmeta import _library, ops
from fastmeta.ops import use_impl
from fastmeta.ops.prototypical import class_means
from fastmeta.reference.pairwise import ABSOLUTE, MAXIMUM, POWER, PRODUCT, SQUARES

METRICS = {  # kind, p, root
    "squares": (SQUARES, 2.0, 1.0),
    "euclidean": (SQUARES, 2.0, 2.0),
    "absolute": (ABSOLUTE, 1.0, 1.0),
    "minkowski": (POWER, 2.5, 2.5),
    "maximum": (MAXIMUM, 0.0, 1.0),
    "product": (PRODUCT, 0.0, 1.0),
}
SHAPES = [  # T, Q, C, D
    (2, 7, 5, 35),
    (1, 9, 34, 3),  # several tiles of rows and of classes
    (3, 1, 1, 1),
    (2, 0, 3, 4),
    (0, 2, 3, 4),
    (2, 3, 2, 0),
]


def op(name: str):
    return _library.OPS[name]


def kernel(name: str):
    return op(name).kernels["triton"][1]


def close(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True} | tolerance
    torch.testing.assert_close(actual, expected, **tolerance)


def episode(tasks: int, rows: int, classes: int, d: int, dtype=torch.float64):
    """Some rows do not count and are NaN; some classes are absent."""
    query = torch.randn(tasks, rows, d, dtype=dtype)
    prototypes = torch.randn(tasks, classes, d, dtype=dtype)
    labels = torch.randint(-1, classes + 1, (tasks, rows))
    valid = (labels >= 0) & (labels < classes)
    query[~valid] = float("nan")
    present = torch.rand(tasks, classes) < 0.8
    present.scatter_(1, torch.where(valid, labels, 0), True)
    if tasks and rows and classes and d:  # a distance of zero, and prototypes that tie
        prototypes[:, -1] = prototypes[:, 0]
        query[0, -1], labels[0, -1] = prototypes[0, 0], 0
        present[0, 0] = True
    return query, labels, prototypes, present, torch.rand(tasks, dtype=dtype) + 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", METRICS)
def test_loss_and_gradient(name: str, shape):
    if shape[2] > 32 and name not in ("minkowski", "maximum"):
        return  # tiles of classes are the same for all
    query, labels, prototypes, present, scale = episode(*shape)
    for chosen in (present, None):
        leaves = [t.clone().requires_grad_() for t in (query, prototypes, scale)]
        given = (leaves[0], labels, leaves[1], chosen, leaves[2], *METRICS[name])
        expected = op("prototypical").reference(*given)
        v_loss = torch.randn(shape[0], dtype=torch.float64)
        gradients = torch.autograd.grad(expected[0], leaves, v_loss)
        given = (query, labels, prototypes, chosen, scale, *METRICS[name])
        got = kernel("prototypical")(*given)
        for i, (actual, e) in enumerate(zip(got, expected, strict=True)):
            close(actual, e.detach(), rtol=1e-7 if i == 1 else 1e-10)
        found = kernel("prototypical_backward")(v_loss, got[2], *given, 7)
        for actual, e in zip(found, gradients, strict=True):
            close(actual, e, rtol=1e-9)
        again = kernel("prototypical_backward")(v_loss, got[2], *given, 7)
        assert all(torch.equal(u, v) for u, v in zip(again, found, strict=True))
        none = kernel("prototypical_backward")(v_loss, got[2], *given, 0)
        assert all(t.numel() == 0 for t in none)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("gradient", [False, True])
def test_rows(name: str, gradient: bool):
    kind, _, root = METRICS[name]
    for tasks, rows, classes in ((1, 3, 1100), (2, 2, 3), (2, 0, 5)):
        sums = torch.randn(tasks, rows, classes, dtype=torch.float64).square() / 4
        sums[..., -1] = sums[..., 0]
        sums[..., 1] = 0
        _, labels, _, present, scale = episode(tasks, rows, classes, 0)
        for chosen in (present, None):
            expected, got = sums.clone(), sums.clone()
            given = (labels, chosen, scale, kind, root, gradient)
            wanted = op("prototypical_rows_").reference(expected, *given)
            found = kernel("prototypical_rows_")(got, *given)
            for actual, e in zip(found, wanted, strict=True):
                close(actual, e)
            close(got, expected)


def test_extreme_logits():
    """Overflowing, absent and NaN classes give what the reference gives."""
    query = torch.tensor([[[1e200], [0.0], [3.0], [1.0]]], dtype=torch.float64)
    prototypes = torch.tensor([[[0.0], [1.0], [float("nan")]]], dtype=torch.float64)
    labels, scale = torch.tensor([[0, 1, 1, 0]]), torch.ones(1, dtype=torch.float64)
    for present in (None, [[True, True, False]], [[False, True, False]], [[False] * 3]):
        present = None if present is None else torch.tensor(present)
        given = (query, labels, prototypes, present, scale, SQUARES, 2.0, 1.0)
        for actual, e in zip(
            kernel("prototypical")(*given), op("prototypical").reference(*given), strict=True
        ):
            close(actual, e)


def test_half_precision_rows():
    query, labels, prototypes, present, scale = episode(2, 5, 4, 20, torch.float32)
    query, prototypes = query.half(), prototypes.half()
    given = (labels, prototypes.float(), present, scale, SQUARES, 2.0, 1.0)
    expected = op("prototypical").reference(query.float(), *given)
    got = kernel("prototypical")(query, labels, prototypes, present, scale, SQUARES, 2.0, 1.0)
    for actual, e in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        close(actual, e, rtol=1e-5, atol=1e-5)


PUBLIC = {"sqeuclidean": {}, "euclidean": {}, "cosine": {}, "cityblock": {}, "dot": {}}


@pytest.mark.parametrize("metric", PUBLIC)
def test_public_loss(metric: str):
    """Values, first and second gradients, many classes, finite differences."""
    for tasks, rows, classes in ((2, 4, 3), (1, 3, 34)) if metric == "euclidean" else ((2, 4, 3),):
        query = torch.randn(tasks, rows, 4, dtype=torch.float64)
        support = torch.randn(tasks, 2 * classes, 4, dtype=torch.float64)
        labels = torch.randint(0, classes, (tasks, rows))
        labels[0, 0] = -100
        support_labels = torch.arange(classes).repeat(tasks, 2)
        query, support = query.requires_grad_(), support.requires_grad_()
        temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

        def loss(query, support, temperature, labels=labels, support_labels=support_labels):
            return ops.prototypical_loss(
                query, labels, support, support_labels, metric=metric, temperature=temperature
            )[0]

        def run(inputs=(query, support, temperature), loss=loss):
            out = loss(*inputs)
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(f.pow(3).sum() for f in first), inputs)
            return [out, *first, *second]

        with use_impl("reference"):
            expected = run()
        with use_impl("triton"):
            for actual, e in zip(run(), expected, strict=True):
                close(actual, e, rtol=1e-8, atol=1e-10)
    if metric != "euclidean":
        return
    few = [query[:1, :2], support[:1, : 2 * classes : 17], temperature]
    labels, support_labels = torch.tensor([[1, 0]]), torch.tensor([[0, 1, 1, 0]])

    def small(query, support, temperature):
        return ops.prototypical_loss(
            query, labels, support, support_labels, metric=metric, temperature=temperature
        )[0]

    inputs = tuple(t.detach().requires_grad_() for t in few)
    with use_impl("triton"):
        assert gradcheck(small, inputs, fast_mode=True)
        assert gradgradcheck(small, inputs, fast_mode=True)


def test_public_class_means():
    features = torch.randn(2, 9, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 9))
    labels[1, 2] = -100
    features[1, 2] = float("nan")
    with use_impl("reference"):
        expected = class_means(features, labels, 3)
    with use_impl("triton"):
        got = class_means(features, labels, 3)
        leaf = features[:, :3, :2].clone().requires_grad_()
        leaf.data.nan_to_num_(1.0)
        assert gradcheck(lambda x: class_means(x, labels[:, :3], 3)[0], (leaf,), fast_mode=True)
        assert gradgradcheck(lambda x: class_means(x, labels[:, :3], 3)[0], (leaf,), fast_mode=True)
    for actual, e in zip(got, expected, strict=True):
        close(actual, e)
