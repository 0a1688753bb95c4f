"""Inner-loop update rules over packed fast weights, with torch.optim's semantics per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.engine.update_rule import FusedRule, State, UpdateRule


@dataclass(frozen=True)
class SGD(FusedRule):
    """``params - lr (grads + weight_decay params)``."""

    weight_decay: float = 0.0
    op = staticmethod(ops.sgd_update)
    op_in_place = staticmethod(ops.sgd_update_)

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",))

    def arguments(self, state, step):
        return (), {"weight_decay": self.weight_decay}


@dataclass(frozen=True)
class Momentum(FusedRule):
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
    op = staticmethod(ops.momentum_update)
    op_in_place = staticmethod(ops.momentum_update_)

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), below_1=("momentum", "dampening"))
        if self.nesterov and (_is_0(self.momentum) or not _is_0(self.dampening)):
            raise ValueError(
                "nesterov needs a momentum above 0 and a dampening of 0, "
                f"got momentum={self.momentum} and dampening={self.dampening}"
            )

    def init(self, params: Tensor) -> State:
        return _zeros(params, 1)

    def arguments(self, state, step):
        dampening = self.dampening
        if isinstance(step, Tensor):  # from a buffer of 0, b is g where nothing is dampened
            buf = state[0]
            dampening = dampening * (step > 0).double() if dampening else 0.0
        else:
            buf = None if step == 0 else state[0]
        return (buf,), {
            "momentum": self.momentum,
            "dampening": dampening,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True)
class Adam(FusedRule):
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
    op = staticmethod(ops.adam_update)
    op_in_place = staticmethod(ops.adam_update_)

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), above_0=("eps",), below_1=("betas",))

    def init(self, params: Tensor) -> State:
        return _zeros(params, 2)

    def arguments(self, state, step):
        return (*state, step + 1), {
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam on ``params (1 - lr weight_decay)``: the decay does not enter m and v.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    """

    weight_decay: float = 1e-2
    op = staticmethod(ops.adamw_update)
    op_in_place = staticmethod(ops.adamw_update_)


@dataclass(frozen=True)
class RMSprop(FusedRule):
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
    op = staticmethod(ops.rmsprop_update)
    op_in_place = staticmethod(ops.rmsprop_update_)

    def __post_init__(self) -> None:
        _check(self, at_least_0=("weight_decay",), above_0=("eps",), below_1=("alpha",))

    def init(self, params: Tensor) -> State:
        return _zeros(params, 1)

    def arguments(self, state, step):
        settings = {"alpha": self.alpha, "eps": self.eps, "weight_decay": self.weight_decay}
        return state, settings


@dataclass(frozen=True)
class Adagrad(FusedRule):
    """``s = s + g^2``, ``params - lr / (1 + (k - 1) lr_decay) g / (sqrt(s) + eps)`` at step k.

    The derivative of ``sqrt(s)`` at ``s = 0`` is taken as 0.

    Args:
        lr_decay: At least 0.
        eps: Above 0.
        weight_decay: At least 0; ``weight_decay params`` is added to the gradient.
        start: Initial value of s, at least 0.

    Source: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    lr_decay: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0
    start: float = 0.0
    op = staticmethod(ops.adagrad_update)
    op_in_place = staticmethod(ops.adagrad_update_)

    def __post_init__(self) -> None:
        _check(self, at_least_0=("lr_decay", "weight_decay", "start"), above_0=("eps",))

    def init(self, params: Tensor) -> State:
        return (_zeros(params, 1)[0] + self.start,)

    def arguments(self, state, step):
        return (*state, step + 1), {
            "lr_decay": self.lr_decay,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


RULES: dict[str, type[UpdateRule]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
}


def resolve_rule(optimizer: str | UpdateRule) -> UpdateRule:
    """The rule of that name at its defaults, or the rule object itself."""
    if isinstance(optimizer, UpdateRule):
        return optimizer
    if not isinstance(optimizer, str) or optimizer not in RULES:
        raise ValueError(
            f"optimizer must be one of {sorted(RULES)} or a rule object such as fm.rules.Adam(), "
            f"got {optimizer!r}"
        )
    return RULES[optimizer]()


def _is_0(setting: object) -> bool:
    """Of numbers; what a tensor holds is the operator's to check."""
    return not isinstance(setting, Tensor) and setting == 0


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
                # a learned setting is checked by the operator at every step
                if not isinstance(value, Tensor) and not fits(value):
                    raise ValueError(
                        f"{name} of {type(rule).__name__} must be {expected}, got {value}"
                    )


def _zeros(params: Tensor, count: int) -> State:
    """New state tensors, none an expanded view even where `params` is one."""
    return tuple(
        torch.zeros_like(params, memory_format=torch.contiguous_format) for _ in range(count)
    )
