"""head_inner_loop against torch.optim.SGD task by task: values, derivatives, arguments, edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastmeta import _backend, _library
from fastmeta.ops import _head_inner_loop, head_inner_loop, use_impl
from fastmeta.testing.tolerance import assert_within_budget, shake

NAN, INF = float("nan"), float("inf")
FORMS = pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])


@pytest.fixture
def form(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' form, whatever the shape would choose."""
    monkeypatch.setattr(_head_inner_loop, "prefers_gram", lambda *shape: gram)


def run_loop(*args, **options):
    """The operator on the device of the implementation in force, results on the CPU."""
    device = "cuda" if _backend.requested() == "cuda" else "cpu"

    def moved(x, where):
        return x.to(where) if isinstance(x, torch.Tensor) else x

    options = {name: moved(value, device) for name, value in options.items()}
    out = head_inner_loop(*(moved(a, device) for a in args), **options)
    return tuple(moved(o, "cpu") for o in out)


class Case:
    """Inputs of one call.

    `sizes` are T, N, D, C, K; `rate` is the shape of the learning rate, None for a number.
    """

    def __init__(self, *sizes, rate="TK", bias="C", weight="CD", ignored=False, seed=0, **options):
        tasks, rows, _, classes, steps = sizes
        g = torch.Generator().manual_seed(seed)
        extent = dict(zip("TNDCK1", (*sizes, 1), strict=True))

        def random(shape):
            return torch.randn([extent[a] for a in shape], generator=g, dtype=torch.float64)

        self.tensors = {"features": random("TND"), "weight": 0.3 * random(weight)}
        if bias is not None:
            self.tensors["bias"] = random(bias)
        if rate is not None:
            self.tensors["lr"] = 0.1 + 0.2 * random(rate).abs()
        ways = options.get("ways")
        high = torch.full((tasks,), classes) if ways is None else ways
        uniform = torch.rand(tasks, rows, generator=g, dtype=torch.float64)
        self.labels = (uniform * high[:, None]).long()
        if ignored:
            self.labels[torch.rand(tasks, rows, generator=g) < 0.4] = -100
        self.steps, self.options = steps, options

    def __call__(self, *tensors):
        given = dict(zip(self.tensors, tensors or self.tensors.values(), strict=True))
        lr = given.pop("lr", 0.2)
        bias = given.pop("bias", None)
        features, weight = given.values()
        out = run_loop(features, self.labels, weight, bias, lr, self.steps, **self.options)
        return tuple(t for t in out[:2] if t is not None)

    def leaves(self, dtype=torch.float64, features=None):
        kinds = {"features": features or dtype}
        return [
            t.to(kinds.get(n, dtype)).detach().requires_grad_() for n, t in self.tensors.items()
        ]

    def run(self, leaves=None, cotangents=None):
        """Results and gradients."""
        leaves = self.leaves() if leaves is None else leaves
        out = self(*leaves)
        cotangents = self.cotangents(out) if cotangents is None else cotangents
        found = torch.autograd.grad(
            out, leaves, [c.to(o) for c, o in zip(cotangents, out, strict=True)], allow_unused=True
        )
        zeros = [
            torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
        ]
        return [*(o.detach() for o in out), *zeros]

    @staticmethod
    def cotangents(out):
        g = torch.Generator().manual_seed(1)
        return [torch.randn(o.shape, generator=g).bfloat16() for o in out]


RAGGED = torch.tensor([2, 4, 3])
CASES = {
    "plain": Case(3, 6, 5, 4, 3),
    "momentum": Case(3, 6, 5, 4, 4, rate="T1", momentum=0.8, weight="TCD", bias="TC"),
    "decay": Case(3, 20, 7, 4, 3, rate="1K", weight_decay=0.3, bias="TC"),
    "all": Case(3, 18, 5, 4, 4, momentum=0.6, weight_decay=0.2, ignored=True, ways=RAGGED),
    "no bias": Case(2, 7, 4, 3, 2, rate="", bias=None, weight_decay=0.1, momentum=0.3),
    "truncated": Case(3, 6, 5, 4, 4, momentum=0.6, weight_decay=0.2, truncate=2),
    "first order": Case(3, 6, 5, 4, 3, momentum=0.6, weight_decay=0.2, truncate=0),
    "inactive": Case(3, 6, 5, 4, 3, active=torch.tensor([True, False, True]), weight_decay=0.1),
    "tiny": Case(1, 1, 1, 2, 1, rate="K"),
    "one class": Case(2, 3, 2, 1, 2, rate="", weight_decay=0.1),
    "many rows": Case(2, 70, 3, 2, 2, ignored=True, momentum=0.5),
    "no tasks": Case(0, 4, 3, 2, 2),
    "wide": Case(2, 17, 130, 7, 3, rate=None, ignored=True),
}
ALL = pytest.mark.parametrize("name", CASES)
SMALL = pytest.mark.parametrize("name", ["all", "no bias", "truncated", "tiny"])


def task_loop(case: Case, leaves, optimizer: bool = False):
    """Task by task through cross_entropy: by torch.optim.SGD, or differentiable by hand."""
    given = dict(zip(case.tensors, leaves, strict=True))
    tasks, classes = len(case.labels), case.tensors["weight"].shape[-2]
    rates = given.get("lr", torch.tensor(0.2, dtype=torch.float64))
    rates = rates.expand(tasks, case.steps) if rates.dim() != 1 else rates.expand(1, case.steps)
    sgd = {"momentum": 0.0, "weight_decay": 0.0}
    sgd.update({k: v for k, v in case.options.items() if k in sgd})
    ways, active = case.options.get("ways"), case.options.get("active")
    found = []
    for t in range(tasks):
        axes = {"weight": 2, "bias": 1}
        start = {n: given[n] for n in axes if n in given}
        params = [p if p.dim() == axes[n] else p[t] for n, p in start.items()]
        if optimizer:
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            rule = torch.optim.SGD(params, **sgd)
        buffers = None
        for k in range(case.steps if active is None or active[t] else 0):
            logits = F.linear(given["features"][t], *params)
            logits = logits[:, : classes if ways is None else int(ways[t])]
            loss = F.cross_entropy(logits, case.labels[t], reduction="sum")
            loss = loss / (case.labels[t] >= 0).sum().clamp_min(1)
            grads = torch.autograd.grad(loss, params, create_graph=not optimizer)
            if optimizer:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                rule.param_groups[0]["lr"] = rates[t, k].item()
                rule.step()
                continue
            pairs = zip(grads, params, strict=True)
            grads = [g + sgd["weight_decay"] * p for g, p in pairs]
            last = [0.0] * len(grads) if buffers is None else buffers
            buffers = [sgd["momentum"] * u + g for u, g in zip(last, grads, strict=True)]
            params = [p - rates[t, k] * u for p, u in zip(params, buffers, strict=True)]
        found.append(params)
    return [torch.stack(ps) for ps in zip(*found, strict=True)]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"no tasks"}))
def test_reference_is_torch_optim_sgd(name):
    case = CASES[name]
    leaves = case.leaves()
    with use_impl("reference"):
        found = case.run(leaves)
    results = task_loop(case, leaves)
    for a, b, e in zip(found, task_loop(case, leaves, optimizer=True), results, strict=False):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(b, e, rtol=1e-11, atol=1e-13)
    if "truncate" in case.options:
        return  # truncated derivatives: compared in test_truncated_derivatives
    cotangents = [c.double() for c in case.cotangents(results)]
    gradients = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    for a, e in zip(found[len(results) :], gradients, strict=True):
        e = torch.zeros_like(a) if e is None else e
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)


@FORMS
@pytest.mark.parametrize("exact", [0, 2])
def test_truncated_derivatives(exact, native_impl, form):
    """The gradients of all but the last steps count as constants."""
    case = Case(3, 6, 5, 4, 4, rate="TK", momentum=0.6, weight_decay=0.2, truncate=exact)
    leaves = case.leaves()
    x, w, b, lr = leaves
    w, b = w.expand(3, 4, 5), b.expand(3, 4)
    u = u_b = 0.0
    target = F.one_hot(case.labels, 4)
    for k in range(4):
        at = (x, w, b) if k >= 4 - exact else (x.detach(), w.detach(), b.detach())
        z = at[0] @ at[1].mT + at[2].unsqueeze(1)
        r = (torch.softmax(z, 2) - target) / 6
        u = 0.6 * u + r.mT @ at[0] + 0.2 * w
        u_b = 0.6 * u_b + r.sum(1) + 0.2 * b
        w, b = w - lr[:, k, None, None] * u, b - lr[:, k, None] * u_b
    cotangents = [c.double() for c in case.cotangents((w, b))]
    expected = torch.autograd.grad((w, b), leaves, cotangents, allow_unused=True)
    for a, e in zip(case.run(leaves)[2:], expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e)


@FORMS
@ALL
def test_values_and_gradients(name, impl, form):
    case = CASES[name]
    found = case.run()
    with use_impl("reference"):
        expected = case.run()
    for a, e in zip(found, expected, strict=True):
        scale = e.abs().max().item() if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12 * scale)
    for a, b in zip(found, case.run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all", "wide"])
def test_low_precision(name, features, impl, form):
    """As good as the reference in the same precision."""
    case = CASES[name]
    rounded = [
        t.to(features).double() if n == "features" else t.float().double()
        for n, t in case.tensors.items()
    ]
    leaves = [t.detach().requires_grad_() for t in rounded]
    low = [t.to(features if i == 0 else torch.float32) for i, t in enumerate(rounded)]
    low = [t.detach().requires_grad_() for t in low]
    found = case.run(low)
    assert [f.dtype for f in found[-len(low) :]] == [x.dtype for x in low]
    with use_impl("reference"):
        exact, weak = case.run(leaves), case.run(low)
        g, eps = torch.Generator().manual_seed(2), torch.finfo(features).eps
        shaken = [
            case.run([shake(x.detach(), eps, g).requires_grad_() for x in leaves]) for _ in range(3)
        ]
    for i, (a, e, w, *s) in enumerate(zip(found, exact, weak, *shaken, strict=True)):
        assert_within_budget(f"{name} {i}", a, e, w.to(a.dtype), s)


@FORMS
@pytest.mark.parametrize("name", ["all", "no bias", "inactive"])
def test_finite_differences(name, gram, form):
    """First derivatives of either form; second ones, which are those of the reference, once."""
    case = CASES[name]
    assert gradcheck(case, case.leaves(), check_batched_grad=True, fast_mode=not gram)
    if gram:
        assert gradgradcheck(case, case.leaves(), check_batched_grad=True, fast_mode=True)


def objective(case):
    return lambda *tensors: sum(o.pow(3).sum() for o in case(*tensors))


@SMALL
def test_function_transforms(name):
    case = CASES[name]
    inputs = [t.detach() for t in case.tensors.values()]
    everything = tuple(range(len(inputs)))
    gradient = torch.func.grad(objective(case), argnums=everything)
    second = torch.func.grad(lambda *x: sum(g.pow(2).sum() for g in gradient(*x)), everything)
    with use_impl("reference"):
        expected = [*gradient(*inputs), *second(*inputs)]
    for a, e in zip([*gradient(*inputs), *second(*inputs)], expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
    batch = [torch.stack([t, 0.5 * t, 0.75 * t], dim=-1) for t in inputs]
    for chosen in (everything, (0,)):
        dims = tuple(-1 if i in chosen else None for i in everything)
        given = [b if d is not None else t for b, t, d in zip(batch, inputs, dims, strict=True)]
        for function in (case, gradient, second):
            rows = [
                function(*[g if d is None else g[..., i] for g, d in zip(given, dims, strict=True)])
                for i in range(3)
            ]
            got = torch.func.vmap(function, in_dims=dims)(*given)
            for a, *e in zip(got, *rows, strict=True):
                torch.testing.assert_close(a, torch.stack(e), rtol=1e-9, atol=1e-11)


@SMALL
def test_capture_and_compile(name):
    case = CASES[name]
    inputs = [t.detach() for t in case.tensors.values()]
    step = torch.func.grad(objective(case), argnums=tuple(range(len(inputs))))
    graph = make_fx(step)(*inputs)
    called = {str(node.target) for node in graph.graph.nodes}
    assert {f"fastmeta.head_inner_loop{e}.default" for e in ("", "_backward")} <= called
    for a, e in zip(graph(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    if name == "all":
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for a, e in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(case, tuple(inputs), tuple(inputs))


@FORMS
def test_opcheck(form):
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == _library.NAMESPACE:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for name in ("all", "no bias", "no tasks", "wide"):
        leaves = CASES[name].leaves()
        with Record():
            out = CASES[name](*leaves)
            torch.autograd.grad(out[0].sum(), leaves[:2])
            CASES[name](*(t.detach() for t in leaves))
    assert len(calls) == 12
    for op, args in calls:
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        checks = ("test_schema", "test_faketensor")
        result = torch.library.opcheck(op, args, {}, test_utils=checks, raise_exception=False)
        assert set(result.values()) == {"SUCCESS"}, f"{op}: {result}"


# -- rows and tasks that do not count --------------------------------------------------------


@FORMS
def test_ignored_rows_and_dead_tasks_reach_nothing(impl, form):
    """NaN in a row without label or in a task that is frozen leaves everything else, to the bit."""
    case = Case(
        4,
        6,
        5,
        3,
        3,
        ignored=True,
        weight_decay=0.1,
        momentum=0.5,
        active=torch.tensor([True, True, False, True]),
    )
    clean = case.run()
    case.tensors["features"][case.labels < 0] = NAN
    case.tensors["features"][2] = INF
    for a, b in zip(case.run(), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_task_that_diverges_disturbs_no_other(value, impl, form):
    case = Case(3, 6, 5, 3, 3, weight_decay=0.1)
    active = torch.tensor([True, False, True])
    case.options["active"] = active
    clean = case.run()
    del case.options["active"]
    case.tensors["features"][1, 2] = value
    leaves = case.leaves()
    out = case(*leaves)
    assert out[0][1].isnan().all() and out[1][1].isnan().all()
    for check in (False, True):
        case.options["check_finite"] = check
        out = case(*leaves)
        for o, e in zip(out, clean, strict=False):
            torch.testing.assert_close(o[active], e[active], rtol=0, atol=0)
        cotangents = [c.to(o) for c, o in zip(case.cotangents(out), out, strict=True)]
        for c in cotangents:
            c[1] = 0.0
        assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, cotangents))
    features, start, start_b, lr = case.tensors.values()
    given = (features, case.labels, start, start_b, lr, 3)
    weight, bias, losses, finite = run_loop(*given, **case.options)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(weight[1], start) and torch.equal(bias[1], start_b)
    assert losses.shape == (3, 3) and losses[active].isfinite().all()


@FORMS
def test_divergence_on_the_way(impl, form):
    """A task that overflows at a later step keeps the weights of the step before."""
    case = Case(2, 6, 5, 3, 4, rate=None, bias=None)
    features, weight = case.tensors.values()
    features[:, 1], case.labels[:, 0], case.labels[:, 1] = features[:, 0], 0, 1  # never solved
    lr = torch.full((2, 4), 0.1, dtype=torch.float64)
    lr[1, 1] = lr[1, 2] = 8e307

    def run(steps):
        return run_loop(
            features, case.labels, weight, None, lr[:, :steps], steps, check_finite=True
        )

    out, _, losses, finite = run(4)
    assert finite.tolist() == [True, False]
    stopped = int(losses[1].isfinite().sum())
    assert 1 < stopped < 4
    kept, _, _, good = run(stopped)
    assert good.all()
    torch.testing.assert_close(out[1], kept[1], rtol=0, atol=0)


@FORMS
def test_a_task_does_not_depend_on_the_batch_or_threads(impl, form):
    case = Case(5, 20, 40, 4, 3, ignored=True, momentum=0.5)
    x, w, b, lr = case.tensors.values()
    whole = run_loop(x, case.labels, w, b, lr, 3, momentum=0.5)
    for t in range(5):
        one = slice(t, t + 1)
        alone = run_loop(x[one], case.labels[one], w, b, lr[one], 3, momentum=0.5)
        for a, e in zip(alone, whole, strict=True):
            torch.testing.assert_close(a[0], e[t], rtol=0, atol=0)


def test_threads_do_not_show():
    case = Case(24, 25, 384, 5, 4, rate=None)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(case.run(case.leaves(torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@FORMS
def test_layouts(native_impl, form):
    """Strided features, expanded and transposed weights: the same results."""
    case = Case(3, 6, 8, 4, 2, weight="TCD", bias="TC")
    x, w, b, lr = case.tensors.values()
    expected = case(x, w, b, lr)
    wide = torch.zeros(6, 3, 16, dtype=torch.float64)
    wide[..., ::2] = x.transpose(0, 1)
    strided = (wide[..., ::2].transpose(0, 1), w.mT.contiguous().mT, b.t().contiguous().t(), lr)
    for a, e in zip(case(*strided), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    shared = case(x, w[0], b[0], lr)
    for a, e in zip(case(x, w[:1].expand(3, -1, -1), b[:1].expand(3, -1), lr), shared, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
