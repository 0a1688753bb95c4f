"""Interpreted Triton kernels of the linear layer with low-rank terms, against its reference."""

from __future__ import annotations

import pytest
import torch
from second_order import derivatives

from fastmeta import ops
from fastmeta.kernels import lora_linear
from fastmeta.ops import QuantizedWeight, use_impl
from fastmeta.testing.lora_linear import samples

SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 5, 7, 4, 2),
    (2, 3, 18, 70, 17),
    (0, 3, 4, 2, 1),
    (2, 0, 3, 4, 2),
    (2, 35, 20, 33, 5),
    (3, 40, 9, 6, 3),
)
F64 = (torch.float64, torch.float64)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_derivatives(index: int):
    sample = list(samples(SHAPES, F64))[index]
    with use_impl("reference"):
        expected = derivatives(sample.call, sample.tensors)
    with use_impl("triton"):
        got = derivatives(sample.call, sample.tensors)
        again = derivatives(sample.call, sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_programs_share_the_rows_of_a_task(index: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_linear, "_ROWS_OF_A_PART", 2)
    test_derivatives(index)


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient(frozen: int):
    """Every subset of x, bias, A and B that lacks one, in both orders."""
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (4,), (2, 2, 5), (2, 4, 2))]
    weight = torch.randn(4, 5, dtype=torch.float64)
    learned = [t for i, t in enumerate(tensors) if i != frozen]

    def call(*given):
        full = list(given)
        full.insert(frozen, tensors[frozen])
        return ops.lora_linear(full[0], weight, full[1], full[2], full[3], 0.5)

    with use_impl("reference"):
        expected = derivatives(call, learned)
    with use_impl("triton"):
        got = derivatives(call, learned)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow(dtype):
    sample = list(samples(SHAPES, (dtype, dtype)))[5]
    wide = [t.double() for t in sample.tensors]
    with use_impl("reference"):
        expected = sample.call(*wide)
    with use_impl("triton"):
        got = sample.call(*sample.tensors)
    assert got.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=20 * rounding)


@pytest.mark.parametrize(("bits", "group"), [(8, 20), (8, 5), (4, 10)])
def test_quantised(bits: int, group: int):
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 20), (2, 3, 20), (2, 34, 3)))
    packed = QuantizedWeight.quantize(torch.randn(34, 20, dtype=torch.float64), bits, group)

    def call(x, a, b):
        return ops.lora_linear(x, packed, None, a, b, 0.5)

    with use_impl("reference"):
        expected = derivatives(call, (x, a, b))
    with use_impl("triton"):
        got = derivatives(call, (x, a, b))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
