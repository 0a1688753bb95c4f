"""Task-batched inner updates over packed fast weights ``[T, P]``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import Function, batch_rows, needs_autograd
from fastmeta._library import define
from fastmeta.reference import inner_update as reference

_ARGS = (
    "Tensor? lr, Tensor? offsets, Tensor? active, float lr_value, float weight_decay, bool maximize"
)
_UPDATE = define(
    f"sgd_update(Tensor params, Tensor grads, {_ARGS}) -> Tensor", reference.sgd_update
)
_UPDATE_ = define(
    f"sgd_update_(Tensor(a!) params, Tensor grads, {_ARGS}) -> ()", reference.sgd_update_
)
_BACKWARD = define(
    f"sgd_update_backward(Tensor d_out, Tensor? params, Tensor? grads, {_ARGS}, "
    "ScalarType grads_dtype, bool need_params, bool need_grads, bool need_lr) "
    "-> (Tensor, Tensor, Tensor)",
    reference.sgd_update_backward,
)


class Layout(Protocol):
    """Anything that knows how a row is divided, such as a patched model's ``ParamLayout``."""

    def segment_offsets(self, device: torch.device) -> Tensor:
        """int64 ``[S + 1]``: where each segment starts, from 0 to P."""
        ...


def sgd_update(
    params: Tensor,
    grads: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.0,
    maximize: bool = False,
    active: Tensor | None = None,
    segments: Tensor | Layout | None = None,
) -> Tensor:
    """One descent step for every task: ``params - lr * (grads + weight_decay * params)``.

    The semantics are those of ``torch.optim.SGD`` without momentum.

    Args:
        params: Tensor ``[T, P]``, float32, float64, bfloat16 or float16. May be an expanded view,
            such as one row shared by all tasks.
        grads: Tensor ``[T, P]`` of the same dtype, or bfloat16 or float16 with float32 params.
        lr: learning rate: a number, or a tensor that is a scalar, ``[T]``, ``[P]``, ``[T, P]``,
            ``[T, 1]`` or ``[1, P]``; with ``segments``: a scalar, ``[S]``, ``[T, S]``, ``[T, 1]``
            or ``[1, S]``. Where T = P, one axis is ambiguous and refused: pass ``lr[:, None]`` (per
            task) or ``lr[None, :]`` (per parameter). Any sign; used in float32 (float64 with
            float64 params).
        weight_decay: factor of the L2 penalty, >= 0. Default 0.
        maximize: step along the gradient instead of against it. Default False.
        active: bool ``[T]``; a task with False is frozen: its parameters come back unchanged, and
            its gradients, even NaN or Inf, reach no result and no derivative. Default: all active.
        segments: int64 ``[S + 1]`` rising from 0 to P (segment s owns columns ``segments[s]`` to
            ``segments[s + 1] - 1``), or a layout with ``segment_offsets(device)``.

    Returns:
        Tensor ``[T, P]``, contiguous, in the dtype and on the device of ``params``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an ambiguous ``lr``.

    Note:
        Differentiable to any order in reverse mode with respect to ``params``, ``grads`` and
        ``lr``, also under ``torch.func.grad`` and ``vmap``; forward mode raises. Two runs give
        equal bits.
    """
    args = _prepare("sgd_update", params, grads, lr, weight_decay, maximize, active, segments)
    if _backend.use_reference():
        return reference.sgd_update(*args)
    return _update(*args)


def sgd_update_(
    params: Tensor,
    grads: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.0,
    maximize: bool = False,
    active: Tensor | None = None,
    segments: Tensor | Layout | None = None,
) -> Tensor:
    """:func:`sgd_update` written over ``params``, without derivatives.

    Args:
        params: Tensor ``[T, P]`` whose elements do not share memory; overwritten.
        grads, lr, weight_decay, maximize, active, segments: as for :func:`sgd_update`.

    Returns:
        ``params``.

    Raises:
        ValueError: as for :func:`sgd_update`, or ``params`` is an expanded view.
        RuntimeError: a gradient would have to flow through the call.
    """
    args = _prepare("sgd_update_", params, grads, lr, weight_decay, maximize, active, segments)
    if needs_autograd(params, grads, args[2]):
        raise RuntimeError(
            "sgd_update_ has no derivative: call sgd_update, or this one under torch.no_grad() "
            "and outside torch.func transforms"
        )
    if 0 in params.stride() and params.numel() > 1 and not params.is_contiguous():
        raise ValueError(
            f"sgd_update_: params must not be an expanded view, got strides {params.stride()}"
        )
    if _backend.use_reference():
        reference.sgd_update_(*args)
    else:
        _backend.kernel(_UPDATE_, params.device.type)(*args)
    return params


def _prepare(op, params, grads, lr, weight_decay, maximize, active, segments) -> tuple:
    """The arguments of the raw operator; every error is raised here, before any change."""
    _checks.params_and_grads(op, params, grads)
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"{op}: weight_decay must be finite and >= 0, got {weight_decay}")
    if segments is not None:
        segments = _checks.segment_offsets(op, segments, params)
    value, rate = _checks.learning_rate(op, lr, params, segments)
    if rate is None or rate.shape[1] == 1:
        segments = None  # the same rate in every segment
    if active is not None:
        active = _checks.active_tasks(op, active, params)
    return params, grads, rate, segments, active, value, float(weight_decay), bool(maximize)


def _update(params, grads, lr, *rest) -> Tensor:
    if needs_autograd(params, grads, lr):
        return _Update.call(params, grads, lr, *rest)
    return _backend.kernel(_UPDATE, params.device.type)(params, grads, lr, *rest)


def _backward(d_out, params, grads, lr, *rest) -> tuple[Tensor, ...]:
    """The needed ones of d_params, d_grads, d_lr; ``rest`` ends with the three need flags."""
    if not any(rest[-3:]):
        return ()
    if needs_autograd(d_out, params, grads, lr):
        return _Backward.call(d_out, params, grads, lr, *rest)
    return _run_backward(d_out, params, grads, lr, *rest)


def _run_backward(d_out, *rest) -> tuple[Tensor, ...]:
    results = _backend.kernel(_BACKWARD, d_out.device.type)(d_out, *rest)
    return tuple(r for r, need in zip(results, rest[-3:], strict=True) if need)


class _Update(Function):
    """``sgd_update`` with its first derivative, which is :class:`_Backward`."""

    @staticmethod
    def forward(params, grads, lr, *rest):
        return _backend.kernel(_UPDATE, params.device.type)(params, grads, lr, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        params, grads, lr, offsets, active, *constants = inputs
        learned = ctx.needs_input_grad[2]
        ctx.constants = (*constants, grads.dtype)
        weight_decay = constants[1]
        ctx.save_for_backward(
            params if learned and weight_decay else None,
            grads if learned else None,
            lr,
            offsets,
            active,
        )

    @staticmethod
    def backward(ctx, d_out):
        need_params, need_grads, need_lr = ctx.needs_input_grad[:3]
        decays = ctx.constants[1] != 0.0
        needs = (need_params and decays, need_grads, need_lr)
        results = iter(_backward(d_out, *ctx.saved_tensors, *ctx.constants, *needs))
        found = [next(results) if need else None for need in needs]
        if need_params and not decays:
            found[0] = d_out  # the Jacobian is the identity
        return (*found, *[None] * 5)

    @staticmethod
    def vmap(info, in_dims, params, *rest):
        tasks = _tasks(params, in_dims[0])
        folded = _fold(info.batch_size, tasks, in_dims, (params, *rest[:4]), keep_shared_lr=True)
        out = _update(*folded, *rest[4:])
        return out.unflatten(0, (info.batch_size, tasks)), 0


class _Backward(Function):
    """The vector-Jacobian product of ``sgd_update``. It is bilinear: its own derivative needs only
    ``sgd_update`` and itself again, so every order follows."""

    @staticmethod
    def forward(d_out, *rest):
        return _run_backward(d_out, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.constants = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        d_out, params, grads, lr, offsets, active = ctx.saved_tensors
        lr_value, weight_decay, maximize, grads_dtype, *needs = ctx.constants
        given = iter(cotangents)
        # cotangents of d_params, d_grads, d_lr: same shapes as params, grads, lr
        a, b, c = (next(given) if need else None for need in needs)
        rules = (weight_decay, maximize)
        got: list[Tensor | None] = [None] * 13
        if a is not None or b is not None:
            a = torch.zeros_like(d_out) if a is None else a
            b = torch.zeros_like(d_out, dtype=grads_dtype) if b is None else b
            if ctx.needs_input_grad[0]:
                got[0] = _update(a, b, lr, offsets, active, lr_value, *rules)
            if ctx.needs_input_grad[3]:
                only_lr = (grads_dtype, False, False, True)
                (got[3],) = _backward(d_out, a, b, lr, offsets, active, lr_value, *rules, *only_lr)
        if c is not None:
            if ctx.needs_input_grad[0]:
                step = reference.sgd_step(params, grads, c, offsets, active, 0.0, *rules)
                step = step.to(d_out.dtype)
                got[0] = -step if got[0] is None else got[0] - step
            for i, factor in ((1, weight_decay), (2, 1.0)):
                if ctx.needs_input_grad[i]:
                    dtype = d_out.dtype if i == 1 else grads_dtype
                    only_grads = (dtype, False, True, False)
                    # -+ c * d_out: what d_grads is for a learning rate of c
                    (term,) = _backward(
                        d_out, None, None, c, offsets, active, 0.0, *rules, *only_grads
                    )
                    got[i] = term if i == 2 else term * (-factor if maximize else factor)
        return tuple(got)

    @staticmethod
    def vmap(info, in_dims, d_out, *rest):
        batch, tasks = info.batch_size, _tasks(d_out, in_dims[0])
        lr, need_lr = rest[2], rest[-1]
        shared_rows = need_lr and _tasks(lr, in_dims[3]) == 1
        folded = _fold(batch, tasks, in_dims, (d_out, *rest[:5]), keep_shared_lr=not need_lr)
        results = list(_backward(*folded, *rest[5:]))
        results = [r.unflatten(0, (batch, tasks)) for r in results]
        if shared_rows:
            results[-1] = results[-1].sum(1, keepdim=True)
        return tuple(results), (0,) * len(results)


def _tasks(tensor: Tensor, dim: int | None) -> int:
    """T of a ``[T, ...]`` tensor that carries a vmapped axis at ``dim``."""
    return tensor.shape[1 if dim == 0 else 0]


def _fold(batch, tasks, in_dims, tensors, *, keep_shared_lr) -> tuple:
    """Turn a vmapped axis into more tasks. ``tensors`` ends with lr, offsets, active."""
    *rows, lr, offsets, active = tensors
    lr_dim, offsets_dim, active_dim = in_dims[len(rows) : len(rows) + 3]
    if offsets_dim is not None:
        raise ValueError("segments must be the same for the whole vmapped axis")
    folded = [batch_rows(t, d, batch, tasks) for t, d in zip(rows, in_dims, strict=False)]
    if not (keep_shared_lr and lr is not None and lr_dim is None and lr.shape[0] == 1):
        lr = batch_rows(lr, lr_dim, batch, tasks)
    return (*folded, lr, offsets, batch_rows(active, active_dim, batch, tasks))
