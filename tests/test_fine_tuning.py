"""`fm.FineTuner`: against torch.optim on a model of each task's own; tasks that come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine import memory
from fastmeta.engine.fine_tuning import FineTuner
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.places import Place

SETS = [oracle.make_tasks(3, classes=4, seed=seed) for seed in range(4)]
"""Batches of three tasks: support sets of four draws."""
BATCHES = [oracle.as_batch(tasks).support for tasks in SETS]
OPTIMIZERS: dict[str, tuple[rules.UpdateRule, Callable]] = {
    "sgd": (rules.SGD(0.1), lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.1)),
    "momentum": (
        rules.Momentum(0.8, dampening=0.3),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, dampening=0.3),
    ),
    "nesterov": (
        rules.Momentum(0.8, nesterov=True),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True),
    ),
    "adam": (rules.Adam(eps=1e-4), lambda p, lr: torch.optim.Adam(p, lr, eps=1e-4)),
    "adamw": (rules.AdamW(eps=1e-4), lambda p, lr: torch.optim.AdamW(p, lr, eps=1e-4)),
    "rmsprop": (rules.RMSprop(eps=1e-4), lambda p, lr: torch.optim.RMSprop(p, lr, eps=1e-4)),
    "adagrad": (
        rules.Adagrad(lr_decay=0.1, eps=1e-4),
        lambda p, lr: torch.optim.Adagrad(p, lr, lr_decay=0.1, eps=1e-4),
    ),
}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def patched_bert(spec: fm.Spec | None = None) -> fm.Patched:
    return fm.patch(oracle.tiny_bert(classes=4), spec or fm.Params("*"))


class Alone:
    """One task's model and optimizer, as its owner would write it."""

    def __init__(self, optimizer: Callable, lr: float, clip_norm: float | None = None) -> None:
        self.model = oracle.tiny_bert(classes=4)
        self.optimizer = optimizer(self.model.parameters(), lr)
        self.clip_norm = clip_norm

    def step(self, batch: dict[str, Tensor], task: int) -> Tensor:
        inputs = {k: v[task] for k, v in batch.items()}
        labels = inputs.pop("labels")
        loss = F.cross_entropy(self.model(**inputs).logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_norm is not None:
            gradients = [p.grad for p in self.model.parameters()]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for g in gradients:
                g.mul_(min(1.0, self.clip_norm / float(norm)))
        self.optimizer.step()
        return loss

    def check(self, params: fm.TaskParams) -> None:
        own = dict(self.model.named_parameters())
        for name, value in params.items():
            close(value[0], own[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_task_as_alone_with_torchs_optimizer(name: str) -> None:
    """Rates of their own, and steps that not all take: the third waits, then they take turns."""
    rule, optimizer = OPTIMIZERS[name]
    lr = [0.01, 0.02, 0.005]
    tuner = fm.FineTuner(patched_bert(), 3, lr=lr, optimizer=rule, clip_norm=0.5)
    alone = [Alone(optimizer, rate, clip_norm=0.5) for rate in lr]
    turns = [(0, 1), (0, 2), (0, 1, 2), (2, 1)]
    for batch, turn in zip(BATCHES, turns, strict=True):
        found = tuner.step({k: v[list(turn)] for k, v in batch.items()}, turn)
        close(found, torch.stack([alone[t].step(batch, t) for t in turn]))
    assert tuner.steps.tolist() == [3, 3, 3] and not tuner.diverged.any()
    for t in range(3):
        alone[t].check(tuner.task(t))


def test_tasks_come_and_go() -> None:
    rule, optimizer = OPTIMIZERS["adamw"]
    tuner = fm.FineTuner(patched_bert(), ["a", "b"], lr=0.01, optimizer=rule)
    owners = {name: Alone(optimizer, lr) for name, lr in (("a", 0.01), ("b", 0.01), ("c", 0.02))}

    def step(batch: dict[str, Tensor]) -> None:
        tuner.step({k: v[: len(tuner.names)] for k, v in batch.items()})
        for place, name in enumerate(tuner.names):
            owners[name].step(batch, place)

    step(BATCHES[0])
    tuner.add(["c"], lr=0.02)
    assert tuner.names == ("a", "b", "c") and tuner.steps.tolist() == [1, 1, 0]
    step(BATCHES[1])
    owners["b"].check(tuner.remove(["b"]))
    step(BATCHES[2])
    assert tuner.names == ("a", "c") and tuner.params.num_tasks == 2
    for name in tuner.names:
        owners[name].check(tuner.task(name))
    both = torch.cat([tuner.task("c").packed, tuner.task("a").packed])
    assert torch.equal(tuner.remove(["c", "a"]).packed, both)
    assert tuner.names == () and tuner.params.num_tasks == 0
    tuner.add(["d"], lr=0.1, ways=3)
    assert tuner.step({k: v[:1] % 3 if k == "labels" else v[:1] for k, v in BATCHES[0].items()}) > 0


def test_rates_that_change_with_each_tasks_own_steps() -> None:
    tuner = fm.FineTuner(patched_bert(), 2, lr=0.1, optimizer="sgd")
    alone = [Alone(torch.optim.SGD, 0.1) for _ in range(2)]
    for step, turn in enumerate([(0,), (0, 1), (0, 1)]):
        tuner.lr = 0.1 / (1 + tuner.steps.double())
        tuner.step({k: v[list(turn)] for k, v in BATCHES[step].items()}, turn)
        for t in turn:
            alone[t].optimizer.param_groups[0]["lr"] = 0.1 / (1 + step - t)
            alone[t].step(BATCHES[step], t)
    for t in range(2):
        alone[t].check(tuner.task(t))


@pytest.mark.parametrize(
    "settings",
    [{"task_chunk": 2}, {"compile": True}, {"compile": True, "task_chunk": 2}],
    ids=str,
)
def test_chunks_and_captured_steps(settings: dict) -> None:
    spec = fm.LoRA(r=2) + fm.Head()
    tuner = fm.FineTuner(patched_bert(spec), 3, lr=0.01)
    other = fm.FineTuner(patched_bert(spec), 3, lr=0.01, **settings)
    for batch in BATCHES:
        close(other.step(batch), tuner.step(batch))
    close(other.params.packed, tuner.params.packed)


def test_a_task_that_diverges_is_frozen_and_the_others_are_not() -> None:
    spec = fm.Head()
    tuner, calm = (fm.FineTuner(patched_bert(spec), 3, lr=0.01) for _ in range(2))
    calm.step(BATCHES[0])
    tuner.step(BATCHES[0])
    before = tuner.params.packed.clone()
    tuner.params["classifier.weight"][1] = float("nan")
    broken = tuner.params.packed[1].clone()
    tuner.step(BATCHES[1])
    calm.step(BATCHES[1])
    tuner.step(BATCHES[2])
    calm.step(BATCHES[2])
    assert tuner.diverged.tolist() == [False, True, False]
    assert tuner.steps.tolist() == [3, 1, 3]
    assert torch.equal(tuner.params.packed[1].isnan(), broken.isnan())
    assert torch.equal(tuner.params.packed[[0, 2]], calm.params.packed[[0, 2]])
    assert not torch.equal(tuner.params.packed[[0, 2]], before[[0, 2]])


def test_going_on_from_a_state() -> None:
    spec = fm.LoRA(r=2) + fm.Head()
    tuner = fm.FineTuner(patched_bert(spec), ["a", "b", "c"], lr=[0.01, 0.02, 0.03], ways=[4, 3, 4])
    batches = [{**b, "labels": b["labels"] % 3} for b in BATCHES]
    tuner.step(batches[0])
    state = copy.deepcopy(tuner.state_dict())
    other = fm.FineTuner(patched_bert(spec), ["x"], lr=1.0, ways=2)
    other.load_state_dict(state)
    assert other.names == ("a", "b", "c")
    for batch in batches[1:]:
        assert torch.equal(tuner.step(batch), other.step(batch))
    assert torch.equal(tuner.params.packed, other.params.packed)
    assert torch.equal(tuner.steps, other.steps)


def test_starting_from_given_weights_leaves_them_alone() -> None:
    patched = patched_bert(fm.Head())
    half = fm.adapt(patched, BATCHES[0], lr=0.1, steps=2)
    kept = half.params.packed.clone()
    tuner = fm.FineTuner(patched, 3, lr=0.1, optimizer="sgd", params=half.params)
    tuner.step(BATCHES[0])
    tuner.step(BATCHES[0])
    close(tuner.params.packed, fm.adapt(patched, BATCHES[0], lr=0.1, steps=4).params.packed)
    assert torch.equal(half.params.packed, kept)


class Unaware(rules.UpdateRule):
    def update(self, params, grads, state, lr, step, *, active=None, segments=None):
        return params - lr * grads, state


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tasks": 0}, ValueError, "expected at least one task, got none"),
        ({"tasks": ["a", "b", "a"]}, ValueError, "a name of its own, got 'a' twice"),
        ({"tasks": "acme"}, TypeError, r"expected a list of names, such as \['acme'\]"),
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0.0"),
        ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
        ({"lr": [0.1, 0.2]}, ValueError, "a number or one for each of 3 tasks"),
        ({"optimizer": Unaware()}, ValueError, "which Unaware does not know"),
        ({"task_chunk": 0}, ValueError, "task_chunk must be an integer of at least 1, None or"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be positive or None"),
        ({"ways": [1, 2]}, ValueError, r"ways must have shape \[3\]"),
        ({"ways": [1, 2, 5]}, ValueError, r"ways must be in 1..4, got \[1, 2, 5\]"),
        ({"ways": 0}, ValueError, r"ways must be in 1..4, got \[0, 0, 0\]"),
    ],
)
def test_wrong_settings(settings: dict, error: type, message: str) -> None:
    given = {"tasks": 3, "lr": 0.1} | settings
    with pytest.raises(error, match=message):
        fm.FineTuner(patched_bert(fm.Head()), **given)


def test_wrong_calls_change_nothing() -> None:
    patched = patched_bert(fm.Head())
    tuner = fm.FineTuner(patched, ["acme", "bolt", "coda"], lr=0.1)
    before = tuner.params.packed.clone()
    batch = BATCHES[0]
    for call, message in [
        (lambda: tuner.step(batch, ["acme", "bold"]), r"no task 'bold' \(did you mean 'bolt'"),
        (lambda: tuner.step(batch, ["acme", "acme"]), "expected tasks, each once"),
        (lambda: tuner.step(batch, ["acme"]), "expected a batch of 1 tasks, got 3"),
        (lambda: tuner.step({**batch, "labels": batch["labels"] + 9}), "batch labels must be in"),
        (lambda: tuner.add(["acme"], lr=0.1), "a name of its own, got 'acme' twice"),
        (lambda: tuner.add(["dune"], lr=0.1, ways=3), "ways must be given for all tasks or"),
        (lambda: tuner.remove(["dune"]), "there is no task 'dune'"),
        (lambda: tuner.task("dune"), "there is no task 'dune'"),
        (lambda: tuner.load_state_dict({}), "expected the state of a FineTuner"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    others = {
        "another optimizer: expected AdamW": fm.FineTuner(patched, 3, lr=0.1, optimizer="sgd"),
        "another model or specification": fm.FineTuner(patched_bert(fm.LoRA(r=2)), 3, lr=0.1),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            tuner.load_state_dict(other.state_dict())
    with pytest.raises(TypeError, match=r"inputs of a fm\.data\.Minibatch, got list"):
        tuner.step([batch])
    with pytest.raises(TypeError, match="expected a list of names"):
        tuner.step(batch, "acme")
    tuner.lr = [0.1, 0.2, -0.1]
    with pytest.raises(ValueError, match="lr must be at least 0"):
        tuner.step(batch)
    assert torch.equal(tuner.params.packed, before) and tuner.steps.tolist() == [0, 0, 0]
    with pytest.raises(TypeError, match="expected a patched model"):
        fm.FineTuner(torch.nn.Linear(2, 2), 3, lr=0.1)


def test_a_task_that_diverged_is_left_alone() -> None:
    def scaled(outputs, batch) -> Tensor:
        rows = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none").mean(1)
        return rows * batch["labels_by"][:, 0]

    support = oracle.as_batch(oracle.make_tasks(2)).support
    tuner = fm.FineTuner(fm.patch(oracle.tiny_bert(), fm.Head()), 2, lr=0.1, loss_fn=scaled)
    by = torch.ones(2, 3, dtype=torch.float64)
    bad = by.clone()
    bad[1] = float("nan")
    tuner.step(support | {"labels_by": bad})
    kept = tuner.params.packed[1].clone()
    tuner.step(support | {"labels_by": by})
    assert tuner.diverged.tolist() == [False, True] and tuner.steps.tolist() == [2, 0]
    assert torch.equal(tuner.params.packed[1], kept)


@pytest.mark.parametrize("chunk", [None, 2])
def test_adjacent_tasks_after_the_first(chunk: int | None) -> None:
    support = oracle.as_batch(oracle.make_tasks(4)).support
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    tuner = fm.FineTuner(patched, range(4), lr=0.1, task_chunk=chunk)
    before = tuner.params.packed.clone()
    tuner.step({k: v[1:] for k, v in support.items()}, [1, 2, 3])
    assert (tuner.params.packed != before).any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("names", [[0, 1, 2, 3], [3, 1, 0]])
def test_as_many_tasks_as_have_room(names: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the free memory, and where that was wrong by errors: no task takes a step twice."""
    support = oracle.as_batch(oracle.make_tasks(len(names))).support
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    plain, auto = (fm.FineTuner(patched, 4, lr=0.1, task_chunk=c) for c in (None, "auto"))
    assert torch.equal(auto.step(support, names), plain.step(support, names))
    (plan,) = auto._plans[len(names) == 4].known.values()
    with PeakMemory() as meter:
        plain.step(support, names)
    auto.step(support, names)
    assert plan.task_chunk is None and 0.8 <= plan.predicted_bytes / meter.peak <= 1.2
    step, sizes = FineTuner._step, []

    def limited(self: FineTuner, place: Place, inputs: dict) -> Tensor:
        sizes.append(len(inputs["labels"]))
        if sizes[-1] > 1 and len(sizes) != 2:  # what the second one has is enough for two
            raise MemoryError
        return step(self, place, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "_step", limited)
        losses = auto.step(support, names)
    assert torch.equal(losses, plain.step(support, names))
    assert sizes == ([4, 2, 2, 1, 1] if len(names) == 4 else [3, 2, 1])
    assert torch.equal(auto.params.packed, plain.params.packed)
    assert torch.equal(auto.steps, plain.steps)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    little = fm.FineTuner(patched, 4, lr=0.1, task_chunk="auto")
    little.step(support, names)
    assert [plan.task_chunk for plan in little._plans[len(names) == 4].known.values()] == [1]


def test_what_a_tuner_gives_and_takes_are_copies() -> None:
    tuner = fm.FineTuner(fm.patch(oracle.tiny_bert(), fm.Head()), ["a", "b"], lr=0.1)
    kept = tuner.task("a")
    before = kept.packed.clone()
    tuner.step(oracle.as_batch(oracle.make_tasks(2)).support)
    assert torch.equal(kept.packed, before)
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    tuner.lr = rates
    rates.zero_()
    assert tuner.lr.tolist() == [0.1, 0.2]


def test_all_tasks_leave_and_others_come_without_ways() -> None:
    tuner = fm.FineTuner(fm.patch(oracle.tiny_bert(), fm.Head()), ["a", "b"], lr=0.1, ways=3)
    tuner.remove(["a", "b"])
    tuner.add(["c", "d"], lr=0.1)
    tuner.step(oracle.as_batch(oracle.make_tasks(2)).support)
    assert tuner.steps.tolist() == [1, 1]
