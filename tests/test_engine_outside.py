"""Gradients that leave a learner: to what made its batch, to what its loss holds, past hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm

T, N, D, C = 3, 4, 5, 3
STEPS, RATE = 2, 0.1

MODES = {
    "default": {},
    "adam": {"optimizer": "adam"},
    "clipped": {"clip_norm": 0.5},
    "layers": {"lr": fm.LearnedRate(per="layer", init=RATE)},
    "first order": {"order": 1},
    "recompute": {"memory": "recompute"},
    "recompute adam": {"memory": "recompute", "optimizer": "adam"},
    "chunks": {"task_chunk": 1},
    "chunks of two": {"task_chunk": 2, "memory": "recompute"},
    "budget": {"memory_budget": "1GiB"},
    "captured": {"compile": True},
    "captured adam": {"compile": True, "optimizer": "adam"},
    "captured chunks": {"compile": True, "task_chunk": 2},
}
PLAIN = ("memory", "task_chunk", "memory_budget", "compile")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).double()


def raw() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, N, D, generator=g, dtype=torch.float64)
    return x[0], x[1], torch.arange(N).expand(T, N) % C


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def gradients(
    settings: dict, front: nn.Module, loss_fn: object = "classification", **others: object
) -> list[Tensor]:
    """To the front, the network and the losses' `others`, of weighted tasks."""
    support, query, labels = raw()
    model = network()
    given = {"lr": RATE, "steps": STEPS, "loss_fn": loss_fn, **settings}
    learner = fm.MAML(fm.patch(model, fm.Params("*")), **given)
    sets = [{"input": front(x), "labels": labels} for x in (support, query)]
    losses = learner(fm.TaskBatch(*sets)).task_losses
    wanted = [*front.parameters(), *model.parameters(), *others.values()]
    loss = (losses * torch.arange(1, T + 1)).sum()
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def by_hand(front: nn.Module, scale: Tensor | None = None) -> list[Tensor]:
    """One task after another, in plain torch."""
    support, query, labels = raw()
    model, total = network(), 0
    factor = 1 if scale is None else scale

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return factor * F.cross_entropy(torch.func.functional_call(model, weights, (front(x),)), y)

    for t in range(T):
        weights = dict(model.named_parameters())
        for _ in range(STEPS):
            found = torch.autograd.grad(
                loss(weights, support[t], labels[t]), list(weights.values()), create_graph=True
            )
            weights = {n: w - RATE * g for (n, w), g in zip(weights.items(), found, strict=True)}
        total = total + (t + 1) * loss(weights, query[t], labels[t])
    wanted = [*front.parameters(), *model.parameters(), *([] if scale is None else [scale])]
    return list(torch.autograd.grad(total, wanted))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_what_made_the_batch(mode: str) -> None:
    torch.manual_seed(2)
    front = nn.Linear(D, D).double()
    settings = MODES[mode]
    plain = {k: v for k, v in settings.items() if k not in PLAIN} | {"memory": "unroll"}
    expected = gradients(plain, front)
    if plain == {"memory": "unroll"}:
        assert_close(expected, by_hand(front))
    assert_close(gradients(settings, front), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_what_made_the_batch_by_implicit_gradients(batched: bool) -> None:
    """The derivative that is left out by none: of the linear system's right-hand side."""
    torch.manual_seed(2)
    front, (support, query, labels) = nn.Linear(D, D).double(), raw()
    model = nn.Linear(D, C).double()
    learner = fm.IMAML(
        fm.patch(model, fm.Params("*")), lr=0.5, steps=400, lam=2.0, cg_steps=30,
        task_chunk=1 if batched else None,
    )  # fmt: skip
    sets = [{"input": front(x), "labels": labels} for x in (support, query)]
    loss = learner(fm.TaskBatch(*sets)).loss
    found = torch.autograd.grad(loss, list(front.parameters()))
    value = []
    for sign in (1, -1):
        with torch.no_grad():
            front.weight[0, 0] += sign * 1e-5
            sets = [{"input": front(x), "labels": labels} for x in (support, query)]
            value.append(learner(fm.TaskBatch(*sets)).loss)
            front.weight[0, 0] -= sign * 1e-5
    slope = (value[0] - value[1]) / 2e-5
    torch.testing.assert_close(found[0][0, 0], slope, rtol=1e-6, atol=1e-9)


SCALE = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.scale * cross_entropy(outputs, batch["labels"])


class Object:
    def __init__(self) -> None:
        self.scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def __call__(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.scale * cross_entropy(outputs, batch["labels"])


def in_a_lambda() -> tuple[Callable, Tensor]:
    module = Scaled()
    return (lambda outputs, batch: module(outputs, batch)), module.scale


def in_a_method() -> tuple[Callable, Tensor]:
    module = Scaled()
    return module.forward, module.scale


def in_a_list() -> tuple[Callable, Tensor]:
    scales = [torch.tensor(1.5, dtype=torch.float64, requires_grad=True)]
    return (lambda outputs, batch: scales[0] * cross_entropy(outputs, batch["labels"])), scales[0]


def scaled(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return SCALE * cross_entropy(outputs, batch["labels"])


def in_an_object() -> tuple[Callable, Tensor]:
    loss = Object()
    return loss, loss.scale


def by_name() -> tuple[Callable, Tensor]:
    return (lambda outputs, batch: scaled(outputs, batch)), SCALE


@pytest.mark.parametrize("make", [in_a_lambda, in_a_method, in_a_list, in_an_object, by_name])
@pytest.mark.parametrize("mode", ["default", "recompute", "chunks", "budget", "captured"])
def test_what_a_loss_holds(make: Callable, mode: str) -> None:
    front = nn.Identity()
    loss, scale = make()
    assert_close(gradients(MODES[mode], front, loss, scale=scale), by_hand(front, scale))


argmax: Tensor | None = None
"""Of the last step, as scripts keep it: its name is that of a method, too."""


@pytest.mark.parametrize("mode", ["default", "recompute", "chunks"])
def test_what_a_loss_logs(mode: str) -> None:
    """Of earlier steps, whose graphs are gone."""
    global argmax
    history, last = [], None

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        nonlocal last
        assert outputs.argmax(-1).shape == batch["labels"].shape
        last = cross_entropy(outputs, batch["labels"])
        history.append(last)
        return last

    support, query, labels = raw()
    batch = fm.TaskBatch(*({"input": x, "labels": labels} for x in (support, query)))
    learner = fm.MAML(fm.patch(network(), fm.Params("*")), lr=RATE, loss_fn=loss, **MODES[mode])
    for _ in range(3):
        argmax = learner(batch).loss
        argmax.backward()
    assert len(history) > 3 and last is history[-1]


@pytest.mark.parametrize("mode", ["default", "recompute", "chunks", "budget", "captured"])
def test_hooks_of_shared_weights(mode: str) -> None:
    """They see a gradient once, whole."""
    support, query, labels = raw()
    batch = fm.TaskBatch(*({"input": x, "labels": labels} for x in (support, query)))
    model, seen = network(), []
    settings = {"lr": RATE, "steps": STEPS, **MODES[mode]}
    learner = fm.MAML(fm.patch(model, fm.Params("2")), **settings)
    learner(batch).loss.backward()
    expected, model[0].weight.grad = model[0].weight.grad, None

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient / 4

    model[0].weight.register_hook(hook)
    learner = fm.MAML(fm.patch(model, fm.Params("2")), **settings)
    learner(batch).loss.backward()
    assert len(seen) == 1
    assert_close([model[0].weight.grad], [expected / 4])


@pytest.mark.parametrize("mode", ["adam", "recompute", "chunks", "captured"])
def test_a_penalty_on_the_meta_gradient(mode: str) -> None:
    """Exact where the loss is differentiable twice, else refused."""
    support, query, labels = raw()
    batch = fm.TaskBatch(*({"input": x, "labels": labels} for x in (support, query)))
    patched = fm.patch(network(), fm.Params("*"))

    def penalty(**settings: object) -> list[Tensor]:
        learner = fm.MAML(patched, lr=RATE, steps=STEPS, **settings)
        weights = list(learner.parameters())
        found = torch.autograd.grad(learner(batch).loss, weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in found), weights))

    with pytest.raises(RuntimeError, match="the meta-gradient is differentiable once here"):
        penalty(**MODES[mode])
    assert all(g.any() for g in penalty(memory="unroll"))
