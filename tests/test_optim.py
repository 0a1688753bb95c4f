"""fm.optim: torch's optimizers, differentiable, in loops around functional_call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fastmeta as fm

STEPS = 3
OPTIMIZERS = {
    "sgd": (fm.optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (fm.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (fm.optim.Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.9)}),
    "adamw": (fm.optim.AdamW, torch.optim.AdamW, {"lr": 0.05, "maximize": True}),
    "rmsprop": (fm.optim.RMSprop, torch.optim.RMSprop, {"lr": 0.05, "weight_decay": 0.1}),
    "adagrad": (
        fm.optim.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
    ),
}


def make() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(7, 3).double(), torch.randn(7, 2).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optim(name):
    ours, theirs, settings = OPTIMIZERS[name]
    model, x, y = make()
    optimizer = ours(**settings)
    fast = optimizer.init(dict(model.named_parameters()))
    judge = theirs(model.parameters(), **settings)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(20):
        fast = optimizer.minimize(fast, F.mse_loss(functional_call(model, fast.params, (x,)), y))
    for n, p in model.named_parameters():
        assert torch.equal(p, start[n])
    for _ in range(20):
        judge.zero_grad()
        F.mse_loss(model(x), y).backward()
        judge.step()
    assert fast.steps == 20 and set(fast.params) == set(start)
    for n, p in model.named_parameters():
        torch.testing.assert_close(fast.params[n], p.detach(), rtol=1e-11, atol=1e-13)


def eager_adam(params, losses, lr, betas, eps, clip_norm):
    """Adam in plain differentiable torch."""
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for k, loss_of in enumerate(losses, start=1):
        grads = torch.autograd.grad(loss_of(params), params, create_graph=True)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        grads = [g * (clip_norm / norm).clamp(max=1) for g in grads]
        m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, grads, strict=True)]
        v = [betas[1] * a + (1 - betas[1]) * g * g for a, g in zip(v, grads, strict=True)]
        params = [
            p - lr[i] / (1 - betas[0] ** k) * a / ((b / (1 - betas[1] ** k)).sqrt() + eps)
            for i, (p, a, b) in enumerate(zip(params, m, v, strict=True))
        ]
    return params


@pytest.mark.parametrize("way", ["minimize", "step"])
def test_meta_gradients(way):
    """Into the initial parameters, one learned rate per tensor and a learned beta, exactly."""
    model, x, y = make()
    start = list(model.parameters())
    lr = torch.linspace(0.01, 0.05, len(start), dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in model.named_parameters()]

    def loss(params):
        return F.mse_loss(functional_call(model, dict(zip(names, params, strict=True)), (x,)), y)

    wanted = eager_adam(start, [loss] * STEPS, lr, (beta, 0.9), 1e-3, clip_norm=0.5)
    expected = torch.autograd.grad(loss(wanted), [*start, lr, beta])

    optimizer = fm.optim.Adam(lr=lr, betas=(beta, 0.9), eps=1e-3, clip_norm=0.5)
    fast = optimizer.init(start)
    for _ in range(STEPS):
        if way == "minimize":
            fast = optimizer.minimize(fast, loss(fast.params))
        else:
            grads = torch.autograd.grad(loss(fast.params), fast.params, create_graph=True)
            fast = optimizer.step(fast, grads)
    assert isinstance(fast.params, list)
    got = torch.autograd.grad(loss(fast.params), [*start, lr, beta])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_first_order_treats_gradients_as_constants():
    start = torch.tensor([2.0], requires_grad=True)
    optimizer = fm.optim.SGD(lr=0.1)
    for create_graph, slope in ((True, 0.8), (False, 1.0)):
        fast = optimizer.init([start])
        fast = optimizer.minimize(fast, fast.params[0].square().sum(), create_graph=create_graph)
        assert torch.autograd.grad(fast.params[0].sum(), start)[0].item() == pytest.approx(slope)


def test_batched_tasks_equal_separate_ones():
    model, x, y = make()
    tasks = 4
    params = {
        n: torch.stack([p.detach() + 0.1 * t for t in range(tasks)])
        for n, p in model.named_parameters()
    }
    optimizer = fm.optim.Adam(lr=0.05, eps=1e-3)

    def loss(params):
        return F.mse_loss(functional_call(model, params, (x,)), y)

    fast = optimizer.init(params, batched=True)
    for _ in range(STEPS):
        fast = optimizer.minimize(fast, torch.func.vmap(loss)(fast.params))
    for t in range(tasks):
        alone = optimizer.init({n: p[t] for n, p in params.items()})
        for _ in range(STEPS):
            alone = optimizer.minimize(alone, loss(alone.params))
        for n, p in alone.params.items():
            torch.testing.assert_close(fast.params[n][t], p, rtol=1e-10, atol=1e-12)


def test_inside_torch_func():
    """vmap over tasks of a per-task loop, and grad through it, without torch.autograd.grad."""
    model, x, y = make()
    params = {n: p.detach() for n, p in model.named_parameters()}
    optimizer = fm.optim.SGD(lr=0.1, momentum=0.9)

    def adapted_loss(params, shift):
        def loss(p):
            return F.mse_loss(functional_call(model, p, (x + shift,)), y)

        fast = optimizer.init(params)
        for _ in range(2):
            fast = optimizer.step(fast, torch.func.grad(loss)(fast.params))
        return loss(fast.params)

    shifts = torch.randn(3, 1, 1).double()
    gradient = torch.func.vmap(torch.func.grad(adapted_loss), in_dims=(None, 0))(params, shifts)
    for t in range(3):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}

        def loss(p, t=t):
            return F.mse_loss(functional_call(model, p, (x + shifts[t],)), y)

        fast = optimizer.init(leaves)
        for _ in range(2):
            fast = optimizer.minimize(fast, loss(fast.params))
        expected = torch.autograd.grad(loss(fast.params), list(leaves.values()))
        for (_, g), e in zip(gradient.items(), expected, strict=True):
            torch.testing.assert_close(g[t], e, rtol=1e-10, atol=1e-12)


def test_detach_and_rate_of_one_step():
    optimizer = fm.optim.SGD(lr=1.0, momentum=0.5)
    fast = optimizer.init([torch.ones(2)])
    fast = optimizer.step(fast, [torch.ones(2)], lr=0.25).detach()
    assert (
        fast.packed.is_leaf and fast.packed.requires_grad and fast.params[0].tolist() == [0.75] * 2
    )
    fast = optimizer.minimize(fast, fast.params[0].sum(), create_graph=False)
    assert fast.params[0].tolist() == [0.75 - 1.5] * 2
    assert optimizer.step(fast, [None]).steps == 3
    assert "SGD(lr=1.0, Momentum(momentum=0.5" in repr(optimizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, f: o.init([]), "at least one tensor, got none"),
        (
            lambda o, f: o.init([torch.ones(2).long()]),
            "parameter 0 must be a floating-point tensor",
        ),
        (lambda o, f: o.init({"a": 1.0}), "parameter a must be a floating-point tensor, got float"),
        (
            lambda o, f: o.init({"a": torch.ones(2), "b": torch.ones(2).double()}),
            "must share dtype and device: a is torch.float32 on cpu, b is torch.float64 on cpu",
        ),
        (
            lambda o, f: o.init([torch.ones(2, 3), torch.ones(3)], batched=True),
            r"leading task axis: 0 is \[2, 3\], 1 is \[3\]",
        ),
        (lambda o, f: o.step(f, {"a": torch.ones(2)}), r"names of the parameters \['w', 'b'\]"),
        (lambda o, f: o.step(f, [torch.ones(2)]), "expected 2 gradients, got 1"),
        (
            lambda o, f: o.step(f, [torch.ones(2), torch.ones(4)]),
            r"gradient of b must have shape \[3\], got \[4\]",
        ),
        (lambda o, f: o.minimize(f, torch.ones(())), "loss must depend on fast.params"),
        (
            lambda o, f: o.minimize(f, torch.ones((), requires_grad=True) * 2),
            "loss must depend on fast.params",
        ),
        (lambda o, f: fm.optim.Adam(betas=(0.9, 1.0)), r"betas of Adam must be in \[0, 1\), got"),
        (lambda o, f: fm.optim.Adam(lr=-1), "lr of Adam must be at least 0, got -1"),
        (lambda o, f: fm.optim.SGD(lr="0.1"), "lr of SGD must be at least 0, got '0.1'"),
        (lambda o, f: o.step(f, f.packed, lr=-0.1), r"lr of SGD must be at least 0, got -0\.1"),
        (lambda o, f: o.step(f, f.packed, lr=torch.ones(5)), r"lr must be .* S = 2, got"),
        (
            lambda o, f: fm.optim.Adam().step(f, f.packed),
            "expected fast weights of Adam, got those of SGD",
        ),
    ],
)
def test_bad_calls(call, message):
    optimizer = fm.optim.SGD(lr=0.1)
    fast = optimizer.init({"w": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match=message):
        call(optimizer, fast)


def test_parameters_are_for_init():
    """torch's optimizers take them first."""
    module = nn.Linear(2, 3)
    for call in (
        lambda: fm.optim.SGD(module.parameters(), lr=0.1),
        lambda: fm.optim.SGD(module.parameters(), 0.1),
        lambda: fm.optim.SGD(module.parameters()),
    ):
        with pytest.raises(TypeError, match=r"SGD takes no parameters, they are for init"):
            call()
    fast = fm.optim.SGD(0.1).init(module.parameters())
    assert [p.shape for p in fast.params] == [p.shape for p in module.parameters()]


def test_unknown_settings():
    with pytest.raises(TypeError, match=r"SGD has no setting 'momentm' \(did you mean 'momentum'"):
        fm.optim.SGD(0.1, momentm=0.9)
    with pytest.raises(TypeError, match="Adam has no setting 'amsgrad': it has lr, betas, eps"):
        fm.optim.Adam(amsgrad=True)
