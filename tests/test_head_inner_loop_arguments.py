"""head_inner_loop: forms of the learning rate, and one clear sentence for each bad argument."""

from __future__ import annotations

import pytest
import torch

from fastmeta import ops
from fastmeta.ops import head_inner_loop

NAN = float("nan")


def test_rate_forms():
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 4, 5), (2, 5), (2,)))
    labels = torch.tensor([[0, 1, 0, 1]]).expand(3, 4)

    def run(lr):
        return head_inner_loop(x, labels, w, b, lr, 2)[0]

    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    torch.testing.assert_close(run(0.1)[0], run(rates)[0], rtol=0, atol=0)
    torch.testing.assert_close(run(rates[:2]), run(rates[None, :2].expand(3, 2)), rtol=0, atol=0)
    torch.testing.assert_close(run(rates[:, None]), run(rates), rtol=0, atol=0)
    torch.testing.assert_close(run(rates[0]), run(0.1), rtol=0, atol=0)
    two = (x[:2], labels[:2], w, b, rates[:2], 2)
    with pytest.raises(ValueError, match=r"per task or per step .* lr\[:, None\]"):
        head_inner_loop(*two)


BAD = {
    "features must be a floating-point tensor": {"features": torch.zeros(2, 3)},
    "labels must be int64": {"labels": torch.zeros(2, 4, dtype=torch.int32)},
    r"labels must be int64 \[T, N\] = \[2, 4\]": {"labels": torch.zeros(2, 5, dtype=torch.int64)},
    r"labels must be in 0\.\.2 .* got 3 in task 0": {"labels": torch.full((2, 4), 3)},
    r"labels must be in 0\.\.2 .* got -1 in task 0": {"labels": torch.full((2, 4), -1)},
    r"labels must be in 0\.\.1 .* got 2 in task 1": {
        "labels": torch.tensor([[0] * 4, [2] * 4]),
        "ways": torch.tensor([3, 2]),
    },
    r"weight must be float32 \[C, D\].*D = 5, got float32 \[3, 4\]": {"weight": torch.zeros(3, 4)},
    "weight must be float32": {"weight": torch.zeros(3, 5, dtype=torch.float64)},
    "weight must have T = 2": {"weight": torch.zeros(3, 3, 5)},
    "bias must be None or": {"bias": torch.zeros(4)},
    "weight must be on cpu": {"weight": torch.zeros(3, 5, device="meta")},
    "lr must be a finite number": {"lr": NAN},
    "lr must be finite, got a tensor": {"lr": torch.tensor(NAN)},
    "lr must be floating point": {"lr": torch.tensor(1)},
    r"lr must be a number, a scalar tensor, \[T\], \[K\]": {"lr": torch.ones(7)},
    "steps must be an integer of at least 1, got 0": {"steps": 0},
    "steps must be an integer of at least 1, got 1.5": {"steps": 1.5},
    "momentum must be finite and >= 0 and < 1, got 1": {"momentum": 1.0},
    "momentum must be a number": {"momentum": torch.tensor(0.5)},
    "weight_decay must be finite and >= 0, got -0.1": {"weight_decay": -0.1},
    "weight_decay must be finite": {"weight_decay": NAN},
    r"ways must be int64 \[2\]": {"ways": torch.tensor([2.0, 2.0])},
    r"ways must be in 1\.\.3": {"ways": torch.tensor([0, 2])},
    "active must be": {"active": torch.ones(2)},
    r"truncate must be None or an integer in 0\.\.3, got 4": {"truncate": 4},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {
        "features": torch.zeros(2, 4, 5),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "weight": torch.zeros(3, 5),
        "bias": torch.zeros(3),
        "lr": 0.1,
        "steps": 3,
    }
    ops.head_inner_loop(**arguments)
    with pytest.raises(ValueError, match=f"head_inner_loop: {message}"):
        ops.head_inner_loop(**{**arguments, **BAD[message]})
