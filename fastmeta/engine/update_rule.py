"""What an inner-loop update is: over packed fast weights, differentiable in all that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

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
        """What gradients may lead to: parameters, and tensors that require one and that settings
        are or hold."""
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

    def bound(self, layout):
        """Itself; ValueError for settings of each task."""
        for name, value in vars(self).items():
            for setting in _each(value):
                if setting.numel() > 1:  # tasks are also run in other groups
                    raise ValueError(
                        f"{name} of {type(self).__name__} must be one value for all tasks, "
                        f"got shape {list(setting.shape)}"
                    )
        return self

    def named_parameters(self):
        """Settings that are `nn.Parameter`: ``eps``, ``betas.0``."""
        for name, value in vars(self).items():
            several = isinstance(value, tuple)
            for i, setting in enumerate(value if several else (value,)):
                if isinstance(setting, nn.Parameter):
                    yield f"{name}.{i}" if several else name, setting

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


def _each(setting: object) -> list[Tensor]:
    """Tensors that an attribute is or holds."""
    return [value for value in tree_flatten(setting)[0] if isinstance(value, Tensor)]


def _accumulation(grads: Tensor) -> torch.dtype | None:
    return torch.float32 if grads.dtype == torch.float16 else None
