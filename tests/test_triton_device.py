"""The Triton kernels on a GPU: against the references there, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _library, ops
from fastmeta.ops import use_impl
from fastmeta.ops.prototypical import class_means, prototypical_loss
from fastmeta.testing.tolerance import assert_within_budget, shake

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _library.dispatched("pairwise_sums", "cuda")),
    reason="needs a CUDA device and triton",
)

METRICS = {
    "sqeuclidean": {},
    "euclidean": {},
    "cosine": {},
    "cityblock": {},
    "chebyshev": {},
    "minkowski": {"p": 2.7},
    "dot": {},
}
SHAPES = [(3, 75, 5, 640), (2, 130, 70, 33), (1, 5, 3000, 3), (1, 1, 1, 1), (0, 3, 2, 4)]


def with_gradients(call, tensors) -> list[torch.Tensor]:
    """Results of ``call``, first and second gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    return [t.detach() for t in (out, *first, *second)]


def agree(what: str, call, tensors) -> None:
    """float64 to many digits, float32 within the budget of the reference; reruns are bit-equal."""
    exact_inputs = [t.double() for t in tensors]
    got = with_gradients(call, exact_inputs)
    low = with_gradients(call, tensors)
    again = with_gradients(call, tensors)
    assert all(torch.equal(a, b) for a, b in zip(low, again, strict=True)), what
    with use_impl("reference"):
        exact = with_gradients(call, exact_inputs)
        reference = with_gradients(call, tensors)
        eps, generator = torch.finfo(torch.float32).eps, torch.Generator().manual_seed(0)
        shaken = [
            with_gradients(call, [shake(t, eps, generator) for t in tensors]) for _ in range(3)
        ]
    for i, (a, e) in enumerate(zip(got, exact, strict=True)):
        scale = max(e.abs().max().item() if e.numel() else 0.0, 1.0)
        torch.testing.assert_close(
            a, e, rtol=1e-9, atol=1e-11 * scale, msg=lambda m: f"{what}: {m}"
        )
        assert_within_budget(f"{what} {i}", low[i], e, reference[i], [s[i] for s in shaken])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("metric", METRICS)
def test_distances(metric: str, shape):
    b, n, m, d = shape
    x, y = torch.randn(b, n, d, device="cuda"), torch.randn(b, m, d, device="cuda")
    agree(metric, lambda x, y: ops.pairwise_distance(x, y, metric, **METRICS[metric]), (x, y))


@pytest.mark.parametrize("classes", [5, 40, 700])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", "dot"])
def test_prototypical_loss(metric: str, classes: int):
    query = torch.randn(4, 75, 64, device="cuda") / 4
    support = torch.randn(4, 2 * classes, 64, device="cuda") / 4
    labels = torch.randint(0, classes, (4, 75), device="cuda")
    labels[:, ::9] = -100
    support_labels = torch.arange(classes, device="cuda").repeat(4, 2)

    def loss(query, support):
        return prototypical_loss(query, labels, support, support_labels, metric=metric)[0]

    agree(metric, loss, (query, support))


def test_class_means():
    labels = torch.randint(0, 7, (3, 1500), device="cuda")
    features = torch.randn(3, 1500, 130, device="cuda")
    agree("class_means", lambda x: class_means(x, labels, 7)[0], (features,))


@pytest.mark.parametrize("metric", ["sqeuclidean", "cityblock", "dot"])
@pytest.mark.parametrize("k", [1, 10, 64])
def test_nearest(metric: str, k: int):
    x = torch.randn(1500, 32, device="cuda", dtype=torch.float64)
    y = torch.randn(2500, 32, device="cuda", dtype=torch.float64)
    y[::50] = x[:50]
    values, indices = ops.nearest(x, y, k, metric)
    with use_impl("reference"):
        expected = ops.nearest(x, y, k, metric)
    torch.testing.assert_close(values, expected[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("shape", [(100_000, 2, 20), (257, 4, 32), (33, 7, 5)])
def test_coordinate_lstm(shape):
    rows, features, hidden = shape
    given = [(rows, features), (rows, hidden), (rows, hidden)]
    given += [(4 * hidden, features), (4 * hidden, hidden), (4 * hidden,)]
    tensors = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in given]
    agree("coordinate_lstm", lambda *t: torch.cat(ops.coordinate_lstm(*t), 1), tensors)


@pytest.mark.parametrize("shape", [(5, 30, 40, 70, 8), (3, 200, 384, 384, 16), (2, 1, 5, 3, 1)])
@pytest.mark.parametrize("ragged", [False, True])
def test_lora_linear(shape, ragged: bool):
    tasks, rows, width, outputs, rank = shape
    given = [(tasks, rows, width), (outputs, width), (outputs,)]
    given += [(tasks, rank, width), (tasks, outputs, rank)]
    tensors = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in given]
    count = tasks * rows
    offsets = torch.tensor([0, *[count // 3] * (tasks - 1), count], device="cuda")

    def call(x, *rest):
        if not ragged:
            return ops.lora_linear(x, *rest, 0.5)
        return ops.lora_linear(x.flatten(0, 1), *rest, 0.5, offsets=offsets)

    agree("lora_linear", call, tensors)


def test_cuda_graph_without_synchronisation():
    """A captured loss with its gradient replays with new inputs; nothing waits for the device."""
    query, support = torch.randn(4, 30, 64, device="cuda"), torch.randn(4, 10, 64, device="cuda")
    labels = torch.randint(0, 5, (4, 30), device="cuda")
    support_labels = torch.arange(5, device="cuda").repeat(4, 2)

    def step(query, support):
        leaf = query.detach().requires_grad_()
        loss, _ = prototypical_loss(leaf, labels, support, support_labels, num_classes=5)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(query, support)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(query, support)
    query.copy_(torch.randn_like(query))
    graph.replay()
    for a, e in zip(captured, step(query, support), strict=True):
        assert torch.equal(a, e)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(1, 20, 8, device="cuda:1")
    torch.testing.assert_close(ops.cdist(x, x, 1.0), torch.cdist(x, x, 1.0))


ATTENTION = {
    "plain": {},
    "causal": {"causal": True, "window": (40, 0)},
    "dropout": {"dropout_p": 0.2, "seed": 5},
}


@pytest.mark.parametrize("shape", [(8, 4, 32, 32), (2, 2, 300, 64), (1, 2, 17, 5)])
@pytest.mark.parametrize("options", ATTENTION)
def test_attention(options: str, shape):
    batch, heads, rows, width = shape
    q = torch.randn(batch, heads, rows, width, device="cuda")
    k, v = (torch.randn(batch, heads // 2, rows, width, device="cuda") for _ in range(2))
    mask = torch.rand(batch, 1, 1, rows, device="cuda") < 0.8

    def call(q, k, v):
        return ops.attention(q, k, v, mask, **ATTENTION[options])

    agree(options, call, (q, k, v))
