"""The exact GELU with a short second derivative."""

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.patching.activations import gelu, use_in


def _points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64) * 2
    x[0, 0] = 0.0
    return x.requires_grad_()


def test_values_and_derivatives_of_three_orders():
    x = _points()
    assert torch.equal(gelu(x), F.gelu(x))
    assert torch.autograd.gradcheck(gelu, (x,))
    assert torch.autograd.gradgradcheck(gelu, (x,))
    third = []
    for fn in (gelu, F.gelu):
        d = x
        out = fn(d).sin().sum()
        for _ in range(3):
            (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        third.append(out)
    torch.testing.assert_close(*third, rtol=1e-9, atol=1e-9)


def test_under_vmap():
    x = _points()

    def per_row(row: torch.Tensor) -> torch.Tensor:
        return gelu(row).square().sum()

    (got,) = torch.autograd.grad(torch.func.vmap(per_row)(x).sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_only_the_exact_form_is_replaced():
    model = nn.Sequential(nn.GELU(), nn.GELU(approximate="tanh"))
    use_in(model)
    assert model[0].forward is gelu
    assert "forward" not in model[1].__dict__
