"""Implicit meta-gradients: solve one linear system at the adapted weights instead of unrolling.

At a minimum phi of ``L(phi, w) + lam/2 |phi - theta|^2``, with L the support loss, H its Hessian in
phi, and d the gradient of the query loss (Rajeswaran et al. 2019)::

    d theta = v,   d w = -1/lam (dL/dphi dw)^T v,   where (I + H / lam) v = d

Conjugate gradients run for all tasks at once, each with its own step lengths, without asking the
device for a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmeta.engine.backward import backpropagate, differentiable_once
from fastmeta.engine.conditions import Conditions, versions
from fastmeta.engine.inner import InnerLoop, Support, gradient


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve ``A x = b`` for every row of ``b [T, P]``; a row that has converged stays put.

    Args:
        product: ``v [T, P] -> A v``, row by row, A symmetric positive definite.
        b: Right-hand sides.
        iterations: Products with A, at least 1.

    Returns:
        ``x [T, P]``. Where A has no positive curvature along a direction, the row stops there.
    """
    x = torch.zeros_like(b)
    r = b
    p = b
    rr = r.square().sum(1, keepdim=True)
    go = torch.ones_like(rr, dtype=torch.bool)
    for _ in range(iterations):
        ap = product(p)
        curvature = (p * ap).sum(1, keepdim=True)
        # Negative or no curvature, or a finished row: steps of length 0 from then on.
        go = go & (curvature > 0) & (rr > 0)
        alpha = torch.where(go, rr / torch.where(go, curvature, 1.0), 0.0)
        x = x + alpha * p
        r = r - alpha * ap
        new = r.square().sum(1, keepdim=True)
        beta = torch.where(go, new / torch.where(go, rr, 1.0), 0.0)
        p = r + beta * p
        rr = new
    return x


def implicit(
    loop: InnerLoop,
    packed: Tensor,
    adapted: Tensor,
    support: Support,
    shared: Sequence[Tensor],
) -> Tensor:
    """`adapted`, differentiable once to `packed`, `shared` weights, the stored prefix and inputs.

    Args:
        packed: Initial fast weights ``[T, P]``.
        adapted: Fast weights at the end of the inner loop ``[T, P]``.
        shared: Weights of the model that are meta-parameters but not adapted.
    """
    stored, shared = support.stored(), [*shared, *support.carrying()]
    carrying = [t for t in stored if t.requires_grad]
    empty = support.with_stored([None] * len(stored))
    return _Implicit.apply(loop, empty, shared, stored, adapted, packed, *shared, *carrying)


class _Implicit(torch.autograd.Function):
    """Identity on the adapted weights whose backward pass solves the linear system."""

    @staticmethod
    def forward(ctx, loop, empty, shared, stored, adapted, packed, *meta):
        ctx.loop, ctx.support, ctx.shared = loop, empty, shared
        read = versions(loop.patched, empty.inputs.values())
        ctx.conditions = Conditions(loop.patched, packed.device, read)
        ctx.save_for_backward(adapted, *stored, *shared)
        ctx.num_stored = len(stored)
        return adapted.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx, d_adapted: Tensor):
        loop, (adapted, *saved) = ctx.loop, ctx.saved_tensors
        stored = [t.detach().requires_grad_(t.requires_grad) for t in saved[: ctx.num_stored]]
        support = ctx.support.with_stored(stored)
        meta = [*ctx.shared, *(t for t in stored if t.requires_grad)]
        with ctx.conditions.restored(loop.patched):
            phi = adapted.detach().requires_grad_()
            _, grad = gradient(loop, phi, support, create_graph=True)

        # The pull towards the initial weights adds lam I to the Hessian of `gradient`: H + lam I.
        def product(v: Tensor) -> Tensor:
            (hv,) = torch.autograd.grad(grad, phi, v, retain_graph=True)
            return hv / loop.proximal

        v = conjugate_gradient(product, d_adapted, loop.implicit)
        d_meta = backpropagate([grad], [-v / loop.proximal], meta)
        return None, None, None, None, None, v, *d_meta
