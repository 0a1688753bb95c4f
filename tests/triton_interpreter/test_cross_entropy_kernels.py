"""Interpreted Triton kernels of the cross-entropy, of logits and of the layer that makes them,
against the references."""

from __future__ import annotations

import pytest
import torch

from fastmeta.kernels import linear_cross_entropy as chunks
from fastmeta.ops import cross_entropy, use_impl
from fastmeta.testing import linear_cross_entropy as layers
from fastmeta.testing.cross_entropy import SHAPES, samples

F64 = (torch.float64, torch.float64)


def derivatives(call, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = call(x)
    (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [out.detach(), first.detach(), second]


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_values_and_derivatives(index: int):
    sample = list(samples(SHAPES, F64))[index]
    with use_impl("reference"):
        expected = derivatives(sample.call, *sample.tensors)
    with use_impl("triton"):
        got = derivatives(sample.call, *sample.tensors)
        again = derivatives(sample.call, *sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


def test_a_label_out_of_range_is_nan():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with use_impl("triton"):
        losses = cross_entropy(x, torch.tensor([1, 3]))
    assert losses.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("size", [chunks._BYTES, 1], ids=["one chunk", "many"])
@pytest.mark.parametrize("index", range(len(layers.SHAPES)))
def test_layers(index: int, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_BYTES", size)
    sample = list(layers.samples(layers.SHAPES, F64))[index]
    with use_impl("reference"):
        expected = derivatives(sample.call, *sample.tensors)
    with use_impl("triton"):
        got = derivatives(sample.call, *sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
