"""Weights that are the user's model's own are not moved or converted through what shares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def check_unmoved(
    tensors: Iterable[Tensor], fn: Callable[[Tensor], Tensor], what: str, instead: str
) -> None:
    """Raise RuntimeError unless all tensors are on the device and of the dtype asked for.

    Args:
        tensors: Shared weights.
        fn: What `nn.Module._apply` would replace them by.
        what: What shares them, for the message.
        instead: What to move, and when.
    """
    with torch.no_grad():
        if any(fn(tensor) is not tensor for tensor in tensors):
            raise RuntimeError(
                f"{what} shares its weights with the user's model: move or convert {instead}"
            )
