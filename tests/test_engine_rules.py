"""Update rules against torch.optim, one task at a time, over many steps."""

from __future__ import annotations

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine.optimizers import resolve_rule
from fastmeta.engine.rates import LearnedRate, Rates
from fastmeta.patching import ParamLayout

TASKS, SIZE, STEPS = 3, 16, 25

CASES = {
    "sgd": (rules.SGD(), torch.optim.SGD, {}),
    "sgd-decay": (rules.SGD(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (rules.Momentum(), torch.optim.SGD, {"momentum": 0.9}),
    "momentum-all": (
        rules.Momentum(momentum=0.8, dampening=0.3, weight_decay=0.05),
        torch.optim.SGD,
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
    ),
    "nesterov": (
        rules.Momentum(momentum=0.8, nesterov=True, weight_decay=0.05),
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
    ),
    "adam": (rules.Adam(), torch.optim.Adam, {}),
    "adam-all": (
        rules.Adam(betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
        torch.optim.Adam,
        {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adamw": (rules.AdamW(), torch.optim.AdamW, {}),
    "adamw-all": (
        rules.AdamW(betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2),
        torch.optim.AdamW,
        {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "adagrad": (rules.Adagrad(), torch.optim.Adagrad, {}),
    "adagrad-all": (
        rules.Adagrad(lr_decay=0.1, eps=1e-3, weight_decay=0.1, start=0.2),
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "rmsprop": (rules.RMSprop(), torch.optim.RMSprop, {}),
    "rmsprop-all": (
        rules.RMSprop(alpha=0.8, eps=1e-3, weight_decay=0.1),
        torch.optim.RMSprop,
        {"alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1},
    ),
}


def _gradient(params: Tensor, step: int) -> Tensor:
    """A different gradient at every step, that rounding does not grow in; coordinate 5 has none."""
    index = torch.arange(SIZE)
    return (torch.sin(step + index + 0.5) + 0.3 * params) * (index != 5)


@pytest.mark.parametrize("name", CASES)
def test_torch_optim(name: str) -> None:
    rule, optimizer, settings = CASES[name]
    start = torch.randn(TASKS, SIZE, generator=torch.Generator().manual_seed(0)).double()
    params, state = start, rule.init(start)
    for step in range(STEPS):
        params, state = rule.update(params, _gradient(params, step), state, 0.05, step)
    for t in range(TASKS):
        alone = torch.nn.Parameter(start[t].clone())
        torch_rule = optimizer([alone], lr=0.05, **settings)
        for step in range(STEPS):
            alone.grad = _gradient(alone.detach(), step)
            torch_rule.step()
        torch.testing.assert_close(params[t], alone.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_task_and_its_state_stay(name: str) -> None:
    rule, _, _ = CASES[name]
    params = torch.randn(TASKS, SIZE, generator=torch.Generator().manual_seed(0)).double()
    state = rule.init(params)
    params, state = rule.update(params, params.sin(), state, 0.1, 0)
    grads = params.cos()
    grads[1] = float("nan")
    active = torch.tensor([True, False, True])
    new, new_state = rule.update(params, grads, state, 0.1, 1, active=active)
    free, free_state = rule.update(params, grads, state, 0.1, 1)
    for old, kept, unmasked in zip(
        (params, *state), (new, *new_state), (free, *free_state), strict=True
    ):
        assert torch.equal(kept[1], old[1])
        assert torch.equal(kept[::2], unmasked[::2])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per", ["layer", "param", "task", ("task", "layer")], ids=str)
def test_rates_reach_their_coordinates(name: str, per) -> None:
    """A rate per segment, coordinate or task moves what it should, as separate runs do."""
    rule, _, _ = CASES[name]
    layout = ParamLayout(["a", "b"], [(4, 4), (16,)])
    like = torch.zeros((), dtype=torch.float64)
    rates = Rates(LearnedRate(per=per, init=1.0, num_tasks=TASKS), layout, 1, like)
    g = torch.Generator().manual_seed(0)
    params = torch.randn(TASKS, layout.num_params, generator=g).double()
    with torch.no_grad():
        rates.values.copy_(torch.rand(rates.values.shape, generator=g))
        new, _ = rule.update(
            params, params.cos(), rule.init(params), rates.at(0), 0, segments=rates.segments
        )
        for t in range(TASKS):
            for i in range(layout.num_params):
                index = {"task": t, "layer": i // 16, "param": i}
                lr = float(rates.values[tuple(index[axis] for axis in rates.axes)])
                x = params[t : t + 1, i : i + 1]
                want, _ = rule.update(x, x.cos(), rule.init(x), lr, 0)
                torch.testing.assert_close(new[t, i], want[0, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    """Two steps are twice differentiable in parameters, gradients and rate."""
    rule, _, _ = CASES[name]
    g = torch.Generator().manual_seed(1)
    params, one, two = (torch.randn(2, 4, generator=g).double().requires_grad_() for _ in range(3))
    lr = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)

    def run(params: Tensor, one: Tensor, two: Tensor, lr: Tensor) -> Tensor:
        new, state = rule.update(params, one, rule.init(params), lr, 0)
        return rule.update(new, two, state, lr, 1)[0]

    assert torch.autograd.gradcheck(run, (params, one, two, lr))
    assert torch.autograd.gradgradcheck(run, (params, one, two, lr))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.SGD(weight_decay=-1), "weight_decay of SGD must be at least 0, got -1"),
        (lambda: rules.Momentum(momentum=1.0), "momentum of Momentum must be in [0, 1), got 1.0"),
        (lambda: rules.Momentum(dampening=-0.1), "dampening of Momentum must be in [0, 1)"),
        (lambda: rules.Momentum(nesterov=True, dampening=0.1), "nesterov needs a momentum"),
        (lambda: rules.Momentum(nesterov=True, momentum=0), "nesterov needs a momentum"),
        (lambda: rules.Adam(betas=(0.9, 1.0)), "betas of Adam must be in [0, 1), got 1.0"),
        (lambda: rules.AdamW(eps=0), "eps of AdamW must be above 0, got 0"),
        (lambda: rules.RMSprop(alpha=float("nan")), "alpha of RMSprop must be in [0, 1), got nan"),
        (lambda: rules.Adagrad(start=-1), "start of Adagrad must be at least 0, got -1"),
        (lambda: resolve_rule("lion"), "optimizer must be one of ['adagrad', 'adam', 'adamw', "),
        (
            lambda: resolve_rule(torch.optim.Adam),
            "such as fm.rules.Adam(), got <class",
        ),
    ],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_settings_of_each_task() -> None:
    params, grads = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    settings = [{"momentum": m, "nesterov": True} for m in (torch.tensor([0.5, 0.9]), 0.5, 0.9)]
    both, *alone = (
        rules.Momentum(**s).update(params, grads, (grads,), 0.1, 1)[0] for s in settings
    )
    torch.testing.assert_close(both, torch.stack([alone[0][0], alone[1][1]]))


def test_a_learner_has_one_setting_for_all_tasks() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    rule = rules.SGD(weight_decay=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"weight_decay of SGD must be one value .* got shape \[2"):
        fm.MAML(patched, optimizer=rule)


def test_learned_settings_are_meta_parameters() -> None:
    eps, beta = (torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.05, 0.8))
    rule = rules.Adam(betas=(beta, 0.9), eps=eps)
    learner = fm.MAML(fm.patch(oracle.tiny_bert(), fm.Head()), steps=2, optimizer=rule)
    named = dict(learner.named_parameters())
    assert named["optimizer.eps"] is eps and named["optimizer.betas.0"] is beta
    learner(oracle.as_batch(oracle.make_tasks(2))).loss.backward()
    assert eps.grad.abs() > 0 and beta.grad.abs() > 0
    saved = {n: t.clone() for n, t in learner.state_dict().items()}
    with torch.no_grad():
        eps.fill_(1.0)
    learner.load_state_dict(saved)
    assert eps == 0.05


class Plain(rules.UpdateRule):
    """A user's own rule."""

    def __init__(self, scale: float | Tensor = 1.0) -> None:
        self.held = {"scale": scale}

    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        new = params - lr * self.held["scale"] * grads
        return (new if active is None else torch.where(active.unsqueeze(1), new, params)), state


def test_rules_of_users_may_hold_what_learns() -> None:
    patched, batch = fm.patch(oracle.tiny_bert(), fm.Head()), oracle.as_batch(oracle.make_tasks(2))
    found = []
    for mode in ({"memory": "unroll"}, {"memory": "recompute"}, {"task_chunk": 1}):
        scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        learner = fm.MAML(patched, lr=0.1, steps=2, optimizer=Plain(scale), **mode)
        learner(batch).loss.backward()
        found.append(scale.grad)
    assert found[0].abs() > 0
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-9, atol=1e-12)


def test_rules_of_users_are_clipped() -> None:
    patched, tasks = fm.patch(oracle.tiny_bert(), fm.Params("*")), oracle.make_tasks()
    settings = {"clip_norm": 0.1, "optimizer": Plain(), "memory": "unroll"}
    learner = fm.MAML(patched, lr=0.1, steps=2, **settings)
    out = learner(oracle.as_batch(tasks))
    oracle.assert_same(learner, out, oracle.loop(learner, tasks), tasks)


def test_rates_of_narrow_models_are_not_narrow() -> None:
    patched = fm.patch(oracle.tiny_bert().bfloat16(), fm.Head())
    assert fm.MAML(patched, lr=LearnedRate(per="step")).rates.values.dtype == torch.float32


@pytest.mark.parametrize("spec", [fm.Params("*"), fm.Head()], ids=["all", "head"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("mode", [{"memory": "recompute"}, {"memory": "unroll", "task_chunk": 1}])
def test_a_learned_setting(mode: dict, decay: float, spec: fm.Spec) -> None:
    """Its gradient is that of a difference, in every way to compute it."""
    batch = oracle.as_batch(oracle.make_tasks(2))
    patched = fm.patch(oracle.tiny_bert(), spec)

    def loss(weight_decay, **settings) -> Tensor:
        rule = rules.SGD(weight_decay=weight_decay)
        return fm.MAML(patched, lr=0.1, steps=2, optimizer=rule, **settings)(batch).loss

    h = 1e-5
    with torch.no_grad():
        if decay:
            slope = (loss(decay + h) - loss(decay - h)) / (2 * h)
        else:
            slope = (4 * loss(h) - loss(2 * h) - 3 * loss(0.0)) / (2 * h)
    for settings in ({"memory": "unroll"}, mode):
        learned = torch.tensor(decay, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(loss(learned, **settings), learned)
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)
