"""Implicit meta-gradients: solve one linear system at the adapted weights instead of unrolling.

At a minimum of ``L_support(phi) + lam/2 |phi - theta|^2`` the meta-gradient is
``(I + H / lam)^-1 dL_query/dphi`` with H the Hessian of the support loss (Rajeswaran et al. 2019).
Conjugate gradients run for all tasks at once, each with its own step lengths, without asking the
device for a number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, task_losses


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve ``A x = b`` for every row of ``b [T, P]``; a row that has converged stays put.

    Args:
        product: ``v [T, P] -> A v``, row by row, A symmetric positive definite.
    """
    x = torch.zeros_like(b)
    r = b
    p = b
    rr = r.square().sum(1, keepdim=True)
    for _ in range(iterations):
        ap = product(p)
        curvature = (p * ap).sum(1, keepdim=True)
        # Negative or no curvature, or a finished row: a step of length 0.
        go = (curvature > 0) & (rr > 0)
        alpha = torch.where(go, rr / torch.where(go, curvature, 1.0), 0.0)
        x = x + alpha * p
        r = r - alpha * ap
        new = r.square().sum(1, keepdim=True)
        beta = torch.where(go, new / torch.where(go, rr, 1.0), 0.0)
        p = r + beta * p
        rr = new
    return x


class ImplicitGradient(torch.autograd.Function):
    """Identity on the adapted weights whose backward applies ``(I + H / lam)^-1``.

    ``apply(loop, support, adapted, packed)``, both ``[T, P]``, returns `adapted`, differentiable
    to the initial weights `packed`.
    """

    @staticmethod
    def forward(ctx, loop: InnerLoop, support: Support, adapted: Tensor, packed: Tensor):
        ctx.loop, ctx.support = loop, support
        ctx.save_for_backward(adapted)
        return adapted.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_adapted: Tensor):
        loop, support = ctx.loop, ctx.support
        (adapted,) = ctx.saved_tensors
        with torch.enable_grad():
            phi = adapted.detach().requires_grad_()
            losses, _ = task_losses(loop, phi, support.inputs, support.prefix)
            (grad,) = torch.autograd.grad(losses.sum(), phi, create_graph=True)

        def product(v: Tensor) -> Tensor:
            (hv,) = torch.autograd.grad(grad, phi, v, retain_graph=True)
            return v + hv / loop.proximal

        return None, None, None, conjugate_gradient(product, d_adapted, loop.implicit)
