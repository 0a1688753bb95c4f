"""`fm.ops.cross_entropy`: wrong arguments, torch's own, and losses of language models that use it;
the operator table has its derivatives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm
from fastmeta.engine import losses
from fastmeta.ops import cross_entropy

X, LABELS = torch.zeros(3, 4), torch.tensor([0, -100, 3])


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (None, LABELS, r"logits must be a floating-point tensor \[\.\.\., C\], got"),
        (X.long(), LABELS, r"logits must be a floating-point tensor \[\.\.\., C\], got"),
        (torch.zeros(()), LABELS, r"logits must be a floating-point tensor \[\.\.\., C\], got"),
        (X[:, :0], LABELS, r"expected at least one class, got"),
        (X, LABELS.int(), r"labels must be int64 \[3\] on cpu, got"),
        (X, LABELS[:2], r"labels must be int64 \[3\] on cpu, got"),
        (X, LABELS.to("meta"), r"labels must be int64 \[3\] on cpu, got"),
        (X, [0, 1, 2], r"labels must be int64 \[3\] on cpu, got"),
    ],
)
def test_wrong_arguments(x, labels, message: str) -> None:
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(x, labels)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label: int, cpu_impl: tuple[str, str]) -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"label|out of bounds"):
        cross_entropy(X, torch.tensor([0, label, 1]))


def test_rows_that_do_not_count_may_hold_anything(cpu_impl: tuple[str, str]) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    x[1] = float("nan")
    x.requires_grad_()
    labels = torch.tensor([5, 7, 299, 7])
    out = cross_entropy(x, labels, ignore_index=7)
    assert out[[1, 3]].tolist() == [0, 0]
    (d,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(d.square().sum(), x)
    for gradient in (d, second):
        assert not gradient[[1, 3]].any() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_alone(value: float, cpu_impl: tuple[str, str]) -> None:
    x = torch.zeros(3, 40)
    x[1, 17] = value
    out = cross_entropy(x, torch.tensor([1, 2, 3]))
    assert out.isnan().tolist() == [False, True, False]


def test_large_logits_keep_their_digits(cpu_impl: tuple[str, str]) -> None:
    x = torch.randn(5, 333, generator=torch.Generator().manual_seed(1)) * 5 + 1000
    labels = x.argmax(-1)
    expected = F.cross_entropy(x.double(), labels, reduction="none").float()
    torch.testing.assert_close(cross_entropy(x, labels), expected, rtol=2e-6, atol=1e-7)


def loss_of_slices(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token loss of each task, as transformers writes it."""
    found = F.cross_entropy(
        logits[:, :, :-1].flatten(0, -2), labels[:, :, 1:].flatten(), reduction="none"
    ).view(len(logits), -1)
    return found.sum(1) / (labels[:, :, 1:] != -100).flatten(1).sum(1)


@pytest.mark.parametrize("classes", [7, 700], ids=["few", "many"])
def test_next_token_losses(classes: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 2, 6, classes, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.randint(classes, (3, 2, 6), generator=generator)
    labels[0, :, 4:] = -100
    weights = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    results = []
    for run in (lambda x: losses.causal_lm(SimpleNamespace(logits=x), {"labels": labels}),
                lambda x: loss_of_slices(x, labels)):  # fmt: skip
        found = run(logits)
        (d,) = torch.autograd.grad(found.square() @ weights, logits, create_graph=True)
        (second,) = torch.autograd.grad(d.square().sum(), logits)
        results.append((found, d, second))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_many_classes_keep_no_tensor_of_logits() -> None:
    """What the graph keeps beside the logits themselves."""
    x = torch.randn(8, 5000, requires_grad=True)
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != x.data_ptr():
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fm.ops.cross_entropy(x, torch.arange(8)).sum()
    assert sum(kept) <= 4 * len(x)
