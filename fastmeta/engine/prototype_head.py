"""A linear head that starts, in every task, from the prototypes of what it reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmeta import ops


class PrototypeHead(nn.Module):
    """``W_c = 2 mean_c / temperature``, ``b_c = -|mean_c|^2 / temperature``.

    Its logits are those of a prototypical network with squared distances, less ``|x|^2`` that all
    classes share. Classes without support rows get zeros.

    Args:
        name: The head's module in the model.
        weight, bias: Its slots in the packed fast weights.
        temperature: Positive, or None for a learned one.
        initial: Where a learned temperature starts, positive.
        like: Gives a learned temperature its device and dtype.
    """

    def __init__(
        self,
        name: str,
        weight: int,
        bias: int,
        *,
        temperature: float | None,
        initial: float,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.bias = name, weight, bias
        self.constant = temperature
        if temperature is None:
            start = torch.full((), math.log(initial), device=like.device, dtype=like.dtype)
            self.log_temperature = nn.Parameter(start)

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if self.constant is None else self.constant

    def values(self, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Weight ``[T, C, D]`` and bias ``[T, C]`` from features ``[T, N, D]``."""
        means, _ = ops.class_means(features, labels, classes)
        means = means.to(features.dtype)
        return 2 * means / self.temperature, -means.square().sum(-1) / self.temperature

    def put(self, views: list[Tensor], features: Tensor, labels: Tensor) -> list[Tensor]:
        """Fast weights by slot ``[T, *shape]`` with the prototypes in the head's place."""
        views = list(views)
        classes = views[self.bias].shape[1]
        weight, bias = self.values(features, labels, classes)
        views[self.weight] = weight.to(views[self.weight].dtype)
        views[self.bias] = bias.to(views[self.bias].dtype)
        return views
