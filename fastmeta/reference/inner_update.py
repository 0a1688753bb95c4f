"""Task-batched inner updates in plain torch, differentiable to any order by autograd itself.

``params``, ``grads`` and each state are ``[T, P]``. The learning rate is the number ``lr_value``
where ``lr`` is None, else ``lr`` ``[1 or T, 1 or C]`` in the accumulation dtype, with C = P, or
C = S where ``offsets`` (int64 ``[S + 1]``) divides a row into segments. The hyperparameters are the
numbers ``values``, or ``hypers`` ``[1 or T, 6]`` in float64: weight decay, factor of the gradient,
then the rule's own. Rows whose ``active`` is False are frozen: nothing of them enters a product,
so not even a NaN there reaches another number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype

MAXIMIZE, NESTEROV, FIRST = 1, 2, 4
MAX_HYPERS = 6

Number = float | Tensor


def all_finite(grads: Tensor) -> Tensor:
    """bool ``[T]``: all of a task's gradient and of its squares are finite."""
    bound = 2.0**512 if grads.dtype == torch.float64 else 2.0**64
    return (grads.to(wide_dtype(grads.dtype)).abs() < bound).all(1)


def segment_index(offsets: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: the segment that owns each column (empty segments own none)."""
    columns = torch.arange(size, device=offsets.device)
    return torch.searchsorted(offsets[1:-1].contiguous(), columns, right=True)


def spread_rate(lr: Tensor | None, offsets: Tensor | None, lr_value: float, size: int) -> Number:
    """The learning rate as a number or ``[1 or T, 1 or P]``."""
    if lr is None:
        return lr_value
    if offsets is None or lr.shape[1] == 1:
        return lr
    return lr.index_select(1, segment_index(offsets, size))


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinite."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class Step:
    """What a rule needs of one step, in the accumulation dtype.

    Attributes:
        params, grads: ``[T, P]``.
        state: each ``[T, P]``.
        lr: number or ``[1 or T, 1 or P]``.
        hypers: six numbers, or six of ``[1 or T, 1]`` in float64.
        flags: bits MAXIMIZE, NESTEROV, FIRST.
    """

    params: Tensor
    grads: Tensor
    state: Sequence[Tensor | None]
    lr: Number
    hypers: Sequence[Number]
    flags: int

    def cast(self, x: Number) -> Number:
        """A number computed in float64 as the rule's arithmetic takes it."""
        return x.to(self.params.dtype) if isinstance(x, Tensor) else x

    def gradient(self, *, decay: bool = True) -> Tensor:
        """``+- scale grads + weight_decay params``."""
        weight_decay, scale = (self.cast(h) for h in self.hypers[:2])
        g = self.grads if isinstance(scale, float) and scale == 1.0 else scale * self.grads
        if self.flags & MAXIMIZE:
            g = -g
        if decay and not (isinstance(weight_decay, float) and weight_decay == 0.0):
            g = g + weight_decay * self.params
        return g


def sgd(step: Step) -> tuple[Tensor, ...]:
    """``p - lr g``."""
    return (step.params - step.lr * step.gradient(),)


def momentum(step: Step) -> tuple[Tensor, ...]:
    """``b' = momentum b + (1 - dampening) g`` (first step: g), ``p - lr b'``; Nesterov:
    ``p - lr (g + momentum b')``."""
    g = step.gradient()
    (old,) = step.state
    factor, dampening = (step.cast(h) for h in step.hypers[2:4])
    buf = g if step.flags & FIRST else factor * old + (1 - dampening) * g
    direction = g + factor * buf if step.flags & NESTEROV else buf
    return step.params - step.lr * direction, buf


def _adam(step: Step, *, decoupled: bool) -> tuple[Tensor, ...]:
    g = step.gradient(decay=not decoupled)
    beta1, beta2, eps = (step.cast(h) for h in step.hypers[2:5])
    count = step.hypers[5]
    m = beta1 * step.state[0] + (1 - beta1) * g
    v = beta2 * step.state[1] + (1 - beta2) * g * g
    correction1 = step.cast(1 / (1 - step.hypers[2] ** count))
    correction2 = step.cast((1 - step.hypers[3] ** count) ** -0.5)
    start = step.params
    if decoupled:
        start = start - step.lr * step.cast(step.hypers[0]) * start
    return start - step.lr * correction1 * m / (safe_sqrt(v) * correction2 + eps), m, v


def adam(step: Step) -> tuple[Tensor, ...]:
    """Running means m of g and v of g^2, corrected for their start at 0;
    ``p - lr m / (sqrt(v) + eps)``."""
    return _adam(step, decoupled=False)


def adamw(step: Step) -> tuple[Tensor, ...]:
    """:func:`adam` on ``p (1 - lr weight_decay)``, without decay in g."""
    return _adam(step, decoupled=True)


def rmsprop(step: Step) -> tuple[Tensor, ...]:
    """``v' = alpha v + (1 - alpha) g^2``, ``p - lr g / (sqrt(v') + eps)``."""
    g = step.gradient()
    alpha, eps = (step.cast(h) for h in step.hypers[2:4])
    v = alpha * step.state[0] + (1 - alpha) * g * g
    return step.params - step.lr * g / (safe_sqrt(v) + eps), v


def adagrad(step: Step) -> tuple[Tensor, ...]:
    """``v' = v + g^2``, ``p - lr / (1 + (k - 1) lr_decay) g / (sqrt(v') + eps)`` at step k."""
    g = step.gradient()
    v = step.state[0] + g * g
    factor = step.cast(1 / (1 + (step.hypers[4] - 1) * step.hypers[2]))
    return step.params - step.lr * factor * g / (safe_sqrt(v) + step.cast(step.hypers[3])), v


Rule = Callable[[Step], tuple[Tensor, ...]]


def update(
    rule: Rule,
    params: Tensor,
    grads: Tensor,
    state: Sequence[Tensor | None],
    lr: Tensor | None,
    offsets: Tensor | None,
    active: Tensor | None,
    hypers: Tensor | None,
    lr_value: float,
    values: Sequence[float],
    flags: int,
    check_finite: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """New parameters and state, rounded once to the dtype of params; which rows are finite."""
    dtype = wide_dtype(params.dtype)
    finite = None
    if check_finite:
        finite = all_finite(grads)
        if active is not None:
            finite = finite | ~active
        active = finite if active is None else finite & active
    old = [params, *state]
    p, g, *s = (
        None if t is None else _select(active, t.to(dtype)) for t in (params, grads, *state)
    )
    rate = _select(active, spread_rate(lr, offsets, lr_value, params.shape[1]))
    numbers = list(values) if hypers is None else list(hypers.split(1, dim=1))
    new = rule(Step(p, g, s, rate, numbers, flags))
    new = [n.expand(params.shape).to(params.dtype) for n in new]
    if active is not None:
        keep = active[:, None]
        new = [
            torch.where(keep, n, torch.zeros_like(n) if o is None else o)
            for n, o in zip(new, old, strict=True)
        ]
    return tuple(n.contiguous() for n in new), finite


def _select(active: Tensor | None, x):
    """``x`` with the frozen rows replaced by 0 (numbers pass)."""
    if active is None or not isinstance(x, Tensor):
        return x
    return torch.where(active[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def raw_update(rule: Rule, states: int) -> tuple[Callable, Callable, Callable]:
    """:func:`update` in the form of the raw operators: functional, in place, in place for lists."""

    def functional(params, grads, s1, s2, lr, offsets, active, hypers, *constants):
        rates = (lr, offsets, active, hypers)
        new, finite = update(rule, params, grads, (s1, s2)[:states], *rates, *constants)
        empty = [params.new_empty(0) for _ in range(3 - len(new))]
        return *new, *empty, params.new_empty(0, dtype=torch.bool) if finite is None else finite

    def in_place(params, grads, s1, s2, *rest):
        *new, finite = functional(params, grads, s1, s2, *rest)
        for old, value in zip((params, s1, s2), new[: 1 + states], strict=False):
            old.copy_(value)
        return finite

    def lists(params, grads, s1, s2, lr, values, flags):
        rows = [[t.view(1, -1) for t in group] for group in (params, grads, s1, s2)]
        for p, g, *state in zip(*rows[: 2 + states], strict=True):
            in_place(p, g, *[*state, None, None][:2], *[None] * 4, lr, values, flags, False)

    return functional, in_place, lists
