"""Loops whose packed weights hold few rows of an embedding's table, against the per-task loop."""

from __future__ import annotations

import episode_oracle as oracle
import families
import metric_oracle as metric
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine import chunks, narrow
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.prediction import predict
from fastmeta.patching.leaf_params import LeafParams
from fastmeta.patching.narrow_params import NarrowParams, word_slot
from fastmeta.patching.words import Words, collect, take
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
WORDS = 100  # in the model; a task's texts have 15 places, 36 where ragged
TABLE = "bert.embeddings.word_embeddings.weight"


def patched(**settings) -> fm.Patched:
    return fm.patch(oracle.tiny_bert(words=WORDS, **settings), EVERYTHING)


def held_as(params: fm.TaskParams) -> type:
    return type(getattr(params, "made", params))


def check(learner: fm.MAML, tasks: list, held: type = NarrowParams, **kwargs) -> None:
    out = learner(oracle.as_batch(tasks))
    assert held_as(out.params) is held
    oracle.assert_same(learner, out, oracle.loop(learner, tasks, **kwargs), tasks)
    if learner.capture is not None:
        assert learner.capture.steps and all(learner.capture.steps.values())


MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "auto": {"memory": "auto", "memory_budget": "1GiB"},
    "unroll-chunk2": {"memory": "unroll", "task_chunk": 2},
    "recompute-chunk2": {"memory": "recompute", "task_chunk": 2},
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, order: int, ragged: bool, compile: bool) -> None:
    learner = fm.MAML(
        patched(classes=4),
        lr=fm.LearnedRate(per=("layer", "step"), init=0.05),
        steps=3,
        order=order,
        optimizer="momentum",
        compile=compile,
        **MODES[mode],
    )
    tasks = oracle.make_tasks(3, ragged=ragged, classes=4)
    check(oracle.with_varied_rates(learner), tasks, rule=oracle.momentum)


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        (rules.Momentum(momentum=0.8, nesterov=True), lambda *a: oracle.momentum(*a, 0.8, 0, True)),
        (rules.Adam(eps=1e-3), lambda *a: oracle.adam(*a, eps=1e-3)),
        (rules.RMSprop(alpha=0.9, eps=1e-3), lambda *a: oracle.rmsprop(*a, 0.9, 1e-3)),
    ],
    ids=["nesterov", "adam", "rmsprop"],
)
def test_rules(rule: rules.UpdateRule, formula, memory: str) -> None:
    learner = fm.MAML(patched(), lr=0.03, steps=3, optimizer=rule, memory=memory, clip_norm=0.5)
    check(learner, oracle.make_tasks(), rule=formula)


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("per", ["param", ("task", "param", "step")], ids=str)
def test_a_rate_of_every_scalar(per, memory: str) -> None:
    rate = fm.LearnedRate(per=per, init=0.05, num_tasks=3)
    learner = oracle.with_varied_rates(fm.MAML(patched(), lr=rate, steps=3, memory=memory))
    check(learner, oracle.make_tasks())


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": rules.SGD(weight_decay=0.1), "memory": "recompute"},
        {"optimizer": rules.AdamW(eps=1e-3)},
    ],
    ids=["decay", "adamw"],
)
def test_rules_that_move_every_row_keep_the_table(settings: dict) -> None:
    learner = fm.MAML(patched(), **{"lr": 0.05, "steps": 2, "memory": "unroll", **settings})
    assert type(learner(oracle.as_batch(oracle.make_tasks())).params) is fm.TaskParams


def test_texts_of_many_words_keep_the_table() -> None:
    model = fm.patch(oracle.tiny_bert(words=31), EVERYTHING)
    learner = fm.MAML(model, steps=1, optimizer="momentum", memory="unroll")
    assert type(learner(oracle.as_batch(oracle.make_tasks())).params) is fm.TaskParams  # 16 of 31


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", ["unroll", "auto", "unroll-chunk2"])
def test_loops_by_leaf_hold_no_whole_table_either(mode: str, order: int) -> None:
    settings = {**MODES[mode], "memory_budget": None}
    learner = fm.MAML(patched(), lr=0.1, steps=3, order=order, **settings)
    chunked = mode == "unroll-chunk2"  # else all tasks are left to autograd
    check(learner, oracle.make_tasks(), NarrowParams if chunked else LeafParams)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("words", [20, WORDS])
def test_gradient_through_params(words: int, weighted: bool, optimizer: str, monkeypatch) -> None:
    """Losses of the caller's own on adapted weights, whose graphs are kept or built again."""
    tasks = oracle.make_tasks(4)
    found = {}
    monkeypatch.setattr(chunks, "_ample", lambda *args: False)  # keeps the graph of weights by leaf
    for mode, settings in (MODES | {"auto-by-leaf": {"memory": "auto"}}).items():
        model = fm.patch(oracle.tiny_bert(words=words), EVERYTHING)
        learner = fm.MAML(model, lr=0.1, steps=2, optimizer=optimizer, **settings)
        out = learner(oracle.as_batch(tasks))
        with torch.no_grad():
            assert out.params.packed.isfinite().all()  # read once without a gradient
        loss = out.params[TABLE].tanh().sum() + out.params.packed.square().sum() / 3
        loss = loss + (oracle.weighted(out) if weighted else out.loss)
        found[mode] = oracle.gradients(learner, loss)
    for mode in found:
        oracle.assert_close(found[mode], found["unroll"])


def test_chunks_of_uneven_weights_are_built_again() -> None:
    """Once in a chunk that takes its gradient ahead, once in one that does not any more."""
    learner = fm.MAML(patched(), lr=0.1, steps=2, memory="unroll", task_chunk=2)
    tasks = oracle.make_tasks(3)
    expected = oracle.loop(learner, tasks)
    losses = torch.stack(expected.losses)
    want = expected.gradients((losses * torch.arange(1, 4)).mean())
    for _ in range(2):
        out = learner(oracle.as_batch(tasks))
        assert held_as(out.params) is NarrowParams
        oracle.assert_close(oracle.gradients(learner, oracle.weighted(out)), want)


def test_a_diverged_task_leaves_the_others() -> None:
    tasks = oracle.make_tasks(3)
    model = patched()
    bad = torch.randint(20, WORDS, (3, 5))
    with torch.no_grad():
        model.model.get_parameter(TABLE)[bad] = 1e300
    tasks[1][0]["input_ids"] = bad
    learner = fm.MAML(model, lr=0.1, steps=2, optimizer="momentum", memory="unroll")
    out = learner(oracle.as_batch(tasks))
    assert out.diverged.tolist() == [False, True, False]
    good = [tasks[0], tasks[2]]
    expected = oracle.loop(learner, good, rule=oracle.momentum)
    for t, fast in zip((0, 2), expected.fast, strict=True):
        for name, want in fast.items():
            torch.testing.assert_close(out.params.task(t)[name], want.detach())


@pytest.mark.parametrize("compile", [False, True])
def test_adapting_and_evaluating(compile: bool) -> None:
    """Without a graph as with one; the result adapts further and judges any texts."""
    tasks = oracle.make_tasks(3, ragged=True, classes=4)
    batch, model = oracle.as_batch(tasks), patched(classes=4)
    learner = fm.MAML(model, lr=0.1, steps=2, compile=compile)
    expected = oracle.loop(learner, tasks)
    with torch.no_grad():
        out = learner(batch)
    found = fm.adapt(
        model, batch.support, steps=2, lr=0.1, ways=batch.ways, task_chunk=2, compile=compile
    )
    for params in (out.params, found.params):
        assert held_as(params) is NarrowParams
        for t, fast in enumerate(expected.fast):
            oracle.assert_close(params.task(t), fast)
        query = {k: v for k, v in batch.query.items() if k != "labels"}
        with keep_float64(), torch.no_grad():
            logits = model(params, **query).logits
            again = model(fm.TaskParams(model.layout, params.packed), **query).logits
        torch.testing.assert_close(logits, again)
        one = params.select(slice(1, 2)).packed
        torch.testing.assert_close(one, params.packed[1:2])
        torch.testing.assert_close(params.clone().packed, params.detach().packed)
    more = fm.adapt(model, batch.support, steps=1, lr=0.1, ways=batch.ways, params=found.params)
    three = fm.adapt(model, batch.support, steps=3, lr=0.1, ways=batch.ways)
    torch.testing.assert_close(more.params.packed, three.params.packed)


def with_whole_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "may_narrow", lambda loop: False)


@pytest.mark.parametrize("algorithm", ["imaml", "protomaml", "reptile"])
def test_algorithms(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as with whole tables, which their own tests compare with a loop."""
    batch = oracle.as_batch(metric.make_tasks(3))
    make = {
        "imaml": lambda: fm.IMAML(patched(), lr=0.05, steps=4, cg_steps=5, lam=2.0),
        "protomaml": lambda: fm.ProtoMAML(patched(), lr=0.05, steps=3),
        "reptile": lambda: fm.Reptile(patched(), lr=0.05, steps=3),
    }[algorithm]
    found = []
    for _ in range(2):
        learner = make()
        out = learner(batch)
        assert (held_as(out.params) is NarrowParams) is not found
        gradients = oracle.gradients(learner, out.loss)
        found.append({**gradients, "losses": out.task_losses, **out.params})
        with_whole_tables(monkeypatch)
    oracle.assert_close(*found)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "qwen2"])
@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_families(family: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmeta.patching.words._WORTH", 100.0)
    monkeypatch.setattr("fastmeta.patching.rules.FEW_WORDS", 4)
    found = []
    for _ in range(2):
        model = fm.patch(families.build(family), EVERYTHING)
        learner = fm.MAML(model, lr=0.1, steps=2, optimizer="momentum", memory=memory)
        sets = [families.inputs(family, 3, 2, padding="right", seed=s) for s in (1, 2)]
        labels = torch.arange(2).expand(3, 2).contiguous()
        out = learner(fm.TaskBatch(*({**s, "labels": labels} for s in sets)))
        assert (held_as(out.params) is NarrowParams) is not found
        found.append({**oracle.gradients(learner, out.loss), **out.params})
        with_whole_tables(monkeypatch)
    oracle.assert_close(*found)


@pytest.mark.parametrize("family", ["gpt2_lm", "t5", "gemma2", "vit", "bart"])
def test_tables_that_something_else_reads_stay_whole(family: str) -> None:
    model = fm.patch(families.build(family), EVERYTHING)
    with keep_float64():
        plan = model.plan(families.inputs(family, 2, 2))
    assert word_slot(plan) is None


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk2"])
def test_memory_does_not_grow_with_tasks_times_words(mode: str, optimizer: str) -> None:
    batch, peaks = oracle.as_batch(oracle.make_tasks(8)), []
    for words in (1000, 9000):
        model = fm.patch(oracle.tiny_bert(words=words), EVERYTHING)
        learner = fm.MAML(model, lr=0.1, steps=3, optimizer=optimizer, **MODES[mode])
        learner(batch).loss.backward()  # first use: the plan
        learner.zero_grad()
        with PeakMemory() as meter:
            learner(batch).loss.backward()
        peaks.append(meter.peak)
        if "chunk" not in mode:  # tasks are so small here that a table's gradient is most of it
            need = predict(learner.inner_loop(), batch, learner.plans.memory)
            table = words * 16 * 8
            assert 0.8 * meter.peak < need.bytes(8) < 1.3 * meter.peak + table
    more = 8000 * 16 * 8
    assert peaks[1] - peaks[0] < 6 * more  # the start and gradients of it, not of every task


def test_words() -> None:
    ids = torch.tensor([[3, 0, 5, 3], [7, 7, 1, 0]])
    words = Words.of(ids, padding=0)
    rows = words.rows(torch.tensor([[3, 9, 0, 5], [1, 7, 5, 0]]))
    assert rows.tolist() == [[0, 4, 4, 2], [5 + 2, 5 + 0, 4, 4]]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    g, table = random(2, 4, 3), random(9, 3)
    added = collect(g, words.rows(ids), 4)
    assert not added[:, -1].any()
    expected = table.repeat(2, 1, 1)
    for t in range(2):
        for place, word in enumerate(ids[t].tolist()):
            if word:
                expected = expected.index_put(
                    (torch.tensor(t), torch.tensor(word)), g[t, place], accumulate=True
                )
    torch.testing.assert_close(words.written_out(table, added), expected)

    def both(g: Tensor) -> Tensor:
        return take(collect(g, words.rows(ids), 4).tanh(), rows)

    torch.autograd.gradcheck(both, g)
    torch.autograd.gradgradcheck(both, g)


def test_weights_first_packed_under_autocast_are_exact() -> None:
    patched = fm.patch(oracle.tiny_bert().float(), fm.Params("*"))
    settings = {"lr": 0.1, "steps": 1, "memory": "unroll", "compute_dtype": "bfloat16"}
    batch = oracle.as_batch(oracle.make_tasks(4))
    one, two = (fm.MAML(patched, **settings)(batch).params for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        packed = one.packed
    assert torch.equal(packed, two.packed)
