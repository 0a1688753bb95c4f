"""The task-batched affine map: value and derivatives to third order, no transposed copies."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.ops.batched_linear import affine, over_tasks, together
from fastmeta.ops.batched_linear import product as batched_mm

CASES = list(itertools.product((True, False), (0, 1, 3)))


def operands(nt: bool, base_rows: int) -> tuple[Tensor, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    weight = random(2, 4, 5) if nt else random(2, 5, 4)
    return (random(2, 3, 5), weight, *([random(2, base_rows, 4)] if base_rows else []))


@pytest.mark.parametrize(("nt", "base_rows"), CASES)
def test_derivatives_of_every_order(nt: bool, base_rows: int) -> None:
    args = operands(nt, base_rows)
    expected = torch.einsum("tmk,tnk->tmn" if nt else "tmk,tkn->tmn", *args[:2])
    torch.testing.assert_close(affine(*args, nt=nt), expected + sum(args[2:]))

    def run(*args: Tensor) -> Tensor:
        return affine(*args, nt=nt).sin()

    def of_gradients(*args: Tensor) -> Tensor:
        grads = torch.autograd.grad(run(*args).sum(), args, create_graph=True)
        return sum(g.sin().sum() for g in grads)

    torch.autograd.gradcheck(run, args)
    torch.autograd.gradgradcheck(run, args)
    torch.autograd.gradgradcheck(of_gradients, args)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_asked_for(wanted: tuple[int, ...]) -> None:
    args = [a.requires_grad_(i in wanted) for i, a in enumerate(operands(True, 1))]
    plain = [a.detach().clone().requires_grad_(i in wanted) for i, a in enumerate(args)]
    found = []
    for tensors, run in ((args, affine), (plain, lambda x, w, b: x @ w.mT + b)):
        moving = [tensors[i] for i in wanted]
        y = run(*tensors).sin().sum()
        first = torch.autograd.grad(y, moving, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), moving)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_weight_gradients_are_laid_out_as_the_weights() -> None:
    for nt in (True, False):
        args = operands(nt, 1)
        y = affine(*args, nt=nt).sin().sum()
        first = torch.autograd.grad(y, args, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), args)
        assert all(g.is_contiguous() for g in (*first, *second))


def test_transforms() -> None:
    x, weight, base = (a.detach() for a in operands(True, 1))

    def loss(weight: Tensor) -> Tensor:
        return affine(x, weight, base).sin().sum()

    def plain(weight: Tensor) -> Tensor:
        return (x @ weight.mT + base).sin().sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    many = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(grad(loss)(weight), grad(plain)(weight))
    torch.testing.assert_close(vmap(grad(loss))(many), vmap(grad(plain))(many))

    def twice(f):
        return grad(lambda w: grad(f)(w).sin().sum())

    torch.testing.assert_close(twice(loss)(weight), twice(plain)(weight))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 13, 16, 40), (1, 2, 0, 3), (2, 0, 3, 4)])
def test_product_in_place(shape: tuple[int, ...], accumulate: bool, cpu_impl) -> None:
    """Onto a part of a wider buffer, whose other columns stay."""
    tasks, rows, inner, outer = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tasks, inner, rows, generator=generator, dtype=torch.float64).mT
    b = torch.randn(tasks, inner, outer, generator=generator, dtype=torch.float64)
    wide = torch.randn(tasks, rows * outer + 3, generator=generator, dtype=torch.float64)
    to = wide[:, 1 : 1 + rows * outer].unflatten(1, (rows, outer))
    expected = (to if accumulate else 0) + a @ b
    edges = wide[:, [0, -2, -1]].clone()
    together([(to, a, b, to if accumulate else None, False)])
    torch.testing.assert_close(to, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(wide[:, [0, -2, -1]], edges)


@pytest.mark.parametrize("tasks", [1, 3, 4, 9])
def test_products_together(tasks: int, cpu_impl) -> None:
    """What one writes another reads, or adds to; bases are shared, of other products, or none."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w, v = random(tasks, 13, 40), random(tasks, 600, 40), random(1, 40, 17).expand(tasks, -1, -1)
    bias, far = random(tasks, 1, 600), random(tasks, 600, 40)
    y, z, kept = torch.empty(tasks, 13, 600), random(tasks, 13, 17), far.clone()
    y = y.double()
    first = z.clone()
    together(
        [
            (y, x, w.mT, bias, False),
            (z, x, v, z, False),
            (far, y.mT, x, far, False),
            (first, random(tasks, 13, 0), random(tasks, 0, 17), None, False),
            (first, z[:, :, :5], random(5, 17).expand(tasks, -1, -1), first, False),
        ]
    )
    generator.manual_seed(0)
    x, w, v = random(tasks, 13, 40), random(tasks, 600, 40), random(1, 40, 17)
    bias, _ = random(tasks, 1, 600), random(tasks, 600, 40)
    added = random(tasks, 13, 17) + x @ v
    random(tasks, 13, 0), random(tasks, 0, 17)
    for got, want in (
        (y, x @ w.mT + bias),
        (z, added),
        (far, kept + (x @ w.mT + bias).mT @ x),
        (first, added[:, :, :5] @ random(5, 17)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_threads_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, 70, 64, generator=generator) for _ in range(2))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        products = [batched_mm(x, w.mT, None, bf16) for bf16 in (False, True)]
        found.append([*products, over_tasks(x.mT, w), over_tasks(x.mT, w, bf16=True)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("inner", [512, 1024, 1601, 2048])
@pytest.mark.parametrize("rows", [5, 14])
def test_long_rows(rows: int, inner: int, tasks: int, dtype: torch.dtype, cpu_impl) -> None:
    """Sums in several parts, of rows that lie where they evict each other and others."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tasks, rows, inner, generator=generator, dtype=dtype)
    outer = torch.randn(inner, 1024, generator=generator, dtype=dtype)
    for b in (outer, outer.mT.contiguous().mT, outer[:, :70], outer[:, :17].contiguous()):
        base = torch.randn(1, rows, b.shape[1], generator=generator, dtype=dtype)
        left, right = a.double(), b.double()
        bound = (left.abs() @ right.abs() + base.abs()) * inner * torch.finfo(dtype).eps
        found = batched_mm(a, b.expand(tasks, *b.shape), base)
        assert ((found - (left @ right + base)).abs() <= bound).all()


def test_more_rows_than_are_taken_together(cpu_impl) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 500, 20, generator=generator, dtype=torch.float64)
    b = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    for base in (None, torch.ones(1, 1, 40).double(), torch.ones(5, 500, 40).double()):
        found = batched_mm(a, b.expand(5, 20, 40), base)
        expected = a @ b + (0 if base is None else base)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


ODD = (
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (2, 13, 33, 17),
    (2, 3, 0, 4),
    (4, 25, 64, 64),
    (1, 70, 131, 600),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nt", [False, True])
@pytest.mark.parametrize("shape", ODD)
def test_factors_rounded_to_bfloat16(
    shape: tuple[int, ...], nt: bool, dtype: torch.dtype, cpu_impl
) -> None:
    """As exact as sums are, whatever the layout of the factors."""
    tasks, rows, inner, outer = shape
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    a, b = random(tasks, rows, inner), random(tasks, inner, outer)
    left, right = (t.bfloat16().double() for t in (a, b))
    if nt:  # neither lies as the kernel reads it
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    base = random(tasks, rows, outer)
    bound = (left.abs() @ right.abs() + base.abs()) * inner * torch.finfo(dtype).eps
    for onto in (None, base, base[:, :1]):
        expected = left @ right + (0 if onto is None else onto)
        assert ((batched_mm(a, b, onto, True) - expected).abs() <= bound + 1e-30).all()
    to = base.clone()
    together([(to, a, b, to, True)])
    assert ((to - (left @ right + base)).abs() <= bound + 1e-30).all()
    for bf16, x, y in ((True, left, right), (False, a.double(), b.double())):
        difference = over_tasks(a, b, bf16=bf16) - (x @ y).sum(0, keepdim=True)
        assert (difference.abs() <= tasks * bound.sum(0) + 1e-30).all()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("shape", [(23, 100, 40, 70), (5, 7, 70, 40), (3, 900, 9, 1100)])
def test_sums_over_tasks(shape: tuple[int, ...], adjacent: bool, bf16: bool, cpu_impl) -> None:
    """Of groups of tasks where their rows are adjacent, a last smaller one among them."""
    tasks, rows, narrow, wide = shape
    generator = torch.Generator().manual_seed(0)
    spare = 0 if adjacent else 1
    d_y, x = (
        torch.randn(tasks, rows + spare, n, generator=generator, dtype=torch.float64)[:, :rows]
        for n in (narrow, wide)
    )
    left, right = (t.bfloat16().double() if bf16 else t for t in (d_y, x))
    expected = torch.einsum("tkm,tkn->mn", left, right)[None]
    found = over_tasks(d_y.mT, x, bf16)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("apart", ["neither", "left", "right", "both"])
def test_sums_over_tasks_of_one_row(apart: str, bf16: bool, cpu_impl) -> None:
    """Rows of a task each, every third number of a row: no axis of their sum is adjacent."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(6, 1, 3 * n, generator=generator)[:, :, ::3]
        if apart in (side, "both")
        else torch.randn(6, 1, n, generator=generator)
        for side, n in (("left", 20), ("right", 37))
    )
    x, y = (t.bfloat16().double() if bf16 else t.double() for t in (left, right))
    expected = torch.einsum("tkm,tkn->mn", x, y)[None].float()
    torch.testing.assert_close(over_tasks(left.mT, right, bf16), expected, rtol=1e-5, atol=1e-5)


def test_no_columns(cpu_impl) -> None:
    assert over_tasks(torch.zeros(3, 0, 2), torch.zeros(3, 2, 0)).shape == (1, 0, 0)
    assert over_tasks(torch.zeros(3, 4, 2), torch.zeros(3, 2, 0)).shape == (1, 4, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_stays_so_in_bfloat16(value: float, cpu_impl) -> None:
    a = torch.zeros(1, 20, 33)
    a[0, 3, 32] = value
    y = batched_mm(a, torch.ones(1, 33, 40), None, True)
    assert not torch.isfinite(y[0, 3]).any() and (y[0, :3] == 0).all() and (y[0, 4:] == 0).all()


def test_autocast_in_bfloat16() -> None:
    """Every product of value, gradient and second derivative has rounded factors; all else, and
    all results, are float32."""
    x, weight, base = (a.detach().float() for a in operands(True, 1))
    cotangent = torch.randn(2, 3, 4)

    def second(run) -> list[Tensor]:
        args = [t.clone().requires_grad_() for t in (x, weight, base)]
        y = run(*args)
        first = torch.autograd.grad((y * cotangent).sum(), args, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), args[:2])]

    def plain(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        return Rounded.apply(x, weight.mT) + base

    with torch.autocast("cpu", torch.bfloat16):
        found = second(ops.batched_linear)
    for got, want in zip(found, second(plain), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    exact = second(lambda x, w, b: x @ w.mT + b)
    assert any((got - want).abs().max() > 1e-4 for got, want in zip(found, exact, strict=True))


def test_autocast_under_vmap() -> None:
    x, weight = torch.randn(3, 2, 4, 8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.vmap(lambda x: ops.batched_linear(x, weight))(x)
        expected = torch.stack([ops.batched_linear(rows, weight) for rows in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Rounded(torch.autograd.Function):
    """``a b`` of factors rounded to bfloat16, as are those of its derivatives."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.bfloat16().float() @ b.bfloat16().float()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return Rounded.apply(d, b.mT), Rounded.apply(a.mT, d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be a floating-point tensor \[T, M, K\]"),
        ({"weight": torch.zeros(2, 6, 5)}, r"weight must be \[2, N, 4\].*got .*\[2, 6, 5\]"),
        ({"weight": torch.zeros(2, 6, 4).double()}, "weight must be .*float32.*got .*float64"),
        ({"base": torch.zeros(2, 2, 6)}, r"base must be \[2, 1, 6\] or \[2, 3, 6\]"),
    ],
)
def test_arguments(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(2, 6, 4), "base": None}
    with pytest.raises(ValueError, match=message):
        ops.batched_linear(**{**given, **change})
