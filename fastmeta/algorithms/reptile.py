"""Reptile: move the initial values towards the adapted ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.algorithms.learner import GradientLearner
from fastmeta.batch import TaskBatch, join_sets
from fastmeta.engine.episode import MetaOutput, run_episode
from fastmeta.engine.inner import InnerLoop
from fastmeta.engine.memory import MemoryPlan
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.initial_params import InitialParams


class Reptile(GradientLearner):
    """Reptile: the pseudo-gradient of the initial values is ``mean_t (theta - phi_K)``.

    ``out.loss.backward()`` fills ``.grad`` with it, so any outer optimizer works: SGD with rate
    epsilon is the paper's update. `out.loss` itself reports the query loss. Only what is adapted
    learns.

    Args:
        patched: The model, from `fm.patch`.
        use_query: Adapt on support and query together while training, as the paper does with all
            of a task's data (the default); under ``torch.no_grad()`` it adapts on the support set.
        **settings: As for `fm.MAML`; `order` is 1, and rates, optimizer and loss do not learn.

    Raises:
        TypeError, ValueError: As for `fm.MAML`; something but initial values would learn.

    The loss is differentiable once.

    Source: Nichol et al. 2018, https://arxiv.org/abs/1803.02999
    """

    def __init__(self, patched: Patched, *, use_query: bool = True, **settings: Any) -> None:
        if settings.setdefault("order", 1) != 1:
            raise ValueError(f"Reptile is first-order: order must be 1, got {settings['order']!r}")
        super().__init__(patched, **settings)
        learned = [n for n, p in self._own().items() if p.requires_grad]
        if learned:
            raise ValueError(
                "Reptile learns initial values only: expected a number as lr, and an optimizer and "
                f"a loss_fn that are frozen (requires_grad_(False)); {learned[0]!r} would learn"
            )
        self.use_query = use_query

    def _run(self, loop: InnerLoop, batch: TaskBatch, plan: MemoryPlan) -> MetaOutput:
        start = self.patched.initial(batch.num_tasks)
        learning = torch.is_grad_enabled()
        if learning and self.use_query:
            pad = getattr(getattr(self.patched.model, "config", None), "pad_token_id", None)
            both = join_sets(batch.support, batch.query, pad_token_id=pad or 0)
            batch = TaskBatch(both, batch.query, batch.ways)
        with torch.no_grad():
            out = run_episode(loop, start, batch, plan)
        if learning:
            out.loss = out.loss + _pseudo_loss(start, out.params, ~out.diverged)
        return out


def _pseudo_loss(start: InitialParams, adapted: TaskParams, good: Tensor) -> Tensor:
    """Zero, with gradient ``mean over good tasks of (start - adapted)``."""
    changes, count = adapted.change(start.detach(), good), good.sum().clamp_min(1)
    terms = [(part * -change).sum() for part, change in zip(start.parts, changes, strict=True)]
    surrogate = torch.stack(terms).sum() / count
    return surrogate - surrogate.detach()
