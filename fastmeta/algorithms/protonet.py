"""Prototypical networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta import ops
from fastmeta.algorithms.comparison import Comparison
from fastmeta.algorithms.metric_learner import Judged, MetricLearner
from fastmeta.batch import TaskBatch
from fastmeta.ops.prototypical import prototypical_logits
from fastmeta.patching import Patched


class ProtoNet(MetricLearner):
    """ProtoNet: a query belongs to the class whose mean support feature is nearest.

    ``logits = -d(f(x), mean_c) / temperature``; ``out.params["prototypes"]`` holds the means
    ``[T, C, D]``.

    Args:
        model: The model that embeds, a transformers model or one from `fm.patch`.
        metric: A metric of `fm.ops.pairwise_distance`. ``"mahalanobis"`` learns its precision,
            which starts at the identity.
        p: Order of ``"minkowski"``.
        precision: Form of the learned precision: ``"diagonal"`` or ``"full"``.
        temperature: Positive, or ``"learned"``. Default 1.
        initial_temperature: Where a learned temperature starts, positive. Default 1.
        **settings: `pooling`, `projection`, `normalize` and `seed`, as for `MetricLearner`:
            ``pooling="mean" | "cls" | "last"``, default ``"mean"``.

    Raises:
        TypeError: `model` is no module.
        ValueError: A setting is out of range.

    Features of unit length (``normalize=True``) want a temperature of about 0.1. Differentiable
    once to the meta-parameters.

    Source: Snell et al. 2017, https://arxiv.org/abs/1703.05175
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        metric: str = "sqeuclidean",
        p: float | None = None,
        precision: str = "diagonal",
        temperature: float | str = 1.0,
        initial_temperature: float = 1.0,
        **settings: Any,
    ) -> None:
        self._comparison = {
            "metric": metric,
            "p": p,
            "precision": precision,
            "temperature": temperature,
            "initial_temperature": initial_temperature,
        }
        super().__init__(model, **settings)

    def _build(self) -> None:
        learned = self._comparison["metric"] == "mahalanobis"
        self.comparison = Comparison(
            **self._comparison,
            width=self.embedding.width if learned else None,
            device=self.device,
            dtype=self.embedding.dtype,
        )

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """``prototypes`` ``[T, C, D]`` and ``counts`` ``[T, C]`` of their rows."""
        means, counts = ops.class_means(features, labels, classes)
        return {"prototypes": means, "counts": counts.to(means.dtype)}

    def compare(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        logits = self.comparison(features, state["prototypes"])
        return logits.masked_fill(state["counts"].unsqueeze(1) == 0, float("-inf"))

    def _judge(self, batch: TaskBatch, classes: int) -> Judged:
        """As by :meth:`fit` and :meth:`compare`, with the loss in one operator."""
        support, query = self.embed(batch.support), self.embed(batch.query)
        labels = batch.support["labels"]
        temperature = self.comparison.temperature
        losses, scores, logits = prototypical_logits(
            query,
            batch.query["labels"],
            support,
            labels,
            temperature=temperature,
            num_classes=classes,
            **self.comparison.arguments(),
        )
        with torch.no_grad():
            state = self.fit(support, labels, classes)
            if bool((batch.query["labels"] < 0).any()):
                logits = self.compare(state, query)  # of rows that the operator passes over, too
            elif self.comparison.metric == "cosine":  # it leaves out what all classes share
                logits = logits - 1 / temperature
        return Judged(losses, logits.detach(), scores, state)
