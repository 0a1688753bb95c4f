"""Values, first and second derivatives of a function of tensors."""

from __future__ import annotations

import torch


def derivatives(call, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    return [t.detach() for t in (out, *first, *second)]


def by_cotangents(call, tensors) -> list[torch.Tensor]:
    """The result, its gradients, and the derivatives of those for fixed cotangents."""
    generator = torch.Generator().manual_seed(1)
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = call(*inputs)

    def random(t):
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    upstream = random(out).requires_grad_()
    first = torch.autograd.grad(out, inputs, upstream, create_graph=True)
    second = torch.autograd.grad(first, [upstream, *inputs], [random(t) for t in first])
    return [t.detach() for t in (out, *first, *second)]
