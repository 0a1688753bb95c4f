"""MAML with implicit gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmeta.algorithms.learner import GradientLearner
from fastmeta.engine.inner import InnerLoop
from fastmeta.patching import Patched


class IMAML(GradientLearner):
    """iMAML: the meta-gradient at the adapted weights, whatever path led there.

    The inner loop minimises ``L_support(phi) + lam/2 |phi - theta|^2``; the meta-gradient solves
    ``(I + H / lam) g = dL_query/dphi`` by conjugate gradients, batched over tasks. Memory does not
    depend on the number of steps. Exact where the inner loop has converged. The initial values
    learn; shared weights that are not adapted receive the query loss's direct gradient.

    Args:
        patched: The model, from `fm.patch`.
        lam: Strength of the pull towards the initial values, positive.
        cg_steps: Iterations of conjugate gradients, at least 1.
        **settings: As for `fm.MAML`.

    Source: Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630
    """

    def __init__(
        self, patched: Patched, *, lam: float = 1.0, cg_steps: int = 5, **settings: Any
    ) -> None:
        if not lam > 0:
            raise ValueError(f"lam must be positive, got {lam}")
        if cg_steps < 1:
            raise ValueError(f"cg_steps must be at least 1, got {cg_steps}")
        super().__init__(patched, **settings)
        if self.rates.constant is None:
            raise ValueError(
                "iMAML's meta-gradient does not depend on the path: lr must be a number"
            )
        self.lam = float(lam)
        self.cg_steps = cg_steps

    def inner_loop(self, steps: int | None = None) -> InnerLoop:
        loop = super().inner_loop(steps)
        return replace(loop, second_order=0, proximal=self.lam, implicit=self.cg_steps)
