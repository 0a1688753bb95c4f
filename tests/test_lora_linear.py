"""The linear layer with low-rank terms: rows of each task, ranks, weights in few bits, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import fastmeta as fm
from fastmeta.ops import QuantizedWeight, lora_linear, use_impl

T, R, K, N, RANK = 3, 5, 8, 6, 4


def layer(tasks=T, rows=R, width=K, outputs=N, rank=RANK, dtype=torch.float64):
    """x, W, bias, A, B that require grad."""
    shapes = ((tasks, rows, width), (outputs, width), (outputs,), (tasks, rank, width))
    shapes = (*shapes, (tasks, outputs, rank))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def merged(x, weight, bias, a, b, scale):
    """Each task through its own weight ``W + scale B A``."""
    own = [
        F.linear(x_t, weight + s * b_t @ a_t, bias)
        for x_t, a_t, b_t, s in zip(x, a, b, scale, strict=True)
    ]
    return torch.stack(own) if isinstance(x, torch.Tensor) else torch.cat(own)


def derivatives(out, tensors):
    """First gradients of a function of `out`, and the gradients of a function of those."""
    first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), tensors)
    return [out, *first, *second]


def test_is_the_merged_weight_of_each_task(cpu_impl):
    tensors = layer()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    got = derivatives(lora_linear(*tensors, scale), tensors)
    for a, e in zip(got, derivatives(merged(*tensors, scale), tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize(("width", "outputs"), [(1024, 70), (70, 1024), (1601, 33)])
def test_wide_layers(width, outputs, rows, cpu_impl):
    """Weights of many columns are repacked, and summed in parts; few rows of a task and many."""
    tensors = layer(4, rows, width, outputs, 3)
    for t in tensors[1:]:
        t.data /= t.shape[-1] ** 0.5
    scale = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    given = [*tensors[:1], tensors[1].detach(), *tensors[2:]]  # the weight is frozen
    wanted = [given[0], *given[2:]]
    got = derivatives(lora_linear(*given, scale), wanted)
    for a, e in zip(got, derivatives(merged(*given, scale), wanted), strict=True):
        assert (a - e).abs().max() <= 1e-12 * e.abs().max()


@pytest.mark.parametrize("width", [K, 1024, 1601])
def test_ragged_rows(width, cpu_impl):
    x, *rest = layer(tasks=6, rows=9, width=width)
    rest[0].data /= width**0.5
    rest[2].data /= width**0.5
    counts = [5, 6, 0, 35, 4, 4]
    rows = x.detach().flatten(0, 1).requires_grad_()
    offsets = torch.tensor([0, *counts]).cumsum(0)
    tensors = [rows, *rest]
    got = derivatives(lora_linear(*tensors, 0.5, offsets=offsets), tensors)
    expected = derivatives(merged(rows.split(counts), *rest, [0.5] * 6), tensors)
    for a, e in zip(got, expected, strict=True):
        assert (a - e).abs().max() <= 1e-12 * e.abs().max()


def test_ranks_hide_what_lies_behind_them(cpu_impl):
    """Mixed ranks are those of each task's own layer; not even NaN behind one is seen."""
    x, weight, bias, a, b = layer()
    ranks = torch.tensor([0, 2, 4])
    with torch.no_grad():
        for t, rank in enumerate(ranks):
            a[t, rank:], b[t, :, rank:] = float("nan"), float("inf")
    got = lora_linear(x, weight, bias, a, b, ranks=ranks)
    given = torch.autograd.grad(got.square().sum(), (x, a, b))
    for t, rank in enumerate(ranks.tolist()):
        own = [u.detach()[t] for u in (x, a, b)]
        own = [u.requires_grad_() for u in (own[0], own[1][:rank], own[2][:, :rank])]
        y = F.linear(own[0], weight + own[2] @ own[1], bias)
        torch.testing.assert_close(got[t], y)
        d_x, d_a, d_b = torch.autograd.grad(y.square().sum(), own, materialize_grads=True)
        torch.testing.assert_close(given[0][t], d_x)
        torch.testing.assert_close(given[1][t, :rank], d_a)
        torch.testing.assert_close(given[2][t, :, :rank], d_b)
        assert bool((given[1][t, rank:] == 0).all()) and bool((given[2][t, :, rank:] == 0).all())


@pytest.mark.parametrize("trained", [False, True])
def test_third_derivative(trained, cpu_impl):
    x, weight, bias, a, b = layer(2, 2, 2, 2, 1)
    weight.requires_grad_(trained)
    tensors = (x, weight, bias, a, b) if trained else (x, bias, a, b)
    offsets = torch.tensor([0, 3, 4])

    def second(x, *more):
        w, *rest = more if trained else (weight, *more)
        out = lora_linear(x.flatten(0, 1), w, *rest, 0.7, offsets=offsets)
        (g,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), rest[1:], create_graph=True)

    assert gradcheck(second, tensors)


def test_the_gradient_of_a_frozen_weight_is_not_computed():
    x, weight, bias, a, b = layer(dtype=torch.float32)
    weight.requires_grad_(False)
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            shapes.extend(tuple(t.shape) for t in results if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        derivatives(lora_linear(x, weight, bias, a, b), (x, bias, a, b))
    assert (N, K) not in shapes and (K, N) not in shapes


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 32), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantised_weights(bits, group, dtype, cpu_impl):
    """As the unpacked weight, in all orders; sizes of more than one block."""
    x, weight, bias, a, b = layer(2, 70, 96, 80, dtype=dtype)
    packed = QuantizedWeight.quantize(weight, bits, group)
    assert packed.shape == weight.shape and packed.bits == bits
    tensors = (x, bias, a, b)
    unpacked = packed.dequantize(dtype)
    got = derivatives(lora_linear(x, packed, bias, a, b, 0.5), tensors)
    expected = derivatives(lora_linear(x, unpacked, bias, a, b, 0.5), tensors)
    for g, e in zip(got, expected, strict=True):
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


def test_quantisation_rounds_to_the_nearest_step():
    weight = torch.randn(6, 64)
    weight[2] = 0
    for bits, group in ((8, 64), (8, 16), (4, 16)):
        packed = QuantizedWeight.quantize(weight, bits, group)
        error = (packed.dequantize() - weight).abs().unflatten(1, (-1, group))
        most = weight.abs().unflatten(1, (-1, group)).amax(2, keepdim=True)
        assert bool((error <= 0.501 * most / (2 ** (bits - 1) - 1)).all())


def test_no_copy_of_a_quantised_weight():
    packed = QuantizedWeight.quantize(torch.randn(512, 1024), 4)
    x, a, b = torch.randn(1, 4, 1024), torch.randn(1, 2, 1024), torch.randn(1, 512, 2)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(t.numel() for t in results if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        lora_linear(x, packed, None, a, b)
    assert max(sizes) < 512 * 1024 / 16


@pytest.mark.parametrize(("rows", "width"), [(80, 128), (7, 1024), (40, 1024)])
def test_a_task_does_not_depend_on_its_neighbours(rows, width):
    x, weight, bias, a, b = (t.detach() for t in layer(9, rows, width, 128, 8, torch.float32))
    cotangent = torch.randn(9, rows, 128)

    def results(tasks: slice):
        own = [t[tasks].clone().requires_grad_() for t in (x, a, b)]
        y = lora_linear(own[0], weight / 11, bias, *own[1:])
        first = torch.autograd.grad((y * cotangent[tasks]).sum(), own, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(f.square().sum() for f in first), own)]

    together = results(slice(None))
    for t in (0, 4, 8):
        for one, all_of_them in zip(results(slice(t, t + 1)), together, strict=True):
            assert torch.equal(one[0], all_of_them[t])


def test_threads_do_not_change_a_bit():
    tensors = layer(3, 1500, 96, 64, 8, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(derivatives(lora_linear(*tensors, 0.5), tensors[2:]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    tensors = layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = lora_linear(*tensors, 0.5)
        assert y.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    grads = torch.autograd.grad(y.float().square().sum(), tensors)
    expected = merged(*tensors, [0.5] * T)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=rounding, atol=10 * rounding)
    for g, t in zip(grads, tensors, strict=True):
        assert g.dtype == torch.float32 and g.shape == t.shape


# few rows of a task and many, one task, columns of whole vectors or not, steps that are odd
SIZES = ((3, 5, 8, 6), (3, 40, 37, 50), (4, 300, 130, 97), (1, 200, 64, 96), (2, 7, 1601, 33))


@pytest.mark.parametrize(("tasks", "rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_rounds_factors_alone(tasks, rows, width, outputs, bits, trained, cpu_impl):
    """What bfloat16 holds exactly keeps its digits: sums, terms and results are float32."""
    if trained and bits:
        pytest.skip("a weight in few bits has no gradient")
    x, weight, bias, a, b = layer(tasks, rows, width, outputs, 3, torch.float32)
    with torch.no_grad():
        for t in (x, weight):
            t.copy_(t.bfloat16())
    if bits:
        weight = QuantizedWeight(
            torch.randint(-8, 8, (outputs, width)).to(torch.int8), torch.ones(outputs, 1)
        )
    tensors = (x, bias, a, b, weight) if trained else (x, bias, a, b)
    cotangent = torch.randn(tasks, rows, outputs).bfloat16().float().requires_grad_()
    g = torch.randn_like(x).bfloat16().float()  # of dx, which the second derivative multiplies by W

    def results(dtype, rounds):
        there = [t.detach().to(dtype).requires_grad_() for t in (*tensors, cotangent)]
        own = there[4] if trained else weight if bits else weight.detach().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            y = lora_linear(there[0], own, *there[1:4], 0.5)
        first = torch.autograd.grad(y, there[:-1], there[-1], create_graph=True)
        second = torch.autograd.grad(first[0], there[2:4] + there[-1:], g.to(dtype))
        return [y, *first, *second]

    for got, exact in zip(results(torch.float32, True), results(torch.float64, False), strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("tasks", "rows", "outputs"), [(3, 40, 50), (1, 20, 600)])
def test_bfloat16_where_no_instruction_multiplies_pairs(tasks, rows, outputs):
    """Rounded number by number, as in float64, results are the same but for the order of sums."""
    x, weight, bias, a, b = (t.detach() for t in layer(tasks, rows, 37, outputs, 3, torch.float32))
    bias, rows = bias.unsqueeze(0), x.flatten(0, 1)
    given = (rows, weight, None, bias, a, b)
    found, s = torch.ops.fastmeta.lora_linear(*given, None, 0.5, True)
    wide = tuple(None if t is None else t.double() for t in given)
    expected, wide_s = torch.ops.fastmeta.lora_linear(*wide, None, 0.5, True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    unrounded, _ = torch.ops.fastmeta.lora_linear(*wide, None, 0.5, False)
    assert (unrounded - expected).abs().max() > 1e-3
    dy = torch.randn(len(rows), outputs)
    back = torch.ops.fastmeta.lora_linear_backward
    found = back(dy, rows, weight, None, a, b, s, None, 0.5, 29, True)
    expected = back(dy.double(), *wide[:3], *wide[4:], wide_s, None, 0.5, 29, True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 90])
def test_weights_of_any_strides(rows, cpu_impl):
    x, _, bias, a, b = layer(3, rows, 33, 40, 3, torch.float32)
    for spread in (torch.randn(40, 66)[:, ::2], torch.randn(1, 1).expand(40, 33)):
        for rounds in (False, True):
            found = []
            for own in (spread, spread.contiguous()):
                with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
                    y = lora_linear(x, own, bias, a, b)
                found.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b))])
            for got, expected in zip(*found, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


X, W, B0 = torch.zeros(T, R, K), torch.zeros(N, K), torch.zeros(N)
A, B = torch.zeros(T, RANK, K), torch.zeros(T, N, RANK)
ROWS = X.flatten(0, 1)


def offsets(*starts):
    return torch.tensor(starts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lora_linear(ROWS, W, B0, A, B),
            r"x must be .* \[T, R, K\], got float32 \[15, 8\]",
        ),
        (lambda: lora_linear(X.long(), W, B0, A, B), "x must be a floating-point tensor"),
        (lambda: lora_linear(X, W[:, 1:], B0, A, B), r"weight must be .* K = 8, got .*\[6, 7\]"),
        (lambda: lora_linear(X, W.double(), B0, A, B), "weight must be float32"),
        (lambda: lora_linear(X, W, B0[1:], A, B), r"bias must be None, \[6\] or float32 \[3, 6\]"),
        (lambda: lora_linear(X, W, B0, A[:, :0], B[..., :0]), "A must have a rank r >= 1, got"),
        (lambda: lora_linear(X, W, B0, A[..., 1:], B), "A must be float32"),
        (lambda: lora_linear(X, W, B0, A[1:], B[1:]), r"A must be \[T, r, K\] with T = 3"),
        (lambda: lora_linear(X, W, B0, A, B[..., 1:]), r"B must be float32 \[3, 6, 4\]"),
        (lambda: lora_linear(X, W, B0, A, B.double()), "B must be float32 .* got float64"),
        (lambda: lora_linear(X, W, B0, A, B, float("nan")), "scale must be a finite number"),
        (lambda: lora_linear(X, W, B0, A, B, torch.ones(2)), r"scale must be .* \[T\] = \[3\]"),
        (
            lambda: lora_linear(X, W, B0, A, B, offsets=offsets(0, 5, 10, 15)),
            r"x must be .* \[M, K\] with offsets",
        ),
        (
            lambda: lora_linear(ROWS, W, B0, A, B, offsets=offsets(0, 5, 15)),
            r"offsets must be int64 \[T \+ 1\] = \[4\]",
        ),
        (
            lambda: lora_linear(ROWS, W, B0, A, B, offsets=offsets(0, 5, 10, 14)),
            "offsets must rise from 0 to the number of rows M = 15",
        ),
        (
            lambda: lora_linear(ROWS, W, B0, A, B, offsets=offsets(1, 5, 10, 15)),
            "offsets must rise from 0",
        ),
        (
            lambda: lora_linear(ROWS, W, B0, A, B, offsets=offsets(0, 11, 10, 15)),
            "offsets must rise from 0",
        ),
        (
            lambda: lora_linear(X, W, B0, A, B, ranks=offsets(1, 5, 2)),
            r"ranks must be in 0..r = 4, got \[1, 5, 2\]",
        ),
        (lambda: lora_linear(X, W, B0, A, B, ranks=torch.ones(3)), r"ranks must be int64 \[T\]"),
        (lambda: QuantizedWeight.quantize(W, 3), "bits must be 8 or 4, got 3"),
        (
            lambda: QuantizedWeight.quantize(W, 4),
            "group_size must divide K = 8 and be even, got 64",
        ),
        (lambda: QuantizedWeight.quantize(W, 8, 3), "group_size must divide K = 8, got 3"),
        (lambda: QuantizedWeight.quantize(B0), r"weight must be a floating-point tensor \[N, K\]"),
        (
            lambda: lora_linear(X, QuantizedWeight.quantize(W[:, :4]), B0, A, B),
            r"weight must be .* K = 8, got 8-bit \[6, 4\] on cpu",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_that_were_not_checked_are_refused_by_the_kernel():
    with pytest.raises(RuntimeError, match="offsets must rise from 0"):
        torch.ops.fastmeta.lora_linear(ROWS, W, None, None, A, B, offsets(0, 9, 8, 15), 1.0)


def test_public_names():
    assert fm.ops.lora_linear is lora_linear
    with use_impl("reference"):
        assert lora_linear(X, W, B0, A, B).shape == (T, R, N)


def test_weights_of_few_bits_in_any_strides() -> None:
    g = torch.Generator().manual_seed(0)
    whole = QuantizedWeight.quantize(torch.randn(16, 8, generator=g), 8, 4)
    every = [QuantizedWeight(whole.values[::2], whole.scale[::2])]
    every.append(QuantizedWeight(whole.values.t().contiguous().t(), whole.scale))
    every.append(QuantizedWeight(whole.values, whole.scale.t().contiguous().t()))
    x = torch.randn(1, 3, 8, generator=g)
    for weight in every:
        nothing = torch.zeros(1, 1, 8), torch.zeros(1, weight.shape[0], 1)
        found = lora_linear(x, weight, None, *nothing)
        torch.testing.assert_close(found, x @ weight.dequantize().mT)
    for values, scale, message in (
        (whole.values.float(), whole.scale, "values must be int8 or uint8 of two axes, got float"),
        (whole.values, whole.scale.half(), "scale must be float32 or float64 of two axes, got flo"),
        (whole.values, whole.scale[:2], r"scale must be \[16, G\] on cpu with G dividing K = 8"),
        (whole.values, whole.scale[:, [0, 0, 1]], "with G dividing K = 8, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedWeight(values, scale)


def test_offsets_in_any_strides() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, generator=g), torch.randn(3, 4, generator=g)
    a, b = torch.randn(2, 2, 4, generator=g), torch.randn(2, 3, 2, generator=g)
    strided = torch.tensor([0, 3, 6, 9, 6, 9])[::2]
    found = lora_linear(x, weight, None, a, b, offsets=strided)
    torch.testing.assert_close(found, lora_linear(x, weight, None, a, b, offsets=strided.clone()))
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \[M, K\]"):
        lora_linear([1], weight, None, a, b, offsets=strided)
