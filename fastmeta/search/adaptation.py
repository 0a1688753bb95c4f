"""The inner loop of many candidates at once: each its rate, optimizer, steps and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.batch import IGNORE_INDEX
from fastmeta.engine.inner import InnerLoop, Support, inner_step
from fastmeta.engine.losses import WAYS, classification
from fastmeta.engine.rates import Rates
from fastmeta.patching import Patched, TaskParams
from fastmeta.search.proposal import Proposal
from fastmeta.search.rules import RowRules


@dataclass(frozen=True)
class Rows:
    """Which support rows the candidates read, in one step.

    Attributes:
        index: int64 ``[T, b]``: rows of each task; b is the largest batch of a candidate.
        labels: ``[C, T, b]``, -100 where a candidate's batch is smaller.
    """

    index: Tensor
    labels: Tensor


def adapt_candidates(
    patched: Patched,
    candidates: Sequence[Proposal],
    start: TaskParams,
    labels: Tensor,
    ways: Tensor | None,
    inputs_of: Callable[[Sequence[int], Tensor], tuple[Mapping[str, Tensor], Any]],
    *,
    seed: int = 0,
) -> tuple[TaskParams, Tensor]:
    """Adapt C candidates to T tasks.

    ``phi_{k+1} = U_c(phi_k, dL_c(phi_k)/dphi_k)`` for k up to the candidate's own number of steps;
    those that are done leave the batch.

    Args:
        patched: What runs them.
        candidates: C of them.
        start: ``[C * T, P]``, candidates on the slow axis.
        labels: Support labels ``[T, N]``.
        ways: ``[T]`` or None.
        inputs_of: Of the candidates still running, and the rows ``[T, b]`` of a step: the model's
            inputs ``[C' * T, b, ...]`` and what `patched` takes as prefix cache.
        seed: Of the rows that smaller batches read; a batch is the same whatever else is evaluated.

    Returns:
        Fast weights, detached, and bool ``[C * T]``: whether all losses and gradients were finite.
    """
    tasks = labels.shape[0]
    params = start.packed
    dtype = wide_dtype(params.dtype)
    running = list(range(len(candidates)))

    def column(values: list[float]) -> Tensor:
        t = torch.tensor(values, dtype=dtype, device=params.device)
        return t.repeat_interleave(tasks)

    rule = RowRules(
        [c.optimizer for c in candidates for _ in range(tasks)],
        column([c.weight_decay for c in candidates]),
    )
    rate = column([c.lr for c in candidates])
    state = rule.init(params)
    active = torch.ones(len(params), dtype=torch.bool, device=params.device)
    done = params.clone()
    finite = active.clone()
    units = torch.arange(len(params), device=params.device)
    for step in range(max(c.steps for c in candidates)):
        left = [i for i, c in enumerate(running) if candidates[c].steps > step]
        if len(left) < len(running):
            done[units], finite[units] = params, active
            rows = [i * tasks + t for i in left for t in range(tasks)]
            rule, state = rule.select(rows, state)
            params, active, rate, units = (x[rows] for x in (params, active, rate, units))
            running = [running[i] for i in left]
        read = step_rows(labels, [candidates[c].batch_size for c in running], step, seed)
        inputs, prefix = inputs_of(running, read.index)
        batch = {**inputs, "labels": read.labels.flatten(0, 1)}
        if ways is not None:
            batch[WAYS] = ways.repeat(len(running))
        loop = InnerLoop(
            patched=patched,
            rule=rule,
            rates=Rates.of_tasks(rate, patched.layout),
            steps=step + 1,
            loss_fn=classification,
            second_order=0,
        )
        params, state, active, _ = inner_step(
            loop, step, params, state, Support(batch, prefix), active,
            create_graph=False, in_place=step > 0,
        )  # fmt: skip
    done[units], finite[units] = params, active
    return TaskParams(start.layout, done), finite


def step_rows(labels: Tensor, batch_sizes: Sequence[int | None], step: int, seed: int) -> Rows:
    """The rows of one step.

    Every step puts a task's labelled rows in a random order of its own, and a candidate reads as
    many as its batch has from the front.

    Args:
        labels: ``[T, N]``.
        batch_sizes: One for each of C candidates; None for all rows.
        step: From 0.
        seed: Of the order.
    """
    tasks, rows = labels.shape
    sizes = [rows if b is None else min(b, rows) for b in batch_sizes]
    most = max(sizes)
    if most == rows:
        order = torch.arange(rows, device=labels.device).expand(tasks, -1)
    if min(sizes) < rows:
        generator = torch.Generator().manual_seed((seed << 20) + step)
        place = torch.rand(rows, generator=generator).expand(tasks, -1).to(labels.device)
        place = place + (labels == IGNORE_INDEX)  # padding comes last
        shuffled = place.argsort(1)
        order = shuffled if most < rows else order
    index = order[:, :most]
    read = labels.gather(1, index).expand(len(sizes), -1, -1)
    if min(sizes) < most:
        rank = torch.empty_like(shuffled)
        ranks = torch.arange(rows, device=labels.device).expand(tasks, -1)
        rank.scatter_(1, shuffled, ranks)  # place of each row in the step's order
        size = torch.tensor(sizes, device=labels.device).view(-1, 1, 1)
        beyond = rank.gather(1, index).unsqueeze(0) >= size
        read = read.masked_fill(beyond, IGNORE_INDEX)
    return Rows(index, read)
