"""Interpreted Triton kernels of normalisations and activations, against their references."""

from __future__ import annotations

import pytest
import torch

from fastmeta.ops import use_impl
from fastmeta.testing.layer_norm import activations, dropouts, norms

SHAPES = ((1, 1, 1), (3, 5, 7), (0, 2, 3), (2, 0, 3), (2, 35, 20), (2, 3, 64))
SIZES = ((3, 5), (0,), (1030,))
F64 = (torch.float64, torch.float64)
CASES = [("layer_norm", i) for i in range(len(SHAPES))]
CASES += [("rms_norm", i) for i in (1, 4, 5)]


def derivatives(call, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    return [t.detach() for t in (out, *first, *second)]


def check(sample) -> None:
    with use_impl("reference"):
        expected = derivatives(sample.call, sample.tensors)
    with use_impl("triton"):
        got = derivatives(sample.call, sample.tensors)
        again = derivatives(sample.call, sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


@pytest.mark.parametrize(("op", "index"), CASES)
def test_norms(op: str, index: int):
    check(list(norms(op, SHAPES, F64))[index])


@pytest.mark.parametrize("index", range(len(SIZES)))
@pytest.mark.parametrize(
    ("op", "options"), [("gelu", {}), ("gelu", {"approximate": "tanh"}), ("silu", {})]
)
def test_activations(op: str, options: dict, index: int):
    check(list(activations(op, SIZES, F64, **options))[index])


@pytest.mark.parametrize("index", range(2 * len(SIZES)))
def test_dropout(index: int):
    check(list(dropouts(SIZES, F64))[index])
