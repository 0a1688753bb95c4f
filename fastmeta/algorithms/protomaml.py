"""Proto-MAML: MAML whose head starts from each task's prototypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmeta._settings import above_0
from fastmeta.algorithms.embedding import Embedding
from fastmeta.algorithms.learner import GradientLearner, warn_of_nothing
from fastmeta.algorithms.pooled import PooledClassifier
from fastmeta.batch import TaskBatch
from fastmeta.engine.checks import check_classes, check_support_of_queries
from fastmeta.engine.episode import MetaOutput
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.prototype_head import PrototypeHead
from fastmeta.patching import Head, Patched, patch
from fastmeta.patching.head import classifying_head


class ProtoMAML(GradientLearner):
    """Proto-MAML: ``W_c = 2 mean_c``, ``b_c = -|mean_c|^2``, then K inner steps as in MAML.

    Before the first step the logits are those of a prototypical network; the meta-gradient flows
    through the prototypes. The head's own initial values are not used and do not learn. A task has
    the classes of its support set, up to as many as the head has.

    Args:
        model: A model from `fm.patch` whose specification adapts the classifying linear layer,
            alone or with parameters of the body: then the prototypes are means of what that layer
            reads. Or a transformers model, with or without a head: then pooled token states are
            read by a new head, which alone adapts, all steps in `fm.ops.head_inner_loop`.
        ways: For a model that is not patched: most classes of a task. Default 5.
        temperature: W and b are divided by it; positive, or ``"learned"``. Default 1.
        initial_temperature: Where a learned temperature starts, positive. Default 1.
        pooling, projection, normalize, seed: For a model that is not patched, as for `ProtoNet`.
        **settings: As for `fm.MAML`; the loss is classification.

    Raises:
        TypeError: `model` is no module, or as for `fm.MAML`.
        ValueError: The specification adapts no linear head with a bias, or a setting is out of
            range.

    Differentiable as `fm.MAML`.

    Source: Triantafillou et al. 2020, https://arxiv.org/abs/1903.03096
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        ways: int | None = None,
        temperature: float | str = 1.0,
        initial_temperature: float = 1.0,
        pooling: str | None = None,
        projection: int | nn.Module | None = None,
        normalize: bool | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if settings.get("loss_fn", "classification") != "classification":
            raise ValueError(
                "prototypes need class labels: loss_fn must be 'classification', "
                f"got {settings['loss_fn']!r}"
            )
        embedding = None
        if isinstance(model, Patched):
            given = {"ways": ways, "pooling": pooling, "projection": projection}
            for name, value in (given | {"normalize": normalize}).items():
                if value is not None:
                    raise ValueError(
                        f"{name} is for a model that is not patched: a patched model's own head "
                        f"reads what it reads, got {name}={value!r}"
                    )
            patched = model
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                embedding = Embedding(
                    model,
                    pooling="mean" if pooling is None else pooling,
                    projection=projection,
                    normalize=bool(normalize),
                    by_length=False,
                )
                patched = patch(PooledClassifier(embedding, 5 if ways is None else ways), Head())
        adapted = classifying_head(patched)
        if adapted is None:
            raise ValueError(
                "ProtoMAML starts a linear head with a bias from prototypes, but the "
                "specification adapts none; add fm.Head()"
            )
        super().__init__(patched, **settings)
        names = {} if embedding is None else embedding.names()
        own = patched.model.named_parameters()
        # names in the model that embeds -> in the user's own, and below "metric"
        self.embedding_names = {n: names[id(p)] for n, p in own if id(p) in names}
        learned = temperature == "learned"
        self.head = PrototypeHead(
            adapted.name,
            adapted.slots["weight"],
            adapted.slots["bias"],
            temperature=None if learned else above_0("temperature", temperature, " or 'learned'"),
            initial=above_0("initial_temperature", initial_temperature),
            like=patched.slots.initial[0].detach(),
        )

    # -- meta-parameters ---------------------------------------------------------------------

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        initial = self.patched.slots.initial
        unused = {id(initial[self.head.weight]), id(initial[self.head.bias])}
        found = super().meta_parameters().items()
        found = {self.embedding_names.get(n, n): p for n, p in found if id(p) not in unused}
        return found | {f"metric.{n}": p for n, p in self.head.named_parameters()}

    # -- running -----------------------------------------------------------------------------

    def inner_loop(self, steps: int | None = None) -> InnerLoop:
        return replace(super().inner_loop(steps), head=self.head)

    def forward(self, batch: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        batch = self._with_ways(batch)
        if next(self.parameters(), None) is not None:
            return super().forward(batch, steps=steps)
        warn_of_nothing(self)
        with torch.no_grad():
            return super().forward(batch, steps=steps)

    forward.__doc__ = GradientLearner.forward.__doc__

    def check(self, batch: TaskBatch) -> None:
        if isinstance(batch, TaskBatch) and _are_classes(batch):
            check_support_of_queries(batch.support["labels"], batch.query["labels"])
        super().check(batch)
        most = self.patched.layout.shapes[self.head.bias][0]
        check_classes(batch.support["labels"], batch.ways, most)

    def _with_ways(self, batch: TaskBatch) -> TaskBatch:
        """The batch with each task's number of classes: those of its support set."""
        if not isinstance(batch, TaskBatch) or batch.ways is not None:
            return batch
        if not _are_classes(batch):
            return batch  # for `check` to say what is wrong
        ways = (batch.support["labels"].amax(1) + 1).clamp_min(1)
        return TaskBatch(batch.support, batch.query, ways)


def _are_classes(batch: TaskBatch) -> bool:
    """Whether both sets have labels int64 ``[T, N]``."""
    sets = (batch.support.get("labels"), batch.query.get("labels"))
    return all(t is not None and t.dim() == 2 and t.dtype == torch.int64 for t in sets)
