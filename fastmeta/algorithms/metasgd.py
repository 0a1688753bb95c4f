"""Meta-SGD: the inner learning rate of every parameter is learned too."""

from __future__ import annotations

from typing import Any

from fastmeta.algorithms.learner import GradientLearner
from fastmeta.engine.rates import LearnedRate
from fastmeta.patching import Patched


class MetaSGD(GradientLearner):
    """Meta-SGD: ``phi_{k+1} = phi_k - alpha * dL_support(phi_k)/dphi_k`` with alpha learned.

    Args:
        patched: The model, from `fm.patch`.
        lr: Initial value of every rate, positive, or a `fm.LearnedRate` (``per="layer"``...).
            Default 1e-2.
        **settings: As for `fm.MAML`.

    Raises:
        TypeError, ValueError: As for `fm.MAML`.

    Differentiable as `fm.MAML`.

    Source: Li et al. 2017, https://arxiv.org/abs/1707.09835
    """

    def __init__(
        self, patched: Patched, *, lr: float | LearnedRate = 1e-2, **settings: Any
    ) -> None:
        rate = lr if isinstance(lr, LearnedRate) else LearnedRate(per="param", init=lr)
        super().__init__(patched, lr=rate, **settings)
