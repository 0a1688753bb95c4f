"""`fm.search.run`: costs, budgets, rewards, and its state."""

from __future__ import annotations

import pytest
import search_oracle as oracle
import torch
from search_oracle import make_space, run

import fastmeta as fm
from fastmeta.search import (
    CostModel,
    Evaluator,
    Evolution,
    Range,
    SearchError,
    SearchInterrupted,
    Space,
    When,
)
from fastmeta.search.budget import Budget


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = oracle.tiny_bert()
    return model, tokenizer, oracle.batch_of(tokenizer)


# -- cost ----------------------------------------------------------------------------------------


def test_costs_are_those_of_the_pruned_model(parts):
    model, _, _ = parts
    space = make_space(model, layers="each", heads=[4, 1], uniform=False)
    cost, evaluator = CostModel(space, latency=False), Evaluator(space)
    for p in space.sample(6):
        pruned = fm.search.prune(evaluator.net.model, space.anatomy, p)
        assert cost(p)["parameters"] == sum(w.numel() for w in pruned.parameters())
        linears = [m for m in pruned.bert.encoder.modules() if isinstance(m, torch.nn.Linear)]
        products = sum(m.weight.numel() for m in linears)
        attention = sum(2 * 16 * h * 8 for h, k in zip(p.heads, p.kept, strict=True) if k)
        assert cost(p)["flops"] == 2 * 16 * (products + attention)
    whole = cost(fm.search.run.__globals__["whole_model"](space))
    assert whole["relative_flops"] == whole["relative_parameters"] == 1
    assert "latency" not in whole


def test_latency_comes_from_a_table_of_sizes(parts):
    space = make_space(parts[0], layers="each", uniform=False)
    cost = CostModel(space, rounds=1)
    found = [cost(p)["latency"] for p in space.sample(10)]
    assert len(cost.table) == 2 and all(x > 0 for x in found)
    one, two = space.proposal(), space.proposal({"layer.1": False})
    full = cost.table[4, 128]
    assert cost(one)["latency"] - cost(two)["latency"] == pytest.approx(full)
    again = CostModel(space, rounds=1)
    again.load_state_dict(cost.state_dict())
    assert again(two) == cost(two)


def test_latency_of_a_decoder_is_measured_without_a_cache():
    space = Space(oracle.FAMILIES["llama"]().eval(), heads=[4, 2], widths=[1.0, 0.5])
    cost = CostModel(space, rounds=1)
    assert cost(space.proposal(heads=2, width=24))["latency"] > 0
    caches = [v for v in cost._call[1].values() if hasattr(v, "get_seq_length")]
    assert all(c.get_seq_length() == 0 for c in caches)
    assert space.model.config.use_cache


def test_a_budget_knows_what_conditions_leave_open(parts):
    space = Space(
        parts[0], layers=[3, 2], widths=[1.0, 0.25], conditions=[When("width", "layers", 3)]
    )
    cost = CostModel(space, latency=False)
    least = cost(space.proposal(width=32))["relative_flops"]  # of three narrow layers
    assert least < cost(space.proposal(layers=2))["relative_flops"]
    Budget(space, cost, {"relative_flops": 1.01 * least})
    with pytest.raises(SearchError, match=f"the smallest one has {least:.4g}"):
        Budget(space, cost, {"relative_flops": 0.99 * least})


# -- running and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["random", "evolution", "lstm", "differentiable"])
def test_every_controller_runs_within_the_budget(parts, controller):
    model, _, batch = parts
    found = run(make_space(model), batch, controller=controller, budget={"relative_flops": 0.7})
    assert all(s.cost["relative_flops"] <= 0.7 for s in found.scores)
    assert found.best.accuracy == max(s.accuracy for s in found.scores)
    assert found.baseline.cost["relative_flops"] == 1
    text = found.table()
    assert "whole model" in text and "winner" in text and "±" in text
    front = found.front()
    costs = [s.cost["relative_flops"] for s in front]
    assert costs == sorted(costs) and [s.accuracy for s in front] == sorted(
        s.accuracy for s in front
    )


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(parts, tmp_path):
    model, _, batch = parts
    space = make_space(model)
    settings = {"controller": "lstm", "evaluations": 16, "budget": {"parameters": 1e6}}
    whole = run(space, batch, out=tmp_path / "a", **settings)
    asked = iter([False, True])
    with pytest.raises(SearchInterrupted, match="stopped after 8 candidates; saved in"):
        run(space, batch, out=tmp_path / "b", stop=lambda: next(asked), **settings)
    with pytest.raises(SearchError, match="already holds a search"):
        run(space, batch, out=tmp_path / "b", **settings)
    again = run(space, batch, out=tmp_path / "b", resume=True, **settings)
    assert [s.proposal.key for s in again.scores] == [s.proposal.key for s in whole.scores]
    assert again.rewards == whole.rewards and again.best.proposal == whole.best.proposal
    with pytest.raises(SearchError, match="is of a search with seed=0, got 1"):
        run(space, batch, out=tmp_path / "b", resume=True, seed=1, **settings)


def test_only_the_same_search_goes_on(parts, tmp_path):
    model, tokenizer, batch = parts
    settings = {"controller": "evolution", "evaluations": 4, "out": tmp_path, "tournament": 4}
    run(make_space(model), batch, **settings)
    settings |= {"evaluations": 8, "resume": True}
    other = oracle.batch_of(tokenizer, shots=2)
    assert other.num_tasks == batch.num_tasks
    for space, tasks, more, message in (
        (make_space(model), other, {}, "with tasks="),
        (make_space(model, lora_scale=20.0), batch, {}, "with lora_scale=2.0, got 20.0"),
        (make_space(oracle.tiny_bert(seed=1)[0]), batch, {}, "with model="),
        (make_space(model), batch, {"tournament": 8}, "with settings="),
    ):
        with pytest.raises(SearchError, match="is of a search " + message):
            run(space, tasks, **(settings | more))
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        run(make_space(model), batch, overwrite=True, **settings)
    assert len(run(make_space(model), batch, **settings).scores) > 4
    before = (tmp_path / "search.pt").read_bytes()
    settings |= {"resume": False, "overwrite": True}
    with pytest.raises(SearchError, match="no candidate meets the budget"):
        run(make_space(model), batch, budget={"relative_flops": 0.01}, **settings)
    assert (tmp_path / "search.pt").read_bytes() == before
    run(make_space(model), other, **settings)
    assert (tmp_path / "search.pt").read_bytes() != before


def test_a_step_may_be_larger_than_what_evolution_remembers(parts):
    space = Space(parts[0], layers=[1, 2, 3], lr=Range(0.05, 0.5, log=True), steps=1)
    settings = {"evaluations": 40, "population": 40}
    assert len(run(space, parts[2], controller="evolution", **settings).rewards) == 40
    run(space, parts[2], controller=Evolution(space, population=8), **settings)


def test_a_damaged_state_is_named(parts, tmp_path):
    model, _, batch = parts
    space = make_space(model)
    with pytest.raises(SearchError, match="holds no search to go on with"):
        run(space, batch, out=tmp_path, resume=True)
    run(space, batch, out=tmp_path, evaluations=4)
    state = tmp_path / "search.pt"
    data = state.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nonsense", data[:200] + b"\0" * 300 + data[500:]):
        state.write_bytes(broken)
        with pytest.raises(SearchError, match=r"search\.pt is damaged and the search cannot go on"):
            run(space, batch, out=tmp_path, evaluations=4, resume=True)
    torch.save({"version": 0}, state)
    with pytest.raises(SearchError, match="is not the state of a search of this version"):
        run(space, batch, out=tmp_path, evaluations=4, resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": {"relative_flops": 0.01}}, SearchError, "no candidate meets the budget rel"),
        ({"budget": {"flop": 1.0}}, SearchError, "a budget bounds one of flops, parameters"),
        ({"budget": {"flops": 0.0}}, SearchError, "the budget of flops must be positive"),
        ({"budget": {"flops": "few"}}, SearchError, "budget of flops must be positive, got 'few'"),
        ({"budget": 0.7}, TypeError, r"budget must name costs, such as {.*: 0.7}, got 0.7"),
        ({"weights": [0.7]}, TypeError, r"weights must name costs, such as {.*}, got \[0.7\]"),
        ({"weights": {"flop": 1.0}}, ValueError, "weights name one of flops, parameters"),
        ({"controller": "rnadom"}, ValueError, "got 'rnadom'"),
        ({"evaluations": 0}, ValueError, "evaluations must be an integer of at least 1, got 0"),
        ({"keep": 1.5}, ValueError, "keep must be a share in"),
        ({"resume": True}, ValueError, "resume needs the folder out"),
    ],
)
def test_wrong_settings_are_refused(parts, settings, error, message):
    with pytest.raises(error, match=message):
        run(make_space(parts[0]), parts[2], **settings)


def test_wrong_tasks_are_refused(parts):
    model, _, batch = parts
    space = make_space(model)
    without = [{k: v for k, v in s.items() if k != "labels"} for s in (batch.support, batch.query)]
    far = [{**s, "labels": s["labels"] + 100} for s in (batch.support, batch.query)]
    for tasks, error, message in (
        (fm.TaskBatch(*without), ValueError, "the support set needs 'labels', got"),
        (fm.TaskBatch(*far), ValueError, "support labels must be in 0.."),
        (batch.support, TypeError, "expected a fm.TaskBatch or several, got dict"),
        ([], ValueError, "expected at least one batch of tasks, got none"),
    ):
        with pytest.raises(error, match=message):
            run(space, tasks)


def test_successive_halving_stops_the_worse_ones(parts):
    model, tokenizer, batch = parts
    space = make_space(model)
    rungs = [batch, oracle.batch_of(tokenizer, tasks=3)]
    evaluator = Evaluator(space)
    candidates = space.sample(6)
    every = evaluator.evaluate(candidates, rungs)
    halved = evaluator.evaluate(candidates, rungs, keep=0.5)
    assert sum(s.stopped for s in halved) == 3
    for a, b in zip(every, halved, strict=True):
        assert b.losses == a.losses[: 2 if b.stopped else 5]
    first = [sum(a.accuracies[:2]) for a in every]
    assert min(f for f, s in zip(first, halved, strict=True) if not s.stopped) >= max(
        f for f, s in zip(first, halved, strict=True) if s.stopped
    )


def test_rewards_of_stopped_candidates_compare_with_those_of_the_others(parts):
    """Easy tasks first: who goes on to harder ones must not look worse for it."""
    model, tokenizer, _ = parts
    space = make_space(model, lora=None)
    ease = {2: 0.6, 3: 0.1}  # by the number of tasks

    class Judge(Evaluator):
        def _rung(self, scores, batch):
            for s in scores:
                quality = 0.1 * sum(s.proposal.kept) * sum(s.proposal.widths) / (3 * 128)
                s.accuracies += [ease[batch.num_tasks] + quality] * batch.num_tasks
                s.losses += [0.0] * batch.num_tasks

    rungs = [oracle.batch_of(tokenizer, tasks=n) for n in ease]
    found = run(space, rungs, controller="random", evaluator=Judge(space), keep=0.5)
    rewards = list(zip(found.scores, found.rewards, strict=True))
    stopped = [(s, r) for s, r in rewards if s.stopped]
    going_on = [(s, r) for s, r in rewards if not s.stopped]
    assert stopped and going_on
    assert all(r == s.accuracy for s, r in going_on)
    for s, r in stopped:
        assert all(b >= r - 1e-12 for a, b in going_on if a.accuracies[0] >= s.accuracies[0])
