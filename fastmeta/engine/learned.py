"""Update rules that are themselves learned: small networks that every coordinate shares."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fastmeta import ops
from fastmeta._settings import above_0, integer
from fastmeta.engine.factored import SecondMoments, by_segment, spread
from fastmeta.engine.update_rule import Rate, State, UpdateRule
from fastmeta.patching import ParamLayout

KINDS = ("lstm", "mlp")
_TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of the step features tanh(step / time)
_BETAS = (0.5, 0.9, 0.99)
_SQUARES = 0.99
_MAGNITUDE = 0.1  # of the exponent of the mlp's step size


class LearnedRule(nn.Module, UpdateRule):
    """What learned rules share: frozen tasks and padding stay, any form of rate scales the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layout: ParamLayout | None = None

    def bound(self, layout: ParamLayout) -> LearnedRule:
        """A rule with the same parameters that knows where each adapted tensor lies."""
        other = copy.copy(self)
        other.layout = layout
        return other

    def networks(self, params: Tensor) -> dict[str, Tensor]:
        """The rule's own parameters in the dtype that `params` are updated in, by name."""
        dtype = torch.promote_types(params.dtype, torch.float32)
        found = {}
        for name, parameter in self.named_parameters():
            if parameter.device != params.device:
                raise ValueError(
                    f"the learned optimizer is on {parameter.device}, but the fast weights on "
                    f"{params.device}: move it with .to({str(params.device)!r})"
                )
            found[name] = parameter.to(dtype)
        return found

    def update(
        self,
        params: Tensor,
        grads: Tensor,
        state: State,
        lr: Rate,
        step: int,
        *,
        active: Tensor | None = None,
        segments: ParamLayout | None = None,
        losses: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        wide = torch.promote_types(params.dtype, torch.float32)
        grads = grads.to(wide)
        if active is not None:
            grads = torch.where(active.unsqueeze(1), grads, 0)  # a frozen task's may be NaN
            losses = None if losses is None else torch.where(active, losses, 0)
        if segments is not None:
            lr = spread(lr.unsqueeze(-1), segments).squeeze(-1)
        new, new_state = self.step(params.to(wide), grads, state, lr, step, losses)
        if self.layout is not None and self.layout.gaps:
            inside = torch.ones_like(params[:1], dtype=torch.bool)
            for start, stop in self.layout.gaps:
                inside[:, start:stop] = False
            new = torch.where(inside, new, params)
        if active is not None:
            new = torch.where(active.unsqueeze(1), new, params)
            new_state = tuple(
                torch.where(active.view(-1, *[1] * (s.dim() - 1)), n, s)
                for n, s in zip(new_state, state, strict=True)
            )
        return new.to(params.dtype), new_state

    def step(
        self,
        params: Tensor,
        grads: Tensor,
        state: State,
        lr: Rate,
        step: int,
        losses: Tensor | None,
    ) -> tuple[Tensor, State]:
        """New ``[T, P]`` and state where every task is active."""
        raise NotImplementedError


class LearnedOptimizer(LearnedRule):
    """An update rule that is a small network, the same for every coordinate: ``params - lr u``.

    ``kind="lstm"``: u is a linear function of the state of an LSTM whose input is the gradient,
    preprocessed as ``(log|g| / p, sign g)``, or ``(-1, e^p g)`` where ``|g| < e^-p``; the state is
    that of the coordinate. ``kind="mlp"``: ``u = d exp(0.1 m)`` with ``(d, m)`` a network of the
    gradient, the parameter, running means of both moments (the second also factored into rows and
    columns, as in Adafactor), each divided by its root mean square over the tensor, and of the
    step.

    Use it as ``optimizer=`` of any learner or of `fm.adapt`; its parameters are among
    ``learner.parameters()``. With ``order=1``, as in the papers, gradients count as constants and
    the meta-gradient flows through the updates alone; ``order=2`` is exact. For unrolls that are
    too long to differentiate, see `fm.TruncatedUnroll` and `fm.PES`.

    Args:
        kind: ``"lstm"`` or ``"mlp"``.
        hidden: Width, at least 1. Default 20 for the LSTM, 32 for the network.
        layers: Layers of that width, at least 1. Default 2.
        log_range: p, above 0.
        seed: Seed of its initial values.

    Raises:
        ValueError: A setting is out of range.

    Sources: Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474; Metz et al. 2020,
    https://arxiv.org/abs/2009.11243
    """

    def __init__(
        self,
        kind: str = "lstm",
        *,
        hidden: int | None = None,
        layers: int = 2,
        log_range: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.hidden = integer("hidden", {"lstm": 20, "mlp": 32}[kind] if hidden is None else hidden)
        self.layers = integer("layers", layers)
        self.log_range = above_0("log_range", log_range)
        generator = torch.Generator().manual_seed(seed)
        if kind == "lstm":
            for i in range(self.layers):
                add_cell(self, f"lstm{i}", self.hidden if i else 2, self.hidden, generator)
            add_linear(self, "out", self.hidden, 1, generator, scale=0.1)
            return
        for i in range(self.layers):
            inputs = self.hidden if i else _FEATURES + len(_TIMES)
            add_linear(self, f"layer{i}", inputs, self.hidden, generator)
        add_linear(self, "out", self.hidden, 2, generator, scale=0.1)

    def init(self, params: Tensor) -> State:
        if self.kind == "lstm":
            return lstm_state(params, self.hidden, self.layers)
        moments = SecondMoments(self._known_layout(params))
        means = tuple(torch.zeros_like(_wide(params)).contiguous() for _ in range(len(_BETAS) + 1))
        return (*means, *moments.init(_wide(params)))

    def step(self, params, grads, state, lr, step, losses):
        own = self.networks(params)
        if self.kind == "mlp":
            direction, state = self._by_features(own, params, grads, state, step)
        else:
            given = log_and_sign(grads, self.log_range)
            states = []
            for i in range(self.layers):
                h, c = state[2 * i : 2 * i + 2]
                given, c = lstm_step(own, f"lstm{i}", given, h, c)
                states += [given, c]
            direction = torch.nn.functional.linear(given, own["out_weight"], own["out_bias"])
            direction, state = direction.squeeze(-1), tuple(states)
        return params - lr * direction, state

    def _by_features(self, own, params, grads, state, step) -> tuple[Tensor, State]:
        layout = self._known_layout(params)
        moments = SecondMoments(layout)
        count = len(_BETAS)
        means = [b * m + (1 - b) * grads for b, m in zip(_BETAS, state[:count], strict=True)]
        squares = _SQUARES * state[count] + (1 - _SQUARES) * grads.square()
        factors = moments.update(state[count + 1 :], grads.square(), _SQUARES)
        root, factored = (torch.rsqrt(v + 1e-10) for v in (squares, moments.of(factors)))
        features = torch.stack(
            [params, grads, *means, root, factored]
            + [x * r for r in (root, factored) for x in (grads, means[1])],
            dim=-1,
        )  # [T, P, F]
        size = by_segment(features.square(), layout)
        features = features * spread(torch.rsqrt(size + 1e-10), layout)
        times = torch.tanh((step + 1) / features.new_tensor(_TIMES))
        weight, bias = own["layer0_weight"], own["layer0_bias"]
        bias = bias + weight[:, _FEATURES:] @ times  # the same for all coordinates
        x = torch.relu(torch.nn.functional.linear(features, weight[:, :_FEATURES], bias))
        for i in range(1, self.layers):
            layer = own[f"layer{i}_weight"], own[f"layer{i}_bias"]
            x = torch.relu(torch.nn.functional.linear(x, *layer))
        direction, size = torch.nn.functional.linear(x, own["out_weight"], own["out_bias"]).unbind(
            -1
        )
        return direction * torch.exp(_MAGNITUDE * size), (*means, squares, *factors)

    def _known_layout(self, params: Tensor) -> ParamLayout:
        if self.layout is not None:
            return self.layout
        return ParamLayout(["all"], [(params.shape[1],)])

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, hidden={self.hidden}, layers={self.layers}"


_FEATURES = 4 + len(_BETAS) + 4


# -- pieces that learned rules are made of -----------------------------------------------------


def log_and_sign(x: Tensor, log_range: float) -> Tensor:
    """Size and sign of numbers of any scale as two numbers around 1, ``[..., 2]``."""
    size = x.abs()
    large = size >= math.exp(-log_range)
    log = torch.log(torch.where(large, size, 1)) / log_range
    small = x * math.exp(log_range)
    return torch.stack([torch.where(large, log, -1), torch.where(large, x.sign(), small)], dim=-1)


def lstm_state(params: Tensor, hidden: int, layers: int = 1) -> State:
    """State and cell state of every layer, zeros ``[T, P, hidden]``."""
    wide = _wide(params)
    return tuple(wide.new_zeros(*params.shape, hidden) for _ in range(2 * layers))


def lstm_step(
    own: dict[str, Tensor], name: str, inputs: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a shared cell for all coordinates: inputs ``[T, P, F]``, states ``[T, P, H]``."""
    weights = (own[f"{name}_{which}"] for which in ("weight_ih", "weight_hh", "bias"))
    new_h, new_c = ops.coordinate_lstm(
        inputs.flatten(0, 1), h.flatten(0, 1), c.flatten(0, 1), *weights
    )
    return new_h.view(h.shape), new_c.view(c.shape)


def add_cell(
    module: nn.Module, name: str, inputs: int, hidden: int, generator: torch.Generator
) -> None:
    """Parameters of an LSTM cell, uniform as torch.nn.LSTMCell's; the forget gate starts open."""
    bound = 1 / math.sqrt(hidden)
    for which, shape in (
        ("weight_ih", (4 * hidden, inputs)),
        ("weight_hh", (4 * hidden, hidden)),
        ("bias", (4 * hidden,)),
    ):
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if which == "bias":
            values[hidden : 2 * hidden] += 1
        module.register_parameter(f"{name}_{which}", nn.Parameter(values))


def add_linear(
    module: nn.Module,
    name: str,
    inputs: int,
    outputs: int,
    generator: torch.Generator,
    scale: float = 1.0,
) -> None:
    """Parameters of a linear layer, uniform up to ``scale / sqrt(inputs)``; the bias is zero."""
    bound = scale / math.sqrt(inputs)
    values = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    module.register_parameter(f"{name}_weight", nn.Parameter(values))
    module.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(outputs)))


def _wide(params: Tensor) -> Tensor:
    return params.to(torch.promote_types(params.dtype, torch.float32))
