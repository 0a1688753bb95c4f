"""Task-batched inner updates in plain torch.

``params`` and ``grads`` are ``[T, P]``. The learning rate is the number ``lr_value`` where ``lr``
is None, else ``lr`` ``[1 or T, 1 or C]`` in the accumulation dtype, with C = P, or C = S where
``offsets`` (int64 ``[S + 1]``) divides a row into segments. Rows whose ``active`` is False are
frozen: nothing of them enters a product, so not even a NaN there reaches another number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_index(offsets: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: the segment that owns each column (empty segments own none)."""
    columns = torch.arange(size, device=offsets.device)
    return torch.searchsorted(offsets[1:-1].contiguous(), columns, right=True)


def spread_rate(lr: Tensor | None, offsets: Tensor | None, lr_value: float, size: int):
    """The learning rate as a number or ``[1 or T, 1 or P]``."""
    if lr is None:
        return lr_value
    if offsets is None or lr.shape[1] == 1:
        return lr
    return lr.index_select(1, segment_index(offsets, size))


def sum_to_rate(x: Tensor, lr: Tensor, offsets: Tensor | None) -> Tensor:
    """Adjoint of :func:`spread_rate`: ``[T, P]`` summed to the shape of ``lr``."""
    if lr.shape[1] == 1:
        x = x.sum(1, keepdim=True)
    elif offsets is not None:
        index = segment_index(offsets, x.shape[1])
        x = x.new_zeros(x.shape[0], lr.shape[1]).index_add(1, index, x)
    if lr.shape[0] == 1:
        x = x.sum(0, keepdim=True)
    return x


def _select(active: Tensor | None, x):
    """``x`` with the frozen rows replaced by 0 (numbers pass)."""
    if active is None or not isinstance(x, Tensor):
        return x
    return torch.where(active[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def _direction(params, grads, active, weight_decay: float, maximize: bool, dtype: torch.dtype):
    """``-+ grads + weight_decay * params``, 0 in frozen rows."""
    step = _select(active, grads.to(dtype))
    if maximize:
        step = -step
    if weight_decay != 0.0:
        step = step + weight_decay * _select(active, params.to(dtype))
    return step


def sgd_step(
    params: Tensor | None,
    grads: Tensor,
    lr: Tensor | None,
    offsets: Tensor | None,
    active: Tensor | None,
    lr_value: float,
    weight_decay: float,
    maximize: bool,
) -> Tensor:
    """What :func:`sgd_update` subtracts, ``lr * (grads + weight_decay * params)``."""
    dtype = accumulation_dtype(grads.dtype)
    rate = _select(active, spread_rate(lr, offsets, lr_value, grads.shape[1]))
    return rate * _direction(params, grads, active, weight_decay, maximize, dtype)


def sgd_update(
    params: Tensor,
    grads: Tensor,
    lr: Tensor | None,
    offsets: Tensor | None,
    active: Tensor | None,
    lr_value: float,
    weight_decay: float,
    maximize: bool,
) -> Tensor:
    """``params - lr * (grads + weight_decay * params)``, rounded once to the dtype of params."""
    step = sgd_step(params, grads, lr, offsets, active, lr_value, weight_decay, maximize)
    return (params.to(step.dtype) - step).to(params.dtype).contiguous()


def sgd_update_(params: Tensor, *args) -> None:
    """:func:`sgd_update` written over ``params``."""
    params.copy_(sgd_update(params, *args))


def sgd_update_backward(
    d_out: Tensor,
    params: Tensor | None,
    grads: Tensor | None,
    lr: Tensor | None,
    offsets: Tensor | None,
    active: Tensor | None,
    lr_value: float,
    weight_decay: float,
    maximize: bool,
    grads_dtype: torch.dtype,
    need_params: bool,
    need_grads: bool,
    need_lr: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of :func:`sgd_update`; an unneeded result is an empty tensor.

    d_params = d_out * (1 - lr * weight_decay), d_grads = -lr * d_out, and d_lr is
    ``-d_out * (grads + weight_decay * params)`` summed to the shape of lr. ``grads`` is read only
    for d_lr, ``params`` only for d_lr with weight decay.
    """
    dtype = accumulation_dtype(d_out.dtype)
    moving = _select(active, d_out.to(dtype))
    rate = _select(active, spread_rate(lr, offsets, lr_value, d_out.shape[1]))
    d_params, d_grads, d_lr = (d_out.new_empty(0) for _ in range(3))
    if need_params:
        d_params = (d_out.to(dtype) - rate * weight_decay * moving).to(d_out.dtype).contiguous()
    if need_grads:
        d_grads = (moving * (rate if maximize else -rate)).to(grads_dtype).contiguous()
    if need_lr:
        step = _direction(params, grads, active, weight_decay, maximize, dtype)
        d_lr = sum_to_rate(-moving * step, lr, offsets).contiguous()
    return d_params, d_grads, d_lr
