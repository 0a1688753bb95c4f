"""In-place updates of lists of tensors, as optimizers of existing training code hold them."""

from __future__ import annotations

import pytest
import torch

from fastmeta import ops
from fastmeta.testing.ops import UPDATES

SHAPES = [(3, 5), (), (0, 2), (20_000,), (16,), (1, 1, 7), (17, 1009), (4,)]
SETTINGS = {
    "sgd": {"weight_decay": 0.1, "maximize": True},
    "momentum": {"momentum": 0.8, "dampening": 0.2},
    "adam": {"betas": (0.8, 0.9), "weight_decay": 0.1},
    "adamw": {"grad_scale": 0.5},
    "rmsprop": {"alpha": 0.9},
    "adagrad": {"lr_decay": 0.1},
}


def lists_for(rule: str, shapes, dtypes, device="cpu") -> list[list[torch.Tensor]]:
    """Parameters, gradients, state."""
    made = [[torch.randn(s, dtype=torch.float64).to(device, dtypes[0]) for s in shapes]]
    made.append([torch.randn(s, dtype=torch.float64).to(device, dtypes[1]) for s in shapes])
    for kind in UPDATES[rule].states:
        state = [torch.randn(s, dtype=torch.float64).to(device, dtypes[0]) for s in shapes]
        made.append([s.abs() for s in state] if kind == "square" else state)
    return made


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", UPDATES)
def test_lists_are_updated_as_rows(rule, dtypes, impl):
    """The same bits as one call per tensor, whatever the sizes, for more tensors than a launch of
    the CUDA kernel takes."""
    _, device = impl
    count = (2,) if UPDATES[rule].step else ()
    op, settings = getattr(ops, f"{rule}_update_"), SETTINGS[rule]
    for shapes in (SHAPES, [(16,), (4, 4)] * 60, [(5,)]):
        lists = lists_for(rule, shapes, dtypes, device)
        expected = []
        for row in zip(*lists, strict=True):
            params, grads, *state = (t.clone().view(1, -1) for t in row)
            op(params, grads, *state, *count, 0.05, **settings)
            expected.append((params, grads, *state))
        result = op(*lists[:2], *lists[2:], *count, 0.05, **settings)
        written = [lists[0], *lists[2:]]
        result = [result] if len(written) == 1 else result
        assert all(a is b for a, b in zip(result, written, strict=True))
        for row, want in zip(zip(*lists, strict=True), expected, strict=True):
            for a, b in zip(row, want, strict=True):
                torch.testing.assert_close(a.view(1, -1), b, rtol=0, atol=0)


def test_first_momentum_step_and_empty_lists():
    params, grads = [torch.ones(3), torch.ones(2, 2)], [torch.ones(3), torch.ones(2, 2)]
    new, buf = ops.momentum_update_(params, grads, None, 0.5)
    assert new is params and torch.equal(params[1], torch.full((2, 2), 0.5))
    assert torch.equal(buf[0], torch.ones(3))
    assert ops.sgd_update_([], [], 0.1) == []
    with pytest.raises(ValueError, match=r"params\[0\] must be a floating-point tensor, got None"):
        ops.momentum_update_([None], [torch.ones(3)], None, 0.5)


def test_autograd_notices():
    """A tensor that a graph has saved may not change unnoticed."""
    weight = torch.ones(2, 2, requires_grad=True)
    for params in (weight, [weight]):
        grads = torch.ones(2, 2) if params is weight else [torch.ones(2, 2)]
        loss = weight.square().sum()
        with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
            ops.sgd_update_(params, grads, 0.1)
        with torch.no_grad():
            ops.sgd_update_(params, grads, 0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        ops.sgd_update_([torch.ones(2)], [torch.ones(2)], 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(3)]}, "grads must be a list of 2 tensors, got 1"),
        ({"grads": torch.ones(3)}, r"grads must be a list of 2 tensors, got float32 \[3\]"),
        ({"grads": [torch.ones(3), torch.ones(2)]}, r"grads\[1\] must be float32 \[2, 2\] on cpu"),
        ({"grads": [torch.ones(3), torch.ones(4)]}, r"grads\[1\] must be float32 \[2, 2\] on cpu"),
        ({"grads": [torch.ones(3), None]}, r"grads\[1\] must be a floating-point tensor, got None"),
        ({"exp_avg": [torch.ones(3).double(), torch.ones(2, 2)]}, r"exp_avg\[0\] must be float32"),
        ({"exp_avg_sq": [torch.ones(3), torch.ones(2, 2).half()]}, r"exp_avg_sq\[1\] must be"),
        ({"params": [torch.ones(3), torch.ones(2, 4)[:, ::2]]}, r"params\[1\] must be contiguous"),
        ({"params": [torch.ones(3), torch.ones(2, 2).long()]}, r"params\[1\] must be a floating"),
        ({"lr": torch.tensor(0.1)}, "plain numbers, got a tensor"),
        ({"weight_decay": torch.tensor(0.1)}, "plain numbers, got a tensor"),
        ({"eps": -1.0}, "eps must be finite and > 0, got -1.0"),
        ({"active": torch.ones(2).bool()}, r"active needs params \[T, P\], got a list"),
    ],
)
def test_bad_lists(change, message, cpu_impl):
    def tensors():
        return [torch.ones(3), torch.ones(2, 2)]

    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    arguments = {**{name: tensors() for name in names}, "step": 1, "lr": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        ops.adam_update_(**arguments)
    for group in arguments.values():
        if isinstance(group, list):
            assert all(bool((t == 1).all()) for t in group if t is not None)


def test_functional_forms_name_the_way_for_lists():
    with pytest.raises(ValueError, match=r"got a list; sgd_update_ updates lists in place"):
        ops.sgd_update([torch.ones(3)], [torch.ones(3)], 0.1)
