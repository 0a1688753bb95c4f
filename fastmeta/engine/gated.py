"""The update rule of the LSTM meta-learner: learned forget and input gates of every coordinate."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastmeta._settings import integer
from fastmeta.engine.learned import (
    LearnedRule,
    add_cell,
    add_linear,
    log_and_sign,
    lstm_state,
    lstm_step,
)
from fastmeta.engine.update_rule import State

_INPUTS = 4  # gradient and loss, two numbers each
_LOG_RANGE = 10.0


class GatedUpdate(LearnedRule):
    """``params' = f params - lr i grads``, f and i in (0, 1) for every coordinate.

    ``f = sigmoid(w_f [s, params, f_last] + b_f)`` and i likewise, where s is the state of an LSTM
    that reads the gradient and the support loss, preprocessed as in `fm.LearnedOptimizer`.

    Args:
        hidden: Width of the LSTM, at least 1.
        forget: Where f starts, in (0, 1).
        rate: Where i starts, in (0, 1).
        seed: Seed of the initial values.
    """

    reads_losses: ClassVar[bool] = True

    def __init__(
        self, hidden: int = 20, *, forget: float = 0.999, rate: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__()
        self.hidden = integer("hidden", hidden)
        self.start = {"forget": _share("forget", forget), "rate": _share("rate", rate)}
        generator = torch.Generator().manual_seed(seed)
        add_cell(self, "lstm", _INPUTS, hidden, generator)
        for name, value in self.start.items():
            add_linear(self, name, hidden + 2, 1, generator, scale=0.1)
            with torch.no_grad():
                self.get_parameter(f"{name}_bias").fill_(math.log(value / (1 - value)))

    def init(self, params: Tensor) -> State:
        state = lstm_state(params, self.hidden)
        gates = (torch.full_like(state[0][..., 0], v).contiguous() for v in self.start.values())
        return (*state, *gates)

    def step(self, params, grads, state, lr, step, losses):
        if losses is None:
            raise ValueError("the gated update reads support losses [T], got none")
        own = self.networks(params)
        h, c, *gates = state
        loss = log_and_sign(losses.to(grads), _LOG_RANGE).unsqueeze(1)
        given = torch.cat([log_and_sign(grads, _LOG_RANGE), loss.expand(*grads.shape, 2)], dim=-1)
        h, c = lstm_step(own, "lstm", given, h, c)
        forget, rate = (
            self._gate(own, name, h, params, last)
            for name, last in zip(self.start, gates, strict=True)
        )
        return forget * params - lr * rate * grads, (h, c, forget, rate)

    def _gate(self, own, name: str, h: Tensor, params: Tensor, last: Tensor) -> Tensor:
        weight, bias = own[f"{name}_weight"][0], own[f"{name}_bias"]
        of_h, of_params, of_last = weight.split([self.hidden, 1, 1])
        return torch.sigmoid(h @ of_h + of_params * params + of_last * last + bias)


def _share(name: str, value: object) -> float:
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"{name} must be a number in (0, 1), got {value!r}")
    return value
