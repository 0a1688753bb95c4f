"""What the gradient-based algorithms share: the inner loop's settings and the meta-parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmeta._names import refuse_unknown
from fastmeta.batch import TaskBatch
from fastmeta.engine.adaptation import adapted
from fastmeta.engine.allocator import reuse_large_buffers
from fastmeta.engine.capture import capture_of
from fastmeta.engine.checks import (
    check_clip_norm,
    check_order,
    check_sets,
    check_steps,
    check_truncate,
    compute_dtype_of,
)
from fastmeta.engine.conditions import computing
from fastmeta.engine.episode import MetaOutput, run_episode, with_ways
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.losses import LossFn, mask_ways, resolve_loss
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.memory_plans import MemoryPlans
from fastmeta.engine.optimizers import resolve_rule
from fastmeta.engine.rates import LearnedRate, Rates
from fastmeta.engine.replays import CUDA_GRAPH, replays_of
from fastmeta.engine.update_rule import UpdateRule
from fastmeta.meta_module import MetaModule
from fastmeta.patching import Patched, TaskParams


class GradientLearner(MetaModule):
    """Adapts tasks by gradient steps; ``learner(batch)`` gives a differentiable `MetaOutput`.

    ``parameters()`` are the meta-parameters: initial values, shared weights that require grad,
    what learned rates, a learned optimizer and a loss module hold. ``out.loss.backward()`` fills
    their ``.grad``, for the user's own weights on the user's model. ``eval()`` and ``train()`` set
    the mode of the patched model and of a loss module; the user's model keeps its own.

    Args:
        patched: The model, from `fm.patch`.
        lr: Inner learning rate, positive, or a `fm.LearnedRate`. Default 1e-2.
        steps: Inner steps K, at least 1. Default 5.
        order: 2 differentiates through the inner gradients, 1 treats them as constants. Default 2.
        optimizer: ``"sgd" | "momentum" | "adam" | "adamw" |
            "rmsprop" | "adagrad"`` or a rule object; a `fm.LearnedOptimizer` learns as well.
            Default ``"sgd"``.
        memory: ``"unroll"`` keeps the graph of all K steps; ``"recompute"`` keeps the fast weights
            of all steps and one step's graph, of half the tasks at a time (of all under dropout);
            ``"auto"`` measures a few small episodes for every new input shape and
            chooses by the free memory (or `memory_budget`): ``"unroll"``; on a CPU chunks of it
            where they are large, which compute nothing twice; ``"recompute"`` with the graphs of
            as many of the last steps kept as fit; or fewer tasks at a time. A pass that runs out
            of memory is done again with less. All give the same numbers. Default ``"auto"``.
        task_chunk: Tasks differentiated at once: None (all), an integer of at least 1, or
            ``"auto"``. Chunks give the same numbers; under dropout each draws its own masks. They
            take their gradients in the forward pass: evaluate under ``torch.no_grad()``. Default
            None.
        loss_fn: ``"classification"``, ``"token_classification"``, ``"causal_lm"``,
            ``"masked_lm"``, ``"seq2seq_lm"``, ``"regression"`` or a callable
            ``(outputs, batch) -> [T]`` that treats tasks separately; `batch` is the support or
            query mapping. One that learns is an `nn.Module`; its parameters are meta-parameters.
            Default ``"classification"``.
            Losses of words form no logits where the layer that makes them is frozen.
        clip_norm: Bound on each task's inner gradient norm, positive, or None.
        truncate: Differentiate through the last this many inner gradients only, 0 to K; None for
            all.
        memory_budget: Bytes that a meta-step may take beyond what is allocated before it: an
            integer, or a text such as ``"8GiB"``; needs ``memory="auto"`` or
            ``task_chunk="auto"``. Fast weights then stay packed, which a prediction can trust.
            None: most of what is free on the device.
        compute_dtype: ``torch.bfloat16`` or ``torch.float16``, or its name: matrix products of the
            model in it, with fast weights, their updates, sums within a product and the
            meta-gradient in float32, as under ``torch.autocast``; needs float32 weights. On a CPU
            in bfloat16, layers with weights of each task round the factors of their products alone,
            and what lies between products stays float32. The meta-gradient then differs from the
            exact one by about 1 % of its norm. None: the weights' dtype.
        compile: Capture an inner step and its derivative as graphs, used for every step and every
            batch of the same shapes; where padding is left out, the number of tokens counts as one,
            rounded up by at most a 64th of all positions (a 16th on a GPU). On a CPU three captured
            numbers of tokens tell the graphs of all others; where other shapes seldom repeat, most
            run eagerly, which differs by rounding. True takes what is best on the device:
            ``"trace"`` (the operators alone, replayed in C++ without autograd and Python; seconds
            to capture) on a CPU, ``"inductor"`` (compiled; a minute) on a GPU. Loops of plain SGD
            whose weights are kept by leaf have three graphs on a CPU: of the first step, of the
            others, and of the query losses. The same numbers to rounding; the loss is then
            differentiable once. Numbers that a model or loss reads from Python are fixed when they
            are captured. What cannot be captured runs eagerly, with one warning.
            ``"cudagraph"``, on a GPU: the whole meta-step with its gradient as one CUDA graph for
            each signature, which keeps the memory of a meta-step; for tasks so small that a GPU
            waits for launches. It serves all tasks at once, the library's losses and rules, and no
            dropout; anything else runs eagerly.
        compile_cache: Folder of what Inductor compiles; None for Inductor's own, from which other
            processes of the user read too.

    Raises:
        TypeError: `patched` is no patched model, or a setting is of the wrong type.
        ValueError: A setting is out of range.

    The loss is differentiable once to the meta-parameters; with ``memory="unroll"`` and no chunks,
    to any order.
    """

    def __init__(
        self,
        patched: Patched,
        *,
        lr: float | LearnedRate = 1e-2,
        steps: int = 5,
        order: int = 2,
        optimizer: str | UpdateRule = "sgd",
        memory: str = "auto",
        task_chunk: int | str | None = None,
        loss_fn: str | LossFn = "classification",
        clip_norm: float | None = None,
        truncate: int | None = None,
        memory_budget: int | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        compile: bool | str = False,
        compile_cache: str | Path | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self), unknown)
        if not isinstance(patched, Patched):
            raise TypeError(
                f"expected a patched model (fm.patch(model, spec)), got {type(patched).__name__}"
            )
        self.steps = check_steps(steps)
        self.order = order
        self.plans = MemoryPlans(memory, task_chunk, memory_budget)
        self.clip_norm = clip_norm
        self.truncate = truncate
        self.patched = patched
        self.rates = Rates(lr, patched.layout, steps, patched.slots.initial[0])
        self.rule = resolve_rule(optimizer).bound(patched.layout)
        self.loss_fn = loss_fn
        self.compute_dtype = compute_dtype
        self.capture = capture_of(patched, compile, compile_cache, others=(CUDA_GRAPH,))
        self.replays = replays_of(patched, compile)
        self.train(patched.training)
        if patched.device.type == "cpu":
            reuse_large_buffers()

    def __setattr__(self, name: str, value: Any) -> None:
        """`steps`, `order`, `clip_norm`, `truncate` and `loss_fn` may change; what else a learner
        is built with may not."""
        if name in _FIXED:
            raise AttributeError(
                f"{name} is chosen when a {type(self).__name__} is built: build another one of the "
                "same patched model (learned rates are in `rates`)"
            )
        if name in _CHECKS:
            value = _CHECKS[name](self, value)
        super().__setattr__(name, value)

    # -- meta-parameters ---------------------------------------------------------------------

    averaged = False
    """Whether someone averages gradients of frozen weights, or was told that nobody does."""

    @property
    def device(self) -> torch.device:
        return self.patched.device

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.patched.model

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        shared, own = self.patched.meta_parameters(), self._own()
        if both := sorted(shared.keys() & own.keys()):
            raise ValueError(f"the model has parameters of names that learners use: {both[:4]}")
        return shared | own

    def _own(self) -> dict[str, nn.Parameter]:
        """Meta-parameters that are not the model's, by name."""
        found = {f"inner_lr.{n}": p for n, p in self.rates.named_parameters()}
        if isinstance(self.loss_fn, nn.Module):
            found |= {f"loss_fn.{n}": p for n, p in self.loss_fn.named_parameters()}
        return found | {f"optimizer.{n}": p for n, p in self.rule.named_parameters()}

    # -- running -----------------------------------------------------------------------------

    def inner_loop(self, steps: int | None = None) -> InnerLoop:
        """This learner's inner loop, optionally with another number of steps."""
        steps = self.steps if steps is None else check_steps(steps)
        exact = steps if self.order == 2 else 0
        return InnerLoop(
            patched=self.patched,
            # what is kept by leaf depends on the number of steps, so no few steps predict its peak
            by_leaf=self.plans.budget is None,
            rule=self.rule,
            rates=self.rates,
            steps=steps,
            loss_fn=self.loss_fn,
            second_order=exact if self.truncate is None else min(exact, self.truncate),
            clip_norm=self.clip_norm,
            capture=self.capture,
            widths=next((g.widths for g in (self.capture, self.replays) if g is not None), 0),
            replays=self.replays,
        )

    def forward(self, batch: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt T tasks on their support sets and judge them on their query sets.

        Args:
            batch: T tasks.
            steps: Inner steps, when other than the learner's.

        Returns:
            A `MetaOutput`; ``out.loss.backward()`` fills the meta-parameters' ``.grad``. Under
            ``torch.no_grad()`` nothing is kept, which is how to evaluate.

        Raises:
            TypeError: `batch` is no `fm.TaskBatch`, or its labels are not int64.
            ValueError: Labels out of range, an empty support set, tensors on another device, or
                a loss that is not one differentiable number per task.
            RuntimeError: Called under ``torch.inference_mode()``.

        Several threads may call one learner at once; under dropout they share torch's random
        state.
        """
        self.check(batch)
        self._warn_of_frozen()
        loop = self.inner_loop(steps)
        with computing(self.device, self.compute_dtype):
            return self.plans.run(loop, batch, lambda plan: self._run(loop, batch, plan))

    def _run(self, loop: InnerLoop, batch: TaskBatch, plan: MemoryPlan) -> MetaOutput:
        return run_episode(loop, self.patched.initial(batch.num_tasks), batch, plan)

    def _with_ways(self, batch: TaskBatch) -> TaskBatch:
        """The batch with each task's number of classes, where the algorithm has to know it."""
        return batch

    # -- for services ------------------------------------------------------------------------

    def adapt(
        self,
        support: Mapping[str, Tensor],
        ways: Tensor | Sequence[int] | int | None = None,
        *,
        steps: int | None = None,
    ) -> TaskParams:
        """Fast weights of T tasks by this learner's rule and rates, without a graph.

        Args:
            support: Model inputs and ``labels``, each ``[T, N, ...]``.
            ways: Number of classes of each task, int64 ``[T]`` or one for all, when fewer than the
                head has.
            steps: Inner steps, when other than the learner's.

        Returns:
            Detached fast weights for :meth:`predict`. A task whose loss or gradient becomes NaN or
            Inf keeps those from before that step; under ``torch.no_grad()`` a call of the learner
            says which did.

        Raises:
            TypeError, ValueError: As for a call.
        """
        batch = self._with_ways(TaskBatch(support, support, ways))
        self.check(batch)
        start = self.patched.initial(batch.num_tasks)
        return self._adapted(start, batch, self.inner_loop(steps))

    def _adapted(self, start: TaskParams, batch: TaskBatch, loop: InnerLoop) -> TaskParams:
        """Fast weights after the inner loop on the support sets."""
        support = with_ways(batch)[0]

        def run(plan: MemoryPlan) -> TaskParams:
            return adapted(loop, start, support, plan.task_chunk).params

        with computing(self.device, self.compute_dtype), torch.no_grad():
            return self.plans.run(loop, batch, run)

    def predict(
        self,
        params: TaskParams,
        *,
        ways: Tensor | Sequence[int] | int | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Logits ``[T, Q, ..., C]`` of query inputs ``[T, Q, ...]``, in the learner's
        `compute_dtype`.

        Args:
            params: From :meth:`adapt`, or ``out.params``.
            ways: Number of classes of each task, int64 ``[T]`` or one for all: logits beyond are
                ``-inf``.
            inputs: The model's inputs.

        Differentiable as ``patched(params, **inputs)``; use ``torch.no_grad()`` to serve.
        """
        with computing(self.device, self.compute_dtype):
            out = self.patched(params, **inputs)
        return mask_ways(getattr(out, "logits", out), ways)

    # -- checks ------------------------------------------------------------------------------

    def check(self, batch: TaskBatch) -> None:
        """Raise one clear sentence for a batch that this learner cannot take."""
        if not isinstance(batch, TaskBatch):
            raise TypeError(f"expected a fm.TaskBatch, got {type(batch).__name__}")
        support, query = with_ways(batch)
        check_sets(self.patched, self.loss_fn, {"support": support, "query": query})
        self.rates.check_tasks(batch.num_tasks)

    def _warn_of_frozen(self) -> None:
        """Warn, once, that several processes do not average gradients of what is frozen."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.averaged or not (several and torch.is_grad_enabled()):
            return
        frozen = [p for p in self.patched.slots.initial if not p.requires_grad]
        if not frozen:
            return
        self.averaged = True
        warnings.warn(
            f"{len(frozen)} tensors that adapt are frozen in the model, so that "
            "DistributedDataParallel does not average their gradients: unfreeze them with "
            "requires_grad_()",
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        return f"steps={self.steps}, order={self.order}, memory={self.plans.memory!r}"


_FIXED = frozenset("lr optimizer memory task_chunk memory_budget compile compile_cache".split())
_CHECKS: dict[str, Callable[[GradientLearner, Any], Any]] = {
    "steps": lambda learner, steps: check_steps(steps, 0),  # 0: as of generated weights
    "order": lambda learner, order: check_order(order),
    "clip_norm": lambda learner, norm: check_clip_norm(norm),
    "truncate": lambda learner, truncate: check_truncate(truncate, learner.steps),
    "loss_fn": lambda learner, loss_fn: resolve_loss(loss_fn),
    "compute_dtype": lambda learner, dtype: compute_dtype_of(dtype, learner.patched.dtype),
}
"""Settings that may change: what they have to be."""


def warn_of_nothing(learner: nn.Module) -> None:
    """Warn, where gradients are enabled, of a learner without meta-parameters."""
    if torch.is_grad_enabled():
        warnings.warn(
            f"this {type(learner).__name__} has nothing to learn, and its loss no gradient: its "
            "model is frozen, and it adds no parameters; unfreeze some, or evaluate under "
            "torch.no_grad()",
            stacklevel=2,
        )
