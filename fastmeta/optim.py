"""Differentiable optimizers for loops of your own, such as with ``torch.func.functional_call``.

All parameters lie in one packed buffer, so that a step is one kernel whatever their number::

    optimizer = fm.optim.Adam(lr=1e-2)
    fast = optimizer.init(dict(model.named_parameters()))
    for _ in range(steps):
        loss = loss_fn(torch.func.functional_call(model, fast.params, (x,)), y)
        fast = optimizer.minimize(fast, loss)  # or optimizer.step(fast, gradients)
    meta_loss(torch.func.functional_call(model, fast.params, (x_query,)), y_query).backward()

Names, defaults and semantics are those of ``torch.optim``. Learning rates and settings that are
tensors receive gradients, as do the initial parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta._names import refuse_unknown
from fastmeta.engine import optimizers as rules
from fastmeta.patching import ParamLayout

Number = float | Tensor
Tensors = Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class FastWeights:
    """Parameters in the course of an optimization, and the optimizer's state.

    Attributes:
        packed: Every parameter, ``[T, P]``; T = 1 without a task axis.
        state: Tensors ``[T, P]``.
        steps: Steps taken.
        rule: Type of the update rule that the state belongs to.
        layout: Where each parameter lies in a row.
        named: Whether :attr:`params` is a dict (else a list).
        batched: Whether every parameter carries a task axis T.
    """

    packed: Tensor
    state: tuple[Tensor, ...]
    steps: int
    rule: type[rules.FusedRule]
    layout: ParamLayout
    named: bool
    batched: bool

    @cached_property
    def params(self) -> dict[str, Tensor] | list[Tensor]:
        """The parameters as they were given to `init`: views of `packed`, part of its graph."""
        views = self.layout.unpack(self.packed)
        if not self.batched:
            views = [v[0] for v in views]
        return dict(zip(self.layout.names, views, strict=True)) if self.named else views

    def detach(self) -> FastWeights:
        """The same numbers without their history; the parameters require gradients."""
        packed = self.packed.detach().requires_grad_()
        return replace(self, packed=packed, state=tuple(s.detach() for s in self.state))


class Optimizer:
    """What the optimizers share; see :class:`SGD`, :class:`Adam` and the others.

    Args:
        rule: Update rule.
        lr: Learning rate: a number or scalar tensor; a tensor ``[S]`` with one rate for each of
            the S parameter tensors; or, for T tasks, ``[T, 1]`` or ``[T, S]``.
        maximize: Step along the gradient instead of against it.
        clip_norm: Bound on the norm of each task's gradient, positive, or None. Differentiable.

    Raises:
        TypeError: Parameters in place of the rate (they go to :meth:`init`), an unknown setting.
        ValueError: A setting out of its range.
    """

    def __new__(cls, *args: object, **settings: object) -> Optimizer:
        if args and not isinstance(args[0], Real | Tensor | rules.FusedRule):
            raise TypeError(
                f"{cls.__name__} takes no parameters, they are for init(params): expected the "
                f"learning rate first, got {type(args[0]).__name__}"
            )
        return super().__new__(cls)

    def __init__(
        self,
        rule: rules.FusedRule,
        lr: Number,
        *,
        maximize: bool = False,
        clip_norm: float | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown(type(self), unknown)
        self._check_rate(lr)
        self.rule, self.lr, self.maximize, self.clip_norm = rule, lr, maximize, clip_norm

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lr={self.lr}, {self.rule})"

    def _check_rate(self, lr: object) -> None:
        if not isinstance(lr, Tensor) and not (isinstance(lr, Real) and 0 <= lr < math.inf):
            raise ValueError(f"lr of {type(self).__name__} must be at least 0, got {lr!r}")

    def init(self, params: Tensors | Iterable[Tensor], *, batched: bool = False) -> FastWeights:
        """Pack parameters; gradients flow back to them.

        Args:
            params: Dict or list of floating-point tensors of one dtype on one device, or what
                ``module.parameters()`` returns.
            batched: Every tensor has a leading task axis T.

        Raises:
            ValueError: No parameters, or such as cannot lie in one buffer.
        """
        named = isinstance(params, Mapping)
        tensors = list(params.values()) if named else list(params)
        names = list(params) if named else [str(i) for i in range(len(tensors))]
        _check_params(names, tensors, batched)
        shapes = [t.shape[1:] if batched else t.shape for t in tensors]
        layout = ParamLayout(names, shapes)
        packed = layout.pack(tensors if batched else [t.unsqueeze(0) for t in tensors])
        if not packed.requires_grad and not torch._C._are_functorch_transforms_active():
            packed.requires_grad_()
        state = self.rule.init(packed)
        return FastWeights(packed, state, 0, type(self.rule), layout, named, batched)

    def step(
        self, fast: FastWeights, grads: Tensors | Tensor, *, lr: Number | None = None
    ) -> FastWeights:
        """One update, differentiable twice in everything.

        Args:
            fast: From `init` or the step before.
            grads: Gradients in the form of ``fast.params`` (None: zero), or one tensor like
                ``fast.packed``.
            lr: Rate of this step, in place of the optimizer's own.

        Raises:
            ValueError: Gradients that do not fit, a rate or setting out of its range.
        """
        if fast.rule is not type(self.rule):
            raise ValueError(
                f"expected fast weights of {type(self.rule).__name__}, got those of "
                f"{fast.rule.__name__}"
            )
        grads = _pack_gradients(fast, grads)
        lr = self.lr if lr is None else lr
        self._check_rate(lr)
        scale = 1.0 if self.clip_norm is None else ops.clip_scale(grads, self.clip_norm)
        new, *state = self.rule.call(
            *(type(self.rule).op, fast.packed, grads, fast.state, lr, fast.steps),
            segments=fast.layout if isinstance(lr, Tensor) and lr.numel() > 1 else None,
            grad_scale=scale,
            maximize=self.maximize,
        )
        return replace(fast, packed=new, state=tuple(state), steps=fast.steps + 1)

    def minimize(
        self,
        fast: FastWeights,
        loss: Tensor,
        *,
        create_graph: bool = True,
        lr: Number | None = None,
    ) -> FastWeights:
        """Differentiate a loss of ``fast.params`` and take a step.

        Args:
            fast: From `init` or the step before.
            loss: Scalar, or one loss per task ``[T]``.
            create_graph: Exact second order; False treats the gradient as a constant.
            lr: Rate of this step, in place of the optimizer's own.

        Raises:
            ValueError: The loss does not depend on the parameters.
        """
        grads = None
        if loss.requires_grad:
            (grads,) = torch.autograd.grad(
                loss.sum(), fast.packed, create_graph=create_graph, allow_unused=True
            )
        if grads is None:
            raise ValueError(
                "the loss must depend on fast.params of these fast weights, got one that does not"
            )
        return self.step(fast, grads, lr=lr)


class SGD(Optimizer):
    """``params - lr g``, or with momentum as ``torch.optim.SGD``.

    Args:
        lr, maximize, clip_norm: As for :class:`Optimizer`. Default rate 1e-3.
        momentum, dampening, weight_decay, nesterov: As for :class:`fastmeta.rules.Momentum`, all 0
            or False by default.
    """

    def __init__(
        self,
        lr: Number = 1e-3,
        momentum: Number = 0.0,
        dampening: Number = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        **common,
    ) -> None:
        if nesterov or isinstance(momentum, Tensor) or momentum != 0:
            rule = rules.Momentum(momentum, dampening, nesterov, weight_decay)
        else:
            rule = rules.SGD(weight_decay)
        super().__init__(rule, lr, **common)


class Adam(Optimizer):
    """:func:`fastmeta.ops.adam_update` in the manner of ``torch.optim.Adam``.

    Args:
        lr, maximize, clip_norm: As for :class:`Optimizer`. Default rate 1e-3.
        betas, eps, weight_decay: As for :class:`fastmeta.rules.Adam`.
    """

    def __init__(
        self,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        **common,
    ) -> None:
        super().__init__(rules.Adam(betas, eps, weight_decay), lr, **common)


class AdamW(Optimizer):
    """:func:`fastmeta.ops.adamw_update` in the manner of ``torch.optim.AdamW``.

    Args:
        lr, maximize, clip_norm: As for :class:`Optimizer`. Default rate 1e-3.
        betas, eps, weight_decay: As for :class:`fastmeta.rules.AdamW`.
    """

    def __init__(
        self,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 1e-2,
        **common,
    ) -> None:
        super().__init__(rules.AdamW(betas, eps, weight_decay), lr, **common)


class RMSprop(Optimizer):
    """:func:`fastmeta.ops.rmsprop_update` in the manner of ``torch.optim.RMSprop``.

    Args:
        lr, maximize, clip_norm: As for :class:`Optimizer`. Default rate 1e-2.
        alpha, eps, weight_decay: As for :class:`fastmeta.rules.RMSprop`.
    """

    def __init__(
        self,
        lr: Number = 1e-2,
        alpha: Number = 0.99,
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        **common,
    ) -> None:
        super().__init__(rules.RMSprop(alpha, eps, weight_decay), lr, **common)


class Adagrad(Optimizer):
    """:func:`fastmeta.ops.adagrad_update` in the manner of ``torch.optim.Adagrad``.

    Args:
        lr, maximize, clip_norm: As for :class:`Optimizer`. Default rate 1e-2.
        lr_decay, weight_decay, initial_accumulator_value (its start), eps: As for
            :class:`fastmeta.rules.Adagrad`.
    """

    def __init__(
        self,
        lr: Number = 1e-2,
        lr_decay: Number = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: Number = 1e-10,
        **common,
    ) -> None:
        rule = rules.Adagrad(lr_decay, eps, weight_decay, initial_accumulator_value)
        super().__init__(rule, lr, **common)


def _check_params(names: Sequence[str], tensors: Sequence[Tensor], batched: bool) -> None:
    if not tensors:
        raise ValueError("params must hold at least one tensor, got none")
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"parameter {name} must be a floating-point tensor, got {got}")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"parameters must share dtype and device: {names[0]} is {first.dtype} on "
                f"{first.device}, {name} is {tensor.dtype} on {tensor.device}"
            )
        if batched and (tensor.dim() == 0 or tensor.shape[:1] != first.shape[:1]):
            raise ValueError(
                f"batched parameters must share a leading task axis: {names[0]} is "
                f"{list(first.shape)}, {name} is {list(tensor.shape)}"
            )


def _pack_gradients(fast: FastWeights, grads: Tensors | Tensor) -> Tensor:
    """Gradients in the form of the parameters as ``[T, P]``."""
    if isinstance(grads, Tensor):
        return grads  # checked by the operator
    if isinstance(grads, Mapping):
        if not fast.named or set(grads) != set(fast.layout.names):
            raise ValueError(
                f"gradients must have the names of the parameters {list(fast.layout.names)[:5]}, "
                f"got {list(grads)[:5]}"
            )
        grads = [grads[name] for name in fast.layout.names]
    if len(grads) != len(fast.layout):
        raise ValueError(f"expected {len(fast.layout)} gradients, got {len(grads)}")
    lead = fast.packed.shape[:1]
    found = []
    for name, shape, grad in zip(fast.layout.names, fast.layout.shapes, grads, strict=True):
        expected = (*lead, *shape) if fast.batched else shape
        if grad is None:
            grad = fast.packed.new_zeros(expected)
        elif tuple(grad.shape) != tuple(expected):
            raise ValueError(
                f"the gradient of {name} must have shape {list(expected)}, got {list(grad.shape)}"
            )
        found.append(grad if fast.batched else grad.unsqueeze(0))
    return fast.layout.pack(found)
