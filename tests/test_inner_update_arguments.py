"""Wrong calls of the update rules: a clear error, and nothing written."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _backend, _library, ops
from fastmeta.testing.ops import UPDATES, update_sample

NAN, INF = float("nan"), float("inf")


def test_in_place_refuses_gradients_and_shared_rows():
    params, grads = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
        ops.sgd_update_(params.requires_grad_(), grads, 0.1)
    with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
        torch.func.vmap(lambda g: ops.sgd_update_(torch.zeros(2, 3), g, 0.1))(grads.expand(4, 2, 3))
    with pytest.raises(ValueError, match="params must not be an expanded view"):
        ops.sgd_update_(torch.zeros(1, 3).expand(2, 3), grads, 0.1)
    with pytest.raises(ValueError, match="buf must not be an expanded view"):
        ops.momentum_update_(torch.zeros(2, 3), grads, torch.zeros(1, 3).expand(2, 3), 0.1)
    with torch.no_grad():
        ops.sgd_update_(params, grads, 0.1)
    assert torch.equal(params, torch.full((2, 3), -0.1))


def test_in_place_refuses_a_decay_that_learns():
    decay = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
        ops.sgd_update_(torch.zeros(2, 3), torch.ones(2, 3), 0.1, weight_decay=decay)


def test_in_place_refuses_elements_that_share_memory():
    def arguments(**change):
        names = ("params", "grads", "exp_avg", "exp_avg_sq")
        return {name: torch.ones(2, 3) for name in names} | change

    window = torch.arange(4.0).as_strided((2, 3), (1, 1))
    for name in ("params", "exp_avg"):
        with pytest.raises(
            ValueError, match=rf"{name} must not .* share memory .* strides \(1, 1\)"
        ):
            ops.adam_update_(**arguments(**{name: window}), step=1, lr=0.1)
    assert torch.equal(window, torch.tensor([[0.0, 1, 2], [1, 2, 3]]))
    state = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="exp_avg and exp_avg_sq must not share memory"):
        ops.adam_update_(**arguments(exp_avg=state, exp_avg_sq=state), step=1, lr=0.1)
    assert not state.any()
    woven = torch.zeros(6).as_strided((2, 2), (3, 2))  # strides that cross, but never meet
    assert torch.equal(ops.sgd_update_(woven, torch.ones(2, 2), 1.0), -torch.ones(2, 2))


def test_sparse_tensors_are_refused():
    dense = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"grads must be dense, got .* torch.sparse_coo"):
        ops.sgd_update_(dense, dense.to_sparse(), 0.1)
    with pytest.raises(ValueError, match=r"buf must be like params, .* got .* torch.sparse_coo"):
        ops.momentum_update_(dense, dense + 1, dense.to_sparse(), 0.1)
    assert not dense.any()


def test_ambiguous_rate_is_refused():
    params, grads, rate = torch.zeros(4, 4), torch.ones(4, 4), torch.arange(4.0)
    with pytest.raises(ValueError, match="could mean per task or per parameter") as error:
        ops.sgd_update(params, grads, rate)
    assert "lr[:, None]" in str(error.value) and "lr[None, :]" in str(error.value)
    by_task = ops.sgd_update(params, grads, rate[:, None])
    assert torch.equal(by_task, -rate[:, None].expand(4, 4))
    assert torch.equal(ops.sgd_update(params, grads, rate[None, :]), by_task.t())
    one = ops.sgd_update(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([2.0]))
    assert one.item() == -2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": torch.zeros(6)},
            r"params must be a floating-point tensor \[T, P\], got float32",
        ),
        ({"params": torch.zeros(2, 3, dtype=torch.int64)}, "got int64"),
        ({"params": [[1.0]]}, r"got (a )?list"),
        ({"grads": torch.zeros(3, 2)}, r"shape of params \[2, 3\], got float32 \[3, 2\]"),
        ({"grads": torch.zeros(2, 3, dtype=torch.float64)}, "dtype of params"),
        ({"grads": torch.zeros(2, 3, device="meta")}, "grads must be on cpu"),
        ({"lr": NAN}, "finite number or a tensor, got float nan"),
        ({"lr": torch.tensor([0.1, NAN])}, "lr must be finite, got a tensor with NaN or Inf"),
        ({"lr": torch.tensor(INF)}, "lr must be finite"),
        ({"lr": "0.1"}, "got str '0.1'"),
        ({"lr": torch.ones(5)}, r"\[T\], \[P\], \[T, P\].* T = 2, P = 3, got float32 \[5\]"),
        ({"lr": torch.ones(3, 2)}, r"got float32 \[3, 2\]"),
        ({"lr": torch.ones(1, 1, 1)}, r"got float32 \[1, 1, 1\]"),
        ({"lr": torch.ones(2, dtype=torch.int64)}, "lr must be floating point, got int64"),
        ({"lr": torch.ones(2, device="meta")}, "lr must be on cpu"),
        ({"lr": torch.ones(2), "segments": torch.tensor([0, 3])}, r"\[S\], .* S = 1, got"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"weight_decay": INF}, "weight_decay must be finite"),
        ({"weight_decay": torch.tensor([0.1, -0.5])}, "weight_decay must be .* >= 0, got -0.5"),
        ({"weight_decay": torch.tensor([0.1, NAN])}, "weight_decay must be .* got nan"),
        ({"weight_decay": torch.ones(3)}, r"scalar tensor, \[T\] or \[T, 1\] with T = 2, got"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number or a tensor, got str"),
        ({"grad_scale": NAN}, "grad_scale must be finite, got nan"),
        ({"active": torch.ones(2)}, r"active must be a bool tensor \[T\], got float32"),
        ({"active": torch.ones(3, dtype=torch.bool)}, r"active must be bool \[2\] on cpu"),
        ({"segments": torch.tensor([0, 2])}, r"rise from 0 to P = 3, got \[0, 2\]"),
        ({"segments": torch.tensor([0, 2, 1, 3])}, "rise from 0"),
        ({"segments": torch.tensor([0.0, 3.0])}, "segments must be a layout or an int64 tensor"),
        ({"segments": torch.tensor([0])}, r"int64 \[S \+ 1\] with S >= 1"),
        ({"segments": (0, 3)}, "segments must be a layout or an int64 tensor"),
    ],
)
@pytest.mark.parametrize("op", [ops.sgd_update, ops.sgd_update_])
def test_bad_arguments(op, change, message):
    arguments = {"params": torch.zeros(2, 3), "grads": torch.ones(2, 3), "lr": 0.1, **change}
    kept = arguments["params"]
    before = kept.clone() if isinstance(kept, torch.Tensor) else kept
    with pytest.raises(ValueError, match=message):
        op(**arguments)
    if isinstance(kept, torch.Tensor):
        assert torch.equal(kept, before)


STATES = {
    "momentum": ("buf",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "adagrad": ("state_sum",),
}
OWN = [
    ("momentum", {"momentum": 1.5}, "momentum must be finite and >= 0 and <= 1, got 1.5"),
    ("momentum", {"dampening": torch.tensor(-0.1)}, "dampening must be .* >= 0"),
    ("momentum", {"nesterov": True, "dampening": 0.1}, "nesterov needs a dampening of 0"),
    ("adam", {"betas": (1.0, 0.9)}, r"betas\[0\] must be finite and >= 0 and < 1, got 1.0"),
    ("adam", {"betas": (0.9, torch.tensor([0.9, 1.0]))}, r"betas\[1\] must be .* < 1, got 1.0"),
    ("adam", {"betas": 0.9}, "betas must be a pair of numbers or tensors, got 0.9"),
    ("adam", {"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
    ("adam", {"step": 0}, "step must be finite and >= 1, got 0"),
    ("adam", {"step": torch.tensor([1, 0])}, "step must be .* >= 1, got 0"),
    ("adamw", {"weight_decay": -1.0}, "weight_decay must be .* >= 0, got -1.0"),
    ("rmsprop", {"alpha": NAN}, "alpha must be finite and >= 0 and <= 1, got nan"),
    ("adagrad", {"lr_decay": -0.5}, "lr_decay must be finite and >= 0, got -0.5"),
]


def call(rule: str, in_place: str, change: dict) -> None:
    """A call with one argument changed, after which every tensor must hold what it held."""
    arguments = {"params": torch.zeros(2, 3), "grads": torch.ones(2, 3), "lr": 0.1}
    arguments |= {name: torch.zeros(2, 3) for name in STATES[rule]}
    if UPDATES[rule].step:
        arguments["step"] = 1
    arguments |= change
    kept = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.device.type == "cpu"]
    before = [t.clone() for t in kept]
    try:
        getattr(ops, f"{rule}_update{in_place}")(**arguments)
    finally:
        for a, b in zip(kept, before, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize(("rule", "change", "message"), OWN)
def test_bad_hyperparameters(rule, in_place, change, message):
    with pytest.raises(ValueError, match=message):
        call(rule, in_place, change)


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize(("rule", "name"), [(rule, names[-1]) for rule, names in STATES.items()])
def test_state_of_another_layout(rule, in_place, name):
    for state in (
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, device="meta"),
        [0.0],
    ):
        with pytest.raises(ValueError, match=rf"{name} must be like params, float32 \[2, 3\] on"):
            call(rule, in_place, {name: state})


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize(
    ("rule", "name"), [(rule, names[0]) for rule, names in STATES.items() if rule != "momentum"]
)
def test_state_that_is_missing(rule, in_place, name):
    with pytest.raises(ValueError, match=rf"{name} must be like params, .* got None"):
        call(rule, in_place, dict.fromkeys(STATES[rule]))


def test_explicit_choice_never_falls_back():
    sample = update_sample("sgd", "number", 2, 3)
    with pytest.raises(ValueError, match="implementation must be one of"), ops.use_impl("fast"):
        pass
    for name in ("cuda", "triton"):
        if name not in _library.OPS["sgd_update"].kernels:
            with ops.use_impl(name), pytest.raises(RuntimeError, match="no such implementation"):
                sample.call(*sample.tensors)
    with ops.use_impl("cpp"), ops.use_impl("auto"):
        assert _backend.requested() == "auto"
    assert _backend.requested() == "auto" and _backend._overrides == 0


def test_explicit_choice_checks_the_device(monkeypatch):
    op = _library.OPS["sgd_update"]
    monkeypatch.setitem(op.kernels, "cuda", ("cuda", op.overload))
    sample = update_sample("sgd", "number", 2, 3)
    with ops.use_impl("cuda"), pytest.raises(RuntimeError, match="tensors on cuda, got cpu"):
        sample.call(*sample.tensors)


def test_register_kernel_keeps_one_winner():
    with pytest.raises(ValueError, match="unknown"):
        _library.register_kernel("no_op", "triton", "cpu", print, winner=False)
    if _library.dispatched("sgd_update", "cpu"):
        with pytest.raises(ValueError, match="already has a kernel for cpu"):
            _library.register_kernel("sgd_update", "triton", "cpu", print, winner=True)


@pytest.mark.parametrize(
    "written",
    [
        lambda b: (b[:3], torch.ones(3, 4), b[1:4]),  # rows of both
        lambda b: (b[:3], b[1:4], torch.zeros(3, 4)),  # a gradient that is written meanwhile
    ],
)
def test_overlapping_memory_is_refused(written) -> None:
    params, grads, buf = written(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="must not share memory, got overlapping tensors"):
        ops.momentum_update_(params, grads, buf, 0.1)


def test_rates_that_are_written_meanwhile_are_refused() -> None:
    params = torch.ones(3, 4)
    with pytest.raises(ValueError, match="params and lr must not share memory"):
        ops.sgd_update_(params, torch.ones(3, 4), params[:1])


def test_interleaved_memory_is_taken() -> None:
    both = torch.zeros(3, 8)
    params, buf = both[:, ::2], both[:, 1::2]
    ops.momentum_update_(params, torch.ones(3, 4), buf, 0.1)
    assert torch.equal(params, torch.full((3, 4), -0.1)) and torch.equal(buf, torch.ones(3, 4))
    ops.sgd_update_(params, params, 1.0)  # element by element
    assert not params.any()


@pytest.mark.parametrize("update", [ops.adam_update, ops.adam_update_, ops.adamw_update])
def test_a_step_is_a_number(update) -> None:
    params, *rest = (torch.zeros(2, 3) for _ in range(4))
    with pytest.raises(ValueError, match="step must be"):
        update(params, *rest, None, 0.1)
    with pytest.raises(ValueError, match="must be a list of 0 tensors, got 1"):
        ops.sgd_update_([], [torch.zeros(3)], 0.1)
