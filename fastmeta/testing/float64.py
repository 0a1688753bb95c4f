"""Run code that insists on float32 in float64, so that a comparison is not stopped at 1e-5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class keep_float64(TorchFunctionMode):
    """Within this context a request for float32 is a request for float64.

    Transformers' models upcast to float32 inside norms, rotary embeddings and softmax; in a
    float64 model that is a loss of half the digits. ``x.float()``, ``x.to(torch.float32)`` and
    ``dtype=torch.float32`` arguments are redirected; integer and boolean tensors too.

    Example:
        >>> with keep_float64():
        ...     torch.ones(2, dtype=torch.float64).float().dtype
        torch.float64
    """

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        elif func is not Tensor.dtype.__get__:
            args = tuple(_widen(a) for a in args)
            kwargs = {k: _widen(v) for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
