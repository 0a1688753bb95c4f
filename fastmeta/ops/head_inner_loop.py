"""The inner loop of a linear head: all steps of all tasks in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._autograd import outside_autocast
from fastmeta._checks import describe
from fastmeta._dtypes import wide_dtype
from fastmeta._settings import integer, is_integer, is_number
from fastmeta.ops import _head_inner_loop

IGNORED = -100


@outside_autocast
def head_inner_loop(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: float | Tensor,
    steps: int,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ways: Tensor | None = None,
    active: Tensor | None = None,
    truncate: int | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, ...]:
    """K steps of gradient descent on a linear classifier, for every task, from fixed features.

    ``W_{k+1} = W_k - lr_k U_k`` with ``U_k = momentum U_{k-1} + dL/dW_k + weight_decay W_k``
    (``U_0`` without momentum), the same for the bias, and L the mean over a task's labelled rows of
    ``cross_entropy(x W^T + b, label)``. The semantics are those of ``torch.optim.SGD``.

    Args:
        features: ``[T, N, D]``, float32, float64, bfloat16 or float16.
        labels: int64 ``[T, N]`` in ``[0, C)``; -100 for rows that do not count, of which nothing,
            not even a NaN, reaches a result. On the CPU others are refused, elsewhere ignored.
        weight: where all tasks start, ``[C, D]``, or each, ``[T, C, D]``; float64 with float64
            features, else float32.
        bias: ``[C]`` or ``[T, C]`` in the dtype of ``weight``, or None.
        lr: learning rate: a number, or a tensor that is a scalar, ``[T]``, ``[K]``, ``[T, K]``,
            ``[T, 1]`` or ``[1, K]``. Where T = K, one axis is ambiguous and refused: pass
            ``lr[:, None]`` (per task) or ``lr[None, :]`` (per step).
        steps: K, at least 1.
        momentum: in [0, 1). Default 0.
        weight_decay: factor of the L2 penalty on weight and bias, >= 0. Default 0.
        ways: int64 ``[T]``, the number of classes of each task, 1 to C: logits beyond are -inf.
            Default: C for all.
        active: bool ``[T]``; a task with False comes back as it started. Default: all active.
        truncate: differentiate the last this many inner gradients, 0 to K; the others count as
            constants (0 is first order). Default None: all.
        check_finite: keep a task whose loss or gradient (or a product of its features, which are
            squared here) becomes NaN or Inf at its weights from before that step, and say so.
            Default False: such a task comes back as NaN. Either way it leaves all other tasks, and
            every gradient they contribute to, untouched.

    Returns:
        ``(weight [T, C, D], bias [T, C] or None)``, contiguous, in the dtype of ``weight``. With
        ``check_finite`` also the losses before each step, ``[T, K]`` without gradient, and bool
        ``[T]``, False for tasks that became NaN or Inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, labels out of range, an ambiguous
            ``lr``, a number out of its range.

    Note:
        Differentiable in reverse mode to any order with respect to features, weight, bias and lr,
        also under ``torch.func.grad`` and ``vmap``; forward mode raises. Values and first
        derivatives are one kernel each; higher derivatives differentiate the reference in plain
        torch. Two runs give equal bits.

    Source: the inner loop of ANIL, Raghu et al. 2020, https://arxiv.org/abs/1909.09157
    """
    _check_tensors(features, labels, weight, bias)
    tasks, _, width = features.shape
    classes = weight.shape[-2]
    integer(f"{_OP}: steps", steps)
    for name, value, bounds in (
        ("momentum", momentum, {"at_least": 0.0, "below": 1.0}),
        ("weight_decay", weight_decay, {"at_least": 0.0}),
    ):
        if isinstance(value, Tensor):
            raise ValueError(f"{_OP}: {name} must be a number, got {describe(value)}")
        _checks.in_range(_OP, name, value, **bounds)
    exact = steps if truncate is None else truncate
    if not is_integer(exact) or not 0 <= exact <= steps:
        raise ValueError(
            f"{_OP}: truncate must be None or an integer in 0..{steps}, got {truncate!r}"
        )
    if active is not None:
        active = _checks.active_tasks(_OP, active, features)
    if ways is not None:
        ways = _check_ways(ways, tasks, classes, features)
    _check_labels(labels, classes, ways)
    lr_value, rate = _rates(lr, tasks, steps, features, weight.dtype, active)
    if weight.dim() == 2:
        weight = weight.expand(tasks, classes, width)
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(tasks, classes)
    new_weight, new_bias, losses, taken = _head_inner_loop.run(
        (features, labels, weight, bias, rate, ways, active),
        (lr_value, float(momentum), float(weight_decay), steps, exact, bool(check_finite)),
    )
    if not check_finite:
        return new_weight, new_bias
    finite = taken == steps
    return new_weight, new_bias, losses, finite if active is None else finite | ~active


_OP = "head_inner_loop"


def _check_tensors(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if (
        not isinstance(features, Tensor)
        or features.dim() != 3
        or features.dtype not in _checks.FLOATING
    ):
        raise ValueError(
            f"{_OP}: features must be a floating-point tensor [T, N, D], got {describe(features)}"
        )
    tasks, rows, width = features.shape
    if (
        not isinstance(labels, Tensor)
        or labels.dtype != torch.int64
        or tuple(labels.shape) != (tasks, rows)
    ):
        raise ValueError(
            f"{_OP}: labels must be int64 [T, N] = [{tasks}, {rows}], got {describe(labels)}"
        )
    dtype = wide_dtype(features.dtype)
    kind = str(dtype).removeprefix("torch.")
    fits = isinstance(weight, Tensor) and weight.dim() in (2, 3) and weight.shape[-1] == width
    if not fits or weight.dtype != dtype or weight.shape[-2] < 1:
        raise ValueError(
            f"{_OP}: weight must be {kind} [C, D] or [T, C, D] with C >= 1 and D = {width}, "
            f"got {describe(weight)}"
        )
    if weight.dim() == 3 and weight.shape[0] != tasks:
        raise ValueError(f"{_OP}: weight must have T = {tasks} tasks, got {describe(weight)}")
    classes = weight.shape[-2]
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.dtype != dtype
        or tuple(bias.shape) not in ((classes,), (tasks, classes))
    ):
        raise ValueError(
            f"{_OP}: bias must be None or {kind} [C] or [T, C] with T = {tasks}, C = {classes}, "
            f"got {describe(bias)}"
        )
    for name, tensor in (("labels", labels), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != features.device:
            raise ValueError(f"{_OP}: {name} must be on {features.device}, got {describe(tensor)}")


def _check_ways(ways: Tensor, tasks: int, classes: int, features: Tensor) -> Tensor:
    if (
        not isinstance(ways, Tensor)
        or ways.dtype != torch.int64
        or tuple(ways.shape) != (tasks,)
        or ways.device != features.device
    ):
        raise ValueError(
            f"{_OP}: ways must be int64 [{tasks}] on {features.device}, got {describe(ways)}"
        )
    if _checks.readable(ways) and bool(((ways < 1) | (ways > classes)).any()):
        raise ValueError(f"{_OP}: ways must be in 1..{classes}, got {ways.tolist()}")
    return ways


def _check_labels(labels: Tensor, classes: int, ways: Tensor | None) -> None:
    """Where looking costs nothing: in range, or -100."""
    if not _checks.readable(labels) or labels.numel() == 0:
        return
    high = classes - 1 if ways is None or not _checks.readable(ways) else ways.unsqueeze(1) - 1
    wrong = (labels > high) | ((labels < 0) & (labels != IGNORED))
    if bool(wrong.any()):
        task, row = wrong.nonzero()[0].tolist()
        most = classes if ways is None else int(ways[task])
        raise ValueError(
            f"{_OP}: labels must be in 0..{most - 1} or {IGNORED} to ignore, "
            f"got {int(labels[task, row])} in task {task}"
        )


def _rates(
    lr: float | Tensor,
    tasks: int,
    steps: int,
    features: Tensor,
    dtype: torch.dtype,
    active: Tensor | None,
) -> tuple[float, Tensor | None]:
    """The learning rate as a number, or ``[T, K]`` (gradients flow back)."""
    if not isinstance(lr, Tensor):
        if not is_number(lr) or not math.isfinite(lr):
            raise ValueError(f"{_OP}: lr must be a finite number or a tensor, got {describe(lr)}")
        return float(lr), None
    if not lr.is_floating_point():
        raise ValueError(f"{_OP}: lr must be floating point, got {describe(lr)}")
    if lr.device != features.device and lr.dim() > 0:
        raise ValueError(f"{_OP}: lr must be on {features.device}, got {describe(lr)}")
    shape = tuple(lr.shape)
    if len(shape) == 1 and shape[0] == tasks == steps > 1:
        raise ValueError(
            f"{_OP}: lr of shape [{tasks}] could mean per task or per step because "
            f"T = K = {tasks}; pass lr[:, None] for per task, lr[None, :] for per step"
        )
    if shape in ((), (1,)):
        lr = lr.reshape(1, 1)
    elif shape == (tasks,):
        lr = lr.unsqueeze(1)
    elif shape == (steps,):
        lr = lr.unsqueeze(0)
    elif len(shape) != 2 or shape[0] not in (1, tasks) or shape[1] not in (1, steps):
        raise ValueError(
            f"{_OP}: lr must be a number, a scalar tensor, [T], [K], [T, K], [T, 1] or [1, K] with "
            f"T = {tasks}, K = {steps}, got {describe(lr)}"
        )
    lr = lr.to(features.device, dtype)
    _checks.finite_rate(_OP, lr, active)
    return 0.0, lr.expand(tasks, steps)
