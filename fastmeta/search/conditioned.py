"""Task-conditioned search: for a new task an architecture and a recipe at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastmeta.batch import IGNORE_INDEX, TaskBatch, ways_of
from fastmeta.ops import class_means
from fastmeta.search.budget import Budget, by_cost, check_weights, cost_model
from fastmeta.search.cost import CostModel
from fastmeta.search.evaluation import Evaluator
from fastmeta.search.lstm import LSTMController
from fastmeta.search.proposal import Proposal
from fastmeta.search.run import whole_model
from fastmeta.search.space import Space


@torch.no_grad()
def task_embedding(
    evaluator: Evaluator, support: Mapping[str, Tensor], ways: Tensor | None = None
) -> Tensor:
    """What a task looks like to the whole model.

    For every task: the mean of its support features, the spread of its class means around it (both
    of unit length), the logarithms of its numbers of classes and of rows per class.

    Args:
        evaluator: Whose unpruned model reads the texts.
        support: ``[T, N, ...]`` with ``labels``.
        ways: Numbers of classes ``[T]``; default those that occur.

    Returns:
        ``[T, 2 D + 2]``, float32.

    Raises:
        ValueError: The model's head reads anything but one row of features per text.
    """
    read = evaluator.features([whole_model(evaluator.space)], support)
    if read is None:
        raise ValueError("task embeddings need a model whose head is one linear layer")
    features, labels = read[0].float(), support["labels"].to(evaluator.net.device)
    if ways is not None:
        ways = ways_of(ways, len(labels), labels.device)
    counted = (labels != IGNORE_INDEX).float()  # [T, N]
    center = (features * counted.unsqueeze(2)).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)
    means, size = class_means(features, labels, int(labels.max().clamp_min(0)) + 1)  # [T, C, D]
    there = (size > 0).float().unsqueeze(2)
    number = there.sum(1)  # [T, 1]
    spread = ((means - center.unsqueeze(1)).square() * there).sum(1) / number
    parts = [torch.nn.functional.normalize(x, dim=-1) for x in (center, spread.sqrt())]
    classes = number if ways is None else ways.to(number).unsqueeze(1)
    rows = counted.sum(1, keepdim=True) / number
    return torch.cat([*parts, classes.log(), rows.log()], 1)


@dataclass
class Conditioned:
    """A policy that reads tasks.

    Attributes:
        controller: The policy.
        evaluator: Whose model reads the tasks.
        rewards: Mean reward of every step.
    """

    controller: LSTMController
    evaluator: Evaluator
    rewards: list[float] = field(default_factory=list)

    def propose(self, support: Mapping[str, Tensor], ways: Tensor | None = None) -> list[Proposal]:
        """The policy's most probable candidate for each of T tasks, nothing evaluated."""
        tasks = task_embedding(self.evaluator, support, ways)
        return [self.controller.best_guess(task) for task in tasks]


def run_conditioned(
    space: Space,
    batches: Iterable[TaskBatch],
    *,
    candidates: int = 16,
    budget: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    cost: CostModel | None = None,
    evaluator: Evaluator | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Conditioned:
    """Train an LSTM policy that reads a task and proposes for it.

    Every task of every batch gets candidates of its own, evaluated on that task in one batch, and
    the policy learns from ``accuracy - sum_k weights[k] cost[k]`` against the mean of the task's
    other candidates.

    Args:
        space: What may be proposed.
        batches: Tasks, one batch a step.
        candidates: Candidates of each task, at least 2.
        budget, weights, cost, evaluator, seed, progress: As for `fm.search.run`.
        **settings: Of `LSTMController`.

    Returns:
        The policy: ``found.propose(support)``.

    Raises:
        SearchError: A budget that nothing can meet.
        ValueError: Fewer than two candidates, weights of unknown costs.
    """
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, got {candidates}")
    bounds, weights = by_cost("budget", budget), by_cost("weights", weights)
    if cost is None:
        cost = cost_model(space, bounds, weights)
    check_weights(cost, weights)
    within = Budget(space, cost, bounds)
    evaluator = evaluator or Evaluator(space, seed=seed)
    found: Conditioned | None = None
    for batch in tqdm(batches, disable=not progress, desc="tasks"):
        tasks = task_embedding(evaluator, batch.support, batch.ways)
        if found is None:
            policy = LSTMController(
                space,
                seed=seed,
                allowed=within,
                context=tasks.shape[1],
                **settings,
            )
            found = Conditioned(policy, evaluator)
        every: list[Proposal] = []
        rewards: list[float] = []
        for t, task in enumerate(tasks):
            proposals = found.controller.propose(candidates, task)
            scores = evaluator.evaluate(proposals, batch[t : t + 1])
            for score in scores:
                score.cost = cost(score.proposal)
            rewards += [score.reward(weights) for score in scores]
            every += proposals
        found.controller.observe(every, rewards, tasks.repeat_interleave(candidates, 0))
        found.rewards.append(sum(rewards) / len(rewards))
    if found is None:
        raise ValueError("expected at least one batch of tasks, got none")
    return found
