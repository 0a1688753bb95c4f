"""`fm.adapt`: adaptation without meta-gradient, for evaluation and services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.batch import TaskBatch, check_set
from fastmeta.engine.capture import capture_of
from fastmeta.engine.checks import check_clip_norm, check_sets, check_steps, compute_dtype_of
from fastmeta.engine.chunks import split
from fastmeta.engine.conditions import computing
from fastmeta.engine.episode import adapt_tasks, with_ways
from fastmeta.engine.inner import InnerLoop, Trajectory
from fastmeta.engine.losses import LossFn, resolve_loss
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.memory_plans import MemoryPlans
from fastmeta.engine.optimizers import resolve_rule
from fastmeta.engine.rates import LearnedRate, Rates
from fastmeta.engine.update_rule import UpdateRule
from fastmeta.patching import Patched, TaskParams


@dataclass
class Adapted:
    """What `fm.adapt` returns.

    Attributes:
        params: Adapted fast weights of T tasks, detached.
        support_losses: Support losses before each step, ``[K, T]``.
        diverged: bool ``[T]``; tasks whose loss or gradient became NaN or Inf. They keep the fast
            weights from before that step.
    """

    params: TaskParams
    support_losses: Tensor
    diverged: Tensor


@torch.compiler.disable  # as a learner's call
def adapt(
    patched: Patched,
    support: Mapping[str, Tensor],
    *,
    steps: int,
    lr: float,
    optimizer: str | UpdateRule = "sgd",
    loss_fn: str | LossFn = "classification",
    clip_norm: float | None = None,
    task_chunk: int | str | None = None,
    params: TaskParams | None = None,
    ways: Tensor | int | None = None,
    compute_dtype: torch.dtype | str | None = None,
    compile: bool | str = False,
    compile_cache: str | Path | None = None,
) -> Adapted:
    """Adapt T tasks in one batch and keep no graph.

    ``phi_{k+1} = U(phi_k, dL_support(phi_k)/dphi_k)`` for every task, with U the update rule.

    Args:
        patched: The model, from `fm.patch`.
        support: Model inputs and ``labels``, each ``[T, N, ...]``; of unequal tasks, see
            `fm.TaskBatch.collate`.
        steps: Inner steps, at least 1.
        lr: Learning rate, positive.
        optimizer: ``"sgd" | "momentum" | "adam" | "adamw" |
            "rmsprop" | "adagrad"`` or a rule object, such as a `fm.LearnedOptimizer`.
        loss_fn: ``"classification"``, ``"token_classification"``, ``"causal_lm"``,
            ``"masked_lm"``, ``"seq2seq_lm"``, ``"regression"`` or a callable
            ``(outputs, batch) -> [T]``. Losses of words form no logits where tasks share the layer
            that makes them.
        clip_norm: Bound on each task's gradient norm, positive, or None.
        task_chunk: Tasks adapted at once: None (all), an integer of at least 1, or ``"auto"``: as
            many as the free memory has room for, which one and two tasks tell. The same numbers.
        params: Fast weights of T tasks to start from; default the model's own initial values.
        ways: Number of classes of each task, int64 ``[T]`` or one for all, when fewer than the head
            has.
        compute_dtype: ``torch.bfloat16`` or ``torch.float16``, or its name: matrix products of the
            model in it, fast weights and updates in float32. None: the weights' dtype.
        compile, compile_cache: Captured steps, as for `fm.MAML`; later calls use them too.

    Returns:
        The adapted fast weights: ``patched(adapted.params, **query_inputs)``. Shared weights, and
        rows of an embedding's table that a task's texts do not read, stay the model's own: adapt
        anew after the model has learned on.

    Raises:
        TypeError: `patched` is no patched model, `params` no fast weights, `lr` or `steps` no
            number, labels not int64.
        ValueError: Empty support, labels out of range, tensors on another device, steps below 1,
            `lr` not positive, `params` of another model, specification or number of tasks.

    Not differentiable; use a learner for meta-gradients, and `fm.FineTuner` for tasks with more
    texts than one batch. Several threads may call it at once.
    """
    loop = plain_loop(
        patched,
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        loss_fn=loss_fn,
        clip_norm=clip_norm,
        compile=compile,
        compile_cache=compile_cache,
    )
    plans = MemoryPlans("unroll", task_chunk)
    compute_dtype = compute_dtype_of(compute_dtype, patched.dtype)
    tasks = check_set("support", support)
    if params is not None:
        patched.check_params(params)
        if params.num_tasks != tasks:
            raise ValueError(f"params hold {params.num_tasks} tasks, but the support set {tasks}")
    batch = TaskBatch(support, support, ways)
    inputs = with_ways(batch)[0]
    check_sets(patched, loop.loss_fn, {"support": inputs})

    def run(plan: MemoryPlan) -> Trajectory:
        return adapted(loop, start, inputs, plan.task_chunk)

    with computing(patched.device, compute_dtype), torch.no_grad():
        start = patched.initial(tasks) if params is None else params
        whole = plans.run(loop, batch, run)
    return Adapted(whole.params, torch.stack(whole.losses), ~whole.active)


@torch.no_grad()
def adapted(
    loop: InnerLoop, start: TaskParams, support: Mapping[str, Tensor], task_chunk: int | None
) -> Trajectory:
    """The inner loop of T tasks, so many at a time, without a graph and with detached results."""
    places = torch.arange(start.num_tasks, device=start.device)
    pieces = []
    for s in split(slice(0, start.num_tasks), task_chunk):
        inputs = {k: v[s] for k, v in support.items()}
        pieces.append(adapt_tasks(loop, start.select(s), inputs, "unroll", places[s]))
    whole = Trajectory.joined(pieces)
    return replace(whole, params=whole.params.detach())


def plain_loop(
    patched: Patched,
    *,
    steps: int,
    lr: float,
    optimizer: str | UpdateRule,
    loss_fn: str | LossFn,
    clip_norm: float | None,
    compile: bool | str = False,
    compile_cache: str | Path | None = None,
) -> InnerLoop:
    """An inner loop without meta-gradient; every setting is checked, as for :func:`adapt`."""
    if not isinstance(patched, Patched):
        raise TypeError(
            f"expected a patched model (fm.patch(model, spec)), got {type(patched).__name__}"
        )
    steps = check_steps(steps)
    check_clip_norm(clip_norm)
    if isinstance(lr, LearnedRate):
        raise TypeError("adapt takes a number as lr; learned rates belong to a learner")
    capture = capture_of(patched, compile, compile_cache)
    return InnerLoop(
        patched=patched,
        rule=resolve_rule(optimizer).bound(patched.layout),
        rates=Rates(lr, patched.layout, steps, patched.slots.initial[0]),
        steps=steps,
        loss_fn=resolve_loss(loss_fn),
        second_order=0,
        clip_norm=clip_norm,
        capture=capture,
        widths=0 if capture is None else capture.widths,
    )
