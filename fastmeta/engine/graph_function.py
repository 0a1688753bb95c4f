"""A captured pair of graphs as a function that autograd differentiates once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.engine.backward import differentiable_once
from fastmeta.engine.graphs import Pair
from fastmeta.patching.adapted_linear import Gathering

Landings = Mapping[int, Gathering | None]
"""By place: where the gradient of a tensor gathers; none where autograd brings it."""


class GraphFunction:
    """``(*operands, *constants) -> (*shown, *results)``.

    Args:
        pair: The graphs: what is shown and the results; gradients that cotangents of the
            differentiable results give.
        shown: How many are shown, without a gradient.
        differentiable: Which results are.
        pulled: The operands that gradients belong to; those of `shared` follow.
        operands: How many there are.
        shared: Weights that may be among the pair's constants.
    """

    def __init__(
        self,
        pair: Pair,
        shown: int,
        differentiable: Sequence[int],
        pulled: Sequence[int],
        operands: int,
        shared: Sequence[Tensor],
    ) -> None:
        self.pair, self.shown, self.differentiable = pair, shown, differentiable
        constants = {id(t): operands + i for i, t in enumerate(pair.constants)}
        self.pulled = [*pulled, *(constants.get(id(t), -1) for t in shared)]

    def with_pair(self, pair: Pair) -> GraphFunction:
        """The same of other graphs, which read the same constants."""
        other = copy.copy(self)
        other.pair = pair
        return other

    def __call__(
        self, operands: Sequence[Tensor], before: Landings, after: Landings
    ) -> tuple[Tensor, ...]:
        """What is shown, then the results.

        Args:
            before: Landings of operands.
            after: Those of results, which may be put there after the call.
        """
        with torch.autocast(operands[0].device.type, enabled=False):
            return _Run.apply(self, before, after, *operands, *self.pair.constants)


class _Run(torch.autograd.Function):
    """``(function, landings before, landings after, *operands, *constants)``."""

    @staticmethod
    def forward(
        ctx: Any, function: GraphFunction, before: Landings, after: Landings, *tensors: Tensor
    ) -> tuple:
        found, ctx.saved = function.pair.run(tensors)
        ctx.save_for_backward(*(tensors[i] for i in function.pair.kept))
        ctx.function, ctx.before, ctx.after, ctx.count = function, before, after, len(tensors)
        results = found[function.shown :]
        ctx.likes = [(t.shape, t.dtype, t.device) for t in results]
        others = [t for i, t in enumerate(results) if i not in function.differentiable]
        ctx.mark_non_differentiable(*found[: function.shown], *others)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        function, found = ctx.function, [None] * (3 + ctx.count)
        cotangents = [
            _cotangent(gradients[function.shown + i], ctx.after.get(i), ctx.likes[i])
            for i in function.differentiable
        ]
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        with torch.autocast(cotangents[0].device.type, enabled=False):
            pulled = function.pair.pull(ctx.saved_tensors, ctx.saved, cotangents, keep)
        for place, gradient in zip(function.pulled, pulled, strict=True):
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
