"""Modules of a copied structure that run through `fm.ops`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from fastmeta.patching.activations import use_in
from fastmeta.patching.bind import copy_structure


def _points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64) * 2
    x[0, 0] = 0.0
    return x.requires_grad_()


def _derivatives(module: nn.Module, x: torch.Tensor, orders: int) -> list[torch.Tensor]:
    """The output, and derivatives up to the given order."""
    out = module(x)
    found = [out]
    out = out.sin().sum()
    for _ in range(orders):
        (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        found.append(out)
    return found


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        *(ACT2FN[name] for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")),
        nn.LayerNorm(7, dtype=torch.float64),
        nn.LayerNorm(7, bias=False, dtype=torch.float64),
    ],
    ids=lambda module: repr(module),
)
def test_values_and_derivatives_of_three_orders(module: nn.Module):
    x, copied = _points(), copy_structure(module)
    use_in(copied)
    assert "forward" in copied.__dict__
    for mine, theirs in zip(_derivatives(copied, x, 3), _derivatives(module, x, 3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_under_vmap():
    x, module = _points(), nn.GELU()
    use_in(module)

    def per_row(row: torch.Tensor) -> torch.Tensor:
        return module(row).square().sum()

    (got,) = torch.autograd.grad(torch.func.vmap(per_row)(x).sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x).square().sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["gelu_python", "gelu_10", "relu", "quick_gelu"])
def test_other_activations_stay(name: str):
    module = ACT2FN[name]
    inner = list(module.modules())
    use_in(module)
    replaced = [m for m in inner if "forward" in m.__dict__]
    assert all(type(m).__name__ == "GELUActivation" and m.act is F.gelu for m in replaced)


def test_narrow_dtypes_run_as_they_did():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    for module in (nn.GELU(), nn.LayerNorm(6, dtype=torch.bfloat16)):
        copied = copy_structure(module)
        use_in(copied)
        assert torch.equal(copied(x), module(x))
