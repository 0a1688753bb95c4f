"""`fm.adapt`: what a learner adapts, without gradients, for services."""

from __future__ import annotations

import threading

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine.meter import PeakMemory

TASKS = oracle.make_tasks(4, ragged=True, classes=4)
BATCH = oracle.as_batch(TASKS)
EVERYTHING = fm.Params("*")
RULES = ["sgd", "momentum", "adam", "adamw", rules.RMSprop(eps=1e-4), rules.Momentum(nesterov=True)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1])
def test_nothing_leads_back_to_the_model(chunk: int | None) -> None:
    """Also where most of a table stays the model's own."""
    patched = fm.patch(oracle.tiny_bert(classes=4, words=400), EVERYTHING)
    found = fm.adapt(
        patched, BATCH.support, ways=BATCH.ways, steps=2, lr=0.1, task_chunk=chunk
    ).params
    assert "Narrow" in type(found).__name__
    assert not found.packed.requires_grad
    inputs = {k: v for k, v in BATCH.query.items() if k != "labels"}
    assert not patched(found, **inputs).logits.requires_grad


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("optimizer", RULES, ids=str)
def test_a_learners_weights(optimizer, chunk: int | None) -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    settings = {"lr": 0.01, "steps": 3, "optimizer": optimizer, "clip_norm": 1.0}
    expected = fm.MAML(patched, memory="unroll", **settings)(BATCH)
    found = fm.adapt(patched, BATCH.support, ways=BATCH.ways, task_chunk=chunk, **settings)
    close(found.params.packed, expected.params.packed)
    close(found.support_losses, expected.support_losses)
    assert not found.diverged.any() and not found.params.packed.requires_grad
    inputs = {k: v for k, v in BATCH.query.items() if k != "labels"}
    with torch.no_grad():
        close(patched(found.params, **inputs).logits, expected.logits)


def test_a_task_alone() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    together = fm.adapt(patched, BATCH.support, ways=BATCH.ways, lr=0.1, steps=3)
    for t, task in enumerate(TASKS):
        one = oracle.as_batch([task])
        alone = fm.adapt(patched, one.support, ways=one.ways, lr=0.1, steps=3)
        close(together.params.packed[t], alone.params.packed[0])


def test_going_on_from_adapted_weights() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), fm.Head())
    half = fm.adapt(patched, BATCH.support, lr=0.1, steps=2)
    kept = half.params.packed.clone()
    whole = fm.adapt(patched, BATCH.support, lr=0.1, steps=2, params=half.params)
    close(whole.params.packed, fm.adapt(patched, BATCH.support, lr=0.1, steps=4).params.packed)
    assert torch.equal(half.params.packed, kept)


def test_the_model_stays_as_it_is() -> None:
    model = oracle.tiny_bert(classes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    patched = fm.patch(model, EVERYTHING)
    fm.adapt(patched, BATCH.support, lr=0.1, steps=2)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_memory_does_not_grow_with_the_steps() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)

    def peak(steps: int) -> int:
        fm.adapt(patched, BATCH.support, lr=0.1, steps=1)
        with PeakMemory() as meter:
            fm.adapt(patched, BATCH.support, lr=0.1, steps=steps)
        return meter.peak

    assert peak(8) <= peak(3) + 1024


def test_threads_share_a_model() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    supports = [oracle.as_batch(oracle.make_tasks(2, seed=i)).support for i in range(4)]
    expected = [fm.adapt(patched, s, lr=0.1, steps=2).params.packed for s in supports]
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = fm.adapt(patched, supports[i], lr=0.1, steps=2).params.packed

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        close(got, want)


def test_rates_of_tasks_in_chunks() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    support, found = oracle.as_batch(oracle.make_tasks(4)).support, []
    for chunk in (None, 2):
        rates = fm.LearnedRate(per="task", init=0.1, num_tasks=4)
        learner = fm.MAML(patched, lr=rates, steps=2, task_chunk=chunk)
        oracle.with_varied_rates(learner)
        found.append(learner.adapt(support).packed)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
