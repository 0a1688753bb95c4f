"""The prototypical loss: against a loop over tasks, with ragged tasks and many classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastmeta.ops import class_means, pairwise_distance, prototypical_loss, use_impl
from fastmeta.ops._prototypical import CHUNK

METRICS = {"sqeuclidean": {}, "euclidean": {}, "cosine": {}, "cityblock": {}, "chebyshev": {}}
T, Q, N, D = 3, 7, 9, 5


def loop(query, query_labels, support, support_labels, metric="sqeuclidean", temperature=1.0):
    """Task by task, class by class, row by row, in plain torch."""
    losses, right = [], []
    for q, ql, s, sl in zip(query, query_labels, support, support_labels, strict=True):
        own = sorted(set(sl.tolist()) - {-100})
        means = torch.stack([s[sl == c].mean(0) for c in own])
        rows = [i for i, c in enumerate(ql.tolist()) if c != -100]
        with use_impl("reference"):
            logits = -pairwise_distance(q[rows], means, metric) / temperature
        target = torch.tensor([own.index(int(ql[i])) for i in rows])
        losses.append(F.cross_entropy(logits, target))
        right.append((logits.argmax(1) == target).double().mean())
    return torch.stack(losses), torch.stack(right)


def ragged(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(T, Q, D, generator=generator, dtype=torch.float64)
    support = torch.randn(T, N, D, generator=generator, dtype=torch.float64)
    support_labels = torch.tensor(
        [
            [0, 1, 2, 3, 0, 1, 2, 3, 0],
            [0, 0, 2, 2, 2, 0, -100, -100, -100],
            [1, 3, 3, 1] + [-100] * 5,
        ]
    )
    query_labels = torch.tensor(
        [[0, 1, 2, 3, 3, 2, 1], [0, 2, 0, 2, -100, -100, -100], [3, 1, -100, 1, 3, -100, 1]]
    )
    return query, query_labels, support, support_labels


@pytest.mark.parametrize("metric", METRICS)
def test_ragged_tasks_and_missing_classes(metric, cpu_impl):
    query, query_labels, support, support_labels = ragged()
    query.requires_grad_(), support.requires_grad_()
    found, accuracy = prototypical_loss(
        query, query_labels, support, support_labels, metric=metric, temperature=0.7
    )
    expected, right = loop(query, query_labels, support, support_labels, metric, 0.7)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(accuracy, right)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), (query, support))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, support))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "mahalanobis"])
def test_nothing_of_ignored_rows_arrives(metric, cpu_impl):
    query, query_labels, support, support_labels = ragged()
    inputs, settings = [query, support], {"metric": metric}
    if metric == "mahalanobis":
        settings["precision"] = torch.eye(D, dtype=query.dtype).requires_grad_()
        inputs.append(settings["precision"])
    expected = prototypical_loss(query, query_labels, support, support_labels, **settings)
    query[query_labels == -100] = float("nan")
    support[support_labels == -100] = float("inf")
    query.requires_grad_(), support.requires_grad_()
    found = prototypical_loss(query, query_labels, support, support_labels, **settings)
    torch.testing.assert_close(found, expected)
    for gradient in torch.autograd.grad(found[0].sum(), inputs, create_graph=True):
        assert bool(gradient.isfinite().all())
        assert bool(
            torch.autograd.grad(gradient.sum(), query, retain_graph=True)[0].isfinite().all()
        )


def test_given_prototypes_and_tasks_without_rows(cpu_impl):
    query, query_labels, support, _ = ragged()
    query_labels = query_labels.clone()
    query_labels[1] = -100
    loss, accuracy = prototypical_loss(query, query_labels, support[:, :4], None)
    assert loss[1] == 0 and accuracy[1] == 0
    labels = torch.arange(4).expand(T, 4)
    again = prototypical_loss(query, query_labels, support[:, :4], labels)
    torch.testing.assert_close((loss, accuracy), again)


@pytest.mark.parametrize("cpu_impl", ["cpp"], indirect=True)
@pytest.mark.parametrize("classes", [3, 70])
def test_gradients_of_answers_that_are_all_but_certain(classes, cpu_impl):
    """1 - p is 0 in float32, the gradient is not: the kernels sum the other classes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(1, classes, 16, generator=generator)
    means *= 5 / means.norm(dim=2, keepdim=True)  # neighbours' logits are some 20 to 100 lower
    labels = torch.arange(3).unsqueeze(0)
    query = means[:, :3] + 0.1 * torch.randn(1, 3, 16, generator=generator)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        given = query.to(dtype).requires_grad_()
        loss, _ = prototypical_loss(given, labels, means.to(dtype), None)
        gradients.append(torch.autograd.grad(loss.sum(), given)[0].double())
    assert 0 < gradients[1].norm() < 1e-6
    error = (gradients[0] - gradients[1]).norm(dim=2) / gradients[1].norm(dim=2)
    # exponentials of logits below 100, of which 16 coordinates are the sum
    assert error.max() < 100 * 16 * torch.finfo(torch.float32).eps


def test_one_of_equally_near_prototypes(cpu_impl):
    query, means = torch.zeros(1, 2, 3), torch.ones(1, 3, 3)
    _, accuracy = prototypical_loss(query, torch.tensor([[0, 1]]), means, None)
    assert accuracy.tolist() == [0.5]


def many(metric, dtype=torch.float64, rows=23, classes=70, tasks=2, width=6):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(tasks, rows, width, generator=generator, dtype=dtype).requires_grad_()
    means = torch.randn(tasks, classes, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, classes, (tasks, rows), generator=generator)
    labels[:, 2] = -100
    temperature = (0.5 + torch.rand(tasks, generator=generator, dtype=dtype)).requires_grad_()

    def loss(query, means, temperature):
        return prototypical_loss(
            query, labels, means, None, metric=metric, temperature=temperature
        )[0]

    return loss, (query, means, temperature)


@pytest.mark.parametrize("metric", METRICS)
def test_many_classes(metric, monkeypatch):
    """In chunks of rows, and of tasks: the same losses and derivatives as at once."""
    loss, inputs = many(metric)
    with use_impl("reference"):
        expected = loss(*inputs)
        first = torch.autograd.grad(expected.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for chunk in (CHUNK, 70 * 5, 70 * 23):
        monkeypatch.setattr("fastmeta.ops._prototypical.CHUNK", chunk)
        found = loss(*inputs)
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad(found.sin().sum(), inputs, create_graph=True)
        torch.testing.assert_close(ours, first)
        again = torch.autograd.grad(sum(g.square().sum() for g in ours), inputs)
        torch.testing.assert_close(again, second)
        with torch.no_grad():
            torch.testing.assert_close(loss(*inputs), expected)


def test_many_classes_under_transforms():
    loss, inputs = many("sqeuclidean", rows=4, classes=40)
    inputs = tuple(t.detach() for t in inputs)
    gradient = torch.func.grad(lambda *t: loss(*t).sum(), argnums=(0, 1, 2))
    with use_impl("reference"):
        expected = gradient(*inputs)
    torch.testing.assert_close(gradient(*inputs), expected)
    batch = tuple(torch.stack([t, 0.5 * t]) for t in inputs)
    found = torch.func.vmap(gradient)(*batch)
    for i in range(2):
        each = gradient(*(t[i] for t in batch))
        torch.testing.assert_close(tuple(f[i] for f in found), each)


def test_many_classes_hold_no_matrix():
    loss, inputs = many("sqeuclidean", torch.float32, rows=6000, classes=1000, tasks=1, width=8)
    seen = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            seen.extend(t.numel() for t in results if isinstance(t, torch.Tensor))
            return out

    with Largest():
        loss(*inputs).sum().backward()
    assert max(seen) <= CHUNK < 6000 * 1000 / 4


def test_exponentials_are_exact_enough():
    """Logits over the whole range of float32, against float64."""
    means = torch.linspace(0, 13, 200).reshape(1, 200, 1)
    query, labels = torch.zeros(1, 200, 1), torch.arange(200).unsqueeze(0)
    for classes in (20, 200):
        found = prototypical_loss(query[:, :classes], labels[:, :classes], means[:, :classes], None)
        exact = prototypical_loss(
            query[:, :classes].double(), labels[:, :classes], means[:, :classes].double(), None
        )
        torch.testing.assert_close(found[0].double(), exact[0], rtol=3e-7, atol=0)


def test_class_means(cpu_impl):
    features = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 0, 1, 0, -100], [3, 3, 3, 3, 3, 3]])
    means, counts = class_means(features, labels)
    assert counts.tolist() == [[3, 2, 0, 0], [0, 0, 0, 6]]
    torch.testing.assert_close(means[0, 0], features[0, [0, 2, 4]].mean(0))
    assert bool((means[0, 2:] == 0).all())
    assert gradcheck(lambda f: class_means(f, labels)[0], (features,))
    assert gradgradcheck(lambda f: class_means(f, labels)[0].square(), (features,))


def call(**changes):
    names = ("query", "query_labels", "support", "support_labels")
    arguments = {**dict(zip(names, ragged(), strict=True)), **changes}
    tensors = [arguments.pop(name) for name in names]
    return prototypical_loss(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(Q, D)}, r"query must be a floating-point tensor \[T, N, D\]"),
        ({"support": torch.zeros(T, N, D)}, "support must have the dtype, device and D of query"),
        ({"support": torch.zeros(T + 1, N, D).double()}, "support must have T = 3 tasks"),
        ({"query_labels": torch.zeros(T, Q)}, r"query_labels must be int64 \[3, 7\]"),
        ({"query_labels": torch.full((T, Q), 4)}, r"query_labels must be in 0..3 or -100.* got 4"),
        ({"query_labels": torch.full((T, Q), -1)}, "query_labels must be in 0..3 or -100"),
        (
            {"query_labels": torch.ones(T, Q, dtype=torch.int64)},
            r"query_labels must be classes with support rows, \[0, 2\] in task 1, got 1",
        ),
        ({"support_labels": torch.full((T, N), -100)}, "at least one class, got none"),
        (
            {"support_labels": torch.full((T, N), -3)},
            "support rows of at least one class|must be in",
        ),
        ({"num_classes": 2}, r"support_labels must be in 0..1 or -100.* got 2"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1 or None, got 0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": torch.ones(2)}, r"temperature must be a number, a scalar tensor or \[T\]"),
        ({"temperature": -torch.ones(T)}, "temperature must be finite and > 0"),
        ({"metric": "minkowski"}, "needs a number p > 0"),
        ({"metric": "mahalanobis"}, "needs a precision matrix"),
        ({"support_labels": None, "support": torch.zeros(T, 0, D).double()}, "with C >= 1"),
        (
            {"support_labels": None, "num_classes": 3},
            r"prototypes must be \[T, C, D\] with C = num",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("classes", [5, 65])
def test_one_temperature_as_a_tensor(classes: int) -> None:
    """A scalar is one for all tasks, in memory of its own."""
    g = torch.Generator().manual_seed(0)
    query, points = (torch.randn(3, n, 4, generator=g) for n in (8, classes))
    labels = torch.randint(0, classes, (3, 8), generator=g)
    found, expected = (
        prototypical_loss(query, labels, points, None, temperature=t)[0]
        for t in (torch.tensor(2.0), 2.0)
    )
    torch.testing.assert_close(found, expected)
