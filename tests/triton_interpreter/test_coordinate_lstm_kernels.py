"""Interpreted Triton kernels of the shared LSTM cell, against its reference."""

from __future__ import annotations

import pytest
import torch
from second_order import derivatives

from fastmeta import ops
from fastmeta.ops import use_impl
from fastmeta.testing.coordinate_lstm import samples

SHAPES = ((1, 1, 1), (0, 2, 3), (4, 0, 2), (5, 3, 0), (37, 2, 5), (20, 17, 18))
F64 = (torch.float64, torch.float64)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_derivatives(index: int):
    sample = list(samples(SHAPES, F64))[index]

    def call(*given):
        return torch.cat(sample.call(*given), dim=1)

    with use_impl("reference"):
        expected = derivatives(call, sample.tensors)
    with use_impl("triton"):
        got = derivatives(call, sample.tensors)
        again = derivatives(call, sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-11)
    assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_is_used_and_weights_are_frozen(which: int):
    sample = list(samples(SHAPES, F64))[4]
    x, h, c, *weights = sample.tensors

    def call(*given):
        return ops.coordinate_lstm(*given, *weights)[which]

    with use_impl("reference"):
        expected = derivatives(call, (x, h, c))
    with use_impl("triton"):
        got = derivatives(call, (x, h, c))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow(dtype):
    sample = list(samples(SHAPES, (dtype, dtype)))[4]
    with use_impl("reference"):
        expected = sample.call(*(t.double() for t in sample.tensors))
    with use_impl("triton"):
        got = sample.call(*sample.tensors)
    rounding = 8 * torch.finfo(dtype).eps
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=rounding, atol=rounding)
