"""The update rules beyond the operator table: torch's optimizers, frozen tasks, sizes, threads."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _library, ops
from fastmeta.testing.ops import RATE_FORMS, UPDATES, strided, update_sample

NAN, INF = float("nan"), float("inf")
FLOAT32 = (torch.float32, torch.float32)
needs_kernels = pytest.mark.skipif(
    not _library.dispatched("sgd_update", "cpu"), reason="fastmeta._C is not built"
)

# (rule, its arguments, torch's optimizer, its arguments)
OPTIMIZERS = [
    ("sgd", {}, torch.optim.SGD, {}),
    ("sgd", {"weight_decay": 0.1, "maximize": True}, torch.optim.SGD, None),
    ("momentum", {"momentum": 0.9, "dampening": 0.2}, torch.optim.SGD, None),
    ("momentum", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, torch.optim.SGD, None),
    ("adam", {"betas": (0.8, 0.95)}, torch.optim.Adam, None),
    ("adam", {"weight_decay": 0.1, "maximize": True, "eps": 1e-3}, torch.optim.Adam, None),
    ("adamw", {}, torch.optim.AdamW, {}),
    ("adamw", {"weight_decay": 0.3, "maximize": True}, torch.optim.AdamW, None),
    ("rmsprop", {"alpha": 0.9, "weight_decay": 0.1}, torch.optim.RMSprop, None),
    ("adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}, torch.optim.Adagrad, None),
]


def outputs_of(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def take_steps(rule: str, params, gradient, rates, steps: int, **options):
    """`steps` updates in place."""
    op, update = getattr(ops, f"{rule}_update_"), UPDATES[rule]
    state = [torch.zeros_like(params) for _ in update.states]
    if rule == "momentum":
        state = [None]
    for k in range(steps):
        count = (k + 1,) if update.step else ()
        result = op(params, gradient(params, k), *state, *count, rates, **options)
        state = list(outputs_of(result)[1:])
    return params


@pytest.mark.parametrize(
    ("rule", "options", "optimizer", "torch_options"),
    OPTIMIZERS,
    ids=[f"{rule}-{'-'.join(options)}" for rule, options, *_ in OPTIMIZERS],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["64", "32"]
)
def test_torch_optim(impl, rule, options, optimizer, torch_options, dtype, tolerance):
    """100 steps agree with torch's optimizer, task by task and segment by segment."""
    _, device = impl
    tasks, size, layers = 3, 7, (slice(0, 4), slice(4, 7))
    start = torch.randn(tasks, size, dtype=dtype)
    targets = torch.randn(100, tasks, size, dtype=dtype)
    rates = 0.01 + 0.05 * torch.rand(tasks, 2, dtype=dtype)
    expected = start.clone()
    for t in range(tasks):
        weights = [torch.nn.Parameter(expected[t, c].clone()) for c in layers]
        groups = [{"params": [w], "lr": r.item()} for w, r in zip(weights, rates[t], strict=True)]
        judge = optimizer(groups, lr=0.1, **(options if torch_options is None else torch_options))
        for k in range(100):
            for w, columns in zip(weights, layers, strict=True):
                w.grad = w.detach() - targets[k, t, columns]
            judge.step()
        for w, columns in zip(weights, layers, strict=True):
            expected[t, columns] = w.detach()
    targets = targets.to(device)
    got = take_steps(
        *(rule, start.to(device), lambda p, k: p - targets[k], rates.to(device), 100),
        segments=torch.tensor([0, 4, 7], device=device),
        **options,
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", UPDATES)
def test_frozen_tasks_reach_nothing(rule, impl):
    """NaN and Inf in a frozen task leave values, gradients and second derivatives as they are."""
    _, device = impl
    active = torch.tensor([True, False, True], device=device)
    for form in RATE_FORMS:
        clean = update_sample(rule, form, 3, 6, variant="learned", frozen="mask", device=device)
        dirty = [t.clone() for t in clean.tensors]
        dirty[1][1, :3], dirty[1][1, 3:] = NAN, -INF
        dirty[0][1] = INF
        if form in ("T", "TP", "T1", "TS"):
            dirty[2 + len(UPDATES[rule].states)][1] = NAN

        def derivatives(tensors):
            tensors = [t.detach().requires_grad_() for t in tensors]
            out = outputs_of(clean.call(*tensors))  # noqa: B023
            loss = sum(o[active].pow(3).sum() for o in out)
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            second = torch.autograd.grad(sum(g[~g.isnan()].pow(2).sum() for g in first), tensors)
            return out, first, second

        out, first, second = derivatives(dirty)
        out_clean, first_clean, second_clean = derivatives(clean.tensors)
        for a, b in zip(out, out_clean, strict=True):
            torch.testing.assert_close(a[active], b[active], rtol=0, atol=0)
        assert torch.equal(out[0][1], dirty[0][1])
        for a, b in zip((*first, *second), (*first_clean, *second_clean), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert not first[1][1].any()


@pytest.mark.parametrize("rule", UPDATES)
def test_in_place(rule, impl):
    """The same bits as the functional form, written over parameters and state."""
    _, device = impl
    op = getattr(ops, f"{rule}_update_")
    states = len(UPDATES[rule].states)
    for i, form in enumerate(RATE_FORMS):
        layout = ("contiguous", "transposed", "offset")[i % 3]
        chosen = {"variant": "decay", "frozen": "nan", "layout": layout, "device": device}
        sample = update_sample(rule, form, 3, 1030, **chosen)
        params, grads, *rest = sample.tensors
        params = strided(params, layout)
        state = [strided(s, layout) for s in rest[:states]]
        given = (params, grads, *state, *rest[states:])
        expected = outputs_of(sample.call(*given))
        written = (params, *state)
        pointers = [t.data_ptr() for t in written]
        got = outputs_of(sample.call(*given, op=op))
        assert all(a is b for a, b in zip(got, written, strict=True))
        assert pointers == [t.data_ptr() for t in written]
        for a, b in zip(written, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("rule", UPDATES)
def test_check_finite(rule, impl):
    """Tasks whose gradient is not finite are frozen and reported; the others do not notice."""
    _, device = impl
    states = len(UPDATES[rule].states)
    active = torch.tensor([True, True, True, False, False], device=device)
    for dtypes in (FLOAT32, (torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        for size in (3, 20_000):  # in tiles that one thread or several take
            sample = update_sample(rule, "TP", 5, size, dtypes=dtypes, device=device)
            tensors = [t.clone() for t in sample.tensors]
            huge = -1e154 * 1.5 if dtypes[0] == torch.float64 else -1.9e19
            tensors[1][1, -1], tensors[1][2, 0], tensors[1][3, 1] = NAN, huge, INF
            good = torch.tensor([True, False, False, False, False], device=device)
            *got, finite = sample.call(*tensors, active=active, check_finite=True)
            assert finite.tolist() == [True, False, False, True, True]
            expected = outputs_of(sample.call(*tensors, active=good))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            written = [tensors[0].clone(), tensors[1], *(t.clone() for t in tensors[2:])]
            op = getattr(ops, f"{rule}_update_")
            *_, finite = sample.call(*written, op=op, active=active, check_finite=True)
            assert finite.tolist() == [True, False, False, True, True]
            for a, b in zip([written[0], *written[2 : 2 + states]], expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("rule", UPDATES)
def test_check_finite_keeps_derivatives_clean(rule, impl):
    sample = update_sample(rule, "1P", 3, 5, variant="learned", device=impl[1])
    tensors = [t.clone() for t in sample.tensors]
    tensors[1][1, 2] = NAN
    mask = torch.tensor([True, False, True], device=impl[1])

    def derivatives(**options):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = outputs_of(sample.call(*leaves, **options))[: 1 + len(UPDATES[rule].states)]
        loss = sum(o.pow(3).sum() for o in out)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)]

    got = derivatives(check_finite=True)
    for a, b in zip(got, derivatives(active=mask), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_task_that_is_frozen_already_stays_so_where_gradients_are_checked(impl):
    params = torch.randn(2, 5, dtype=torch.float64, device=impl[1])
    grads = torch.randn_like(params).requires_grad_()
    active = torch.tensor([True, False], device=impl[1])
    new, finite = ops.sgd_update(params, grads, 0.1, active=active, check_finite=True)
    (found,) = torch.autograd.grad(new.sum(), grads)
    assert finite.all() and torch.equal(new[1], params[1])
    assert (found[0] == -0.1).all() and not found[1].any()


@pytest.mark.parametrize("rule", ["adam", "adamw", "rmsprop", "adagrad"])
def test_coordinates_without_gradients_have_finite_derivatives(rule, impl):
    """sqrt at 0 is the trap: state 0 and gradient 0, first and second derivatives."""
    sample = update_sample(rule, "TP", 2, 4, variant="learned", device=impl[1])
    tensors = [t.detach().clone() for t in sample.tensors]
    for t in tensors[1 : 2 + len(UPDATES[rule].states)]:
        t[:, :2] = 0
    leaves = [t.requires_grad_() for t in tensors]
    out = outputs_of(sample.call(*leaves))
    first = torch.autograd.grad(sum(o.sum() for o in out), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    assert all(t.isfinite().all() for t in (*out, *first, *second))


def test_clip_scale(impl):
    _, device = impl
    grads = torch.randn(4, 50, dtype=torch.float64, device=device)
    grads[1] *= 0.01
    grads[2] = 0
    params = torch.zeros_like(grads)
    scale = ops.clip_scale(grads, 1.0)
    got = -ops.sgd_update(params, grads, 1.0, grad_scale=scale)
    assert got.norm(dim=1).tolist() == pytest.approx([1, grads[1].norm().item(), 0, 1])
    torch.testing.assert_close(got[1], grads[1])

    def step(g):
        return ops.sgd_update(params, g, 1.0, grad_scale=ops.clip_scale(g, 1.0))

    grads.requires_grad_()
    assert torch.autograd.gradcheck(step, grads)
    assert torch.autograd.gradgradcheck(step, grads)
    assert torch.equal(ops.clip_scale(torch.zeros(0, 3), 1.0), torch.zeros(0))
    assert ops.clip_scale(torch.full((1, 4), 30_000.0).half(), 1.0).dtype == torch.float32


def test_a_learned_number_of_any_shape_gets_its_gradient():
    params, grads = torch.zeros(2, 3), torch.ones(2, 3)
    for shape in ((), (1,), (1, 1)):
        rate = torch.full(shape, 0.5, requires_grad=True)
        decay = torch.full(shape, 0.5, requires_grad=True)
        ops.sgd_update(params + 1, grads, rate, weight_decay=decay).sum().backward()
        assert rate.grad.shape == shape and rate.grad.item() == -9
        assert decay.grad.shape == shape and decay.grad.item() == -3


def test_a_third_derivative_is_refused(native_impl):
    name, device = native_impl
    sample = update_sample("adam", "scalar", 2, 3, device=device)
    leaves = [t.detach().requires_grad_() for t in sample.tensors]
    x = sample.call(*leaves)[0].pow(3).sum()
    for _ in range(2):
        x = sum(g.pow(2).sum() for g in torch.autograd.grad(x, leaves[:2], create_graph=True))
    if name == "reference":
        assert torch.autograd.grad(x, leaves[0])[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="differentiable twice, got a third derivative"):
            torch.autograd.grad(x, leaves[0])


@needs_kernels
def test_more_than_2_to_the_31_elements():
    """Index arithmetic beyond 32 bits, on rows that share memory: only the sums are allocated."""
    tasks, size = 70_000, 33_000
    assert tasks * size > 2**31
    row = torch.ones(1, size, dtype=torch.bfloat16).expand(tasks, size)
    rate = torch.zeros(1, 1)
    backward = _library.OPS["sgd_update_backward"].overload
    x = (None, row, None, None)
    numbers = (0.0, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 0, torch.bfloat16)
    *_, d_rate, _ = backward(row, None, None, *x, rate, None, None, None, *numbers, 1 << 7)
    assert d_rate.item() == -float(torch.tensor(tasks * size, dtype=torch.float32))
    shape = torch.empty(tasks, size, device="meta")
    for name, update in UPDATES.items():
        count = (1,) if update.step else ()
        op = getattr(ops, f"{name}_update")
        for out in outputs_of(op(shape, shape, *[shape] * len(update.states), *count, 0.1)):
            assert out.shape == (tasks, size)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_rows_further_apart_than_2_to_the_31_elements(rule, impl):
    """The same bits as for adjacent rows, on every path; only the touched pages are allocated."""
    name, device = impl
    if name == "reference":
        pytest.skip("is what the others are compared with")
    stride, sample = 2**31 + 8, update_sample(rule, "TS", 2, 1030, dtypes=FLOAT32, device=device)

    def apart(t):
        wide = torch.empty(2 * stride, dtype=t.dtype, device=device)
        return wide.as_strided(t.shape, (stride, 1)).copy_(t.detach())

    states = len(UPDATES[rule].states)
    wide = [apart(t) for t in sample.tensors[: 2 + states]]
    rates = sample.tensors[2 + states :]
    for a, b in zip(
        derivatives(sample, [*wide, *rates]), derivatives(sample, sample.tensors), strict=True
    ):
        assert torch.equal(a, b)
    expected = outputs_of(sample.call(*sample.tensors))
    got = outputs_of(sample.call(*wide, *rates, op=getattr(ops, f"{rule}_update_")))
    assert got[0].stride() == (stride, 1)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def derivatives(sample, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = outputs_of(sample.call(*tensors))
    loss = sum(o.square().sum() for o in out)
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    return [*out, *first, *second]


@needs_kernels
@pytest.mark.parametrize("form", ["scalar", "TS", "1P"])
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_threads_do_not_change_a_bit(rule, form):
    sample = update_sample(rule, form, 3, 50_000, variant="learned", dtypes=FLOAT32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = derivatives(sample, sample.tensors)
        torch.set_num_threads(4)
        four = derivatives(sample, sample.tensors)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["T", "TP", "TS"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_task_does_not_depend_on_its_batch(rule, form, impl):
    """The same bits alone as among others, derivatives included."""
    sample = update_sample(rule, form, 4, 5000, dtypes=FLOAT32, device=impl[1])
    together = derivatives(sample, sample.tensors)
    alone = derivatives(sample, [t[2:3] for t in sample.tensors])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[2:3], b)
