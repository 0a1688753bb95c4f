"""Views of packed fast weights: their gradients land in one buffer, with autograd's values."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.ops.batched_linear import affine
from fastmeta.patching import ParamLayout
from fastmeta.patching.packing import landing_of, unpack

TASKS, ROWS, WIDE, NARROW = 2, 4, 6, 5
LAYOUT = ParamLayout(
    ["first", "bias", "second", "unused", "scale"],
    [(WIDE, NARROW), (WIDE,), (NARROW, WIDE), (3,), (NARROW,)],
)


def packed_and_input() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (TASKS, LAYOUT.num_params)
    packed = torch.randn(shape, generator=generator, dtype=torch.float64)
    for start, stop in LAYOUT.gaps:
        packed[:, start:stop] = 0
    x = torch.randn(TASKS, ROWS, NARROW, generator=generator, dtype=torch.float64)
    return packed.requires_grad_(), x


def by_landing(layout: ParamLayout, packed: Tensor) -> list[Tensor]:
    return unpack(layout, packed)


def by_autograd(layout: ParamLayout, packed: Tensor) -> list[Tensor]:
    return layout.unpack(packed)


def loss_of(views: list[Tensor], x: Tensor, case: str) -> Tensor:
    first, bias, second, _, scale = views
    y = affine(x, first, bias.unsqueeze(1), landing=landing_of(first)).tanh()
    y = affine(y, second, landing=landing_of(second))
    if case == "read twice":  # by two layers: products on the landing
        y = y + affine(x, first, landing=landing_of(first))[..., :NARROW]
    if case == "read otherwise":  # and by something that knows no landing
        y = y + (second.square().sum((1, 2)) + first.sum((1, 2)))[:, None, None]
    return (y * scale.unsqueeze(1)).sin().sum()


CASES = ["read once", "read twice", "read otherwise"]


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_order(case: str) -> None:
    found = []
    for views_of in (by_landing, by_autograd):
        packed, x = packed_and_input()
        views = views_of(LAYOUT, packed)
        (first_order,) = torch.autograd.grad(loss_of(views, x, case), packed, retain_graph=True)
        (grad,) = torch.autograd.grad(loss_of(views, x, case), packed, create_graph=True)
        new = packed - 0.1 * grad
        outer = loss_of(views_of(LAYOUT, new), x, case)
        outer.backward()
        found.append([first_order, grad, packed.grad])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        for start, stop in LAYOUT.gaps:
            assert not mine[:, start:stop].any()


def test_a_graph_walked_twice() -> None:
    packed, x = packed_and_input()
    views = unpack(LAYOUT, packed)
    loss = loss_of(views, x, "read twice")
    once, again = (torch.autograd.grad(loss, packed, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and once.data_ptr() != again.data_ptr()
    assert not landing_of(views[0]).sink.open


def test_batched_gradients() -> None:
    packed, x = packed_and_input()
    views = unpack(LAYOUT, packed)
    y = torch.stack([loss_of(views, x, "read once"), loss_of(views, 2 * x, "read once")])
    rows = [torch.autograd.grad(y[i], packed, retain_graph=True)[0] for i in range(2)]
    batched = torch.autograd.grad(y, packed, torch.eye(2).to(y), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack(rows))


def test_weight_gradients_are_not_copied() -> None:
    """Only what no product wrote is: biases and the like."""
    copied: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func._schema.name
            if name in ("aten::copy_", "aten::cat", "aten::add_"):
                copied[name] = copied.get(name, 0) + out.numel()
            return out

    packed, x = packed_and_input()
    small = TASKS * sum(LAYOUT.numels[LAYOUT.index[n]] for n in ("bias", "scale"))
    with Count():
        loss = loss_of(unpack(LAYOUT, packed), x, "read once")
        (grad,) = torch.autograd.grad(loss, packed, create_graph=True)
        first = dict(copied)
        grad.square().sum().backward(inputs=[packed])
    weight = TASKS * WIDE * NARROW
    assert first == {"aten::copy_": small}
    assert copied.get("aten::cat", 0) == 0 and copied["aten::copy_"] < small + weight


def test_segment_offsets_are_made_once_and_stay_in_their_process() -> None:
    layout = ParamLayout(["w", "b"], [(4, 5), (3,)])
    with torch.inference_mode():
        found = layout.segment_offsets("cpu")
    assert found.tolist() == [0, 32, 48] and not found.is_inference()
    assert layout.segment_offsets("cpu") is found
    twin = pickle.loads(pickle.dumps(layout))
    assert torch.equal(twin.segment_offsets(), found) and twin.segment_offsets() is not found
