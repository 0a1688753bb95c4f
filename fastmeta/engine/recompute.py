"""Meta-gradients in the memory of one inner step of half the tasks, whatever K is; exactly the
same numbers.

Forward runs first-order steps and keeps only the fast weights and optimizer state of each.
Backward walks the steps from last to first, rebuilds one step's graph, and applies its
vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.engine.conditions import Conditions
from fastmeta.engine.inner import InnerLoop, Support, Trajectory, inner_step
from fastmeta.patching.prefix import is_random

SLICES = 2
"""Tasks are recomputed in at least this many slices: then a step's graph is small beside the fast
weights kept of all steps, and more slices would only cost launches."""


def slices(loop: InnerLoop, tasks: int) -> list[slice]:
    """Which tasks are recomputed together: only one slice's graph of a step exists at a time.

    All of them under dropout: slices would draw other masks than the same tasks unrolled.
    """
    random = loop.patched.training and is_random(loop.patched.model)
    size = tasks if random else max(1, tasks // SLICES)
    return [slice(i, min(i + size, tasks)) for i in range(0, tasks, size)]


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The trajectory of all tasks from those of slices of them."""
    if len(parts) == 1:
        return parts[0]
    return Trajectory(
        torch.cat([p.params for p in parts]),
        torch.cat([p.active for p in parts]),
        [torch.cat(losses) for losses in zip(*(p.losses for p in parts), strict=True)],
    )


def recompute(
    loop: InnerLoop, packed: Tensor, support: Support, shared: Sequence[Tensor]
) -> Trajectory:
    """All K steps, differentiable once to `packed`, rates, rule, `shared` weights and prefix.

    Args:
        packed: Initial fast weights ``[T, P]``.
        shared: Weights of the model that are meta-parameters but not adapted.
    """
    weights = [*loop.rates.parameters(), *loop.rule.parameters(), *shared]
    stored = support.stored()
    carrying = [t for t in stored if t.requires_grad]
    params, active, *losses = _Recompute.apply(
        loop,
        support.with_stored([None] * len(stored)),
        weights,
        stored,
        packed,
        *weights,
        *carrying,
    )
    return Trajectory(params, active, losses)


class _Recompute(torch.autograd.Function):
    """``(loop, support without its prefix, weights, stored prefix, packed, *meta)``, where meta
    are the weights and those stored tensors that carry a gradient."""

    @staticmethod
    def forward(ctx, loop, empty, weights, stored, packed, *meta):
        support = empty.with_stored(stored)
        state = loop.rule.init(packed)
        active = torch.ones(packed.shape[0], dtype=torch.bool, device=packed.device)
        ctx.loop, ctx.support, ctx.weights = loop, empty, weights
        ctx.conditions = []
        saved, losses = [], []
        for step in range(loop.steps):
            saved.append((packed, *state, active))
            ctx.conditions.append(Conditions(loop.patched, packed.device))
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_params: Tensor, *_: Tensor):
        loop: InnerLoop = ctx.loop
        saved, per_step = ctx.saved_tensors, ctx.per_step
        stored = saved[loop.steps * per_step :][: ctx.num_stored]
        # The prefix's own graph is walked once, by autograd, from the gradients gathered here.
        stored = [t.detach().requires_grad_(t.requires_grad) for t in stored]
        support = ctx.support.with_stored(stored)
        meta = [*ctx.weights, *(t for t in stored if t.requires_grad)]
        d_meta: list[Tensor | None] = [None] * len(meta)
        d_state: Sequence[Tensor | None] = [None] * (per_step - 2)
        for step in reversed(range(loop.steps)):
            packed, *state, active = saved[step * per_step : (step + 1) * per_step]
            packed = packed.detach().requires_grad_()
            state = tuple(s.detach().requires_grad_() for s in state)
            with ctx.conditions[step].restored(loop.patched):
                new, new_state, _, _ = inner_step(
                    loop, step, packed, state, support, active, loop.create_graph(step)
                )
            d_params, *rest = backpropagate(
                (new, *new_state), (d_params, *d_state), [packed, *state, *meta]
            )
            d_state = rest[: len(state)]
            d_meta = [add(a, b) for a, b in zip(d_meta, rest[len(state) :], strict=True)]
        return None, None, None, None, d_params, *d_meta


def backpropagate(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """``torch.autograd.grad`` where some outputs have no gradient or depend on no input."""
    pairs = [
        (o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad
    ]
    wanted = [t for t in inputs if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    )
    return [next(found) if t.requires_grad else None for t in inputs]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, None standing for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
