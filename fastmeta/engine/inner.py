"""The inner loop: K update steps of T tasks in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmeta.engine.held import carried_by
from fastmeta.engine.losses import MANY_CLASSES, WAYS, LossFn, name_of, of_words, words_loss
from fastmeta.engine.prototype_head import PrototypeHead
from fastmeta.engine.rates import Rates
from fastmeta.engine.update_rule import State, UpdateRule
from fastmeta.patching import ParamLayout, Patched, TaskParams
from fastmeta.patching.narrow_params import Narrowing, NarrowParams, joined
from fastmeta.patching.prefix import PrefixCache
from fastmeta.patching.words import TextRows

if TYPE_CHECKING:
    from fastmeta.engine.capture import Capture
    from fastmeta.engine.replays import Replays


@dataclass(frozen=True)
class InnerLoop:
    """How tasks adapt.

    Attributes:
        patched: The model.
        rule: Update rule.
        rates: Learning rate of every step.
        steps: K, at least 1, or 0 for weights that are generated.
        loss_fn: Task losses, ``(outputs, batch) -> [T]``.
        second_order: Steps whose gradient is itself differentiated: the last this many.
        clip_norm: Per-task bound on the gradient's norm, or None.
        proximal: Weight of ``1/2 |phi - theta|^2`` added to the inner loss (iMAML), or 0.
        implicit: Iterations of conjugate gradients of an implicit meta-gradient, or 0.
        head: Starts the head from each task's prototypes (ProtoMAML), or None.
        capture: Runs gradients from captured graphs, or None.
        widths: Numbers of tokens without padding that rounding up leaves, so that few graphs serve;
            0: they are not rounded.
        own_rows: Whether tasks start from weights of their own, which have a gradient each.
        by_leaf: Whether weights may be kept by leaf instead of packed, where that is possible.
        replays: Runs whole meta-steps from CUDA graphs, or None.
        asks: Whether the device may be asked for values on the way: not while it is recorded.
    """

    patched: Patched
    rule: UpdateRule
    rates: Rates
    steps: int
    loss_fn: LossFn
    second_order: int
    clip_norm: float | None = None
    proximal: float = 0.0
    implicit: int = 0
    head: PrototypeHead | None = None
    capture: Capture | None = None
    widths: int = 0
    own_rows: bool = False
    by_leaf: bool = True
    replays: Replays | None = None
    asks: bool = True

    @cached_property
    def shared(self) -> list[Tensor]:
        """Weights of the model that are meta-parameters but not adapted, and what the loss holds
        that has a gradient; found once, since that takes a walk over all modules."""
        found = [*self.patched.shared_parameters(), *carried_by(self.loss_fn)]
        return list({id(p): p for p in found}.values())  # a loss may hold some of the model's

    def output_layer(self, inputs: Mapping[str, Tensor], only_tasks: bool) -> nn.Linear | None:
        """The layer whose logits the loss can do without, or None.

        Args:
            only_tasks: Nothing but fast weights receives a gradient.
        """
        layer = self.patched.output_layer(inputs) if of_words(self.loss_fn) else None
        # else logits are hardly larger than what they are made of
        if layer is None or layer.out_features < max(MANY_CLASSES, 8 * layer.in_features):
            return None
        if only_tasks:
            return layer
        own = set(layer.parameters())
        return None if any(t in own for t in self.shared) else layer

    def added_parameters(self) -> list[Tensor]:
        """Meta-parameters that are not the model's: of rates, the update rule, a temperature."""
        head = [] if self.head is None else list(self.head.parameters())
        return [*self.rates.parameters(), *self.rule.learned(), *head]

    def create_graph(self, step: int) -> bool:
        """Whether this step's gradient is differentiated."""
        return step >= self.steps - self.second_order

    @property
    def captures_packed(self) -> bool:
        """Whether what is captured reads packed weights, which are then not kept by leaf."""
        if self.capture is None:
            return False
        return not self.capture.by_leaf or self.second_order < self.steps


_HOLE = object()
"""Stands for a tensor that is kept elsewhere."""


@dataclass(frozen=True)
class Support:
    """A support set as the inner loop reads it.

    Attributes:
        inputs: Model inputs and labels ``[T, N, ...]``.
        prefix: Stored outputs of the frozen prefix, or None.
        tasks: Which tasks of the learner's batch these are, int64 ``[T]`` (for rates learned per
            task), or None for all.
        start: ``[T, P]`` that a proximal term pulls towards, or None.
        narrowing: How fast weights ``[T, P]`` hold an embedding's table, or None.
        rows: What of that table stays the same, where there is one.
    """

    inputs: Mapping[str, Tensor]
    prefix: PrefixCache | None = None
    tasks: Tensor | None = None
    start: Tensor | None = None
    narrowing: Narrowing | None = None
    rows: TextRows | None = None

    def params(self, loop: InnerLoop, packed: Tensor) -> TaskParams:
        """Fast weights ``[T, P]`` as the model reads them on this set."""
        if self.narrowing is None:
            return TaskParams(loop.patched.layout, packed)
        return NarrowParams(self.narrowing, packed, self.rows)

    def after(self, loop: InnerLoop, packed: Tensor) -> TaskParams:
        """Adapted fast weights ``[T, P]`` as the model reads them on any texts."""
        if self.narrowing is None:
            return TaskParams(loop.patched.layout, packed)
        return NarrowParams(self.narrowing, packed)

    def layout(self, loop: InnerLoop) -> ParamLayout:
        """Of fast weights ``[T, P]``."""
        return loop.patched.layout if self.narrowing is None else self.narrowing.narrow

    def rate(self, loop: InnerLoop, step: int) -> float | Tensor:
        """The learning rate of a step, in a shape that update rules take."""
        rate = loop.rates.at(step, self.tasks)
        if self.narrowing is None or "param" not in loop.rates.axes:
            return rate
        return self.narrowing.per_entry(rate)

    def carrying(self) -> list[Tensor]:
        """Inputs that carry a gradient to what made them."""
        return [t for t in self.inputs.values() if t.requires_grad]

    def stored(self) -> list[Tensor]:
        """Every tensor that all steps read alike, in a fixed order: of the stored prefix, of an
        embedding's table."""
        leaves = [] if self.prefix is None else tree_flatten(self.prefix.outputs)[0]
        found = [t for t in leaves if isinstance(t, Tensor)]
        return found if self.rows is None else [*found, self.rows.base, self.rows.rows]

    def with_stored(self, tensors: Sequence[Tensor | None]) -> Support:
        """This support set with others in place of :meth:`stored`; None leaves a hole."""
        if self.rows is not None:
            *tensors, base, rows = tensors
            rows = replace(self.rows, base=base, rows=rows)
            return replace(self, rows=rows)._with_prefix(tensors)
        return self._with_prefix(tensors)

    def _with_prefix(self, tensors: Sequence[Tensor | None]) -> Support:
        if self.prefix is None:
            return self
        leaves, spec = tree_flatten(self.prefix.outputs)
        others = iter(_HOLE if t is None else t for t in tensors)
        cache = PrefixCache(self.prefix.tokens)
        cache.recording = False
        cache.outputs = tree_unflatten(
            [next(others) if isinstance(t, Tensor) or t is _HOLE else t for t in leaves], spec
        )
        return replace(self, prefix=cache)


@dataclass(frozen=True)
class Trajectory:
    """Where the inner loop went.

    Attributes:
        params: After the last step.
        active: bool ``[T]``; False from the step on at which a loss or gradient was not finite.
        losses: Support losses before each step, K tensors ``[T]``.
    """

    params: TaskParams
    active: Tensor
    losses: list[Tensor]

    @classmethod
    def joined(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """The trajectory of all tasks from those of slices of them."""
        return cls(
            joined([p.params for p in parts]),
            torch.cat([p.active for p in parts]),
            [torch.cat(losses) for losses in zip(*(p.losses for p in parts), strict=True)],
        )


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task set without its tasks' numbers of classes, which are the loss's alone."""
    return {k: v for k, v in batch.items() if k != WAYS}


def task_losses(
    loop: InnerLoop,
    params: TaskParams,
    batch: Mapping[str, Tensor],
    prefix: PrefixCache | None = None,
    *,
    only_tasks: bool = False,
) -> tuple[Tensor, Any]:
    """Losses ``[T]`` and outputs of the model; None where they were of no need.

    Args:
        only_tasks: Nothing but fast weights receives a gradient of these losses.
    """
    inputs = model_inputs(batch)
    layer = loop.output_layer(inputs, only_tasks)
    if layer is not None:
        states = loop.patched.run(params, inputs, prefix, before_output=True).logits
        return words_loss(loop.loss_fn, states, layer, batch), None
    outputs = loop.patched.run(params, inputs, prefix)
    fewer = "memory='auto' measures with few tasks, and chunks hold fewer than a batch"
    try:
        losses = loop.loss_fn(outputs, batch)
    except Exception as error:
        own = name_of(loop.loss_fn) is None
        if own and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                "loss_fn was called as loss_fn(outputs, batch), where batch holds 'labels' and all "
                f"other inputs of {params.num_tasks} tasks ({fewer})"
            )
        raise
    if not isinstance(losses, Tensor) or losses.shape != (params.num_tasks,):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if losses is None:
            got = "None (models are given no labels and return no loss: read batch['labels'])"
        raise ValueError(
            f"loss_fn must return one loss per task, shape [{params.num_tasks}], got {got} "
            f"({fewer})"
        )
    return losses, outputs


def gradient(
    loop: InnerLoop, packed: Tensor, support: Support, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Support losses ``[T]`` and their gradient ``[T, P]``, one batched pass for all tasks."""
    if loop.capture is not None and not support.carrying():
        found = loop.capture.gradient(loop, packed, support, create_graph)
        if found is not None:
            return found
    with torch.enable_grad():
        if not (create_graph and packed.requires_grad):  # prototypes of frozen features do not
            packed = packed.detach().requires_grad_()
        params = support.params(loop, packed)
        losses, _ = task_losses(
            loop, params, support.inputs, support.prefix, only_tasks=not create_graph
        )
        total = losses
        if loop.proximal:
            total = losses + 0.5 * loop.proximal * (packed - support.start).square().sum(1)
        grad = None
        if total.requires_grad:
            (grad,) = torch.autograd.grad(
                total.sum(), packed, create_graph=create_graph, allow_unused=True
            )
    if grad is None:
        raise ValueError(
            "the support loss must depend on the adapted parameters: a differentiable function "
            "of the model's outputs was expected, got one without a gradient"
        )
    return losses.detach(), grad


def inner_step(
    loop: InnerLoop,
    step: int | Tensor,
    packed: Tensor,
    state: State,
    support: Support,
    active: Tensor,
    create_graph: bool,
    in_place: bool = False,
) -> tuple[Tensor, State, Tensor, Tensor]:
    """One step: new ``[T, P]``, new state, who is still active, support losses ``[T]``.

    `step` may be int64 ``[T]`` for rules with steps apart and rates that are not learned by step.
    With `create_graph` the gradient is part of the graph (second order); without, the update
    still is, so that first-order gradients reach learned rates and initial values. With `in_place`
    `packed` and `state` may be overwritten.
    """
    losses, grad = gradient(loop, packed, support, create_graph)
    active = active & torch.isfinite(losses)
    packed, state, finite = loop.rule.checked_update(
        packed,
        grad,
        state,
        support.rate(loop, step),
        step,
        active=_mask(active),
        segments=None if loop.rates.segments is None else support.layout(loop),
        clip_norm=loop.clip_norm,
        in_place=in_place,
        losses=losses,
    )
    return packed, state, active & finite, losses


def unroll(loop: InnerLoop, packed: Tensor, support: Support) -> Trajectory:
    """All K steps, in the autograd graph as far as gradients are enabled."""
    state = loop.rule.init(packed)
    active = torch.ones(packed.shape[0], dtype=torch.bool, device=packed.device)
    all_losses = []
    for step in range(loop.steps):
        differentiable = torch.is_grad_enabled()
        packed, state, active, losses = inner_step(
            loop, step, packed, state, support, active,
            create_graph=differentiable and loop.create_graph(step),
            in_place=step > 0 and not differentiable,  # the first step reads the caller's weights
        )  # fmt: skip
        all_losses.append(losses)
    return Trajectory(support.after(loop, packed), active, all_losses)


def _mask(active: Tensor) -> Tensor | None:
    """None where nobody is frozen and asking costs nothing: the update skips the selection."""
    if active.device.type == "cpu" and bool(active.all()):
        return None
    return active
