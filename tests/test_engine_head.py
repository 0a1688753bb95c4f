"""A plain linear head runs its inner loop in one operator, with the numbers of the general loop."""

from __future__ import annotations

from collections.abc import Callable

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.engine import episode, head
from fastmeta.engine.optimizers import SGD, Momentum
from fastmeta.models import SentenceClassifier

TASKS = oracle.make_tasks(3)
RAGGED = oracle.make_tasks(4, ragged=True, classes=4)


@pytest.fixture(scope="module")
def patched() -> fm.Patched:
    return fm.patch(oracle.tiny_bert(classes=4), fm.Head())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of every call of the operator by the engine."""
    seen: list[int] = []
    operator = head.ops.head_inner_loop

    def counted(*args, **kwargs):
        seen.append(args[5])
        return operator(*args, **kwargs)

    monkeypatch.setattr(head.ops, "head_inner_loop", counted)
    return seen


def general(monkeypatch: pytest.MonkeyPatch, run: Callable):
    """`run()` by the general loop."""
    with monkeypatch.context() as patch:
        patch.setattr(episode, "adapt_head", lambda *_: None)
        return run()


def results(learner, batch) -> dict[str, Tensor]:
    """Everything an episode gives, and the meta-gradient."""
    out = learner(batch)
    found = {
        "losses": out.task_losses,
        "logits": out.logits,
        "params": out.params.packed,
        "support": out.support_losses,
        "diverged": out.diverged.double(),
        "accuracy": out.accuracy.double(),
    }
    return {**found, **oracle.gradients(learner, out.loss)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for t, e in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(t.isnan(), e.isnan())
    found, expected = ({n: t.nan_to_num() for n, t in x.items()} for x in (found, expected))
    oracle.assert_close(found, expected)
    for name in ("losses", "params", "support"):
        oracle.assert_close({name: found[name]}, {name: expected[name]})


SETTINGS = {
    "sgd": {},
    "first order": {"order": 1},
    "truncated": {"truncate": 1},
    "momentum": {"optimizer": Momentum(0.8, weight_decay=0.1)},
    "decay": {"optimizer": SGD(weight_decay=0.2), "memory": "recompute"},
    "first order momentum": {"optimizer": Momentum(0.7, weight_decay=0.1), "order": 1},
    "one rate": {"lr": fm.LearnedRate(per=(), init=0.3)},
    "rate per step": {"lr": fm.LearnedRate(per="step", init=0.3), "order": 1},
    "rate per task": {"lr": fm.LearnedRate(per=("task", "step"), init=0.3, num_tasks=4)},
    "chunks": {"task_chunk": 3, "memory": "unroll"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_general_loop(name, patched, calls, monkeypatch) -> None:
    settings = {"lr": 0.3, "steps": 3, **SETTINGS[name]}
    learner = fm.ANIL(patched, **settings)
    if isinstance(settings["lr"], fm.LearnedRate):
        oracle.with_varied_rates(learner)
    batch = oracle.as_batch(RAGGED)
    found = results(learner, batch)
    assert calls and set(calls) <= {1, 2, 3}
    calls.clear()
    expected = general(monkeypatch, lambda: results(learner, batch))
    assert not calls
    assert_equal(found, expected)


@pytest.mark.parametrize("order", [1, 2])
def test_equals_the_oracle(order: int, patched, calls) -> None:
    learner = fm.ANIL(patched, lr=0.3, steps=3, order=order)
    out = learner(oracle.as_batch(TASKS))
    assert calls
    oracle.assert_same(learner, out, oracle.loop(learner, TASKS), TASKS)


def test_a_sentence_classifier_and_adapt(calls, monkeypatch) -> None:
    """Features computed between the last module and the head; no gradients in `fm.adapt`."""
    model = SentenceClassifier(oracle.tiny_bert().bert, num_labels=3, scale=5.0).double()
    patched = fm.patch(model, fm.Head())
    learner = fm.ANIL(patched, lr=0.3, steps=2)
    batch = oracle.as_batch(TASKS)
    assert_equal(results(learner, batch), general(monkeypatch, lambda: results(learner, batch)))

    def adapted() -> Tensor:
        return fm.adapt(patched, batch.support, steps=3, lr=0.2, optimizer="momentum").params.packed

    calls.clear()
    found = adapted()
    assert calls == [3]
    torch.testing.assert_close(found, general(monkeypatch, adapted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_that_diverges(value: float, calls, monkeypatch) -> None:
    """Frozen at the same step, with the same results and meta-gradient of the others."""
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.ANIL(patched, lr=0.3, steps=3, optimizer="momentum")
    batch = oracle.as_batch(TASKS)
    for ids in (batch.support["input_ids"], batch.query["input_ids"]):
        ids[ids == 19] = 1
    batch.support["input_ids"][1, 0, 0] = 19
    with torch.no_grad():
        patched.model.bert.embeddings.word_embeddings.weight[19] = value
    found = results(learner, batch)
    assert calls and found["diverged"].tolist() == [0, 1, 0]
    assert_equal(found, general(monkeypatch, lambda: results(learner, batch)))


GENERAL = {
    "clipped": {"clip_norm": 1.0},
    "adam": {"optimizer": "adam"},
    "nesterov": {"optimizer": Momentum(0.9, nesterov=True)},
    "rate per layer": {"lr": fm.LearnedRate(per="layer", init=0.1)},
    "own loss": {"loss_fn": lambda out, batch: out.logits.square().mean((1, 2))},
}


@pytest.mark.parametrize("name", GENERAL)
def test_other_settings_take_the_general_loop(name, patched, calls) -> None:
    settings = {"lr": 0.1, "steps": 2, **GENERAL[name]}
    fm.ANIL(patched, **settings)(oracle.as_batch(TASKS))
    assert not calls


class Scaled(torch.nn.Module):
    """A head whose output is not the logits, or is not given on one row per example."""

    base_model_prefix = "body"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = torch.nn.Embedding(20, 6)
        self.head = torch.nn.Linear(6, 3)
        self.kind = kind

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.body(input_ids)
        if self.kind == "tokens":
            return self.head(x)[:, 0]
        if self.kind == "noise" and self.training:
            return self.head(x.mean(1) + 0.1 * torch.rand(6))
        logits = self.head(x.mean(1))
        if self.kind == "scaled":
            return 2 * logits
        if self.kind == "in place":
            logits += 1.0
        return logits


@pytest.mark.parametrize("kind", ["plain", "tokens", "scaled", "in place", "noise"])
def test_only_logits_of_the_head_itself(kind: str, calls, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Scaled(kind).double()
    learner = fm.ANIL(fm.patch(model.train(kind == "noise"), fm.Head()), lr=0.3, steps=2)
    batch = oracle.as_batch(TASKS)
    torch.manual_seed(0)
    found = learner(batch)
    assert bool(calls) is (kind == "plain")
    if kind != "noise":
        expected = general(monkeypatch, lambda: learner(batch))
        torch.testing.assert_close(found.logits, expected.logits)


def test_dropout_takes_the_general_loop(calls) -> None:
    model = oracle.tiny_bert(dropout=0.2)
    fm.ANIL(fm.patch(model, fm.Head()), lr=0.1, steps=2)(oracle.as_batch(TASKS))
    assert not calls


def test_fast_weights_are_read_by_several_modules(calls) -> None:
    fm.MAML(fm.patch(oracle.tiny_bert(), fm.Head() + fm.Norm()), lr=0.1, steps=2)(
        oracle.as_batch(TASKS)
    )
    assert not calls


@pytest.mark.parametrize("settings", [{"dampening": 0.4}, {"nesterov": True}], ids=str)
def test_momentum_of_all_kinds(settings: dict) -> None:
    patched, tasks = fm.patch(oracle.tiny_bert(), fm.Head()), oracle.make_tasks()
    learner = fm.MAML(patched, lr=0.1, steps=3, optimizer=Momentum(**settings))
    expected = oracle.loop(learner, tasks, rule=lambda *a: oracle.momentum(*a, **settings))
    oracle.assert_same(learner, learner(oracle.as_batch(tasks)), expected, tasks)
