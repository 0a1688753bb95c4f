"""Calls of the update rules: arguments checked, then the operator.

Every error is raised before anything is changed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._autograd import needs_autograd
from fastmeta.ops._inner_update import Rule, by_reference, run, run_, run_list_
from fastmeta.reference.inner_update import FIRST, MAX_HYPERS, MAXIMIZE

Number = float | Tensor


class Layout(Protocol):
    """Anything that knows how a row is divided, such as a patched model's ``ParamLayout``."""

    def segment_offsets(self, device: torch.device) -> Tensor:
        """int64 ``[S + 1]``: where each segment starts, from 0 to P."""
        ...


# ranges of the hyperparameters after weight decay and gradient scale: (name, bounds)
_UNIT = {"at_least": 0.0, "below": 1.0}
_CLOSED = {"at_least": 0.0, "at_most": 1.0}
_RANGES = {
    "sgd": (),
    "momentum": (("momentum", _CLOSED), ("dampening", _CLOSED)),
    "adam": (("betas[0]", _UNIT), ("betas[1]", _UNIT), ("eps", {"above": 0.0})),
    "adamw": (("betas[0]", _UNIT), ("betas[1]", _UNIT), ("eps", {"above": 0.0})),
    "rmsprop": (("alpha", _CLOSED), ("eps", {"above": 0.0})),
    "adagrad": (("lr_decay", {"at_least": 0.0}), ("eps", {"above": 0.0})),
}
_COUNTING = ("adam", "adamw", "adagrad")
"""Rules that depend on the number of the step."""


def _prepare(
    op: str,
    rule: Rule,
    params,
    grads,
    state,
    lr,
    numbers,
    *,
    step=None,
    extra_flags: int = 0,
    active=None,
    check_finite: bool = False,
    grad_scale: Number = 1.0,
    maximize: bool = False,
    segments: Tensor | Layout | None = None,
) -> tuple:
    """The arguments of `run` and `run_`; every error is raised here, before any change."""
    _checks.params_and_grads(op, params, grads)
    for name, tensor in zip(rule.states, state, strict=True):
        if tensor is not None or not extra_flags & FIRST:
            _checks.state(op, name, tensor, params)
    values = _numbers(op, rule, numbers, grad_scale, step)
    if segments is not None:
        segments = _checks.segment_offsets(op, segments, params)
    if active is not None:
        active = _checks.active_tasks(op, active, params)
    lr_value, rate = _checks.learning_rate(op, lr, params, segments)
    if rate is None or rate.shape[1] == 1:
        segments = None  # the same rate in every segment
    if rate is not None:
        _checks.finite_rate(op, rate, active)
    values, hypers = _checks.hyperparameters(op, values, params)
    flags = extra_flags | (MAXIMIZE if maximize else 0)
    return (rate, segments, active, hypers), (lr_value, values, flags), bool(check_finite)


def _numbers(op: str, rule: Rule, numbers, grad_scale, step) -> list[Number]:
    """The hyperparameters in the order of the kernels, checked."""
    weight_decay, *own = numbers
    _checks.in_range(op, "weight_decay", weight_decay, at_least=0.0)
    _checks.in_range(op, "grad_scale", grad_scale)
    for (name, bounds), value in zip(_RANGES[rule.name], own, strict=True):
        _checks.in_range(op, name, value, **bounds)
    values = [weight_decay, grad_scale, *own]
    if rule.name in _COUNTING:
        _checks.in_range(op, "step", step, at_least=1)
        values.append(step.detach() if isinstance(step, Tensor) else float(step))
    return values


def call(rule: Rule, params, grads, state, lr, numbers, **options):
    """The functional form; `numbers` are weight decay and the rule's own settings."""
    op = f"{rule.name}_update"
    if isinstance(params, (list, tuple)):
        raise ValueError(
            f"{op}: params must be one tensor [T, P], got a {type(params).__name__}; {op}_ updates "
            "lists in place, fm.optim differentiably"
        )
    prepared = _prepare(op, rule, params, grads, state, lr, numbers, **options)
    results, finite = run(rule, params, grads, state, *prepared)
    return _pack(results, finite)


def call_(rule: Rule, params, grads, state, lr, numbers, **options):
    """The form in place."""
    op = f"{rule.name}_update_"
    if isinstance(params, (list, tuple)):
        return _call_list_(op, rule, params, grads, state, lr, numbers, **options)
    rates, constants, check = _prepare(op, rule, params, grads, state, lr, numbers, **options)
    if needs_autograd(params, grads, *state, rates[0], rates[3]):
        raise _no_derivative(op)
    written = (params, *state)
    named = dict(zip(("params", *rule.states), written, strict=True))
    _checks.written_rows(op, named, {"grads": grads, "lr": rates[0]})
    finite = run_(rule, params, grads, state, rates, constants, check)
    _mark_written(written)
    return _pack(written, finite)


def _call_list_(
    op: str,
    rule: Rule,
    params,
    grads,
    state,
    lr,
    numbers,
    *,
    step=None,
    extra_flags: int = 0,
    grad_scale: Number = 1.0,
    maximize: bool = False,
    **refused,
):
    """The in-place form for lists of tensors."""
    if refused:
        raise ValueError(f"{op}: {', '.join(refused)} needs params [T, P], got a list of tensors")
    values = _numbers(op, rule, numbers, grad_scale, step)
    for value in (lr, *values):
        if isinstance(value, Tensor):
            raise ValueError(f"{op}: lists of tensors need plain numbers, got a tensor among them")
    lr, _ = _checks.learning_rate(op, lr, params, None)
    values = [*map(float, values), *[0.0] * (MAX_HYPERS - len(values))]
    flags = extra_flags | (MAXIMIZE if maximize else 0)
    written = (params, *state)
    lists = {"params": params, "grads": grads, **dict(zip(rule.states, state, strict=True))}
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for group in lists.values() for t in group
    ):
        raise _no_derivative(op)
    alike = all(isinstance(g, list | tuple) and len(g) == len(params) for g in lists.values())
    if not alike or by_reference(rule, params[0] if params else None):
        _checks.tensor_lists(op, lists)
    if params:
        try:
            run_list_(rule, list(params), grads, state, lr, values, flags)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            _checks.tensor_lists(op, lists)  # says what does not fit, which kernels only notice
            raise
        _mark_written([t for group in written for t in group])
    return written[0] if len(written) == 1 else written


def _mark_written(tensors) -> None:
    """So that autograd notices where a tensor that it saved has changed since."""
    if not any(t.is_inference() for t in tensors):
        torch.autograd.graph.increment_version(tensors)


def _no_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op} has no derivative: call {op[:-1]}, or this one under torch.no_grad() "
        "and outside torch.func transforms"
    )


def _pack(results, finite):
    if finite is not None:
        return (*results, finite)
    return results[0] if len(results) == 1 else tuple(results)
