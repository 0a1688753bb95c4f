"""Meta-gradients in the memory of one inner step, whatever K is; exactly the same numbers.

Forward runs first-order steps and keeps only the fast weights and optimizer state of each.
Backward walks the steps from last to first, rebuilds one step's graph, and applies its
vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, Trajectory, inner_step


class RandomState:
    """The global random state before a step, so that its dropout can be replayed exactly."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self):
        devices = [] if self.cuda is None else [self.device]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


class _Tape:
    """What the forward pass keeps for the backward pass, and who may be differentiated."""

    def __init__(self, loop: InnerLoop, support: Support, shared: Sequence[Tensor]) -> None:
        self.loop = loop
        self.support = support
        self.boundary = support.prefix.tensors() if support.prefix is not None else []
        self.meta: list[Tensor] = [*loop.rates.parameters(), *shared, *self.boundary]
        self.trajectory: Trajectory | None = None
        self.params: list[Tensor] = []
        self.states: list[tuple[Tensor, ...]] = []
        self.actives: list[Tensor] = []
        self.random: list[RandomState | None] = []


def recompute(
    loop: InnerLoop, packed: Tensor, support: Support, shared: Sequence[Tensor]
) -> Trajectory:
    """All K steps, differentiable to `packed`, the rates, `shared` weights and the prefix.

    Args:
        packed: Initial fast weights ``[T, P]``.
        shared: Weights of the model that are meta-parameters but not adapted.
    """
    tape = _Tape(loop, support, shared)
    params = _Recompute.apply(tape, packed, *tape.meta)
    trajectory = tape.trajectory
    assert trajectory is not None
    return replace(trajectory, params=params)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape: _Tape, packed: Tensor, *meta: Tensor) -> Tensor:
        loop, support = tape.loop, tape.support
        state = loop.rule.init(packed)
        active = torch.ones(packed.shape[0], dtype=torch.bool, device=packed.device)
        trajectory = Trajectory(packed, state, active)
        random = loop.patched.training
        for step in range(loop.steps):
            tape.params.append(packed)
            tape.states.append(state)
            tape.actives.append(active)
            tape.random.append(RandomState(packed.device) if random else None)
            packed, state, active, losses = inner_step(
                loop, step, packed, state, support, active, create_graph=False
            )
            trajectory.losses.append(losses)
        trajectory.state, trajectory.active = state, active
        tape.trajectory = trajectory
        ctx.tape = tape
        return packed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_params: Tensor):
        tape: _Tape = ctx.tape
        loop = tape.loop
        aliases = [t.detach().requires_grad_() for t in tape.boundary]
        kept = len(tape.meta) - len(tape.boundary)
        meta = [*tape.meta[:kept], *aliases]
        support = tape.support
        if aliases:
            support = replace(support, prefix=support.prefix.with_tensors(aliases))
        d_meta: list[Tensor | None] = [None] * len(meta)
        d_state: tuple[Tensor | None, ...] = (None,) * len(tape.states[0])
        for step in reversed(range(loop.steps)):
            packed = tape.params[step].detach().requires_grad_()
            state = tuple(s.detach().requires_grad_() for s in tape.states[step])
            random = tape.random[step]
            with torch.enable_grad():
                run = _replayed(random, inner_step)
                new, new_state, _, _ = run(
                    loop, step, packed, state, support, tape.actives[step], loop.create_graph(step)
                )
            outputs, gradients = [], []
            for tensor, d in zip((new, *new_state), (d_params, *d_state), strict=True):
                if d is not None and tensor.requires_grad:
                    outputs.append(tensor)
                    gradients.append(d)
            grads = torch.autograd.grad(
                outputs, [packed, *state, *meta], gradients, allow_unused=True
            )
            d_params = grads[0]
            d_state = grads[1 : 1 + len(state)]
            d_meta = [_add(a, b) for a, b in zip(d_meta, grads[1 + len(state) :], strict=True)]
        return (None, d_params, *d_meta)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _replayed(random: RandomState | None, fn: Callable) -> Callable:
    if random is None:
        return fn

    def run(*args):
        with random.replayed():
            return fn(*args)

    return run


class Rerun(torch.autograd.Function):
    """A function whose graph is dropped after the forward pass and rebuilt in the backward pass.

    ``Rerun.apply(fn, random, *inputs)`` equals ``fn(*inputs)``, a tuple of tensors; `random` says
    whether `fn` draws random numbers, which are then replayed.
    """

    @staticmethod
    def forward(ctx, fn: Callable, random: bool, *inputs: Tensor):
        ctx.fn, ctx.inputs = fn, inputs
        ctx.random = RandomState(inputs[0].device) if random else None
        outputs = fn(*inputs)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor):
        # Leaves (model weights, rates) are read by fn directly; others enter as detached aliases.
        inputs = [
            t if t.is_leaf and t.requires_grad else t.detach().requires_grad_(t.requires_grad)
            for t in ctx.inputs
        ]
        with torch.enable_grad():
            outputs = _replayed(ctx.random, ctx.fn)(*inputs)
        pairs = [
            (o, g)
            for o, g in zip(outputs, gradients, strict=True)
            if o.requires_grad and g is not None
        ]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
        )
        return (None, None, *(next(found) if t.requires_grad else None for t in inputs))
