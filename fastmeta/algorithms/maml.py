"""Model-agnostic meta-learning."""

from __future__ import annotations

from fastmeta.algorithms.learner import GradientLearner


class MAML(GradientLearner):
    """MAML: learn initial values from which a few gradient steps solve a task.

    ``phi_0 = theta``, ``phi_{k+1} = phi_k - lr dL_support(phi_k)/dphi_k``, and the meta-loss is
    ``mean_t L_query(phi_K)``. ``order=2`` differentiates through the inner gradients; ``order=1``
    (FOMAML) treats them as constants. Arguments, all but `patched` by name: see
    `fm.GradientLearner`.

    Source: Finn et al. 2017, https://arxiv.org/abs/1703.03400
    """
