"""Operators of one row or one task under `torch.func`, in checkpoints, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from fastmeta import ops
from fastmeta.ops import use_impl


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prototypes(classes: int) -> Callable[[Tensor], Tensor]:
    labels, points = torch.tensor([[0, classes // 2]]), numbers(1, classes, 3, seed=1)
    return lambda q: ops.prototypical_loss(q, labels, points, None)[0]


def update(**options) -> Callable[[Tensor], Tensor]:
    params = numbers(1, 4, seed=1)
    return lambda g: ops.sgd_update(params, g, 0.1, **options)


WEIGHT = numbers(5, 4, seed=1)


ONE = {
    "layer_norm": lambda: jacrev(ops.layer_norm)(numbers(5)),
    "rms_norm": lambda: jacrev(ops.rms_norm)(numbers(5)),
    "cross_entropy": lambda: jacrev(jacrev(lambda x: ops.cross_entropy(x, torch.tensor(2))))(
        numbers(5)
    ),
    "linear_cross_entropy": lambda: vmap(
        lambda x: ops.linear_cross_entropy(x, WEIGHT, torch.tensor(2))
    )(numbers(3, 4)),
    "few classes": lambda: jacrev(grad(lambda q: prototypes(4)(q).sin().sum()))(numbers(1, 2, 3)),
    "many classes": lambda: vmap(prototypes(65))(numbers(4, 1, 2, 3)),
    "active": lambda: vmap(update(active=torch.tensor([True])))(numbers(50, 1, 4)),
    "frozen": lambda: vmap(update(active=torch.tensor([False])))(numbers(50, 1, 4)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_row_for_all_samples(name: str) -> None:
    """What the samples share is one row in memory, and kernels read many."""
    found = ONE[name]()
    with use_impl("reference"):
        torch.testing.assert_close(found, ONE[name]())


def head(x: Tensor) -> Tensor:
    labels = torch.tensor([[0, 1]])
    return ops.head_inner_loop(x, labels, x.new_zeros(1, 3, 3), x.new_zeros(1, 3), 0.1, 2)[0].sum()


CHECKPOINTED = {
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x[0], numbers(5, 3, seed=1), torch.tensor([0, 3])
    ).sum(),
    "head_inner_loop": head,
    "prototypical_loss": lambda x: prototypes(65)(x).sum(),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_in_a_checkpoint(name: str) -> None:
    call, x = CHECKPOINTED[name], numbers(1, 2, 3).requires_grad_()
    (expected,) = torch.autograd.grad(call(x), x)
    (found,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False), x)
    torch.testing.assert_close(found, expected)


def test_batched_linear_compiled() -> None:
    weight = numbers(2, 5, 4, seed=1)
    call = torch.compile(lambda x: ops.batched_linear(x, weight), backend="eager")
    x = numbers(2, 3, 4).requires_grad_()
    (found,) = torch.autograd.grad(call(x).sin().sum(), x)
    (expected,) = torch.autograd.grad(ops.batched_linear(x, weight).sin().sum(), x)
    torch.testing.assert_close(found, expected)
