"""Task-batched inner updates over packed fast weights ``[T, P]``.

Every rule has a functional form, differentiable twice, and one in place (trailing ``_``) without
derivatives. Both take these keyword arguments:

    active: bool ``[T]``; a task with False is frozen: its parameters and state come back unchanged,
        and its gradients, even NaN or Inf, reach no result and no derivative. Default: all active.
    check_finite: freeze each task whose gradient holds a NaN, an Inf or a number whose square is
        Inf (from 1.8e19 in float32, 1.3e154 in float64) as well, and say so: the result gains a
        last element, bool ``[T]``, False for these tasks (True for tasks frozen by `active`, which
        are not read). Default False.
    grad_scale: factor of the gradients, a number or tensor like `weight_decay`, such as a clipping
        factor from :func:`clip_scale`. Default 1.
    maximize: step along the gradient instead of against it. Default False.
    segments: int64 ``[S + 1]`` rising from 0 to P (segment s owns columns ``segments[s]`` to
        ``segments[s + 1] - 1``), or a layout with ``segment_offsets(device)``; then `lr` is per
        segment. Default None.

Learning rates and hyperparameters that are tensors receive gradients. On the CPU a tensor that
holds a NaN, an Inf or a value out of range is refused; on other devices that would stop the queue,
so there it is not looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._dtypes import wide_dtype
from fastmeta.ops._inner_update import Rule
from fastmeta.ops._update_calls import Number, call, call_
from fastmeta.reference.inner_update import FIRST, NESTEROV

_SGD = Rule.define("sgd", (), linear=True)
_MOMENTUM = Rule.define("momentum", ("buf",), linear=True)
_ADAM = Rule.define("adam", ("exp_avg", "exp_avg_sq"), linear=False)
_ADAMW = Rule.define("adamw", ("exp_avg", "exp_avg_sq"), linear=False)
_RMSPROP = Rule.define("rmsprop", ("square_avg",), linear=False)
_ADAGRAD = Rule.define("adagrad", ("state_sum",), linear=False)


def sgd_update(
    params: Tensor, grads: Tensor, lr: Number, *, weight_decay: Number = 0.0, **common
) -> Tensor:
    """One descent step for every task: ``params - lr (grads + weight_decay params)``.

    The semantics are those of ``torch.optim.SGD`` without momentum.

    Args:
        params: ``[T, P]``, float32, float64, bfloat16 or float16. May be an expanded view, such as
            one row shared by all tasks.
        grads: ``[T, P]`` of the same dtype, or bfloat16 or float16 with float32 params.
        lr: learning rate: a number, or a tensor that is a scalar, ``[T]``, ``[P]``, ``[T, P]``,
            ``[T, 1]`` or ``[1, P]``; with ``segments``: a scalar, ``[S]``, ``[T, S]``, ``[T, 1]``
            or ``[1, S]``. Where T = P, one axis is ambiguous and refused: pass ``lr[:, None]`` (per
            task) or ``lr[None, :]`` (per parameter). Any sign; used in float32 (float64 with
            float64 params).
        weight_decay: factor of the L2 penalty, >= 0; a number, or a tensor that is a scalar,
            ``[T]`` or ``[T, 1]``. Default 0.
        **common: ``active``, ``check_finite``, ``grad_scale``, ``maximize``, ``segments``: see the
            module :mod:`fastmeta.ops.inner_update`.

    Returns:
        ``[T, P]``, contiguous, in the dtype and on the device of ``params``; with ``check_finite``
        a pair with bool ``[T]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an ambiguous ``lr``, a number out of
            its range.

    Note:
        Differentiable twice in reverse mode with respect to every tensor, also under
        ``torch.func.grad`` and ``vmap``; forward mode raises. Two runs give equal bits.
    """
    return call(_SGD, params, grads, (), lr, (weight_decay,), **common)


def momentum_update(
    params: Tensor,
    grads: Tensor,
    buf: Tensor | None,
    lr: Number,
    *,
    momentum: Number = 0.9,
    dampening: Number = 0.0,
    nesterov: bool = False,
    weight_decay: Number = 0.0,
    **common,
) -> tuple[Tensor, ...]:
    """Descent with momentum: ``b = momentum buf + (1 - dampening) g``, ``params - lr b``.

    With g = ``grads + weight_decay params``. The semantics are those of ``torch.optim.SGD``.

    Args:
        params, grads, lr, weight_decay, **common: as for :func:`sgd_update`.
        buf: ``[T, P]`` in the dtype of ``params``; None at the first step, where b is g.
        momentum, dampening: in [0, 1]; numbers or tensors like `weight_decay`. Defaults 0.9, 0.
        nesterov: step along ``g + momentum b``; needs a dampening of 0. Default False.

    Returns:
        ``(params, buf)``; with ``check_finite`` also bool ``[T]``. Raises and derivatives: as for
        :func:`sgd_update`.

    Source: Sutskever et al. 2013, http://proceedings.mlr.press/v28/sutskever13.html
    """
    first = buf is None
    extra = _momentum_flags(momentum, dampening, nesterov, first)
    return call(
        _MOMENTUM,
        *(params, grads, (buf,), lr, (weight_decay, momentum, dampening)),
        extra_flags=extra,
        **common,
    )


def adam_update(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Number,
    lr: Number,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    **common,
) -> tuple[Tensor, ...]:
    """Adam: ``params - lr m' / (sqrt(v') + eps)`` with running means m of g and v of g^2.

    g = ``grads + weight_decay params``, ``m = beta1 exp_avg + (1 - beta1) g``,
    ``v = beta2 exp_avg_sq + (1 - beta2) g^2``, ``m' = m / (1 - beta1^step)``,
    ``v' = v / (1 - beta2^step)``. The semantics are those of ``torch.optim.Adam`` without amsgrad.

    Args:
        params, grads, lr, weight_decay, **common: as for :func:`sgd_update`.
        exp_avg, exp_avg_sq: ``[T, P]`` in the dtype of ``params``; zeros before the first step.
        step: which step this is, from 1: a number, or a tensor that is a scalar or ``[T]``; it has
            no derivative.
        betas: in [0, 1); numbers or tensors like `weight_decay`. Default (0.9, 0.999).
        eps: above 0; a number or tensor like `weight_decay`. Default 1e-8.

    Returns:
        ``(params, exp_avg, exp_avg_sq)``; with ``check_finite`` also bool ``[T]``.

    Raises:
        ValueError: as for :func:`sgd_update`, or state of another shape.

    Note:
        Differentiable as :func:`sgd_update`. The derivative of ``sqrt(v)`` at ``v = 0`` is taken as
        0, so that a coordinate which never saw a gradient has finite derivatives.

    Source: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980
    """
    numbers = (weight_decay, *_pair(betas), eps)
    return call(_ADAM, params, grads, (exp_avg, exp_avg_sq), lr, numbers, step=step, **common)


def adamw_update(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Number,
    lr: Number,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    **common,
) -> tuple[Tensor, ...]:
    """:func:`adam_update` of ``params (1 - lr weight_decay)``, with g = ``grads``.

    The semantics are those of ``torch.optim.AdamW`` without amsgrad. Arguments, results and
    derivatives are those of :func:`adam_update`; ``weight_decay`` is 0.01 by default.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    """
    numbers = (weight_decay, *_pair(betas), eps)
    return call(_ADAMW, params, grads, (exp_avg, exp_avg_sq), lr, numbers, step=step, **common)


def rmsprop_update(
    params: Tensor,
    grads: Tensor,
    square_avg: Tensor,
    lr: Number,
    *,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    **common,
) -> tuple[Tensor, ...]:
    """RMSprop: ``v = alpha square_avg + (1 - alpha) g^2``, ``params - lr g / (sqrt(v) + eps)``.

    With g = ``grads + weight_decay params``. The semantics are those of ``torch.optim.RMSprop``,
    neither centered nor with momentum.

    Args:
        params, grads, lr, weight_decay, **common: as for :func:`sgd_update`.
        square_avg: ``[T, P]`` in the dtype of ``params``; zeros before the first step.
        alpha: in [0, 1]; a number or tensor like `weight_decay`. Default 0.99.
        eps: above 0; a number or tensor like `weight_decay`. Default 1e-8.

    Returns:
        ``(params, square_avg)``; with ``check_finite`` also bool ``[T]``. Raises and derivatives:
        as for :func:`adam_update`.
    """
    numbers = (weight_decay, alpha, eps)
    return call(_RMSPROP, params, grads, (square_avg,), lr, numbers, **common)


def adagrad_update(
    params: Tensor,
    grads: Tensor,
    state_sum: Tensor,
    step: Number,
    lr: Number,
    *,
    lr_decay: Number = 0.0,
    eps: Number = 1e-10,
    weight_decay: Number = 0.0,
    **common,
) -> tuple[Tensor, ...]:
    """Adagrad: ``s = state_sum + g^2``, ``params - lr' g / (sqrt(s) + eps)``.

    With g = ``grads + weight_decay params`` and ``lr' = lr / (1 + (step - 1) lr_decay)``. The
    semantics are those of ``torch.optim.Adagrad``.

    Args:
        params, grads, lr, weight_decay, **common: as for :func:`sgd_update`.
        state_sum: ``[T, P]`` in the dtype of ``params``.
        step: which step this is, from 1: as for :func:`adam_update`.
        lr_decay: >= 0; a number or tensor like `weight_decay`. Default 0.
        eps: above 0; a number or tensor like `weight_decay`. Default 1e-10.

    Returns:
        ``(params, state_sum)``; with ``check_finite`` also bool ``[T]``. Raises and derivatives:
        as for :func:`adam_update`.

    Source: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    numbers = (weight_decay, lr_decay, eps)
    return call(_ADAGRAD, params, grads, (state_sum,), lr, numbers, step=step, **common)


def sgd_update_(params, grads, lr, *, weight_decay=0.0, **common):
    """:func:`sgd_update` written over ``params``.

    Args:
        params: ``[T, P]`` whose elements share memory neither with each other nor with the state;
            overwritten. Or a list of contiguous tensors of any shapes and one dtype, as an
            optimizer of existing training code holds them; `grads` and the state of other rules are
            then lists too, all numbers are plain numbers, and of `common` only ``grad_scale`` and
            ``maximize`` apply. All tensors are updated in one call.
        grads, lr, weight_decay, **common: as for :func:`sgd_update`.

    Returns:
        ``params``; with ``check_finite`` a pair with bool ``[T]``. Gradients are then checked
        before anything is written, in a pass of their own.

    Raises:
        ValueError: as for :func:`sgd_update`, or elements that would be written share memory.
        RuntimeError: a gradient would have to flow through the call.
    """
    return call_(_SGD, params, grads, (), lr, (weight_decay,), **common)


def momentum_update_(
    params,
    grads,
    buf,
    lr,
    *,
    momentum=0.9,
    dampening=0.0,
    nesterov=False,
    weight_decay=0.0,
    **common,
):
    """:func:`momentum_update` written over ``params`` and ``buf`` (None: the first step, a new
    buffer is made).

    Returns ``(params, buf)``; else as for :func:`sgd_update_`.
    """
    extra = _momentum_flags(momentum, dampening, nesterov, buf is None)
    numbers = (weight_decay, momentum, dampening)
    if buf is None and isinstance(params, Tensor):
        buf = torch.zeros_like(params, memory_format=torch.contiguous_format)
    elif buf is None and isinstance(params, (list, tuple)):
        buf = [torch.zeros_like(p) if isinstance(p, Tensor) else None for p in params]
    return call_(_MOMENTUM, params, grads, (buf,), lr, numbers, extra_flags=extra, **common)


def adam_update_(
    params,
    grads,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    **common,
):
    """:func:`adam_update` written over ``params``, ``exp_avg`` and ``exp_avg_sq``, as
    :func:`sgd_update_`."""
    numbers = (weight_decay, *_pair(betas), eps)
    return call_(_ADAM, params, grads, (exp_avg, exp_avg_sq), lr, numbers, step=step, **common)


def adamw_update_(
    params,
    grads,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    **common,
):
    """:func:`adamw_update` written over ``params``, ``exp_avg`` and ``exp_avg_sq``, as
    :func:`sgd_update_`."""
    numbers = (weight_decay, *_pair(betas), eps)
    return call_(_ADAMW, params, grads, (exp_avg, exp_avg_sq), lr, numbers, step=step, **common)


def rmsprop_update_(
    params, grads, square_avg, lr, *, alpha=0.99, eps=1e-8, weight_decay=0.0, **common
):
    """:func:`rmsprop_update` written over ``params`` and ``square_avg``, as :func:`sgd_update_`."""
    numbers = (weight_decay, alpha, eps)
    return call_(_RMSPROP, params, grads, (square_avg,), lr, numbers, **common)


def adagrad_update_(
    params, grads, state_sum, step, lr, *, lr_decay=0.0, eps=1e-10, weight_decay=0.0, **common
):
    """:func:`adagrad_update` written over ``params`` and ``state_sum``, as :func:`sgd_update_`."""
    numbers = (weight_decay, lr_decay, eps)
    return call_(_ADAGRAD, params, grads, (state_sum,), lr, numbers, step=step, **common)


def clip_scale(grads: Tensor, max_norm: float) -> Tensor:
    """Factors that scale each task's gradient to a norm of at most ``max_norm``.

    ``min(1, max_norm / |grads[t]|)``, to be given as ``grad_scale`` to an update, which multiplies
    on its way through memory.

    Args:
        grads: ``[T, P]``.
        max_norm: above 0.

    Returns:
        ``[T]``, float32 (float64 for float64 gradients), differentiable to any order, also where
        a gradient is 0. Where the norm overflows the factor is 0.

    Raises:
        ValueError: ``grads`` is not a floating-point ``[T, P]``, or ``max_norm`` not above 0.
    """
    _checks.rows("clip_scale", "grads", grads)
    _checks.in_range("clip_scale", "max_norm", max_norm, above=0.0)
    dtype = wide_dtype(grads.dtype)
    grads = grads.to(dtype)
    square = torch.linalg.vecdot(grads, grads)
    over = square > max_norm**2
    # the root is taken where it is needed only: at 0 it has no derivative
    return torch.where(over, max_norm * torch.where(over, square, 1.0).rsqrt(), 1.0)


def _pair(betas) -> tuple[Number, Number]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers or tensors, got {betas!r}")
    return tuple(betas)


def _momentum_flags(momentum, dampening, nesterov: bool, first: bool) -> int:
    if nesterov and isinstance(dampening, (int, float)) and dampening != 0:
        raise ValueError(f"nesterov needs a dampening of 0, got dampening={dampening}")
    return (NESTEROV if nesterov else 0) | (FIRST if first else 0)
