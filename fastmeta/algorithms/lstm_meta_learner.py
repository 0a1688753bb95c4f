"""A learned update with gates: the fast weights are the cell state of an LSTM."""

from __future__ import annotations

from typing import Any

from fastmeta.algorithms.learner import GradientLearner
from fastmeta.engine.gated import GatedUpdate
from fastmeta.patching import Patched


class LSTMMetaLearner(GradientLearner):
    """The LSTM meta-learner: ``phi_{k+1} = f_k phi_k - lr i_k dL_support(phi_k)/dphi_k``.

    The fast weights phi are the cell state of an LSTM, whose learned forget gate f and input gate i
    depend on the loss, the gradient and the fast weight, by way of a hidden state of each
    coordinate. All coordinates share its weights. The outer loop learns them and the initial values
    of the cell state: the model's own parameters, or LoRA's.

    Args:
        patched: The model, from `fm.patch`.
        hidden: Width of the LSTM, at least 1. Default 20.
        forget: Where the forget gate starts, in (0, 1). Default 0.999: close to keeping.
        rate: Where the input gate starts, in (0, 1). Default 0.01.
        lr: Factor of the input gate, which stays below 1. Default 1.
        seed: Seed of the LSTM's initial values.
        **settings: As for `fm.MAML`, without `optimizer`; `order` is 1 by default, as in the paper:
            losses and gradients count as constants. With 2 gradients are differentiated.

    Raises:
        TypeError: An `optimizer` was given, or as `fm.MAML` does.
        ValueError: A setting is out of range.

    Differentiable as `fm.MAML`.

    Source: Ravi and Larochelle 2017, https://openreview.net/forum?id=rJY0-Kcll
    """

    def __init__(
        self,
        patched: Patched,
        *,
        hidden: int = 20,
        forget: float = 0.999,
        rate: float = 0.01,
        lr: Any = 1.0,
        order: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if "optimizer" in settings:
            raise TypeError(
                "the LSTM meta-learner is an optimizer itself: expected no optimizer, "
                f"got {settings['optimizer']!r}"
            )
        rule = GatedUpdate(hidden, forget=forget, rate=rate, seed=seed)
        if isinstance(patched, Patched):
            rule.to(patched.device)
        super().__init__(patched, lr=lr, order=order, optimizer=rule, **settings)
