"""Captured steps of a loop that keeps weights by leaf: one step and its vector-Jacobian product.

What a step writes anew, the rest in its packed buffer and the weights of leaves, are operands of a
graph and among its results; all steps after the first are alike and share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastmeta.engine import graphs
from fastmeta.engine.capture import signature, token_tensors, traced_support
from fastmeta.engine.inner import InnerLoop, Support
from fastmeta.engine.leaf_step import one_step
from fastmeta.engine.recompute import backpropagate
from fastmeta.ops._adapted_linear import Gate, Gathering
from fastmeta.patching import TaskParams
from fastmeta.patching.leaf_params import LeafParams


def captured_step(
    loop: InnerLoop, rate: Tensor | float, params: LeafParams, support: Support, gate: Gate
) -> tuple[Tensor, Tensor, LeafParams] | None:
    """What :func:`~fastmeta.engine.leaf_step.one_step` returns, differentiable once; None where
    eager code serves."""
    states = [leaf.state() for leaf in params.leaves.values()]
    rest = params.rest.packed
    parts = _Parts(
        [rate if isinstance(rate, Tensor) else rest.new_full((1,), rate)],
        [rest],
        [t for written, _ in states for t in written],
        [t for _, read in states for t in read],
        support.stored(),
        [*support.inputs.values(), *token_tensors(support)],
    )
    shared = loop.patched.shared_parameters()
    counts = tuple((len(written), len(read)) for written, read in states)
    key = (*params.leaves, counts, *signature(loop, support, parts.joined(), shared))
    make = partial(_LeafStep.make, loop, parts, params, support, gate, shared)
    step = loop.capture.find(key, make)
    return None if step is None else step.run(params, parts)


@dataclass(frozen=True)
class _Parts:
    """Operands of a step.

    Attributes:
        rate: The learning rate, ``[1 or T]``.
        rest: The packed buffer, ``[T, P']``.
        written: What the step writes anew of leaves.
        read: What it reads of them besides.
        stored: The stored prefix.
        given: The support set.
    """

    rate: list[Tensor]
    rest: list[Tensor]
    written: list[Tensor]
    read: list[Tensor]
    stored: list[Tensor]
    given: list[Tensor]

    def _all(self) -> tuple[list[Tensor], ...]:
        return self.rate, self.rest, self.written, self.read, self.stored, self.given

    @property
    def first_written(self) -> int:
        """The place of the first of :attr:`written`."""
        return len(self.rate) + len(self.rest)

    def joined(self) -> list[Tensor]:
        return [t for part in self._all() for t in part]

    def like(self, tensors: Sequence[Tensor]) -> _Parts:
        """Others in their place."""
        others = iter(tensors)
        return _Parts(*([*islice(others, len(part))] for part in self._all()))


def _at(
    params: LeafParams, rest: Tensor, written: Sequence[Tensor], read: Sequence[Tensor]
) -> LeafParams:
    """The fast weights with other tensors in place of the rest and of what leaves write and
    read."""
    each, beside = iter(written), iter(read)
    leaves = {}
    for slot, leaf in params.leaves.items():
        mine, more = leaf.state()
        leaves[slot] = leaf.at([*islice(each, len(mine))], [*islice(beside, len(more))])
    return LeafParams(params.layout, TaskParams(params.rest.layout, rest), leaves)


def _written(params: LeafParams) -> list[Tensor]:
    return [t for leaf in params.leaves.values() for t in leaf.state()[0]]


def _landings(params: LeafParams) -> list[Gathering | None]:
    """Where the gradient of every tensor that steps write anew gathers."""
    return [landing for leaf in params.leaves.values() for landing in leaf.landings()]


class _LeafStep:
    """A captured step, for operands of one signature.

    Attributes:
        pair: The graphs: ``(losses, finite number, rest, *written)``, and the gradients that
            cotangents of the rest and of what is written give.
        pulled: For each gradient: the operand or constant it belongs to.
    """

    def __init__(self, pair: graphs.Pair, pulled: list[int]) -> None:
        self.pair, self.pulled = pair, pulled

    @classmethod
    def make(
        cls,
        loop: InnerLoop,
        parts: _Parts,
        params: LeafParams,
        support: Support,
        gate: Gate,
        shared: list[Tensor],
        compiler: graphs.Compiler | None,
    ) -> _LeafStep:
        loop = replace(loop, capture=None)
        operands, results = parts.joined(), [*parts.rest, *parts.written]

        def function(*args: Tensor) -> list[Tensor | None]:
            leaves = [
                t.detach().requires_grad_() if like.requires_grad else t
                for t, like in zip(args, operands, strict=False)
            ]
            own = parts.like(leaves)
            before = _at(params, *own.rest, own.written, own.read)
            landings = _landings(before)  # a step changes its leaves
            texts = traced_support(support, own.stored, iter(own.given))
            found = one_step(loop, *own.rate, before, texts, gate, True)
            if found is None:
                raise RuntimeError("an adapted layer does not run once a step")
            losses, finite, after = found
            stepped = [after.rest.packed, *_written(after)]
            if [t.shape for t in stepped] != [t.shape for t in results]:
                raise RuntimeError("steps after the first are not alike")
            given = [losses, finite, *(t.detach() for t in stepped)]  # before cotangents are read
            for landing in _landings(after):
                if landing is not None:
                    landing.given_away = True
            pulled = backpropagate(stepped, args[len(operands) :], [*leaves, *shared])
            for i, landing in enumerate(landings, parts.first_written):
                if landing is not None:
                    pulled[i] = landing.finish(pulled[i])
            return [*given, *pulled]

        cotangents = [torch.ones_like(t, memory_format=torch.contiguous_format) for t in results]
        pair = graphs.capture(function, operands, cotangents, 2 + len(results), compiler)
        places = {id(t): len(operands) + i for i, t in enumerate(pair.constants)}
        pulled = [*range(len(operands)), *(places.get(id(t), -1) for t in shared)]
        return cls(pair, pulled)

    def run(self, params: LeafParams, parts: _Parts) -> tuple[Tensor, Tensor, LeafParams]:
        tensors = [*parts.joined(), *self.pair.constants]
        before = dict(enumerate(_landings(params), parts.first_written))
        after: list[Gathering | None] = []
        with torch.autocast(tensors[0].device.type, enabled=False):
            losses, finite, rest, *written = _Captured.apply(self, before, after, *tensors)
        params = _at(params, rest, written, parts.read)
        after += _landings(params)
        return losses, finite, params


class _Captured(torch.autograd.Function):
    """``(step, landings of what is written by place, those after, *operands, *constants)`` to
    ``(losses, finite number, rest, *written)``."""

    @staticmethod
    def forward(ctx: Any, step: _LeafStep, before: dict, after: list, *tensors: Tensor) -> tuple:
        (losses, finite, *results), ctx.saved = step.pair.run(tensors)
        ctx.save_for_backward(*(tensors[i] for i in step.pair.kept))
        ctx.step, ctx.before, ctx.after, ctx.count = step, before, after, len(tensors)
        ctx.likes = [(t.shape, t.dtype, t.device) for t in results]
        ctx.mark_non_differentiable(losses, finite)
        ctx.set_materialize_grads(False)
        return losses, finite, *results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: None, __: None, *gradients: Tensor | None) -> tuple:
        found: list[Tensor | None] = [None] * (3 + ctx.count)
        cotangents = map(_cotangent, gradients, [None, *ctx.after], ctx.likes)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        with torch.autocast(ctx.likes[0][2].type, enabled=False):
            pulled = ctx.step.pair.pull(ctx.saved_tensors, ctx.saved, cotangents, keep)
        for place, gradient in zip(ctx.step.pulled, pulled, strict=True):
            if gradient is None or place < 0 or not ctx.needs_input_grad[3 + place]:
                continue
            landing = ctx.before.get(place)
            if landing is None:
                found[3 + place] = gradient
            else:
                landing.give(gradient)
        return tuple(found)


def _cotangent(gradient: Tensor | None, landing: Gathering | None, like: tuple) -> Tensor:
    """What came to a result; of one with a landing it may be written to."""
    owned = False
    if landing is not None:
        gradient, owned = landing.take(gradient)
    if gradient is None:
        shape, dtype, device = like
        return torch.zeros(shape, dtype=dtype, device=device)
    if landing is None or owned:
        return gradient.contiguous()
    return gradient.clone(memory_format=torch.contiguous_format)
