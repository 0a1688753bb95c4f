"""What only a GPU can show: CUDA graphs, streams, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _library, ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _library.dispatched("sgd_update", "cuda")),
    reason="needs a CUDA device and fastmeta._C_cuda",
)


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.rand(8, 5000, device="cuda") for _ in range(count)]


def step(p, g, m, v, lr, beta):
    """Forward, backward and double backward with learned numbers; the update in place."""
    leaves = [t.detach().requires_grad_() for t in (p, g, m, v, lr, beta)]
    *x, rate, b = leaves
    out = ops.adam_update(*x, 3, rate, betas=(0.9, b), eps=1e-3, check_finite=True)
    first = torch.autograd.grad(sum(o.sum() for o in out[:3]), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    ops.adam_update_(p, g, m, v, 3, lr.detach(), check_finite=True)
    return [*out, *first, *second]


def test_cuda_graph():
    """A captured step, derivatives included, replays with new inputs."""
    inputs = [*tensors(4), torch.full((1, 5000), 0.1, device="cuda"), torch.tensor(0.9).cuda()]
    other = [*tensors(4), torch.full((1, 5000), 0.2, device="cuda"), torch.tensor(0.8).cuda()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*[t.clone() for t in inputs])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    for t, new in zip(inputs, other, strict=True):
        t.copy_(new)
    graph.replay()
    expected = step(*other)
    for a, b in zip([*captured, *inputs], [*expected, *other], strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*Synchronization debug mode.*")
def test_no_synchronisation():
    inputs = [*tensors(4), torch.full((8, 1), 0.1, device="cuda"), torch.full((8,), 0.9).cuda()]
    step(*inputs)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_stream():
    """Work is queued on the current stream, behind what it has to wait for."""
    p, g = tensors(2)
    expected = p - 0.5 * g
    source = g.clone()
    g.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        g.copy_(source)
        got = ops.sgd_update(p, g, 0.5)
    stream.synchronize()
    torch.testing.assert_close(got, expected)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs a device of 40 GiB")
    p = torch.zeros(3, 800_000_000, dtype=torch.bfloat16, device="cuda")
    g = torch.ones(1, device="cuda", dtype=torch.bfloat16).expand_as(p)
    ops.sgd_update_(p, g.contiguous(), 1.0)
    assert bool((p == -1).all())
