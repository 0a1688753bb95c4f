"""Interpreted Triton kernels of attention against the reference, to the second derivative."""

from __future__ import annotations

import pytest
import torch

from fastmeta import ops
from fastmeta.ops import use_impl
from fastmeta.testing.attention import laid_out, mask_of, operands

OPTIONS = {
    "plain": {},
    "padding": {"mask": "padding", "window": (4, 3), "offset": 1},
    "additive": {"mask": "heads", "causal": True},
    "finite": {"mask": "finite"},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7, "mask": "rows"},
}
SHAPES = {  # B, H, Hk, Lq, Lk, D, E
    "one tile": (2, 2, 2, 5, 7, 8, 6),  # a head in one program
    "grouped": (1, 4, 2, 9, 20, 3, 3),
    "several tiles": (1, 1, 1, 20, 40, 4, 4),  # of 16 x 16 in float64
    "single": (1, 1, 1, 1, 1, 1, 1),
    "no batch": (0, 2, 1, 3, 4, 4, 4),
    "no queries": (2, 1, 1, 0, 3, 4, 4),
    "no keys": (2, 2, 1, 3, 0, 4, 4),
}


def all_orders(shape, impl: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [laid_out(t, i % 3) for i, t in enumerate(operands(shape, generator))]
    inputs = [t.to(dtype).requires_grad_() for t in made]
    if "mask" in options:
        options["mask"] = mask_of(options["mask"], shape, generator)
    with use_impl(impl):
        out = ops.attention(*inputs, **options)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        upstream.requires_grad_()
        first = torch.autograd.grad(out, inputs, upstream, create_graph=True)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in made]
        cotangents = [c.to(dtype) for c in cotangents]
        found = [out, *first, *torch.autograd.grad(first, [upstream, *inputs], cotangents)]
        for i in range(3 if options == {} and len(out) == 1 else 0):  # one cotangent alone
            found += torch.autograd.grad(
                ops_first(inputs, upstream, options)[i],
                [upstream, *inputs],
                cotangents[i],
                allow_unused=True,
                materialize_grads=True,
            )
    return [t.detach() for t in found]


def ops_first(inputs, upstream, options):
    out = ops.attention(*inputs, **options)
    return torch.autograd.grad(out, inputs, upstream, create_graph=True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_orders(shape: str, option: str):
    given = SHAPES[shape], OPTIONS[option]
    got = all_orders(given[0], "triton", torch.float64, **given[1])
    expected = all_orders(given[0], "reference", torch.float64, **given[1])
    for i, (a, e) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES["grouped"], (1, 1, 1, 70, 40, 36, 4)])
def test_narrow_operands(shape, dtype):
    """Computed in float32 whatever the operands, in larger tiles; results are rounded once."""
    got = all_orders(shape, "triton", dtype, causal=True)
    expected = all_orders(shape, "cpp", dtype, causal=True)
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, e, rtol=4 * eps, atol=64 * eps * e.abs().max().item())


def test_unsupported_head_size():
    with use_impl("triton"), pytest.raises(ValueError, match="head sizes up to 256, got D = 300"):
        ops.attention(*torch.zeros(3, 1, 1, 2, 300))
