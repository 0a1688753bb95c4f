"""One step of an LSTM that all coordinates share: the recurrence of learned optimizers."""

from __future__ import annotations

from torch import Tensor

from fastmeta._autograd import autocast
from fastmeta._checks import FLOATING, describe
from fastmeta.ops._coordinate_lstm import cell

_OP = "coordinate_lstm"


def coordinate_lstm(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM cell for M coordinates that share its weights.

    ``c' = f c + i g`` and ``h' = o tanh(c')`` with ``i, f, o = sigmoid`` and ``g = tanh`` of the
    four parts of ``inputs W_ih^T + b_ih + h W_hh^T + b_hh``: torch.nn.LSTMCell, its layout and
    order of gates. The gates of a coordinate exist only while it is computed: neither pass stores
    them.

    Args:
        inputs: ``[M, F]``; float32, float64, bfloat16 or float16 (computed in float32). M is large:
            tasks times parameters.
        h, c: ``[M, H]``, state and cell state.
        w_ih, w_hh: ``[4H, F]`` and ``[4H, H]``.
        b_ih, b_hh: ``[4H]``, or None for zeros.

    Returns:
        ``h'`` and ``c'``, ``[M, H]`` in the dtype of the inputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Note:
        Differentiable in reverse mode to any order in all arguments, also under ``torch.func``;
        forward mode raises. Weight gradients are summed in an order that depends on M alone: two
        runs give equal bits, whatever the number of threads. Within autocast all are cast as by
        ``torch.nn.LSTMCell``. Andrychowicz et al. 2016, arXiv 1606.04474.
    """
    given = {"inputs": inputs, "h": h, "c": c, "w_ih": w_ih, "w_hh": w_hh}
    given |= {k: b for k, b in (("b_ih", b_ih), ("b_hh", b_hh)) if b is not None}
    _check(given)
    inputs, h, c, w_ih, w_hh, b_ih, b_hh = autocast(inputs, h, c, w_ih, w_hh, b_ih, b_hh)
    if b_ih is None or b_hh is None:
        bias = b_hh if b_ih is None else b_ih
        bias = w_hh.new_zeros(w_hh.shape[0]) if bias is None else bias
    else:
        bias = b_ih + b_hh
    return cell(inputs, h, c, w_ih, w_hh, bias)


def _check(given: dict[str, object]) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dtype not in FLOATING:
            raise ValueError(
                f"{_OP}: {name} must be a floating-point tensor, got {describe(value)}"
            )
    first = given["inputs"]
    if first.dim() != 2 or given["h"].dim() != 2:
        raise ValueError(
            f"{_OP}: inputs must be [M, F] and h [M, H], got {list(first.shape)} and "
            f"{list(given['h'].shape)}"
        )
    rows, features = first.shape
    hidden = given["h"].shape[1]
    expected = {"h": (rows, hidden), "c": (rows, hidden), "w_ih": (4 * hidden, features)}
    expected |= {"w_hh": (4 * hidden, hidden), "b_ih": (4 * hidden,), "b_hh": (4 * hidden,)}
    for name, value in given.items():
        if name != "inputs" and tuple(value.shape) != expected[name]:
            raise ValueError(
                f"{_OP}: {name} must be {list(expected[name])} beside inputs {list(first.shape)} "
                f"and h {list(given['h'].shape)}, got {list(value.shape)}"
            )
        if value.dtype != first.dtype or value.device != first.device:
            raise ValueError(
                f"{_OP}: {name} must be of the dtype and device of the inputs, "
                f"{describe(first)}, got {describe(value)}"
            )
