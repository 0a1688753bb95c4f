"""A memory budget: steps kept as far as it reaches, peaks inside it, and backward passes that run
out of memory."""

from __future__ import annotations

from dataclasses import replace

import episode_oracle as oracle
import pytest
import torch
from test_engine_memory import ERRORS, peak

import fastmeta as fm
from fastmeta.engine import chunks
from fastmeta.engine.budget import budget_bytes, readable
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.prediction import predict

BATCH = oracle.as_batch(oracle.make_tasks(4))
EVERYTHING = fm.Params("*")


def plan_of(learner: fm.MAML) -> MemoryPlan:
    (plan,) = learner.plans.known.values()
    return plan


def with_plan(monkeypatch: pytest.MonkeyPatch, **plan) -> None:
    choose = "fastmeta.engine.memory_plans.choose_plan"
    monkeypatch.setattr(choose, lambda *args: MemoryPlan("recompute", **plan))


# -- steps that are kept ---------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "compile"), [(1, False), (3, False), (2, True)])
def test_kept_steps_are_exact(keep: int, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_plan(monkeypatch, keep=keep)
    tasks = oracle.make_tasks(3)
    patched = fm.patch(oracle.tiny_bert(layers=2), fm.Params("bert.encoder.layer.1", "classifier"))
    rate = fm.LearnedRate(per=("layer", "step"), init=0.1)
    learner = fm.MAML(patched, lr=rate, steps=3, optimizer="momentum", compile=compile)
    oracle.with_varied_rates(learner)
    out = learner(oracle.as_batch(tasks))
    oracle.assert_same(learner, out, oracle.loop(learner, tasks, rule=oracle.momentum), tasks)


@pytest.mark.parametrize("chunk", [None, 2])
def test_kept_steps_draw_the_masks_of_their_forward_pass(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = fm.patch(oracle.tiny_bert(dropout=0.3), EVERYTHING)
    found = []
    for keep in (0, 2):
        with_plan(monkeypatch, keep=keep, task_chunk=chunk)
        torch.manual_seed(5)
        learner = fm.MAML(patched, lr=0.1, steps=3)
        found.append(oracle.gradients(learner, learner(BATCH).loss))
    oracle.assert_close(found[1], found[0], 1e-12)


@pytest.mark.parametrize("compile", [False, True])
def test_kept_steps_serve_two_backward_passes(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plan(monkeypatch, keep=2, free_mode=True)
    learner = fm.MAML(fm.patch(oracle.tiny_bert(), EVERYTHING), lr=0.1, steps=3, compile=compile)
    once = oracle.gradients(learner, learner(BATCH).loss)
    out = learner(BATCH)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    twice = {n: p.grad for n, p in learner.named_parameters()}
    oracle.assert_close(twice, {n: 2 * g for n, g in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


# -- budgets ---------------------------------------------------------------------------------

CASES = {
    "everything": (1, EVERYTHING, {"steps": 6}, (1.2, 0.85, 0.45)),
    "lora": (1, fm.LoRA(r=2) + fm.Head(), {"steps": 4}, (1.2, 0.6, 0.35)),
    "last layer": (2, fm.Params("bert.encoder.layer.1", "classifier"), {"steps": 4}, (1.2, 0.5)),
    "adam": (1, EVERYTHING, {"steps": 4, "optimizer": "adam"}, (1.2, 0.7)),
    "first order": (1, EVERYTHING, {"steps": 4, "order": 1}, (1.2,)),
}


@pytest.mark.parametrize("name", CASES)
def test_peaks_stay_inside_the_budget(name: str) -> None:
    """And are predicted within 20 %, whatever was chosen."""
    layers, spec, settings, shares = CASES[name]
    patched = fm.patch(oracle.tiny_bert(layers=layers), spec)
    loop = fm.MAML(patched, lr=0.01, **settings).inner_loop()
    batch = BATCH.select(torch.arange(8) % 4)
    whole = predict(replace(loop, by_leaf=False), batch, "unroll").bytes(8)
    chosen = []
    for share in shares:
        learner = fm.MAML(patched, lr=0.01, memory_budget=int(share * whole), **settings)
        measured, plan = peak(learner, batch), plan_of(learner)
        chosen.append((plan.mode, plan.keep, plan.task_chunk))
        print(f"{name} {share}: {chosen[-1]} {plan.predicted_bytes / measured:.3f}")
        assert measured <= share * whole
        assert 0.8 <= plan.predicted_bytes / measured <= 1.2
    assert chosen[0] == ("unroll", 0, None) and len(set(chosen)) == len(chosen)


def test_more_memory_keeps_more_steps() -> None:
    patched = fm.patch(oracle.tiny_bert(layers=2), EVERYTHING)
    loop = fm.MAML(patched, lr=0.01, steps=8).inner_loop()
    loop = replace(loop, by_leaf=False)
    low, high = (predict(loop, BATCH, mode).bytes(4) for mode in ("recompute", "unroll"))
    kept = []
    for share in (0.05, 0.4, 0.8):
        budget = int((low + share * (high - low)) / 0.9)
        learner = fm.MAML(patched, lr=0.01, steps=8, memory_budget=budget)
        learner(BATCH)
        kept.append(plan_of(learner).keep)
    assert kept == sorted(set(kept)) and kept[-1] < 8


def test_evaluation_keeps_the_budget() -> None:
    patched = fm.patch(oracle.tiny_bert(layers=2), EVERYTHING)
    learner = fm.MAML(patched, lr=0.01, steps=4)
    with torch.no_grad():
        need = predict(learner.inner_loop(), BATCH, "unroll")
        learner = fm.MAML(patched, lr=0.01, steps=4, memory_budget=int(need.chunk(2, 4) / 0.89))
        learner(BATCH)
    assert plan_of(learner).task_chunk in (2, 3)


def test_a_budget_that_one_task_exceeds() -> None:
    learner = fm.MAML(fm.patch(oracle.tiny_bert(), EVERYTHING), memory_budget="10 KiB")
    with pytest.raises(ValueError, match=r"needs about \d.*MiB|KiB, got 10 KiB"):
        learner(BATCH)


def test_budgets_in_words() -> None:
    assert budget_bytes(None) is None
    assert budget_bytes("8GiB") == 8 << 30 and budget_bytes(12) == 12
    assert budget_bytes(" 1.5 mb ") == 1_500_000 and budget_bytes("4096") == 4096
    for bad in ("8 gigs", "GiB", "-1GiB", 0, -5, "0"):
        with pytest.raises(ValueError, match="a number of bytes above 0, or a text such as '8GiB'"):
            budget_bytes(bad)
    for bad in (True, 1.5):
        with pytest.raises(TypeError, match="memory_budget"):
            budget_bytes(bad)
    assert [readable(n) for n in (3, 2048, 3 << 29)] == ["3 bytes", "2 KiB", "1.5 GiB"]
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    with pytest.raises(ValueError, match="memory_budget needs memory='auto' or task_chunk='auto'"):
        fm.MAML(patched, memory="unroll", memory_budget="1GiB")


# -- running out of memory in the backward pass of all tasks at once -------------------------


@pytest.mark.parametrize("plan", ["unroll", "keep"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_backward_pass_of_all_tasks_out_of_memory(
    plan: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    settings = {"lr": 0.1, "steps": 2, "optimizer": "momentum"}  # plain SGD would run by leaf
    reference = fm.MAML(patched, memory="unroll", **settings)
    expected = oracle.gradients(reference, reference(BATCH).loss)
    if plan == "keep":
        with_plan(monkeypatch, keep=1, free_mode=True, free_chunk=True)
    learner = fm.MAML(patched, **settings)
    original, failures = chunks.backpropagate, [error]

    def limited(*args, **kwargs):
        if failures:
            raise failures.pop()
        return original(*args, **kwargs)

    monkeypatch.setattr(chunks, "backpropagate", limited)
    oracle.assert_close(oracle.gradients(learner, learner(BATCH).loss), expected)
    found = plan_of(learner)
    assert not failures and (found.mode, found.keep, found.task_chunk) == ("recompute", 0, 2)


def test_other_errors_of_the_backward_pass_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    learner = fm.MAML(patched, lr=0.1, steps=2, optimizer="momentum")
    out = learner(BATCH)

    def broken(*args, **kwargs):
        raise RuntimeError("no memory of this")

    monkeypatch.setattr(chunks, "backpropagate", broken)
    with pytest.raises(RuntimeError, match="no memory of this"):
        out.loss.backward()


def test_a_loss_with_parameters_of_its_own_learns() -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def loss_fn(outputs, batch):
        return scale * outputs.logits.square().mean((1, 2))

    learner = fm.MAML(fm.patch(oracle.tiny_bert(), fm.Head()), lr=0.1, steps=2, loss_fn=loss_fn)
    learner(BATCH).loss.backward()
    assert scale.grad is not None and scale.grad.abs() > 0
