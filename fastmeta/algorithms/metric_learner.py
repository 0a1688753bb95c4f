"""What the metric-based algorithms share: embed, compare, judge; T tasks in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta._names import refuse_unknown
from fastmeta.algorithms.embedding import Embedding
from fastmeta.algorithms.learner import warn_of_nothing
from fastmeta.batch import TaskBatch, check_set, ways_of
from fastmeta.engine.allocator import reuse_large_buffers
from fastmeta.engine.checks import check_labels, check_support_of_queries, warn_of_ignored_rows
from fastmeta.engine.episode import MetaOutput, with_ways, zero_loss
from fastmeta.engine.losses import WAYS, accuracy, classification
from fastmeta.meta_module import MetaModule
from fastmeta.patching import ParamLayout, Patched, TaskParams
from fastmeta.patching.inputs import check_inputs


class Judged(NamedTuple):
    """What T tasks gave: ``[T]``, ``[T, Q, C]``, ``[T]`` and tensors ``[T, ...]`` by name."""

    losses: Tensor
    logits: Tensor
    accuracy: Tensor
    state: dict[str, Tensor]


class MetricLearner(MetaModule):
    """Solves tasks by comparing query with support features; ``learner(batch)`` is a `MetaOutput`.

    ``parameters()`` are the meta-parameters: the encoder's weights that require grad, found in the
    user's own model, and what the algorithm adds. Nothing adapts by gradient steps:
    ``out.params`` is what a task's support set becomes (for example its prototypes), and
    ``predict(out.params, **inputs)`` reuses it. ``eval()`` and ``train()`` leave the mode of the
    user's model alone.

    Args:
        model: The model that embeds: a transformers model with or without a head, any module whose
            output has ``last_hidden_state`` or is ``[B, D]``, or one from `fm.patch`, whose
            initial values (of LoRA factors, say) then learn. BatchNorm in training mode
            normalises over the rows of each task's support or query set, and its running
            statistics stay as they are.
        pooling: ``"mean"`` of the token states under the attention mask, ``"cls"``: the first
            token's, ``"last"``: the last token's that is not padding.
        projection: Outputs of a new linear layer on the pooled states, a module, or None.
        normalize: Whether features are divided by their length.
        seed: Seed of newly created layers.
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        pooling: str = "mean",
        projection: int | nn.Module | None = None,
        normalize: bool = False,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self), unknown)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.embedding = Embedding(
                model, pooling=pooling, projection=projection, normalize=normalize
            )
            self._build()
        self.train(model.training)
        if self.device.type == "cpu":
            reuse_large_buffers()

    def _build(self) -> None:
        """Create what the algorithm adds to the embedding, as submodules."""

    # -- meta-parameters ---------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.embedding.model

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """What the algorithm adds to the model, by name."""
        found = {}
        for name, module in vars(self).items():
            if isinstance(module, nn.Module) and name != "embedding":
                found |= {f"{name}.{n}": p for n, p in module.named_parameters()}
        if self.embedding.projection is not None:
            own = self.embedding.projection.named_parameters()
            found |= {f"projection.{n}": p for n, p in own}
        return {n: p for n, p in found.items() if p.requires_grad}

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """The encoder's, then what the algorithm adds, by name."""
        added = {f"metric.{n}": p for n, p in self.added_parameters().items()}
        return self.embedding.meta_parameters() | added

    # -- running -----------------------------------------------------------------------------

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Classify T tasks' query rows by their support sets.

        Args:
            batch: T tasks.

        Returns:
            A `MetaOutput`; ``out.loss.backward()`` fills the meta-parameters' ``.grad``, once.
            Logits of classes that a task has no support rows of are -inf. Under
            ``torch.no_grad()`` nothing is kept, which is how to evaluate. A task whose loss is NaN
            or Inf is reported in ``out.diverged`` and leaves the others and the gradient untouched.

        Raises:
            TypeError: `batch` is no `fm.TaskBatch`, or its labels are not int64.
            ValueError: Labels out of range, a query row of a class without support, tensors on
                another device.
        """
        classes = self.check(batch)
        found = self._judge(batch, classes)
        if not found.losses.requires_grad:
            warn_of_nothing(self)
        good = torch.isfinite(found.losses.detach())
        if not bool(good.all()):
            found = Judged(*_detached(found))  # lets go of the graph before another one is built
            if torch.is_grad_enabled():
                found, good = self._without(batch, classes, found, good)
            found = found._replace(losses=found.losses.masked_fill(~good, float("nan")))
        if bool(good.any()):
            loss = found.losses[good].mean()
        else:
            loss = zero_loss(list(self.parameters()) or [found.losses])
        return MetaOutput(
            loss=loss,
            task_losses=found.losses,
            logits=found.logits,
            params=_as_params(found.state),
            diverged=~good,
            support_losses=found.losses.new_zeros(0, batch.num_tasks),
            accuracy=found.accuracy,
        )

    def _without(
        self, batch: TaskBatch, classes: int, frozen: Judged, good: Tensor
    ) -> tuple[Judged, Tensor]:
        """The good tasks again, so that no NaN is in their graph, beside the others' values."""
        while bool(good.any()):
            index = good.nonzero().flatten()
            again = self._judge(batch.select(index), classes)
            still = torch.isfinite(again.losses.detach())
            if bool(still.all()):
                state = {n: t.index_copy(0, index, again.state[n]) for n, t in frozen.state.items()}
                merged = [
                    old.index_copy(0, index, new)
                    for old, new in zip(frozen[:3], again[:3], strict=True)
                ]
                return Judged(*merged, state), good
            # Other dropout masks, another task lost: fewer tasks each time, so this ends.
            good = good.index_copy(0, index, still)
        return frozen, good

    def _judge(self, batch: TaskBatch, classes: int) -> Judged:
        labels = batch.support["labels"]
        state = self.fit(self.embed(batch.support), labels, classes)
        logits = self.compare(state, self.embed(batch.query))
        query = {"labels": batch.query["labels"]}
        return Judged(self.task_losses(logits, query), logits, accuracy(logits, query), state)

    def task_losses(self, logits: Tensor, query: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of each task's rows, ``[T]``."""
        return classification(logits, query)

    # -- for services and stored features ----------------------------------------------------

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features ``[T, N, D]`` of inputs ``[T, N, ...]``; of texts ``[N, L]``, ``[N, D]``."""
        return self.embedding(inputs)

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """What a support set becomes, from its features.

        Args:
            features: ``[T, N, D]``.
            labels: int64 ``[T, N]``, -100 ignored.
            classes: C, at least the largest label + 1.
        """
        raise NotImplementedError

    def compare(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Logits ``[T, Q, C]`` of query features ``[T, Q, D]``, from what :meth:`fit` returned."""
        raise NotImplementedError

    @torch.no_grad()
    def adapt(self, support: Mapping[str, Tensor], ways: Tensor | int | None = None) -> TaskParams:
        """What T support sets become, to be kept and used again by :meth:`predict`.

        Args:
            support: Model inputs and ``labels``, each ``[T, N, ...]``.
            ways: Number of classes of each task, int64 ``[T]`` or one for all.

        Returns:
            Tensors ``[T, ...]`` by name, detached.

        Raises:
            TypeError, ValueError: As for a call.
        """
        tasks = check_set("support", support)
        if ways is not None:
            ways = ways_of(ways, tasks, self.device)
        classes = self._check_support(dict(support), ways)
        if self.embedding.rows_meet:
            warn_of_ignored_rows(support)
        return _as_params(self.fit(self.embed(support), support["labels"], classes))

    def predict(self, params: Mapping[str, Tensor], **inputs: Tensor) -> Tensor:
        """Logits ``[T, Q, C]`` of query inputs ``[T, Q, ...]``; ``-inf`` where a class is none.

        Args:
            params: From :meth:`adapt`, or ``out.params``.
            inputs: The model's inputs.
        """
        return self.compare(params, self.embed(inputs))

    # -- checks ------------------------------------------------------------------------------

    def check(self, batch: TaskBatch) -> int:
        """Raise one clear sentence for a batch that this learner cannot take; C otherwise."""
        if not isinstance(batch, TaskBatch):
            raise TypeError(f"expected a fm.TaskBatch, got {type(batch).__name__}")
        _, query = with_ways(batch)
        classes = self._check_support(batch.support, batch.ways)
        check_inputs(query, "query", self.device, self.model)
        check_labels(query, "query", "num_labels", 2, None)
        check_support_of_queries(batch.support["labels"], query["labels"])
        if self.embedding.rows_meet:
            warn_of_ignored_rows(batch.support, query)
        return classes

    def _check_support(self, support: Mapping[str, Tensor], ways: Tensor | None) -> int:
        check_inputs(support, "support", self.device, self.model)
        extra = {} if ways is None else {WAYS: ways}
        check_labels({**support, **extra}, "support", "num_labels", 2, None)
        return int(ways.max() if ways is not None else support["labels"].max() + 1)

    def extra_repr(self) -> str:
        return f"pooling={self.embedding.pooling!r}, normalize={self.embedding.normalize}"


def _detached(found: Judged) -> tuple[Any, ...]:
    return (*(t.detach() for t in found[:3]), {n: t.detach() for n, t in found.state.items()})


def _as_params(state: Mapping[str, Tensor]) -> TaskParams:
    layout = ParamLayout(list(state), [t.shape[1:] for t in state.values()])
    return TaskParams(layout, layout.pack(list(state.values())))
