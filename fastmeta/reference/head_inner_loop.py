"""All inner steps of a linear head in plain torch, differentiable to any order by autograd itself.

Shapes: ``features [T, N, D]``, ``labels [T, N]`` (outside ``[0, C)``: ignored),
``weight [T, C, D]``, ``bias [T, C]`` or None, ``lr [T, K]`` or None for the number ``lr_value``,
``ways [T]`` or None, ``active`` bool ``[T]`` or None. A task whose loss or squared gradient norm is
not finite stops before that step; nothing of it enters a product from then on, so not even a NaN
there reaches another number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype


class Steps(NamedTuple):
    """What the steps left behind.

    Attributes:
        weight, bias: ``[T, C, D]`` and ``[T, C]`` after the last step; bias may be None.
        losses: ``[T, K]`` before each step, without graph; 0 for inactive tasks.
        taken: int64 ``[T]``, the steps taken; -1 for a task that diverged and is NaN.
        probabilities: ``[K, T, N, C]`` of each step, 0 where a task takes it no more.
    """

    weight: Tensor
    bias: Tensor | None
    losses: Tensor
    taken: Tensor
    probabilities: Tensor


def head_inner_loop(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor | None,
    ways: Tensor | None,
    active: Tensor | None,
    lr_value: float,
    momentum: float,
    weight_decay: float,
    steps: int,
    exact: int,
    freeze: bool,
) -> Steps:
    """K steps of ``torch.optim.SGD`` on the mean cross-entropy of each task's labelled rows.

    The gradients of the last ``exact`` steps are differentiated, the others are constants. With
    ``freeze`` a task that diverges keeps the weights from before that step, else it is NaN.
    """
    tasks, _, _ = features.shape
    classes = weight.shape[1]
    x = features.to(wide_dtype(features.dtype))
    valid = (labels >= 0) & (labels < classes)
    x = torch.where(valid[:, :, None], x, 0.0)
    target = torch.nn.functional.one_hot(torch.where(valid, labels, 0), classes).to(x.dtype)
    share = valid.to(x.dtype) / valid.sum(1, keepdim=True).clamp_min(1)  # [T, N]
    beyond = None
    if ways is not None:
        beyond = torch.arange(classes, device=x.device) >= ways.clamp(1, classes).view(-1, 1, 1)

    def gradient(x, w, b):
        """Probabilities, losses, and the gradients of w and b."""
        z = torch.bmm(x, w.mT)
        if b is not None:
            z = z + b.unsqueeze(1)
        if beyond is not None:
            z = z.masked_fill(beyond, float("-inf"))
        log_p = torch.log_softmax(z, 2)
        p = log_p.exp()
        r = (p - target) * share.unsqueeze(2)
        own = log_p.gather(2, torch.where(valid, labels, 0).unsqueeze(2)).squeeze(2)
        losses = -(torch.where(valid, own, 0.0) * share).sum(1)
        return p, losses, torch.bmm(r.mT, x), None if b is None else r.sum(1)

    started = torch.ones(tasks, dtype=torch.bool, device=x.device) if active is None else active
    alive = started
    w, b, u, u_b = weight, bias, None, None
    taken, all_losses, all_p = torch.zeros_like(labels[:, 0:1]).sum(1), [], []
    for k in range(steps):
        with torch.no_grad():
            _, losses, g, g_b = gradient(x, w, b)
            square = g.square().sum((1, 2)) + (0.0 if g_b is None else g_b.square().sum(1))
            losses = torch.where(started, losses, 0.0)
            alive = alive & torch.isfinite(losses) & torch.isfinite(square)
            all_losses.append(losses)
            taken = taken + alive
        on = alive[:, None]
        w_k = torch.where(on[:, :, None], w, 0.0)
        b_k = None if b is None else torch.where(on, b, 0.0)
        x_k = torch.where(on[:, :, None], x, 0.0)
        at = (x_k, w_k, b_k)
        if k < steps - exact:
            at = tuple(None if t is None else t.detach() for t in at)
        p, _, g, g_b = gradient(*at)
        all_p.append(torch.where(on[:, :, None] & valid[:, :, None], p.detach(), 0.0))
        rate = lr_value if lr is None else torch.where(alive, lr[:, k], 0.0)[:, None]

        def step(w, w_k, g, u, on, rate):
            g = g + weight_decay * w_k if weight_decay else g
            u = g if u is None or not momentum else momentum * torch.where(on, u, 0.0) + g
            return torch.where(on, w_k - rate * u, w), u

        wide = rate if lr is None else rate[:, :, None]
        w, u = step(w, w_k, g, u, on[:, :, None], wide)
        if b is not None:
            b, u_b = step(b, b_k, g_b, u_b, on, rate)
    if not freeze:
        lost = started & ~alive
        w = torch.where(lost[:, None, None], float("nan"), w)
        b = None if b is None else torch.where(lost[:, None], float("nan"), b)
        taken = torch.where(lost, -1, taken)
    return Steps(w, b, torch.stack(all_losses, 1), taken, torch.stack(all_p))


def raw_head_inner_loop(
    features,
    labels,
    weight,
    bias,
    lr,
    ways,
    active,
    lr_value,
    momentum,
    weight_decay,
    steps,
    gram,
    freeze,
    keep_steps,
):
    """:func:`head_inner_loop` in the form of the raw operator."""
    numbers = (lr_value, momentum, weight_decay, steps, 0, freeze)
    found = head_inner_loop(features, labels, weight, bias, lr, ways, active, *numbers)
    empty = (weight.new_empty(0), weight.new_empty(0), weight.new_empty(0))
    probabilities, products, no_bias = empty
    if keep_steps:
        probabilities = found.probabilities.permute(1, 0, 3, 2).contiguous()
        if gram:
            valid = (labels >= 0) & (labels < weight.shape[1])
            x = torch.where(valid[:, :, None], features.to(weight.dtype), 0.0)
            products = torch.bmm(x, x.mT)
            if bias is not None:
                products = products + (valid[:, :, None] & valid[:, None, :])
    return (
        found.weight.contiguous(),
        no_bias if found.bias is None else found.bias.contiguous(),
        found.losses.contiguous(),
        found.taken.contiguous(),
        probabilities,
        products,
    )
