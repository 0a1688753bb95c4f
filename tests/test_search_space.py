"""`fm.search.Space`: what it counts, draws and refuses."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import search_oracle as oracle

import fastmeta as fm
from fastmeta.search import Decision, Range, Space, When
from fastmeta.search.run import whole_model


@pytest.fixture(scope="module")
def bert():
    return oracle.tiny_bert()[0]


def test_the_size_is_the_number_of_different_candidates(bert):
    space = Space(
        bert, layers="each", heads=[4, 2], widths=[1.0, 0.5], uniform=False, lora=[0, 4],
        lr=[0.1, 0.2], optimizer=["sgd", "adam"], conditions=[When("lr", "optimizer", "sgd")],
    )  # fmt: skip
    names = [d.name for d in space.decisions]
    every = itertools.product(*(d.domain for d in space.decisions))
    different = {space.proposal(dict(zip(names, values, strict=True))).key for values in every}
    kept = [k for k in different if any(dict(k)[f"layer.{i}"] for i in range(3))]
    assert space.size == len(kept)
    assert math.isinf(Space(bert, lr=Range(0.1, 1)).size)
    assert Space(bert, steps=Range(2, 5, integer=True)).size == 4


def test_what_it_prints_and_draws(bert):
    space = Space(bert, layers=[1, 3], heads=[4, 2], lora={"query": [0, 4]}, steps=[1, 2])
    text = str(space)
    assert "16 candidates" in text and "rank.query" in text and "for example: layers [" in text
    drawn = space.sample(50, seed=1)
    assert [p.key for p in drawn] == [p.key for p in space.sample(50, seed=1)]
    assert {sum(p.kept) for p in drawn} == {1, 3} and {p.heads[0] for p in drawn} == {2, 4}
    assert all(p.first_adapted == (sum(p.kept) - min(3, sum(p.kept)) if p.ranks["query"] else 3)
               for p in drawn)  # fmt: skip


def test_conditions_and_constraints_hold(bert):
    space = Space(
        bert, layers=[1, 2, 3], widths=[128, 64],
        optimizer=["sgd", "adam"], weight_decay=[0.0, 0.1],
        conditions=[When("weight_decay", "optimizer", "adam"), When("width", "layers", [3])],
        constraint=lambda p: sum(p.kept) > 1,
    )  # fmt: skip
    for p in space.sample(60):
        assert p.optimizer == "adam" or p.weight_decay == 0.0
        assert sum(p.kept) == 3 or p.widths[0] == 128
        assert sum(p.kept) > 1


def test_ranges_keep_their_scale():
    rng = random.Random(0)
    r = Range(1e-4, 1.0, log=True)
    drawn = [r.at(rng.random()) for _ in range(400)]
    assert 0.4 < sum(x < 1e-2 for x in drawn) / 400 < 0.6
    assert r.at(r.share(0.03)) == pytest.approx(0.03)
    assert Range(1, 9, integer=True).at(0.5) == 5


def test_integers_of_a_range_are_equally_likely():
    rng = random.Random(0)
    drawn = Counter(Range(5, 8, integer=True).at(rng.random()) for _ in range(4000))
    assert sorted(drawn) == [5, 6, 7, 8] and all(850 < n < 1150 for n in drawn.values())
    drawn = Counter(Range(1, 3, log=True, integer=True).at(rng.random()) for _ in range(4000))
    for n, count in drawn.items():
        assert count / 4000 == pytest.approx(math.log((n + 1) / n) / math.log(4), abs=0.03)


@pytest.mark.parametrize(
    ("bounds", "log"),
    [((5, 8), False), ((5, 20), False), ((1, 10), False), ((-3, 300), False), ((1, 9), True),
     ((1, 1000), True)],
)  # fmt: skip
def test_an_integer_belongs_to_the_option_it_was_drawn_from(bounds, log):
    rng, domain = random.Random(0), Range(*bounds, log=log, integer=True)
    steps = Decision("steps", domain)
    assert steps.options == min(8, bounds[1] - bounds[0] + 1)
    for option in range(steps.options):
        values = [steps.option(option, rng) for _ in range(100)]
        assert {steps.number(v) for v in values} == {option}
        assert all(v in domain for v in values)
    assert all(domain.at(domain.share(v)) == v for v in range(bounds[0], bounds[1] + 1))


def test_the_whole_model_is_described_by_its_own_decisions(bert):
    space = Space(bert, layers=[1, 3], heads=[1, 4], widths=[0.5, 1.0], lr=[0.1, 0.2])
    assert whole_model(space).key == space.proposal(layers=3, heads=4, width=128).key
    each = Space(bert, layers="each", heads=[1, 4], widths=[64, 128], uniform=False)
    parts = {f"{k}.{i}": v for k, v in (("heads", 4), ("width", 128)) for i in range(3)}
    assert whole_model(each) == each.proposal(parts)


ERRORS = [
    (lambda m: Space(m, layers=[]), "the space is empty: layers has no value to choose from"),
    (lambda m: Space(m, layers=[4]), "layers must be integers from 1 to 3, got 4"),
    (lambda m: Space(m, layers="some"), "layers must be 'each' or numbers of layers, got 'some'"),
    (lambda m: Space(m, heads=[8]), "heads must be an integer from 1 to 4 or a share of it in "),
    (lambda m: Space(m, widths=[1.5]), "width must be an integer from 1 to 128 or a share"),
    (lambda m: Space(m, widths=[1.0, 128]), "width names a value twice: [128, 128]"),
    (lambda m: Space(m, pooling="mean"), "pooling of BertForSequenceClassification must be one"),
    (lambda m: Space(m, lora={"qeury": [2]}), "matches no linear layer of BertFor"),
    (lambda m: Space(m, lora={"pooler.dense": [2]}), "names no module within the layers"),
    (lambda m: Space(m, lora={"query": [2], "attention.self.query": [4]}), "both name 'bert."),
    (lambda m: Space(m, lora={"query": [0.5]}), "the LoRA ranks of 'query' must be integers"),
    (lambda m: Space(m, adapted_layers=[1]), "adapted_layers says where LoRA terms are"),
    (lambda m: Space(m, lora=[2], adapted_layers=[5]), "adapted_layers must be integers from 1"),
    (lambda m: Space(m, optimizer="sdg"), "optimizer must be one of ['adagrad', 'adam'"),
    (lambda m: Space(m, lr=0.0), "lr must be above 0, got 0.0"),
    (lambda m: Space(m, lora=[2], adapted_layers=0), "adapted_layers must be at least 1, got 0"),
    (lambda m: Space(m, lora=[2], adapted_layers=[]), "adapted_layers has no value to choose from"),
    (lambda m: Space(m, steps=[2.5, 5]), "steps must be integers, got [2.5, 5]"),
    (lambda m: Range(1.2, 4, integer=True), "needs integers as bounds, got 1.2 and 4"),
    (lambda m: Space(m, steps=Range(1, 4, integer=True)).proposal(steps=2.5), "got 2.5"),
    (lambda m: Space(m, lr=Range(1, 0.5)), "a range needs low < high, got 1 and 0.5"),
    (lambda m: Space(m, steps=[0]), "steps must be at least 1, got 0"),
    (lambda m: Space(m, steps=Range(1, 4)), "a range of steps must be one of integers"),
    (lambda m: Space(m, batch_size=[None, 0]), "batch_size must be None or at least 1, got 0"),
    (lambda m: Space(m, conditions=[When("lrr", "optimizer", "sgd")]), "names the decision 'lrr'"),
    (lambda m: Space(m, conditions=[When("lr", "optimizer", "adam")]),
     "the space is contradictory: a condition on 'lr' needs optimizer to be one of ['adam']"),
    (lambda m: Space(m, conditions=[When("layers", "lr", 0.01)]), "must name an earlier decision"),
    (lambda m: Space(m, constraint=lambda p: False), "the space is contradictory: of 500"),
    (lambda m: Space(m.bert.pooler), "a search needs a model with one stack of layers"),
    (lambda m: Space(m).proposal(lr=3.0), "lr must be one of [0.01], got 3.0"),
    (lambda m: Space(m).proposal(depth=3), "got 'depth'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors_are_one_sentence(bert, make, message):
    with pytest.raises(ValueError) as error:
        make(bert)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_model_is_left_alone(bert):
    before = {n: p.clone() for n, p in bert.named_parameters()}
    fm.search.Evaluator(Space(bert, heads=[4, 2], widths=[128, 64], lora=[2]))
    assert all((before[n] == p).all() and p.requires_grad for n, p in bert.named_parameters())
