"""Relation networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import ops
from fastmeta._settings import integer
from fastmeta.algorithms.metric_learner import MetricLearner
from fastmeta.batch import IGNORE_INDEX
from fastmeta.patching import Patched

PARTS = ("query", "mean", "difference", "product")
LOSSES = ("cross_entropy", "mse")


class RelationNet(MetricLearner):
    """Relation networks: the comparison of a query with a class is itself learned.

    ``logits = r(parts of f(x) and mean_c)`` with r a network of one hidden layer; the parts are
    ``f(x)``, ``mean_c``, ``|f(x) - mean_c|`` and ``f(x) * mean_c``. Features of unit length
    (``normalize=True``) are read times ``sqrt(D)``.

    Args:
        model: The model that embeds, a transformers model or one from `fm.patch`.
        hidden: Width of the hidden layer, at least 1. Default 128.
        parts: What r reads, any of ``"query"``, ``"mean"``, ``"difference"``, ``"product"``; the
            paper concatenates the first two. Default: all four.
        loss: ``"cross_entropy"`` of the logits, or ``"mse"``, the paper's: ``sigmoid(logits)``
            against 1 for the query's class and 0 for the task's others, mean of the squares.
            Default ``"cross_entropy"``.
        **settings: `pooling`, `projection`, `normalize` and `seed`, as for `ProtoNet`.

    Raises:
        TypeError: `model` is no module.
        ValueError: A setting is out of range, or the model does not tell its hidden size.

    Differentiable once to the meta-parameters.

    Source: Sung et al. 2018, https://arxiv.org/abs/1711.06025
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        hidden: int = 128,
        parts: Sequence[str] = PARTS,
        loss: str = "cross_entropy",
        **settings: Any,
    ) -> None:
        integer("hidden", hidden)
        parts = (parts,) if isinstance(parts, str) else tuple(parts)
        if not parts or not set(parts) <= set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {parts!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self.hidden, self.parts, self.loss = hidden, parts, loss
        super().__init__(model, **settings)

    def _build(self) -> None:
        like = {"dtype": self.embedding.dtype}  # drawn on the CPU, whose generator has the seed
        self.relation = nn.Sequential(
            nn.Linear(len(self.parts) * self.embedding.width, self.hidden, **like),
            nn.ReLU(),
            nn.Linear(self.hidden, 1, **like),
        ).to(self.device)

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """``prototypes`` ``[T, C, D]`` and ``counts`` ``[T, C]`` of their rows."""
        means, counts = ops.class_means(features, labels, classes)
        return {"prototypes": means, "counts": counts.to(means.dtype)}

    def compare(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        # entries of order one, also where features have unit length
        scale = features.shape[-1] ** 0.5 if self.embedding.normalize else 1.0
        x, mean = scale * features.unsqueeze(2), scale * state["prototypes"].unsqueeze(1)
        shape = torch.broadcast_shapes(x.shape, mean.shape)
        of = {
            "query": lambda: x.expand(shape),
            "mean": lambda: mean.expand(shape),
            "difference": lambda: (x - mean).abs(),
            "product": lambda: x * mean,
        }
        pairs = torch.cat([of[part]() for part in self.parts], dim=-1)
        logits = self.relation(pairs).squeeze(-1)
        return logits.masked_fill(state["counts"].unsqueeze(1) == 0, float("-inf"))

    def task_losses(self, logits: Tensor, query: Mapping[str, Tensor]) -> Tensor:
        if self.loss == "cross_entropy":
            return super().task_losses(logits, query)
        labels = query["labels"]
        valid = labels != IGNORE_INDEX
        target = F.one_hot(labels.clamp_min(0), logits.shape[-1]).to(logits.dtype)
        own = logits.detach() > float("-inf")  # the task's classes
        squares = (logits.sigmoid() - target).square()
        rows = torch.where(own, squares, 0).sum(2) / own.sum(2).clamp_min(1)
        return torch.where(valid, rows, 0).sum(1) / valid.sum(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={self.parts}, loss={self.loss!r}"
