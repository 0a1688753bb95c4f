"""Meta-gradients in the memory of one inner step's graph, of half the tasks, and of all steps' fast
weights; exactly the same numbers.

Forward runs first-order steps and keeps only the fast weights and optimizer state of each.
Backward walks the steps from last to first, rebuilds one step's graph, and applies its
vector-Jacobian product. Steps whose graph was kept need not be rebuilt: the more memory, the less
is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.engine.backward import add, backpropagate, differentiable_once
from fastmeta.engine.conditions import Conditions, versions
from fastmeta.engine.inner import InnerLoop, Support, Trajectory, inner_step
from fastmeta.patching.prefix import has_dropout

SLICES = 2
"""Tasks are recomputed in at least this many slices: then a step's graph is small beside the fast
weights kept of all steps, and more slices would only cost launches."""


def slices(loop: InnerLoop, tasks: int) -> list[slice]:
    """Which tasks are recomputed together: only one slice's graph of a step exists at a time.

    All of them under dropout: slices would draw other masks than the same tasks unrolled. And where
    the device may not be asked, as which positions are padding is known of whole sets.
    """
    random = loop.patched.training and has_dropout(loop.patched.model)
    size = tasks if random or not loop.asks else max(1, tasks // SLICES)
    return [slice(i, min(i + size, tasks)) for i in range(0, tasks, size)]


def recompute(
    loop: InnerLoop,
    packed: Tensor,
    support: Support,
    shared: Sequence[Tensor],
    keep: int = 0,
) -> Trajectory:
    """All K steps, differentiable once to `packed`, rates, rule, `shared` weights, prefix, inputs.

    Args:
        packed: Initial fast weights ``[T, P]``.
        shared: Weights of the model that are meta-parameters but not adapted.
        keep: The last this many steps keep their graphs from the forward pass.
    """
    weights = [*loop.rates.parameters(), *loop.rule.learned(), *shared, *support.carrying()]
    stored = support.stored()
    carrying = [t for t in stored if t.requires_grad]
    params, active, *losses = _Recompute.apply(
        loop,
        keep,
        support.with_stored([None] * len(stored)),
        weights,
        stored,
        packed,
        *weights,
        *carrying,
    )
    return Trajectory(support.after(loop, params), active, losses)


class _Recompute(torch.autograd.Function):
    """``(loop, keep, support without its prefix, weights, stored prefix, packed, *meta)``, where
    meta are the weights and those stored tensors that carry a gradient."""

    @staticmethod
    def forward(ctx, loop, keep, empty, weights, stored, packed, *meta):
        support = empty.with_stored(stored)
        state = loop.rule.init(packed)
        active = torch.ones(packed.shape[0], dtype=torch.bool, device=packed.device)
        ctx.loop, ctx.support, ctx.weights = loop, empty, weights
        ctx.conditions, ctx.kept = [], {}
        read = versions(loop.patched, support.inputs.values())
        saved, losses = [], []
        for step in range(loop.steps):
            saved.append((packed, *state, active))
            ctx.conditions.append(Conditions(loop.patched, packed.device, read))
            if step >= loop.steps - keep:
                with torch.enable_grad():
                    graph = _Graph.of(loop, step, packed, state, empty, stored, active)
                ctx.kept[step] = graph
                packed, *state = (t.detach() for t in graph.outputs)
                active, loss = graph.active, graph.losses
            else:
                packed, state, active, loss = inner_step(
                    loop, step, packed, state, support, active, create_graph=False
                )
            ctx.conditions[-1].finish()
            losses.append(loss)
        # The weights are saved only so that changing them before backward() raises.
        ctx.save_for_backward(*(t for row in saved for t in row), *stored, *weights)
        ctx.per_step, ctx.num_stored = len(saved[0]), len(stored)
        ctx.mark_non_differentiable(active, *losses)
        return packed, active, *losses

    @staticmethod
    @differentiable_once
    def backward(ctx, d_params: Tensor, *_: Tensor):
        loop: InnerLoop = ctx.loop
        saved, per_step = ctx.saved_tensors, ctx.per_step
        stored = saved[loop.steps * per_step :][: ctx.num_stored]
        d_meta: list[Tensor | None] = [None] * (
            len(ctx.weights) + sum(t.requires_grad for t in stored)
        )
        d_state: Sequence[Tensor | None] = [None] * (per_step - 2)
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        for step in reversed(range(loop.steps)):
            graph = ctx.kept.get(step)
            if graph is None:
                packed, *state, active = saved[step * per_step : (step + 1) * per_step]
                with ctx.conditions[step].restored(loop.patched):
                    graph = _Graph.of(loop, step, packed, state, ctx.support, stored, active)
            elif not retain:
                del ctx.kept[step]
            d_params, *rest = backpropagate(
                graph.outputs,
                (d_params, *d_state),
                [*graph.inputs, *ctx.weights, *graph.stored],
                retain_graph=retain and step in ctx.kept,
            )
            d_state = rest[: len(d_state)]
            d_meta = [add(a, b) for a, b in zip(d_meta, rest[len(d_state) :], strict=True)]
        return None, None, None, None, None, d_params, *d_meta


@dataclass(frozen=True)
class _Graph:
    """One step's graph.

    Attributes:
        inputs: Leaves: fast weights and state before the step.
        stored: Leaves: those of the stored prefix that carry a gradient, whose own graph autograd
            walks once, from the gradients gathered here.
        outputs: Fast weights and state after the step.
    """

    inputs: list[Tensor]
    stored: list[Tensor]
    outputs: list[Tensor]
    active: Tensor
    losses: Tensor

    @classmethod
    def of(
        cls,
        loop: InnerLoop,
        step: int,
        packed: Tensor,
        state: Sequence[Tensor],
        empty: Support,
        stored: Sequence[Tensor],
        active: Tensor,
    ) -> _Graph:
        packed, *state = (t.detach().requires_grad_() for t in (packed, *state))
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in stored]
        new, new_state, active, losses = inner_step(
            loop, step, packed, tuple(state), empty.with_stored(leaves), active,
            loop.create_graph(step),
        )  # fmt: skip
        carrying = [t for t in leaves if t.requires_grad]
        return cls([packed, *state], carrying, [new, *new_state], active, losses)
