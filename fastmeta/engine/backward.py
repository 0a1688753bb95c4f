"""Gradients of a part of the graph, which the caller's backward pass goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable) -> Callable:
    """A backward pass of a Function that refuses to be differentiated: autograd would take what it
    returns for constants, unless what comes in has a gradient itself."""
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the meta-gradient is differentiable once here, but create_graph=True asks for its "
                "own: use memory='unroll' without task_chunk and compile"
            )
        return once(ctx, *gradients)

    return checked


def backpropagate(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` where some outputs have no gradient or depend on no input."""
    pairs = [
        (o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad
    ]
    wanted = [t for t in inputs if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    with _without_hooks(wanted):
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                allow_unused=True,
                retain_graph=retain_graph,
            )
        )
    return [next(found) if t.requires_grad else None for t in inputs]


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, gradients pass by hooks that the user has on tensors: they see them whole, once, when
    the caller's own backward pass brings them."""
    hooks = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        for t, _ in hooks:
            t._backward_hooks = None
        yield
    finally:
        for t, own in hooks:
            t._backward_hooks = own


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, None standing for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
