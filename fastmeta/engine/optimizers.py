"""Inner-loop update rules over packed fast weights, with torch.optim's semantics per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmeta import ops
from fastmeta.patching import ParamLayout

State = tuple[Tensor, ...]
Rate = float | Tensor


class UpdateRule:
    """One inner update, ``(params, grads, state) -> (params, state)``, differentiable in all.

    Subclass it for a rule of your own::

        class Smooth(fm.rules.UpdateRule):  # steps along the gradient's signs, smoothed
            def update(self, params, grads, state, lr, step, *, active=None, segments=None):
                new = params - lr * torch.tanh(grads)
                if active is not None:  # tasks that were frozen come back unchanged
                    new = torch.where(active.unsqueeze(1), new, params)
                return new, state

        learner = fm.MAML(patched, lr=0.1, optimizer=Smooth())

    Every tensor is ``[T, P]``, the fast weights of T tasks; a rule with state makes it in
    :meth:`init`. Clipping is done before, and a task whose gradient is not finite is not `active`.

    Attributes:
        reads_losses: Whether :meth:`update` takes the support losses before the step as ``losses``,
            ``[T]`` without gradient.
        steps_apart: Whether ``step`` may be int64 ``[T]``, another for each task, for state that
            starts at step 0 as :meth:`init` made it.
    """

    reads_losses: ClassVar[bool] = False
    steps_apart: ClassVar[bool] = False

    def bound(self, layout: ParamLayout) -> UpdateRule:
        """The rule for fast weights of this layout: itself, unless it looks at it."""
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Meta-parameters of the rule itself, which only a learned one has."""
        return iter(())

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def learned(self) -> list[Tensor]:
        """What gradients may lead to: parameters, and settings that are tensors and require one."""
        settings = [t for value in vars(self).values() for t in _each(value)]
        found = [*self.parameters(), *(t for t in settings if t.requires_grad)]
        return list({id(t): t for t in found}.values())

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
            segments: The layout, where the rate is per layer: rate s is that of the columns
                ``segments.segment_offsets(device)[s]`` up to the next.

        Returns:
            New parameters and state, differentiable in `params`, `grads`, `state` and `lr`.
        """
        raise NotImplementedError

    def checked_update(
        self,
        params: Tensor,
        grads: Tensor,
        state: State,
        lr: Rate,
        step: int,
        *,
        active: Tensor | None,
        segments: ParamLayout | None,
        clip_norm: float | None,
        in_place: bool,
        losses: Tensor,
    ) -> tuple[Tensor, State, Tensor]:
        """:meth:`update` as the engine calls it: each task's gradient clipped to `clip_norm`, tasks
        whose gradient is not finite frozen.

        Args:
            active: bool ``[T]``, or None where every task is active.
            clip_norm: Bound on each task's gradient norm, or None.
            in_place: `params` and `state` may be overwritten.
            losses: Support losses before the step, ``[T]``.

        Returns:
            Parameters, state, and bool ``[T]``: False where the gradient is not finite.
        """
        norm = torch.linalg.vector_norm(grads.detach(), dim=1, dtype=_accumulation(grads))
        finite = torch.isfinite(norm)
        if active is not None:
            finite = finite | ~active
        if clip_norm is not None:
            grads = grads * ops.clip_scale(grads, clip_norm).to(grads.dtype).unsqueeze(1)
        active = finite if active is None else finite & active
        options = {"losses": losses.detach()} if self.reads_losses else {}
        new, state = self.update(
            params, grads, state, lr, step, active=active, segments=segments, **options
        )
        return new, state, finite


class FusedRule(UpdateRule):
    """A rule that is one of `fm.ops`: clipping, update, freezing and the check of the gradient are
    one pass over memory."""

    op: ClassVar[Callable]
    op_in_place: ClassVar[Callable]
    steps_apart = True

    def arguments(self, state: State, step: int | Tensor) -> tuple[tuple, dict[str, object]]:
        """What the operator takes between gradient and rate, and its settings."""
        return state, {}

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        new, *state = self.call(
            type(self).op, params, grads, state, lr, step, active=active, segments=segments
        )
        return new, tuple(state)

    def checked_update(
        self, params, grads, state, lr, step, *, active, segments, clip_norm, in_place, losses
    ):
        op = type(self).op_in_place if in_place else type(self).op
        scale = 1.0 if clip_norm is None else ops.clip_scale(grads, clip_norm)
        new, *state, finite = self.call(
            *(op, params, grads, state, lr, step),
            active=active,
            segments=segments,
            grad_scale=scale,
            check_finite=True,
        )
        return new, tuple(state), finite

    def call(self, op, params, grads, state, lr, step, **options) -> tuple[Tensor, ...]:
        middle, settings = self.arguments(state, step)
        result = op(params, grads, *middle, lr, **settings, **options)
        return (result,) if isinstance(result, Tensor) else result


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
            f"optimizer must be one of {sorted(RULES)} or a rule object, got {optimizer!r}"
        )
    return RULES[optimizer]()


def _is_0(setting: object) -> bool:
    """Of numbers; what a tensor holds is the operator's to check."""
    return not isinstance(setting, Tensor) and setting == 0


def _each(setting: object) -> list[Tensor]:
    values = setting if isinstance(setting, tuple) else (setting,)
    return [value for value in values if isinstance(value, Tensor)]


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


def _accumulation(grads: Tensor) -> torch.dtype | None:
    return torch.float32 if grads.dtype == torch.float16 else None
