"""Matching networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta._settings import integer
from fastmeta.algorithms.comparison import Comparison
from fastmeta.algorithms.full_context import FullContext
from fastmeta.algorithms.metric_learner import MetricLearner
from fastmeta.patching import Patched


class MatchingNet(MetricLearner):
    """Matching networks: a query's class probabilities are its attention over the support set.

    ``p(c | x) = sum_i a_i [y_i = c]`` with ``a = softmax_i(-d(f(x), g(x_i)) / temperature)``, and
    ``logits = log p``. ``out.params`` holds the support features ``[T, N, D]`` and which class
    each row is of, ``[T, N, C]``.

    Args:
        model: The model that embeds, a transformers model or one from `fm.patch`.
        full_context: Whether features depend on the whole support set: g by a bidirectional LSTM
            over it, f by an LSTM that attends to it. The order of the rows then matters.
        fce_steps: Steps of the query's attending LSTM, at least 1.
        metric: A metric of `fm.ops.pairwise_distance`; default ``"cosine"``, the paper's.
            ``"mahalanobis"`` learns its precision.
        p, precision, temperature, initial_temperature: As for `ProtoNet`. The paper's temperature
            is 1; cosines of an encoder's features want one of about 0.1.
        **settings: `pooling`, `projection`, `normalize` and `seed`, as for `ProtoNet`.

    Raises:
        TypeError: `model` is no module.
        ValueError: A setting is out of range.

    Differentiable to the meta-parameters.

    Source: Vinyals et al. 2016, https://arxiv.org/abs/1606.04080
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        full_context: bool = False,
        fce_steps: int = 5,
        metric: str = "cosine",
        p: float | None = None,
        precision: str = "diagonal",
        temperature: float | str = 1.0,
        initial_temperature: float = 1.0,
        **settings: Any,
    ) -> None:
        integer("fce_steps", fce_steps)
        self._full_context = fce_steps if full_context else 0
        self._comparison = {
            "metric": metric,
            "p": p,
            "precision": precision,
            "temperature": temperature,
            "initial_temperature": initial_temperature,
        }
        super().__init__(model, **settings)

    def _build(self) -> None:
        like = {"device": self.device, "dtype": self.embedding.dtype}
        learned = self._comparison["metric"] == "mahalanobis"
        width = self.embedding.width if learned or self._full_context else None
        self.comparison = Comparison(**self._comparison, width=width, **like)
        self.context = None
        if self._full_context:
            # drawn on the CPU, whose generator has the seed
            context = FullContext(width, self._full_context, dtype=self.embedding.dtype)
            self.context = context.to(self.device)

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """``support`` ``[T, N, D]`` and ``classes`` ``[T, N, C]``: 1 for a row's class, else 0."""
        of = F.one_hot(labels.clamp_min(0), classes) * (labels >= 0).unsqueeze(-1)
        if self.context is not None:
            features = self.context.support(features, labels >= 0)
        return {"support": features, "classes": of.to(features.dtype)}

    def compare(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        support, of = state["support"], state["classes"] != 0
        if self.context is not None:
            features = self.context.query(features, support, of.any(2))
        scores = self.comparison(features, support)  # [T, Q, N]
        scores = scores.masked_fill(~of.any(2).unsqueeze(1), float("-inf"))
        log_attention = F.log_softmax(scores, dim=-1)
        # log of the sum over a class's rows; -inf where it has none
        by_class = log_attention.unsqueeze(3).masked_fill(~of.unsqueeze(1), float("-inf"))
        return torch.logsumexp(by_class, dim=2)
