"""Chunks of the cross-entropy of a linear layer's logits, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from test_cross_entropy_kernels import F64, derivatives

from fastmeta.kernels import linear_cross_entropy as chunks
from fastmeta.ops import use_impl
from fastmeta.testing.linear_cross_entropy import SHAPES, samples


@pytest.mark.parametrize("size", [chunks._BYTES, 1], ids=["one chunk", "many"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_values_and_derivatives(index: int, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_BYTES", size)
    sample = list(samples(SHAPES, F64))[index]
    with use_impl("reference"):
        expected = derivatives(sample.call, *sample.tensors)
    with use_impl("triton"):
        got = derivatives(sample.call, *sample.tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)
