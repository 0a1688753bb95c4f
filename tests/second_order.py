"""Values, first and second derivatives of a function of tensors."""

from __future__ import annotations

import torch


def derivatives(call, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
    return [t.detach() for t in (out, *first, *second)]
