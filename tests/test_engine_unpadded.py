"""Learners on layers without padding: what adapts, memory modes, captured steps, memory plans."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import episode_oracle
import pytest
import torch
from torch import Tensor, nn
from unpadded_texts import (
    EVERYTHING,
    LENGTH,
    masks,
    padded,
    texts,
    watched,
)

import fastmeta as fm
from fastmeta.engine import memory, memory_plans
from fastmeta.engine.capture import Capture
from fastmeta.engine.memory_plans import growth

# -- what adapts -----------------------------------------------------------------------------

SPECS = {
    "everything": EVERYTHING,
    "LoRA and head": fm.LoRA(r=2) + fm.Head(),
    "last layer": fm.Params("bert.encoder.layer.2", "classifier"),
    "middle layer": fm.Params("bert.encoder.layer.1"),
    "head": fm.Params("classifier"),
    "prefix": fm.Prefix(2),
}


def bert(**settings) -> nn.Module:
    return episode_oracle.tiny_bert(layers=3, **settings)


@cache
def tasks(seed: int = 0) -> list[episode_oracle.Task]:
    """Three tasks of three support texts and two query texts, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths in ([5, 2, 8], [1, 2, 1], [3, 4, 2]):
        sets = []
        for rows in (3, 2):
            mask = masks(torch.tensor(lengths[:rows]))
            ids = torch.randint(1, 20, mask.shape, generator=generator)
            labels = torch.randperm(3, generator=generator)[:rows]
            sets.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        found.append((*sets, None))
    return found


SUPPORT, QUERY = (3, 15), (3, 7)
"""Tasks, and tokens of the fullest."""


def support_of(batch: fm.TaskBatch) -> dict[str, Tensor]:
    return memory.model_inputs(batch.support)


def steps_of(learner: nn.Module, *, seed: int | None = None) -> tuple[dict[str, Tensor], set]:
    """Losses and meta-gradients of one batch, and what layers saw."""
    batch = episode_oracle.as_batch(tasks())
    with watched(learner.patched.plan(support_of(batch))) as shapes:
        if seed is not None:
            torch.manual_seed(seed)
        out = learner(batch)
        found = episode_oracle.gradients(learner, out.loss)
    found |= {"losses": out.task_losses, "logits": out.logits}
    return {n: t.detach() for n, t in found.items()}, set(shapes)


@cache
def expected(name: str, order: int = 2) -> dict[str, Tensor]:
    """The same by a loop over tasks."""
    return by_loop(fm.MAML(fm.patch(bert(), SPECS[name]), lr=0.1, steps=2, order=order))


def by_loop(learner: fm.MAML) -> dict[str, Tensor]:
    episode = episode_oracle.loop(learner, tasks())
    found = episode.gradients()
    found |= {"losses": torch.stack(episode.losses), "logits": torch.stack(episode.logits)}
    return {n: t.detach() for n, t in found.items()}


@pytest.mark.parametrize("name", SPECS)
def test_specifications(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[dict[str, Tensor], set]:
        patched = fm.patch(bert(), SPECS[name])
        return steps_of(fm.MAML(patched, lr=0.1, steps=2, memory="unroll"))

    found, shapes = run()
    kept, kept_shapes = padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY} and kept_shapes == {(9, LENGTH), (6, LENGTH)}
    episode_oracle.assert_close(found, kept)
    if name != "prefix":
        episode_oracle.assert_close(found, expected(name))


@pytest.mark.parametrize("name", ["last layer", "middle layer"])
def test_a_stored_prefix_is_that_of_tokens(name: str) -> None:
    patched = fm.patch(bert(), SPECS[name])
    inputs = {
        k: v for k, v in support_of(episode_oracle.as_batch(tasks())).items() if k != "labels"
    }
    params = patched.init(3)
    want = patched(params, **inputs).logits
    outputs = []
    first = patched.plan(inputs).unpadded[:1]
    for kept in (False, True):
        store = patched.record_prefix(params, inputs, padded=kept)
        (output,) = store.outputs[first[0]]
        outputs.append(output)
        with watched(patched.plan(inputs), layers=first) as shapes:
            for given in (store, store):
                got = patched(params, prefix_cache=given, **inputs).logits
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert not shapes  # which ran once, before
    assert outputs[0].shape[:2] == SUPPORT and outputs[1].shape[:2] == (9, LENGTH)


def test_transforms_need_a_prefix_of_padded_texts() -> None:
    patched = fm.patch(bert(), SPECS["last layer"])
    inputs = texts()
    params = patched.init(2)
    packed = params.packed.detach()

    def run(factor: Tensor, store) -> Tensor:
        fast = fm.TaskParams(patched.layout, factor * packed)
        return patched(fast, prefix_cache=store, **inputs).logits

    factors = torch.tensor([1.0, 1.5], dtype=packed.dtype)
    with pytest.raises(RuntimeError, match="needs a prefix of padded texts: record_prefix"):
        torch.func.vmap(run, in_dims=(0, None))(factors, patched.record_prefix(params, inputs))
    store = patched.record_prefix(params, inputs, padded=True)
    got = torch.func.vmap(run, in_dims=(0, None))(factors, store)
    want = torch.stack([run(f, store) for f in factors])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# -- the engine ------------------------------------------------------------------------------

MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "chunks": {"memory": "unroll", "task_chunk": 1},
    "recomputed chunks": {"memory": "recompute", "task_chunk": 2},
    "auto": {"memory": "auto"},
    "packed": {"memory": "unroll", "optimizer": "sgd", "clip_norm": 1e6},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["everything", "last layer"])
def test_memory_modes(name: str, mode: str) -> None:
    learner = fm.MAML(fm.patch(bert(), SPECS[name]), lr=0.1, steps=2, **MODES[mode])
    found, shapes = steps_of(learner)
    # a chunk has the width of its own tasks
    assert SUPPORT in shapes or {(1, 15), (2, 15)} & shapes
    assert all(rows <= 3 for rows, _ in shapes)
    episode_oracle.assert_close(found, expected(name))


def test_first_order() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=2, order=1, memory="unroll")
    found, shapes = steps_of(learner)
    assert shapes == {SUPPORT, QUERY}
    episode_oracle.assert_close(found, expected("everything", order=1))


@pytest.fixture(autouse=True)
def _coarse_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests' texts are short: with all widths, numbers of their tokens would not be rounded."""
    monkeypatch.setattr(Capture, "widths", 16)


CAPTURED = (3, 16)
"""The support set's tokens, rounded up to a multiple of 2: a sixteenth of 3 x 8 positions."""


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize(("pattern", "order"), [("*layer.0.output*", 1), ("*layer.1.*", 2)])
def test_captured_steps(pattern: str, order: int, memory: str) -> None:
    """With a prefix of layers, or of the embeddings alone."""
    patched = fm.patch(episode_oracle.tiny_bert(layers=2), fm.Params(pattern))
    learner = fm.MAML(patched, lr=0.1, steps=2, order=order, memory=memory, compile=True)
    found, shapes = steps_of(learner)
    assert_captured(learner)
    if memory == "unroll":
        assert shapes == {CAPTURED, QUERY}
    else:  # some tasks at a time, with numbers of tokens of their own
        assert all(tokens % 2 == 0 and tokens != LENGTH for _, tokens in shapes - {QUERY})
    episode_oracle.assert_close(found, by_loop(learner))


def assert_captured(learner: fm.MAML) -> None:
    assert learner.capture.steps and all(s is not None for s in learner.capture.steps.values())


def test_a_graph_serves_every_mask_of_a_width() -> None:
    patched = fm.patch(bert(), EVERYTHING)
    eager, learner = (
        fm.MAML(patched, lr=0.1, steps=2, memory="unroll", compile=c) for c in (False, True)
    )
    graphs = set()
    for lengths in ([5, 2, 8], [4, 8, 3], [8, 1, 7], [6, 6, 1]):  # 15, 15, 16 and 13 tokens
        batch = episode_oracle.as_batch(tasks())
        batch.support["attention_mask"][0] = masks(torch.tensor(lengths))
        want, got = (episode_oracle.gradients(m, m(batch).loss) for m in (eager, learner))
        episode_oracle.assert_close(got, want)
        graphs.add((sum(lengths) + 1) // 2)
        assert len(learner.capture.steps) == 2 * len(graphs) + 1  # one of query losses
    assert_captured(learner)


def test_captured_steps_whose_prefix_draws_random_numbers() -> None:
    """Nothing of it is stored; so few are drawn that the results are those without."""
    found = []
    for compile in (False, True):
        patched = fm.patch(bert(dropout=1e-12), fm.Params("*layer.2.*"))
        learner = fm.MAML(patched, lr=0.1, steps=2, memory="unroll", compile=compile)
        numbers, shapes = steps_of(learner)
        found.append(numbers)
    assert_captured(learner)
    assert shapes == {CAPTURED, QUERY}
    episode_oracle.assert_close(found[1], found[0])


@pytest.mark.slow
def test_compiled_steps(tmp_path) -> None:
    patched = fm.patch(episode_oracle.tiny_bert(layers=2), fm.Params("*layer.0.output*"))
    settings = {"compile": "inductor", "compile_cache": tmp_path}
    learner = fm.MAML(patched, lr=0.1, steps=2, memory="unroll", **settings)
    found, shapes = steps_of(learner)
    assert_captured(learner)
    assert shapes == {CAPTURED, QUERY}
    episode_oracle.assert_close(found, by_loop(learner))


def test_heads_on_frozen_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[dict[str, Tensor], set]:
        return steps_of(fm.ANIL(fm.patch(bert(), fm.Head()), lr=0.1, steps=3, memory="unroll"))

    (found, shapes), (kept, kept_shapes) = run(), padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY} and kept_shapes == {(9, LENGTH), (6, LENGTH)}
    episode_oracle.assert_close(found, kept)


def test_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that start from what they read."""

    def run() -> tuple[dict[str, Tensor], set]:
        return steps_of(
            fm.ProtoMAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1, memory="unroll")
        )

    (found, shapes), (kept, _) = run(), padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY}
    episode_oracle.assert_close(found, kept)


def test_dropout_is_replayed() -> None:
    def run(mode: str, seed: int = 3) -> dict[str, Tensor]:
        learner = fm.MAML(fm.patch(bert(dropout=0.3), EVERYTHING), lr=0.1, steps=2, memory=mode)
        learner.train()
        found, shapes = steps_of(learner, seed=seed)
        assert shapes == {SUPPORT, QUERY}
        return found

    found, again = run("unroll"), run("unroll")
    assert all(torch.equal(found[n], again[n]) for n in found)
    episode_oracle.assert_close(run("recompute"), found)
    assert not torch.equal(run("unroll", seed=4)["losses"], found["losses"])


# -- memory plans ----------------------------------------------------------------------------


def batch_of(tokens: int) -> fm.TaskBatch:
    """Two tasks of three texts; the second is the fullest and has so many tokens."""
    lengths = torch.tensor([[1, 1, 1], [1, 1, tokens - 2]])
    sets = [texts(lengths, seed=s) | {"labels": torch.tensor([[0, 1, 2]] * 2)} for s in (0, 1)]
    return fm.TaskBatch(*sets)


def plan_of(learner: fm.MAML, batch: fm.TaskBatch) -> memory.MemoryPlan:
    learner(batch)
    (plan,) = learner.plans.known.values()
    return plan


def measurements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Tokens of the first task of every batch that is measured from now on."""
    measured = []
    original = memory.choose_plan

    def choose_plan(given, batch, *how):
        *how, predict = how

        def noted(loop, batch, mode):
            measured.append(memory.computed_tokens(loop, batch[:1]))
            return predict(loop, batch, mode)

        return original(given, batch, *how, noted)

    monkeypatch.setattr(memory_plans, "choose_plan", choose_plan)
    return measured


def test_many_more_tokens_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where so many might not fit."""
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    measured = measurements(monkeypatch)
    first = plan_of(learner, batch_of(6))
    free = int(1.4 * first.predicted_bytes / memory._USABLE)  # 1.5 times the tokens may need 2.25
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert first.tokens == (6, 6) and measured[0] == (6, 6)  # the fullest task is
    count = len(measured)
    for fewer in (6, 4):
        assert plan_of(learner, batch_of(fewer)) is first
    assert len(measured) == count
    second = plan_of(learner, batch_of(9))
    assert second is not first and second.tokens == (9, 9) and measured[count] == (9, 9)
    assert plan_of(learner, batch_of(6)) is second
    # the query set counts too
    batch = batch_of(6)
    third = plan_of(learner, fm.TaskBatch(batch.support, batch_of(10).query))
    assert third is not second and third.tokens == (6, 10)


def test_plans_of_captured_steps_round_up() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1, compile=True)
    for tokens in (5, 6):
        plan = memory.choose_plan(learner.inner_loop(), batch_of(tokens), "auto", None)
        assert plan.tokens == (6, tokens)


def test_plans_of_padded_texts_hold_for_any() -> None:
    patched = fm.patch(episode_oracle.tiny_bert(layers=1), EVERYTHING)
    learner = fm.MAML(patched, lr=0.1, steps=1)
    for tokens in (6, 10):
        plan = memory.choose_plan(learner.inner_loop(), batch_of(tokens), "auto", None)
        assert plan.predicted_bytes > 0 and plan.tokens == (0, 0)


def test_what_is_sure_to_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    measured = measurements(monkeypatch)
    first = plan_of(learner, batch_of(6))
    second = plan_of(learner, batch_of(9))  # of the same shape
    assert second.tokens == (9, 9) and second.predicted_bytes == int(2.25 * first.predicted_bytes)
    batch = batch_of(6)
    learner(
        fm.TaskBatch(*({k: v[:, :2] for k, v in s.items()} for s in (batch.support, batch.query)))
    )
    *_, fewer = learner.plans.known.values()
    assert len(measured) == 1 and len(learner.plans.known) == 2
    assert fewer.predicted_bytes == second.predicted_bytes  # a bound
    with torch.no_grad():
        learner(batch)
    learner(batch, steps=2)
    learner(batch[:1])
    assert len(measured) == 4


def test_a_plan_allows_a_few_more_tokens() -> None:
    assert growth((100, 200), (105, 210)) == 1.05
    assert growth((100, 200), (106, 10)) == 1.06 and growth((100, 200), (10, 212)) == 1.06
    assert growth((0, 0), (0, 0)) == 0 and growth((0, 6), (5, 6)) == 5


def test_plans_that_ran_out_of_memory_are_no_example() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    plan, failures = plan_of(learner, batch_of(6)), [MemoryError()]
    learner.plans.known["another"] = replace(plan)

    def run(given: memory.MemoryPlan) -> memory.MemoryPlan:
        if failures:
            raise failures.pop()
        return given

    assert learner.plans.run(learner.inner_loop(), batch_of(6), run) is plan
    assert [*learner.plans.known.values()] == [plan] and plan.mode == "recompute"


def test_hardly_smaller_batches_are_recomputed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=16)
    measured = measurements(monkeypatch)
    whole = plan_of(learner, batch_of(10)).predicted_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(0.9 * whole / memory._USABLE))
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=16)
    first = plan_of(learner, batch_of(10))
    count = len(measured)

    def narrower(width: int) -> memory.MemoryPlan:
        batch = batch_of(10)
        sets = ({k: v[..., :width] for k, v in s.items()} for s in (batch.support, batch.query))
        learner(fm.TaskBatch(*sets))
        return [*learner.plans.known.values()][-1]

    assert not first.is_whole and narrower(7).mode == first.mode and len(measured) == count
    assert len(learner.plans.known) == 2
    narrower(5)
    assert len(measured) > count


def test_room_for_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger texts may need more at once, as where they hold half the words of a table."""
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1, memory_budget="1GiB")
    measured = measurements(monkeypatch)
    first = plan_of(learner, batch_of(6))
    learner.plans.budget = int(2.25 * first.predicted_bytes / memory._TRUSTED) + 1
    second = plan_of(learner, batch_of(9))
    assert len(measured) > 1 and second.predicted_bytes < 2.25 * first.predicted_bytes


def test_a_mask_that_keeps_padding_outgrows_a_plan() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    first = plan_of(learner, batch_of(6))
    batch = batch_of(6)
    batch.support["attention_mask"] = batch.support["attention_mask"].double()
    assert first.tokens == (6, 6) and plan_of(learner, batch).tokens == (3 * LENGTH, 6)
