"""A hypernetwork: reads a task's support set and returns its fast weights, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._settings import above_0, integer
from fastmeta.algorithms.embedding import Embedding
from fastmeta.algorithms.generator import (
    ClassHead,
    Generator,
    SetEncoder,
    check_generated,
    class_means,
    row_labels,
)
from fastmeta.algorithms.learner import GradientLearner
from fastmeta.batch import TaskBatch
from fastmeta.engine.checks import check_classes, check_steps
from fastmeta.engine.conditions import computing
from fastmeta.engine.episode import MetaOutput, run_episode, zero_loss
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.losses import classification
from fastmeta.engine.memory import MemoryPlan
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.head import classifying_head
from fastmeta.patching.inputs import check_inputs

READS = ("support", "description", "both")


class HyperNetwork(GradientLearner):
    """A hypernetwork: ``phi = theta + G(support set)``, then if wanted K inner steps from there.

    The support set is encoded by a transformer (pooled token states, labels by way of class
    means; the order of examples does not matter), and a network generates every adapted tensor:
    LoRA factors of each layer and module, biases, a soft prefix. An adapted classifying linear
    layer has each class's weights made from that class's examples. Nothing is generated at first:
    the untrained hypernetwork is the model with a nearest-class-mean head. What the outer loop
    learns are the generator, the initial values theta and shared weights that require grad; the
    meta-gradient flows into the generated ``[T, ...]`` weights, never into copies per token.

    Args:
        patched: The model, from `fm.patch`, with any specification.
        encoder: What encodes examples: None for the patched model's own body at its present
            weights, or a module as `fm.ProtoNet` takes it. It gets the model's inputs.
        train_encoder: Whether gradients flow through the encoder into those of its weights that
            require grad. Default False.
        reads: ``"support"``, ``"description"`` (a text that describes the task) or ``"both"``.
            Without the support set the classifying layer is generated as everything else is.
            Examples whose labels are no classes ``[T, N]`` (of ``"causal_lm"``) are all of one.
        steps: Inner steps K from the generated weights; 0 for none. Default 0.
        latent, hidden, embedding, rank: Sizes of the task's vector, of the networks, of layer and
            module embeddings, and the rank of what is generated for large matrices; each at least
            1. Default 64, 128, 32 and 4.
        gain: Where the factor of class means in the classifying layer starts. Default 1.
        scale: Factor of what is generated, above 0: with Adam it sets how fast that moves beside
            everything else. Default 0.01, the order of trained LoRA factors.
        pooling: Of token states, ``"mean"``, ``"cls"`` or ``"last"``.
        generator: None, or a module of yours from ``[T, latent]`` to a mapping name -> ``[T,
            *shape]`` of what is to be added; tensors left out keep their initial values.
        seed: Seed of new weights.
        **settings: As for `fm.MAML` (`lr`, `order`, `optimizer`, ...), for the K steps.

    Raises:
        TypeError: `patched` is no patched model, or as for `fm.MAML`.
        ValueError: A setting is out of range.

    Differentiable as `fm.MAML`: with K > 0 and ``order=2`` exactly through the steps. A task whose
    generated weights are not finite counts as diverged; the others are untouched.

    Sources: Ha et al. 2017, https://arxiv.org/abs/1609.09106; Charakorn et al. 2025 (Text-to-LoRA),
    https://arxiv.org/abs/2506.06105; Bansal et al. 2020 (LEOPARD), https://arxiv.org/abs/1911.03863
    """

    def __init__(
        self,
        patched: Patched,
        *,
        encoder: nn.Module | None = None,
        train_encoder: bool = False,
        reads: str = "support",
        steps: int = 0,
        latent: int = 64,
        hidden: int = 128,
        embedding: int = 32,
        rank: int = 4,
        gain: float = 1.0,
        scale: float = 0.01,
        pooling: str = "mean",
        generator: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {reads!r}")
        sizes = {"latent": latent, "hidden": hidden, "embedding": embedding, "rank": rank}
        for name, value in sizes.items():
            integer(name, value)
        scale = above_0("scale", scale)
        super().__init__(patched, steps=max(check_steps(steps, 0), 1), **settings)
        self.steps = steps
        self.reads = reads
        self.train_encoder = train_encoder
        own = patched.model if encoder is None else encoder
        self.encoder = embed = Embedding(own, pooling=pooling, by_length=False)
        self.separate = encoder is not None
        self.head = None
        if reads != "description" and self.loss_fn is classification:
            self.head = classifying_head(patched)
        skip = [] if self.head is None else [self.head.slots["weight"], self.head.slots["bias"]]
        width = embed.width if encoder is None else _width(embed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = nn.ModuleDict(
                {
                    "set": SetEncoder(
                        width, latent, hidden,
                        rows=reads != "description", description=reads != "support",
                    )
                }
            )  # fmt: skip
            if generator is None and len(skip) < len(patched.layout):
                net["generator"] = Generator(
                    patched.layout,
                    skip,
                    latent=latent,
                    hidden=hidden,
                    embedding=embedding,
                    rank=rank,
                    scale=scale,
                )
            elif isinstance(generator, nn.Module):
                net["generator"] = generator
            if self.head is not None:
                shape = patched.layout.shapes[self.head.slots["weight"]]
                net["head"] = ClassHead(width, latent, hidden, shape[1], gain=gain, scale=scale)
        self.net = net.to(patched.device, patched.dtype)
        self.generator = net["generator"] if generator is None and "generator" in net else generator
        self.train(patched.training)  # the encoder too, whatever the mode of the user's model

    # -- meta-parameters ---------------------------------------------------------------------

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        initial = self.patched.slots.initial
        seen = set()
        if self.head is not None:
            seen = {id(initial[self.head.slots[n]]) for n in ("weight", "bias")}  # not used
        found = {}
        for name, parameter in super().meta_parameters().items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = parameter
        return found

    def _own(self) -> dict[str, nn.Parameter]:
        found = super()._own() | {f"hypernet.{n}": p for n, p in self.net.named_parameters()}
        if self.separate and self.train_encoder:
            shared = {id(p) for p in self.patched.parameters()}
            found |= {
                f"hypernet.encoder.{n}": p
                for n, p in self.encoder.model.named_parameters()
                if p.requires_grad and id(p) not in shared
            }
        return found

    def shared_tensors(self) -> list[Tensor]:
        own = self.encoder.model
        more = [*own.parameters(), *own.buffers()] if self.separate else []
        return [*super().shared_tensors(), *more]

    # -- running -----------------------------------------------------------------------------

    def inner_loop(self, steps: int | None = None) -> InnerLoop:
        count = self.steps if steps is None else check_steps(steps, 0)
        loop = super().inner_loop(max(count, 1))
        return replace(loop, steps=count, second_order=min(loop.second_order, count))

    def forward(
        self,
        batch: TaskBatch,
        *,
        steps: int | None = None,
        description: Mapping[str, Tensor] | None = None,
    ) -> MetaOutput:
        """Generate the fast weights of T tasks, refine them by K steps, judge them.

        Args:
            batch: T tasks.
            steps: Inner steps, 0 or more, when other than the learner's.
            description: Tokens of a text that describes each task, ``[T, L]``, where it is read.

        Returns:
            A `MetaOutput`, as `fm.MAML` gives it.

        Raises:
            TypeError: `batch` is no `fm.TaskBatch`, or its labels are not int64.
            ValueError: A class without examples, support texts longer than the encoder takes, a
                description missing or not asked for, or what `fm.MAML` refuses.
        """
        batch = self._with_ways(batch)
        self.check(batch)
        self._check_texts(batch.support, description)
        self._warn_of_frozen()
        loop = replace(self.inner_loop(steps), own_rows=True)
        with computing(self.device, self.compute_dtype):
            return self.plans.run(
                loop, batch, lambda plan: self._judge(loop, batch, description, plan)
            )

    def _judge(
        self,
        loop: InnerLoop,
        batch: TaskBatch,
        description: Mapping[str, Tensor] | None,
        plan: MemoryPlan,
    ) -> MetaOutput:
        # Fast weights are made in their own dtype; an autocast of the caller's is left alone.
        lowered = self.compute_dtype is not None
        with torch.autocast(self.device.type, enabled=False) if lowered else nullcontext():
            params = self._params(batch.support, batch.ways, description)
        finite = params.packed.detach().isfinite().all(1)
        if bool(finite.all()):
            return run_episode(loop, params, batch, plan)
        with torch.no_grad():
            whole = run_episode(loop, params.detach(), batch, plan)
        whole.diverged = whole.diverged | ~finite
        whole.task_losses = whole.task_losses.masked_fill(~finite, float("nan"))
        index = finite.nonzero().flatten()
        if not len(index):
            whole.loss = zero_loss(list(self.parameters()))
            return whole
        # Once more without them: zero times what is not finite would reach shared weights.
        some = None if description is None else {k: v[index] for k, v in description.items()}
        part = self._judge(loop, batch.select(index), some, plan)
        whole.loss = part.loss
        for name in ("task_losses", "logits", "diverged", "accuracy"):
            old, new = getattr(whole, name), getattr(part, name)
            if old is not None:
                setattr(whole, name, old.index_copy(0, index, new))
        whole.support_losses = whole.support_losses.index_copy(1, index, part.support_losses)
        filled = params.packed.detach().index_copy(0, index, part.params.packed)
        whole.params = TaskParams(self.patched.layout, filled)
        return whole

    # -- generating --------------------------------------------------------------------------

    def generate(
        self,
        support: Mapping[str, Tensor] | None = None,
        *,
        ways: Tensor | Sequence[int] | int | None = None,
        description: Mapping[str, Tensor] | None = None,
    ) -> TaskParams:
        """Fast weights of T tasks in one forward pass, differentiable.

        Args:
            support: Model inputs and ``labels``, each ``[T, N, ...]``, where they are read.
            ways: Number of classes of each task, int64 ``[T]`` or one for all.
            description: Tokens ``[T, L]`` of a text that describes each task, where it is read.
        """
        if support is not None and self.reads != "description":
            batch = self._with_ways(TaskBatch(support, support, ways))
            self.check(batch)
            support, ways = batch.support, batch.ways
        self._check_texts(support, description)
        return self._params(support, ways, description)

    def _params(
        self,
        support: Mapping[str, Tensor] | None,
        ways: Tensor | None,
        description: Mapping[str, Tensor] | None,
    ) -> TaskParams:
        features = labels = means = present = text = None
        if self.reads != "description":
            features, labels = self._features(support), row_labels(support["labels"])
            classes = int(labels.max()) + 1
            if self.head is not None:
                classes = self.patched.layout.shapes[self.head.slots["bias"]][0]
            means, present = class_means(features, labels, classes)
        if self.reads != "support":
            text = self._features({k: v.unsqueeze(1) for k, v in description.items()}).squeeze(1)
        z = self.net["set"](features, labels, means, text)
        found = {} if self.generator is None else self.generator(z)
        layout, tasks = self.patched.layout, z.shape[0]
        check_generated(found, layout, tasks)
        start = self.patched.initial(tasks)
        views = [
            view + found[name].to(view.dtype) if name in found else view
            for name, view in start.items()
        ]
        if self.head is not None:
            weight, bias = self.net["head"](means, present, z)
            views[self.head.slots["weight"]] = weight.to(self.patched.dtype)
            views[self.head.slots["bias"]] = bias.to(self.patched.dtype)
        return TaskParams(layout, layout.pack(views))

    def _features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``[T, N, D]`` in the dtype of the fast weights."""
        with nullcontext() if self.train_encoder else torch.no_grad():
            return self.encoder(inputs).to(self.patched.dtype)

    # -- checks ------------------------------------------------------------------------------

    def check(self, batch: TaskBatch) -> None:
        super().check(batch)
        if self.head is not None:
            most = self.patched.layout.shapes[self.head.slots["bias"]][0]
            check_classes(batch.support["labels"], batch.ways, most)

    def _with_ways(self, batch: TaskBatch) -> TaskBatch:
        """The batch with each task's number of classes, those of both its sets."""
        known = self.head is None or not isinstance(batch, TaskBatch) or batch.ways is not None
        if known or any("labels" not in s for s in (batch.support, batch.query)):
            return batch
        most = [s["labels"].flatten(1).amax(1) for s in (batch.support, batch.query)]
        ways = (torch.maximum(*most) + 1).clamp_min(1)
        return TaskBatch(batch.support, batch.query, ways.to(torch.int64))

    def _check_texts(
        self, support: Mapping[str, Tensor] | None, description: Mapping[str, Tensor] | None
    ) -> None:
        asked = self.reads != "support"
        if asked != (description is not None):
            given = "a description" if description is not None else "none"
            raise ValueError(
                f"the hypernetwork reads {self.reads!r}: expected "
                f"{'a description' if asked else 'no description'}, got {given}"
            )
        if self.reads != "description" and support is None:
            raise ValueError(f"the hypernetwork reads {self.reads!r}: expected support, got none")
        texts = {"support": support if self.reads != "description" else None}
        for which, inputs in (texts | {"description": description}).items():
            if inputs is not None:
                check_inputs(inputs, which, self.device, self.encoder.source)

    # -- for services ------------------------------------------------------------------------

    @torch.no_grad()
    def adapt(
        self,
        support: Mapping[str, Tensor] | None = None,
        ways: Tensor | Sequence[int] | int | None = None,
        *,
        description: Mapping[str, Tensor] | None = None,
        steps: int | None = None,
    ) -> TaskParams:
        """Fast weights of T tasks, generated and refined, to be used again by :meth:`predict`.

        Args:
            support: Model inputs and ``labels``, each ``[T, N, ...]``; where a description alone is
                read and no step is taken, none is needed.
            ways: Number of classes of each task, int64 ``[T]`` or one for all.
            description: Tokens ``[T, L]`` of a text that describes each task, where it is read.
            steps: Inner steps, 0 or more, when other than the learner's.

        Returns:
            Detached fast weights.

        Raises:
            TypeError, ValueError: As for a call; no support set, and steps to take on it.
        """
        loop = self.inner_loop(steps)
        if support is None and loop.steps:
            raise ValueError(f"expected a support set to take {loop.steps} steps on, got none")
        params = self.generate(support, ways=ways, description=description)
        if loop.steps == 0:
            return params
        batch = self._with_ways(TaskBatch(support, support, ways))
        self.check(batch)
        return self._adapted(params, batch, loop)


def _width(embed: Embedding) -> int:
    """Length of a feature: what the encoder says, or its configuration."""
    own = getattr(embed.model, "width", None)
    return own if isinstance(own, int) else embed.width
