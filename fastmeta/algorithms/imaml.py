"""MAML with implicit gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmeta._settings import above_0, integer
from fastmeta.algorithms.learner import GradientLearner
from fastmeta.engine.inner import InnerLoop
from fastmeta.patching import Patched


class IMAML(GradientLearner):
    """iMAML: the meta-gradient at the adapted weights, whatever path led there.

    The inner loop minimises ``L_support(phi) + lam/2 |phi - theta|^2``; the meta-gradient solves
    ``(I + H / lam) g = dL_query/dphi`` by conjugate gradients, batched over tasks. Memory does not
    depend on the number of steps. Exact where the inner loop has converged. The initial values
    learn; shared weights that are not adapted receive the query loss's gradient and what reaches
    them through the adapted weights.

    Args:
        patched: The model, from `fm.patch`.
        lam: Strength of the pull towards the initial values, positive. Default 1.
        cg_steps: Iterations of conjugate gradients, at least 1. Default 5.
        **settings: As for `fm.MAML`, without `order`, `truncate`, and rates or optimizers that
            learn.

    Raises:
        TypeError, ValueError: As for `fm.MAML`.

    The loss is differentiable once.

    Source: Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630
    """

    def __init__(
        self, patched: Patched, *, lam: float = 1.0, cg_steps: int = 5, **settings: Any
    ) -> None:
        lam, cg_steps = above_0("lam", lam), integer("cg_steps", cg_steps)
        for name, value in (("order", 2), ("truncate", None)):
            if settings.get(name, value) != value:
                raise ValueError(
                    f"iMAML differentiates no inner step: expected no {name}, "
                    f"got {settings[name]!r}"
                )
        super().__init__(patched, **settings)
        path = [*self.rates.parameters(), *self.rule.learned()]
        if any(p.requires_grad for p in path):
            raise ValueError(
                "iMAML's meta-gradient does not depend on the path: lr must be a number, and an "
                "optimizer that learns must be frozen (requires_grad_(False))"
            )
        self.lam, self.cg_steps = lam, cg_steps

    def inner_loop(self, steps: int | None = None) -> InnerLoop:
        loop = super().inner_loop(steps)
        return replace(loop, second_order=0, proximal=self.lam, implicit=self.cg_steps)
