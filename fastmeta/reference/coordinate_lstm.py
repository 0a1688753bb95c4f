"""An LSTM cell that all coordinates share, in differentiable plain torch.

Shapes: ``x [M, F]``, states ``h`` and ``c [M, H]``, ``w_ih [4H, F]``, ``w_hh [4H, H]``, ``bias
[4H]`` in torch.nn.LSTMCell's order of gates (input, forget, cell, output). Narrow dtypes compute
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype


def coordinate_lstm(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``c' = f c + i g`` and ``h' = o tanh(c')``, ``[M, H]`` in the dtype of x.

    ``i, f, o = sigmoid`` and ``g = tanh`` of the four parts of ``x W_ih^T + h W_hh^T + b``.
    """
    given = x.dtype
    dtype = wide_dtype(given)
    x, h, c, w_ih, w_hh, bias = (t.to(dtype) for t in (x, h, c, w_ih, w_hh, bias))
    i, f, g, o = (x @ w_ih.mT + h @ w_hh.mT + bias).chunk(4, dim=1)
    cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    state = torch.sigmoid(o) * torch.tanh(cell)
    return state.to(given).contiguous(), cell.to(given).contiguous()
