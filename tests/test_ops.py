"""Every operator of the table through every implementation."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastmeta import _library, ops
from fastmeta.ops import use_impl
from fastmeta.testing.ops import TABLE, OpRow, Sample
from fastmeta.testing.tolerance import assert_within_budget, shake

pytestmark = pytest.mark.filterwarnings(
    # gradcheck reads .grad of the non-leaf tensors it was given
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def short(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


ROWS_DTYPES = [
    pytest.param(row, d, id=f"{row.name}-{short(d)}") for row in TABLE for d in row.dtypes
]
SMALL = [
    pytest.param(row, i, id=f"{row.name}-{sample.id}")
    for row in TABLE
    for i, sample in enumerate(row.small())
]


def small(row: OpRow, index: int, device: str = "cpu") -> Sample:
    return list(row.small(device))[index]


def skip_without(row: OpRow, implementation: str) -> None:
    """Triton kernels have tests of their own: without a GPU they run in the interpreter, and each
    shape that they are compiled for takes a while."""
    if implementation.startswith("cuda") and row.gpu != "cuda":
        pytest.skip(f"{row.gpu} serves {row.name} on a GPU")


def leaves(sample: Sample, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The sample's tensors as they are, or in one dtype, as inputs that require grad."""
    return [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in sample.tensors]


def cotangents_of(sample: Sample) -> list[torch.Tensor]:
    """The same for all precisions: a tensor that bfloat16 can hold for every output."""
    with torch.no_grad():
        results = outputs_of(sample.call(*sample.tensors))
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(r.shape, generator=generator) for r in results]
    return [c.to(torch.bfloat16).to(r.device) for c, r in zip(made, results, strict=True)]


def outputs_of(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def run(sample: Sample, tensors: list[torch.Tensor], cotangents=None) -> list[torch.Tensor]:
    """The results and the gradient for each input."""
    out = outputs_of(sample.call(*tensors))
    cotangents = cotangents_of(sample) if cotangents is None else cotangents
    given = [c.to(o.dtype) for c, o in zip(cotangents, out, strict=False)]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, tensors, given)]


def shaken_runs(sample: Sample, dtypes: tuple[torch.dtype, ...]) -> list[list[torch.Tensor]]:
    """Exact results for inputs moved by one rounding of the widest dtype but float64."""
    eps = torch.finfo(torch.float32 if torch.float64 in dtypes else dtypes[0]).eps
    generator = torch.Generator().manual_seed(2)
    runs = []
    for _ in range(3):
        moved = [shake(t, eps, generator).requires_grad_() for t in sample.tensors]
        runs.append(run(sample, moved, [shake(c, eps, generator) for c in cotangents_of(sample)]))
    return runs


@pytest.mark.parametrize(("row", "dtypes"), ROWS_DTYPES)
def test_values_and_gradients(row: OpRow, dtypes, impl):
    name, device = impl
    if name == "cuda_emulated":
        skip_without(row, name)
    for sample in row.samples(dtypes, device):
        actual = run(sample, leaves(sample))
        with use_impl("reference"):
            exact = run(sample, leaves(sample, torch.float64))
            low = run(sample, leaves(sample, torch.float32 if torch.float64 in dtypes else None))
            shaken = shaken_runs(sample, dtypes)
        for i, (a, e, w, *s) in enumerate(zip(actual, exact, low, *shaken, strict=True)):
            of = i - (len(actual) - len(sample.tensors))  # which gradient; negative: a result
            what = f"{name} {sample.id}: {'result' if of < 0 else f'gradient {of}'}"
            assert of >= 0 or a.is_contiguous(), what
            dtype = sample.tensors[max(of, 0)].dtype
            if of < 0 and row.float_results and dtype != torch.float64:
                dtype = torch.float32
            assert a.dtype == dtype, what
            assert_within_budget(what, a, e, w, s)
        again = run(sample, leaves(sample))
        for a, b in zip(actual, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


FOLLOW_AUTOCAST = (
    *("lora_linear", "attention", "batched_linear", "coordinate_lstm", "linear_cross_entropy"),
)


def with_gradients(results: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]):
    of = [r for r in results if r.requires_grad]
    return *results, *torch.autograd.grad(of, inputs, [torch.ones_like(r) for r in of])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_autocast(row: OpRow, cpu_impl) -> None:
    """In a region of bfloat16 products of layers are rounded, and nothing else."""
    for sample in row.samples((torch.float32, torch.float32), "cpu"):
        plain, lowered = leaves(sample), leaves(sample)
        expected = outputs_of(sample.call(*plain))
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs_of(sample.call(*lowered))
        pairs = zip(with_gradients(found, lowered), with_gradients(expected, plain), strict=True)
        for i, (a, e) in enumerate(pairs):
            if row.name in FOLLOW_AUTOCAST:
                assert (a - e).norm() <= 0.1 * e.norm() + 1e-5, f"{sample.id} {i}"
            else:
                torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("row", "index"), SMALL)
def test_finite_differences(row: OpRow, index: int, native_impl):
    name, device = native_impl
    skip_without(row, name)
    sample = small(row, index, device)
    inputs = tuple(leaves(sample))
    batched = name != "reference"
    assert gradcheck(sample.call, inputs, check_batched_grad=batched)
    assert gradgradcheck(sample.call, inputs, check_batched_grad=batched)


def objective(sample: Sample):
    return lambda *tensors: sum(o.square().sum() for o in outputs_of(sample.call(*tensors)))


@pytest.mark.parametrize(("row", "index"), SMALL)
def test_function_transforms(row: OpRow, index: int, native_impl):
    skip_without(row, native_impl[0])
    sample = small(row, index, native_impl[1])
    inputs = [t.detach() for t in sample.tensors]
    everything = tuple(range(len(inputs)))
    gradient = torch.func.grad(objective(sample), argnums=everything)

    def penalty(*tensors):  # a function of the gradient, so that its own gradient is second order
        return sum(g.pow(3).sum() for g in gradient(*tensors))

    second = torch.func.grad(penalty, argnums=everything)
    with use_impl("reference"):
        expected = [*gradient(*inputs), *second(*inputs)]
    for a, e in zip([*gradient(*inputs), *second(*inputs)], expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)

    batch = [torch.stack([t, 0.5 * t, 0.75 * t]) for t in inputs]
    for in_dims in {
        (0,) * len(inputs),
        *((None,) * i + (0,) + (None,) * (len(inputs) - i - 1) for i in range(len(inputs))),
    }:
        given = [b if d == 0 else t for b, t, d in zip(batch, inputs, in_dims, strict=True)]
        for function in (sample.call, gradient, second):
            rows = [
                function(*[g[i] if d == 0 else g for g, d in zip(given, in_dims, strict=True)])
                for i in range(3)
            ]
            got = torch.func.vmap(function, in_dims=in_dims)(*given)
            for i, g in enumerate(outputs_of(got)):
                expected = torch.stack([outputs_of(r)[i] for r in rows])
                torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("row", "index"), SMALL)
def test_vmapped_axis_anywhere(row: OpRow, index: int, native_impl):
    skip_without(row, native_impl[0])
    sample = small(row, index, native_impl[1])
    inputs = [t.detach() for t in sample.tensors]
    last = tuple(t.dim() for t in inputs)
    batch = [torch.stack([t, 0.5 * t], dim=-1) for t in inputs]
    got = outputs_of(torch.func.vmap(sample.call, in_dims=last, out_dims=1)(*batch))
    rows = (outputs_of(sample.call(*[f * t for t in inputs])) for f in (1, 0.5))
    for a, *e in zip(got, *rows, strict=True):
        torch.testing.assert_close(a, torch.stack(e, dim=1))


@pytest.mark.parametrize(("row", "index"), SMALL)
def test_capture(row: OpRow, index: int):
    """make_fx records the raw operators of a gradient, and the graph computes the same."""
    sample = small(row, index)
    inputs = [t.detach() for t in sample.tensors]
    step = torch.func.grad(objective(sample), argnums=tuple(range(len(inputs))))
    graph = make_fx(step)(*inputs)
    called = {str(node.target) for node in graph.graph.nodes}
    assert sample.composed or f"fastmeta.{row.raw[0]}.default" in called
    for a, e in zip(graph(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_compiled_transforms(row: OpRow):
    """torch.compile keeps the derivatives under torch.func; it would lose those of a Function."""
    torch._dynamo.reset()  # rows share code, and one piece of code is compiled eight times at most
    sample = list(row.small())[-1]
    inputs = [t.detach() for t in sample.tensors]
    gradient = torch.func.grad(objective(sample), argnums=tuple(range(len(inputs))))
    batch = [torch.stack([t, 0.5 * t]) for t in inputs]
    for function, given in ((gradient, inputs), (torch.func.vmap(gradient), batch)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, e in zip(compiled(*given), function(*given), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("row", "index"), SMALL)
def test_forward_mode_is_refused(row: OpRow, index: int):
    sample = small(row, index)
    inputs = tuple(t.detach() for t in sample.tensors)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(sample.call, inputs, inputs)


def recorded_calls(row: OpRow):
    """Arguments of the raw operators, as the public ones pass them."""
    for sample in [*row.small(), *row.samples(row.dtypes[0]), *row.samples(row.dtypes[-1])]:
        if max((t.numel() for t in sample.tensors), default=0) > 1000:
            continue
        calls = []

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == _library.NAMESPACE:
                    calls.append((func, args, kwargs or {}))  # noqa: B023
                return func(*args, **(kwargs or {}))

        with Record():
            tensors = leaves(sample)
            out = outputs_of(sample.call(*tensors))
            first = torch.autograd.grad(
                out, tensors, list(map(torch.ones_like, out)), create_graph=True
            )
            first = [t for t in first if t.requires_grad]
            if first:
                torch.autograd.grad(first, tensors, first, allow_unused=True)
            in_place = getattr(ops, f"{row.name}_", None)
            if in_place is not None:
                with torch.no_grad():
                    sample.call(*(t.detach().clone() for t in sample.tensors), op=in_place)
        yield from ((sample.id, *call) for call in calls)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_opcheck(row: OpRow):
    """torch's own check of a custom operator: schema, fake kernel, autograd registration."""
    seen = set()
    for name, op, args, kwargs in recorded_calls(row):
        seen.add(op)
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        # the public functions own the derivatives; the raw operators have none
        checks = ("test_schema", "test_faketensor")
        result = torch.library.opcheck(op, args, kwargs, test_utils=checks, raise_exception=False)
        assert set(result.values()) == {"SUCCESS"}, f"{op} on {name}: {result}"
    missed = set(row.raw) - {op._schema.name.split("::")[1] for op in seen}
    # the second derivative of piecewise linear distances is 0
    assert missed <= {"pairwise_sums_double_backward"}
