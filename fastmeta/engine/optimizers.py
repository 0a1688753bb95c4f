"""Inner-loop update rules over packed fast weights, with torch.optim's semantics per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.patching import ParamLayout

State = tuple[Tensor, ...]
Rate = float | Tensor


class UpdateRule:
    """One inner update, ``(params, grads, state) -> (params, state)``, differentiable in all.

    Subclass it for a rule of your own: every tensor is ``[T, P]``; `lr` is a number or
    ``[1 or T, 1 or S or P]``, per layer where `segments` is given; a task whose `active` is False
    must come back unchanged.
    """

    def init(self, params: Tensor) -> State:
        """State before the first step, tensors ``[T, P]`` that share no memory with `params`."""
        return ()

    def update(
        self,
        params: Tensor,
        grads: Tensor,
        state: State,
        lr: Rate,
        step: int,
        *,
        active: Tensor | None = None,
        segments: ParamLayout | None = None,
    ) -> tuple[Tensor, State]:
        """One step.

        Args:
            params, grads: ``[T, P]``.
            state: As :meth:`init` or the step before returned it.
            lr: A number, or ``[1 or T, 1]``, ``[1 or T, P]``, or with `segments` ``[1 or T, S]``.
            step: From 0.
            active: bool ``[T]``, or None where every task is active.
            segments: The layout, where the rate is per layer; see `spread_rate`.

        Returns:
            New parameters and state, differentiable in `params`, `grads`, `state` and `lr`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(UpdateRule):
    """``params - lr (grads + weight_decay params)``."""

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",))

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        new = ops.sgd_update(
            params, grads, lr, weight_decay=self.weight_decay, active=active, segments=segments
        )
        return new, state


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """``buf = momentum buf + (1 - dampening) g``, ``params - lr buf`` (first step: ``buf = g``).

    Args:
        momentum: In [0, 1).
        dampening: In [0, 1).
        nesterov: Step along ``g + momentum buf``; needs a momentum and no dampening.
        weight_decay: At least 0; ``weight_decay params`` is added to the gradient.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), below_1=("momentum", "dampening"))
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov needs a momentum above 0 and a dampening of 0, "
                f"got momentum={self.momentum} and dampening={self.dampening}"
            )

    def init(self, params: Tensor) -> State:
        return (torch.zeros_like(params, memory_format=torch.contiguous_format),)

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        (buf,) = state
        g = _decayed(params, grads, self.weight_decay)
        new_buf = g if step == 0 else self.momentum * buf + (1 - self.dampening) * g
        d = g + self.momentum * new_buf if self.nesterov else new_buf
        new = params - spread_rate(lr, segments) * d
        return _keep(active, (new, new_buf), (params, buf))


@dataclass(frozen=True)
class Adam(UpdateRule):
    """``m`` and ``v`` are running means of g and g^2; ``params - lr m' / (sqrt(v') + eps)``.

    ``m' = m / (1 - beta1^k)`` and ``v' = v / (1 - beta2^k)`` at step k, from 1. The derivative of
    ``sqrt(v)`` at ``v = 0`` is taken as 0, so unused coordinates stay finite.

    Args:
        betas: Of m and v, each in [0, 1).
        eps: Above 0. A larger one, such as 1e-3, keeps second-order gradients well conditioned:
            the update's derivative grows as ``1 / eps`` where gradients vanish.
        weight_decay: At least 0; ``weight_decay params`` is added to the gradient.

    Source: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), above_0=("eps",), below_1=("betas",))

    def init(self, params: Tensor) -> State:
        zeros = torch.zeros_like(params, memory_format=torch.contiguous_format)
        return (zeros, zeros)

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        m, v = state
        beta1, beta2 = self.betas
        rate = spread_rate(lr, segments)
        if self.decoupled:
            start = params * (1 - rate * self.weight_decay) if self.weight_decay else params
            g = grads
        else:
            start, g = params, _decayed(params, grads, self.weight_decay)
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g * g
        correction1 = 1 - beta1 ** (step + 1)
        correction2 = (1 - beta2 ** (step + 1)) ** 0.5
        denominator = safe_sqrt(new_v) / correction2 + self.eps
        new = start - rate / correction1 * (new_m / denominator)
        return _keep(active, (new, new_m, new_v), (params, m, v))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam on ``params (1 - lr weight_decay)``: the decay does not enter m and v.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    """

    weight_decay: float = 1e-2
    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RMSprop(UpdateRule):
    """``v = alpha v + (1 - alpha) g^2``, ``params - lr g / (sqrt(v) + eps)``.

    The derivative of ``sqrt(v)`` at ``v = 0`` is taken as 0.

    Args:
        alpha: In [0, 1).
        eps: Above 0.
        weight_decay: At least 0; ``weight_decay params`` is added to the gradient.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), above_0=("eps",), below_1=("alpha",))

    def init(self, params: Tensor) -> State:
        return (torch.zeros_like(params, memory_format=torch.contiguous_format),)

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        (v,) = state
        g = _decayed(params, grads, self.weight_decay)
        new_v = self.alpha * v + (1 - self.alpha) * g * g
        new = params - spread_rate(lr, segments) * (g / (safe_sqrt(new_v) + self.eps))
        return _keep(active, (new, new_v), (params, v))


RULES: dict[str, type[UpdateRule]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
}


def resolve_rule(optimizer: str | UpdateRule) -> UpdateRule:
    """The rule of that name at its defaults, or the rule object itself."""
    if isinstance(optimizer, UpdateRule):
        return optimizer
    if not isinstance(optimizer, str) or optimizer not in RULES:
        raise ValueError(
            f"optimizer must be one of {sorted(RULES)} or a rule object, got {optimizer!r}"
        )
    return RULES[optimizer]()


def _check(
    rule: UpdateRule,
    at_least_0: Sequence[str] = (),
    above_0: Sequence[str] = (),
    below_1: Sequence[str] = (),
) -> None:
    """Raise ValueError for a setting out of its range."""
    ranges = (
        (at_least_0, "at least 0", lambda x: 0 <= x < math.inf),
        (above_0, "above 0", lambda x: 0 < x < math.inf),
        (below_1, "in [0, 1)", lambda x: 0 <= x < 1),
    )
    for names, expected, fits in ranges:
        for name in names:
            given = getattr(rule, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not fits(value):
                    raise ValueError(
                        f"{name} of {type(rule).__name__} must be {expected}, got {value}"
                    )


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinite."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def spread_rate(lr: Rate, segments: ParamLayout | None) -> Rate:
    """A rate as a number or ``[1 or T, 1 or P]``: per-layer rates repeated over their segment."""
    if segments is None or not isinstance(lr, Tensor) or lr.shape[-1] == 1:
        return lr
    ends = segments.segment_offsets(lr.device)
    return lr.repeat_interleave(ends.diff(), dim=-1, output_size=segments.num_params)


def _decayed(params: Tensor, grads: Tensor, weight_decay: float) -> Tensor:
    return grads + weight_decay * params if weight_decay else grads


def _keep(active: Tensor | None, new: State, old: State) -> tuple[Tensor, State]:
    """Frozen tasks keep their old rows."""
    if active is not None:
        row = active.unsqueeze(1)
        new = tuple(torch.where(row, n, o) for n, o in zip(new, old, strict=True))
    return new[0], tuple(new[1:])
