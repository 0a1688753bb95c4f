"""`fm.ops.linear_cross_entropy`: wrong arguments, rows alone, what it computes and never holds; the
operator table has its derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.ops import cross_entropy, linear_cross_entropy

X, W, LABELS = torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, -100, 3])


def problem(rows: int, width: int, classes: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Rows, words, their bias, labels."""
    g = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((rows, width), (classes, width), (classes,))
    )
    return x, weight, bias, torch.randint(classes, (rows,), generator=g)


def derivatives(loss, *inputs: Tensor) -> list[Tensor]:
    """Losses, their gradient, and the derivative of that, in all inputs."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    out = loss(*inputs)
    first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
    return [out.detach(), *(t.detach() for t in first), *second]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X.long(), W, LABELS), r"x must be a floating-point tensor \[\.\.\., D\], got"),
        ((torch.zeros(()), W, LABELS), r"x must be a floating-point tensor \[\.\.\., D\], got"),
        ((X, W.mT, LABELS), r"weight must be \[C, 2\], float32 on cpu, got"),
        ((X, W.double(), LABELS), r"weight must be \[C, 2\], float32 on cpu, got"),
        ((X, W[:0], LABELS), r"expected at least one class, got"),
        ((X, W, LABELS, torch.zeros(2)), r"bias must be \[4\], float32 on cpu, got"),
        ((X, W, LABELS.int()), r"labels must be int64 \[3\] on cpu, got"),
        ((X, W, LABELS[:2]), r"labels must be int64 \[3\] on cpu, got"),
        ((X, W, [0, 1, 2]), r"labels must be int64 \[3\] on cpu, got"),
    ],
)
def test_wrong_arguments(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(*given)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label: int, cpu_impl: tuple[str, str]) -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"label|out of bounds"):
        linear_cross_entropy(X, W, torch.tensor([0, label, 1]))


def test_rows_that_do_not_count_may_hold_anything(cpu_impl: tuple[str, str]) -> None:
    x, weight, _, _ = problem(4, 6, 300)
    x[1] = float("nan")
    labels = torch.tensor([5, 7, 299, 7])
    found = derivatives(lambda x: linear_cross_entropy(x, weight, labels, ignore_index=7), x)
    for t in found:
        assert not t[[1, 3]].any() and t[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_alone(value: float, cpu_impl: tuple[str, str]) -> None:
    x, weight, _, labels = problem(3, 5, 400, torch.float32)
    x[1, 3] = value
    found = derivatives(lambda x: linear_cross_entropy(x, weight, labels), x)
    for t in found:
        assert t.view(3, -1).isnan().any(1).tolist() == [False, True, False]


def test_words_that_cannot_be(cpu_impl: tuple[str, str]) -> None:
    """Whole blocks of them, among them the first."""
    x, weight, bias, labels = problem(7, 64, 5000)
    bias[:2000], bias[4000:] = float("-inf"), float("-inf")
    labels = 2000 + labels % 2000
    expected = derivatives(
        lambda x: F.cross_entropy(
            F.linear(x, weight, bias)[:, 2000:4000], labels - 2000, reduction="none"
        ),
        x,
    )
    found = derivatives(lambda x: linear_cross_entropy(x, weight, labels, bias), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [90.0, 800.0, 1e9])
def test_words_far_above_those_before(gap: float, cpu_impl: tuple[str, str]) -> None:
    """So far that the exponentials of the first are 0 beside them."""
    x, weight, bias, _ = problem(5, 64, 9000)
    bias -= gap * (torch.arange(9000) // 700 % 2)
    labels = torch.tensor([10, 1410, 2810, 4210, 8999])
    expected = derivatives(
        lambda x: F.cross_entropy(F.linear(x, weight, bias), labels, reduction="none"), x
    )
    found = derivatives(lambda x: linear_cross_entropy(x, weight, labels, bias), x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_no_width_and_no_rows(cpu_impl: tuple[str, str]) -> None:
    found = linear_cross_entropy(torch.zeros(3, 0), torch.zeros(7, 0), torch.zeros(3).long())
    torch.testing.assert_close(found, torch.full((3,), 7.0).log())
    none = linear_cross_entropy(torch.zeros(0, 2), W, torch.zeros(0).long())
    assert none.shape == (0,)


def test_a_bias_that_is_expanded() -> None:
    x, weight, _, labels = problem(5, 6, 300)
    one = torch.ones(1, dtype=torch.float64)
    found = linear_cross_entropy(x, weight, labels, one.expand(300))
    torch.testing.assert_close(found, linear_cross_entropy(x, weight, labels))


def test_large_logits_keep_their_digits(cpu_impl: tuple[str, str]) -> None:
    """Each block of words has larger ones than the last."""
    x, weight, bias, labels = problem(5, 32, 3000, torch.float32)
    bias += torch.arange(3000) / 3
    expected = F.cross_entropy(
        F.linear(x.double(), weight.double(), bias.double()), labels, reduction="none"
    )
    found = linear_cross_entropy(x, weight, labels, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


def test_a_row_is_the_same_in_any_company() -> None:
    x, weight, bias, labels = problem(450, 40, 3000, torch.float32)

    def found(rows: slice) -> list[Tensor]:
        return derivatives(lambda x: linear_cross_entropy(x, weight, labels[rows], bias), x[rows])

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [found(slice(i, i + 1)) for i in (0, 191, 449)]
        torch.set_num_threads(3)
        together = found(slice(None))
    finally:
        torch.set_num_threads(threads)
    for i, own in zip((0, 191, 449), alone, strict=True):
        assert all(torch.equal(t[i : i + 1], o) for t, o in zip(together, own, strict=True))


def test_learned_words() -> None:
    """Differentiable in weight and bias, too."""
    x, weight, bias, labels = problem(6, 5, 300)
    labels[2] = -100
    found = derivatives(lambda x, w, b: linear_cross_entropy(x, w, labels, b), x, weight, bias)
    expected = derivatives(
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), labels, reduction="none"),
        x, weight, bias,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_learned_words_under_transforms() -> None:
    """Each place of a vmapped axis has words, of which a gradient is asked for around it."""
    x, weight, _, labels = problem(6, 5, 300)
    stacked = torch.stack([weight, 2 * weight])

    def total(loss, stacked: Tensor) -> Tensor:
        return torch.func.vmap(lambda w: loss(x, w).sum())(stacked).sum()

    found = torch.func.grad(lambda s: total(lambda x, w: linear_cross_entropy(x, w, labels), s))
    expected = torch.func.grad(
        lambda s: total(lambda x, w: F.cross_entropy(F.linear(x, w), labels, reduction="none"), s)
    )
    torch.testing.assert_close(found(stacked), expected(stacked), rtol=1e-10, atol=1e-12)


def test_learned_words_without_gradients_form_no_logits() -> None:
    x, weight, _, labels = problem(300, 8, 1000, torch.float32)
    with torch.no_grad(), Largest() as largest:
        linear_cross_entropy(x, weight.requires_grad_(), labels)
    assert largest.size <= weight.numel()


def test_products_in_bfloat16_vanish_where_a_model_is_right() -> None:
    _, weight, _, labels = problem(9, 64, 2000, torch.float32)
    x = 60 * weight[labels] / weight[labels].norm(dim=1, keepdim=True)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (d,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels).sum(), x)
    assert d.abs().max() < 1e-5


def test_products_in_bfloat16() -> None:
    x, weight, bias, labels = problem(40, 64, 2000, torch.float32)
    weight /= 8

    def found(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, bias)

    exact = derivatives(found, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = derivatives(found, x)
        separate = derivatives(lambda x: cross_entropy(F.linear(x, weight, bias), labels), x)
    for r, s, e in zip(rounded, separate, exact, strict=True):
        scale = e.abs().max()
        assert r.dtype == torch.float32 and not torch.equal(r, e)
        assert (r - e).abs().max() < 2e-2 * scale
        # logits are not rounded, only what they are made of
        assert (r - e).square().mean() < 1.2 * (s - e).square().mean()


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new tensor has."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(found):
            if isinstance(t, Tensor):
                self.size = max(self.size, t.numel())
        return found


def test_no_tensor_of_logits() -> None:
    x, weight, _, labels = problem(300, 8, 1000, torch.float32)
    with Largest() as largest:
        derivatives(lambda x: linear_cross_entropy(x, weight, labels), x)
    assert largest.size <= weight.numel() < 300 * 1000


def test_under_functional_transforms() -> None:
    """Words of each place of a vmapped axis, too."""
    x, weight, bias, labels = problem(6, 5, 40)
    stacked = torch.stack([weight, 2 * weight])

    def hessian(x: Tensor, weight: Tensor) -> Tensor:
        loss = lambda x: linear_cross_entropy(x, weight, labels[:2], bias).sum()  # noqa: E731
        return torch.func.jacrev(torch.func.grad(loss))(x)

    found = torch.func.vmap(hessian, (None, 0))(x[:2], stacked)
    expected = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda x, w=w: F.cross_entropy(F.linear(x, w, bias), labels[:2], reduction="sum"),
                x[:2],
            )
            for w in stacked
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_is_ignored_does_not_reach_a_weight_that_learns() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 3, generator=g), torch.randn(5, 3, generator=g).requires_grad_()
    labels = torch.tensor([0, 1, -100, 2])
    clean = linear_cross_entropy(x, weight, labels)
    x[2] = float("nan")
    found = linear_cross_entropy(x, weight, labels)
    for a, b in zip(*(torch.autograd.grad(t.sum(), weight) for t in (found, clean)), strict=True):
        torch.testing.assert_close(a, b)
