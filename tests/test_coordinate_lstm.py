"""The shared LSTM cell: torch.nn.LSTMCell's numbers, arguments, threads, what is kept."""

from __future__ import annotations

import pytest
import torch

from fastmeta import ops


def arguments(rows: int = 300, features: int = 3, hidden: int = 5, dtype=torch.float64):
    cell = torch.nn.LSTMCell(features, hidden, dtype=dtype)
    x, h, c = (torch.randn(rows, n, dtype=dtype) for n in (features, hidden, hidden))
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    return cell, [t.requires_grad_() for t in (x, h, c)], weights


def test_is_torchs_cell(cpu_impl):
    cell, (x, h, c), weights = arguments()
    expected = cell(x, (h, c))
    found = ops.coordinate_lstm(x, h, c, *weights)
    given = [x, h, c, *weights]
    upstream = [torch.randn_like(h), torch.randn_like(c)]
    for f, e in zip(
        [*found, *torch.autograd.grad(found, given, upstream)],
        [*expected, *torch.autograd.grad(expected, given, upstream)],
        strict=True,
    ):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_extreme_inputs():
    """Saturated gates are finite and right, small numbers keep their digits, NaN stays."""
    x = torch.tensor([[1e30], [-1e30], [200.0], [1e-20], [-3e-9], [float("nan")]])
    weight = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    zero = torch.zeros(6, 1)
    h, c = ops.coordinate_lstm(x, zero, zero, weight, torch.zeros(4, 1))
    i = o = torch.sigmoid(x.double())
    exact = i * torch.tanh(x.double())
    torch.testing.assert_close(c.double(), exact, rtol=4e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(h.double(), o * exact.tanh(), rtol=4e-7, atol=0, equal_nan=True)


def test_threads_do_not_matter():
    _, (x, h, c), weights = arguments(rows=20_000, dtype=torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = ops.coordinate_lstm(x, h, c, *weights)
            runs.append([*out, *torch.autograd.grad(sum(o.sum() for o in out), weights)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_may_be_unused(which: int):
    """Also in second order, where the other's cotangent is absent."""
    _, given, weights = arguments(rows=7)
    found = []
    for implementation in ("reference", "auto"):
        with ops.use_impl(implementation):
            out = ops.coordinate_lstm(*given, *weights)[which]
            first = torch.autograd.grad(out.sum(), [*given, *weights], create_graph=True)
            second = torch.autograd.grad(sum(f.square().sum() for f in first), [*given, *weights])
            found.append([*first, *second])
    for a, e in zip(*reversed(found), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_only_arguments_are_kept():
    _, given, weights = arguments(rows=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.coordinate_lstm(*given, *weights)
    large = {t.data_ptr() for t in kept if t.shape[0] == 50}
    assert large == {t.data_ptr() for t in given}


def test_autocast():
    _, given, weights = arguments(rows=4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c = ops.coordinate_lstm(*given, *weights)
    assert h.dtype == c.dtype == torch.bfloat16
    torch.autograd.grad(h.float().sum(), weights[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4)}, r"inputs must be \[M, F\] and h \[M, H\], got \[4\]"),
        ({0: torch.zeros(4, 2, dtype=torch.int64)}, "inputs must be a floating-point tensor"),
        ({1: torch.zeros(3, 5)}, r"h must be \[4, 5\] beside inputs \[4, 3\]"),
        ({2: torch.zeros(4, 6)}, r"c must be \[4, 5\].*got \[4, 6\]"),
        ({3: torch.zeros(20, 4)}, r"w_ih must be \[20, 3\]"),
        ({4: torch.zeros(5, 20)}, r"w_hh must be \[20, 5\]"),
        ({5: torch.zeros(5)}, r"b_ih must be \[20\]"),
        ({6: torch.zeros(20).double()}, "b_hh must be of the dtype and device of the inputs"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    _, given, weights = arguments(rows=4, dtype=torch.float32)
    full = [*given, *weights]
    for place, value in change.items():
        full[place] = value
    with pytest.raises(ValueError, match=f"coordinate_lstm: {message}"):
        ops.coordinate_lstm(*full)
