"""sgd_update beyond the operator table: torch's own optimizer, frozen tasks, arguments, sizes."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _backend, _library, ops
from fastmeta.testing.ops import RATE_FORMS, RULES, sgd_sample, strided

NAN, INF = float("nan"), float("inf")


class Layout:
    """A stand-in for a patched model's layout."""

    def __init__(self, starts):
        self.starts = starts

    def segment_offsets(self, device):
        return torch.tensor(self.starts, device=device)


@pytest.mark.parametrize("rule", RULES)
def test_reference_is_torch_optim_sgd(rule):
    """Task by task, parameter group by parameter group (one for each segment)."""
    torch.manual_seed(0)
    params, grads, rates = torch.randn(3, 7), torch.randn(3, 7), torch.rand(3, 2)
    expected = params.clone()
    for t in range(3):
        for s, columns in enumerate((slice(0, 4), slice(4, 7))):
            weight = torch.nn.Parameter(expected[t, columns].clone())
            weight.grad = grads[t, columns]
            torch.optim.SGD([weight], lr=rates[t, s].item(), **RULES[rule]).step()
            expected[t, columns] = weight.detach()
    with ops.use_impl("reference"):
        got = ops.sgd_update(params, grads, rates, segments=Layout([0, 4, 7]), **RULES[rule])
    torch.testing.assert_close(got, expected)


def test_frozen_tasks_reach_nothing(impl):
    """NaN and Inf in a frozen task leave values, gradients and second derivatives as they are."""
    active = torch.tensor([True, False, True])
    for form in RATE_FORMS:
        clean = sgd_sample(form, 3, 6, rule="decay", frozen="mask")
        dirty = [t.clone() for t in clean.tensors]
        dirty[1][1, :3], dirty[1][1, 3:] = NAN, -INF
        dirty[0][1] = INF
        if form in ("T", "TP", "T1", "TS"):
            dirty[2][1] = NAN

        def derivatives(tensors):
            tensors = [t.detach().requires_grad_() for t in tensors]
            out = clean.call(*tensors)  # noqa: B023
            loss = out[active].pow(3).sum()
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            second = torch.autograd.grad(sum(g[~g.isnan()].pow(2).sum() for g in first), tensors)
            return out, first, second

        out, first, second = derivatives(dirty)
        out_clean, first_clean, second_clean = derivatives(clean.tensors)
        torch.testing.assert_close(out[active], out_clean[active], rtol=0, atol=0)
        assert torch.equal(out[1], dirty[0][1])
        for a, b in zip((*first, *second), (*first_clean, *second_clean), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        assert not first[1][1].any()


def test_in_place(impl):
    _, device = impl
    for form in RATE_FORMS:
        for layout in ("contiguous", "transposed", "offset"):
            sample = sgd_sample(form, 3, 1030, rule="decay", layout=layout, frozen="nan")
            params, *rest = (t.to(device) for t in sample.tensors)
            params = strided(params, layout)
            expected = sample.call(params, *rest)
            pointer = params.data_ptr()
            got = sample.call(params, *rest, op=ops.sgd_update_)
            assert got is params and params.data_ptr() == pointer
            torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_in_place_refuses_gradients_and_shared_rows():
    params, grads = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
        ops.sgd_update_(params.requires_grad_(), grads, 0.1)
    with pytest.raises(RuntimeError, match="sgd_update_ has no derivative"):
        torch.func.vmap(lambda g: ops.sgd_update_(torch.zeros(2, 3), g, 0.1))(grads.expand(4, 2, 3))
    with pytest.raises(ValueError, match="must not be an expanded view"):
        ops.sgd_update_(torch.zeros(1, 3).expand(2, 3), grads, 0.1)
    with torch.no_grad():
        ops.sgd_update_(params, grads, 0.1)
    assert torch.equal(params, torch.full((2, 3), -0.1))


def test_a_learned_number_of_any_shape_gets_its_gradient():
    params, grads = torch.zeros(2, 3), torch.ones(2, 3)
    for shape in ((), (1,), (1, 1)):
        rate = torch.full(shape, 0.5, requires_grad=True)
        ops.sgd_update(params, grads, rate).sum().backward()
        assert rate.grad.shape == shape and rate.grad.item() == -6


def test_ambiguous_rate_is_refused():
    params, grads, rate = torch.zeros(4, 4), torch.ones(4, 4), torch.arange(4.0)
    with pytest.raises(
        ValueError, match=r"ambiguous|could mean per task or per parameter"
    ) as error:
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
        ({"params": [[1.0]]}, "got list"),
        ({"grads": torch.zeros(3, 2)}, r"shape of params \[2, 3\], got float32 \[3, 2\]"),
        ({"grads": torch.zeros(2, 3, dtype=torch.float64)}, "dtype of params"),
        ({"grads": torch.zeros(2, 3, device="meta")}, "grads must be on cpu"),
        ({"lr": NAN}, "finite number or a tensor, got float nan"),
        ({"lr": "0.1"}, "got str '0.1'"),
        ({"lr": torch.ones(5)}, r"\[T\], \[P\], \[T, P\].* T = 2, P = 3, got float32 \[5\]"),
        ({"lr": torch.ones(3, 2)}, r"got float32 \[3, 2\]"),
        ({"lr": torch.ones(1, 1, 1)}, r"got float32 \[1, 1, 1\]"),
        ({"lr": torch.ones(2, dtype=torch.int64)}, "lr must be floating point, got int64"),
        ({"lr": torch.ones(2, device="meta")}, "lr must be on cpu"),
        ({"lr": torch.ones(2), "segments": torch.tensor([0, 3])}, r"\[S\], .* S = 1, got"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"weight_decay": INF}, "weight_decay must be finite"),
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


def test_explicit_choice_never_falls_back():
    sample = sgd_sample("number", 2, 3)
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
    sample = sgd_sample("number", 2, 3)
    with ops.use_impl("cuda"), pytest.raises(RuntimeError, match="tensors on cuda, got cpu"):
        sample.call(*sample.tensors)


def test_register_kernel_keeps_one_winner():
    with pytest.raises(ValueError, match="unknown"):
        _library.register_kernel("no_op", "triton", "cpu", print, winner=False)
    if _library.dispatched("sgd_update", "cpu"):
        with pytest.raises(ValueError, match="already has a kernel for cpu"):
            _library.register_kernel("sgd_update", "triton", "cpu", print, winner=True)


@pytest.mark.skipif(not _library.dispatched("sgd_update", "cpu"), reason="fastmeta._C is not built")
def test_more_than_2_to_the_31_elements():
    """Index arithmetic beyond 32 bits, on rows that share memory: only the sums are allocated."""
    tasks, size = 70_000, 33_000
    assert tasks * size > 2**31
    row = torch.ones(1, size, dtype=torch.bfloat16).expand(tasks, size)
    rate = torch.zeros(1, 1)
    backward = _library.OPS["sgd_update_backward"].overload
    fixed = (None, None, 0.0, 0.0, False, torch.bfloat16, False, False, True)
    _, _, d_rate = backward(row, None, row, rate, *fixed)
    assert d_rate.item() == -float(torch.tensor(tasks * size, dtype=torch.float32))
    shape = torch.empty(tasks, size, device="meta")
    assert ops.sgd_update(shape, shape, 0.1).shape == (tasks, size)


@pytest.mark.skipif(not _library.dispatched("sgd_update", "cpu"), reason="fastmeta._C is not built")
@pytest.mark.parametrize("form", ["scalar", "TS", "1P"])
def test_threads_do_not_change_a_bit(form):
    sample = sgd_sample(form, 3, 50_000, rule="decay", dtypes=(torch.float32,) * 2)

    def run():
        tensors = [t.clone().requires_grad_() for t in sample.tensors]
        out = sample.call(*tensors)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(4)
        four = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["T", "TP", "TS"])
def test_a_task_does_not_depend_on_its_batch(form, impl):
    """The same bits alone as among others, derivatives included."""
    sample = sgd_sample(form, 4, 5000, dtypes=(torch.float32,) * 2)

    def run(tensors):
        tensors = [t.clone().requires_grad_() for t in tensors]
        out = sample.call(*tensors)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    together = run(sample.tensors)
    alone = run([t[2:3] for t in sample.tensors])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[2:3], b)
