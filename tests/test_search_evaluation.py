"""Candidates in one batch against each candidate alone, on a physically pruned model."""

from __future__ import annotations

import pytest
import search_oracle as oracle
import torch

import fastmeta as fm
from fastmeta.search.budget import Budget
from fastmeta.search.importance import ordered_copy
from fastmeta.search.passes import FrozenPass, LivePass
from fastmeta.testing.float64 import keep_float64

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = oracle.tiny_bert()
    space = fm.search.Space(
        model,
        layers="each",
        heads=[4, 2, 1],
        widths=[1.0, 0.5, 48],
        uniform=False,
        lora={"query": [0, 2, 3], "attention.output.dense": [0, 2], "intermediate.dense": [0, 1]},
        adapted_layers=[1, 2, 3],
        lr=fm.search.Range(0.05, 0.5, log=True),
        optimizer=["sgd", "momentum", "adam", "adamw", "rmsprop"],
        weight_decay=[0.0, 0.1],
        steps=[1, 2, 4],
        batch_size=[None, 2, 3],
    )
    return space, fm.search.Evaluator(space, seed=3), oracle.batch_of(tokenizer)


def losses(scores) -> torch.Tensor:
    return torch.tensor([s.losses for s in scores], dtype=torch.float64)


def test_a_batch_of_candidates_is_what_each_computes_alone_and_pruned(setting):
    space, evaluator, batch = setting
    candidates = space.sample(10, seed=1)
    found = losses(evaluator.evaluate(candidates, batch))
    for candidate, mine in zip(candidates, found, strict=True):
        single = losses(evaluator.evaluate([candidate], batch))[0]
        torch.testing.assert_close(mine, single, **EXACT)
        torch.testing.assert_close(mine, oracle.alone(evaluator, candidate, batch), **EXACT)
    assert len({round(float(x), 6) for x in found.flatten()}) == found.numel()


def test_batches_of_bounded_size_change_nothing(setting):
    space, evaluator, batch = setting
    candidates = space.sample(6, seed=2)
    small = fm.search.Evaluator(space, seed=3, tokens=200)
    assert len(small._chunks([fm.search.Score(c) for c in candidates], batch)) > 3
    torch.testing.assert_close(
        losses(small.evaluate(candidates, batch)),
        losses(evaluator.evaluate(candidates, batch)),
        **EXACT,
    )


def test_candidates_that_agree_below_share_their_layers(setting):
    space, evaluator, batch = setting
    whole = {"rank.query": 2, "adapted_layers": 1}
    candidates = [
        space.proposal(whole | change)
        for change in (
            {},
            {"lr": 0.2},
            {"heads.2": 2},
            {"width.1": 48},
            {"width.1": 48, "layer.2": False},
            {"layer.0": False},
        )
    ]
    inputs = {k: v for k, v in batch.support.items() if k != "labels"}
    frozen = FrozenPass(evaluator.net, inputs, candidates)
    # Layer 0: one node. Layer 1: whole after it, narrow after it, whole after nothing; whoever has
    # no layer 2 adapts layer 1 itself. Layer 2 is live for everyone.
    assert frozen.computed == [1, 3, 0]
    assert frozen.entries[0] == frozen.entries[1] == frozen.entries[2]
    assert [level for level, _ in frozen.entries] == [2, 2, 2, 2, 1, 2]


def test_a_candidate_that_costs_exactly_the_bound_is_within_it(setting):
    space, _, _ = setting
    cost, whole = fm.search.CostModel(space, rounds=1), space.proposal()
    for name in cost.names():
        assert Budget(space, cost, {name: cost(whole)[name]})(whole), name


@pytest.fixture(scope="module")
def sentences():
    bert, tokenizer = oracle.tiny_bert()
    model = fm.models.SentenceClassifier(bert.bert, 6, 5.0).double()
    space = fm.search.Space(
        model,
        layers=[1, 2, 3],
        widths=[1.0, 0.5],
        pooling=["mean", "cls"],
        lora=[0, 2],
        lr=fm.search.Range(0.05, 0.5, log=True),
        optimizer=["sgd", "adam"],
        steps=[1, 3],
    )
    return space, fm.search.Evaluator(space), tokenizer


def test_heads_and_poolings_of_sentence_encoders(sentences):
    space, evaluator, tokenizer = sentences
    batch = oracle.batch_of(tokenizer)
    heads = {"rank.query": 0, "rank.value": 0}
    candidates = [
        space.proposal(heads | {"pooling": "mean", "optimizer": "adam", "steps": 3}),
        space.proposal(heads | {"pooling": "cls", "layers": 2, "width": 64}),
        space.proposal(heads | {"pooling": "cls", "layers": 2, "width": 64, "lr": 0.3}),
        space.proposal({"pooling": "cls", "rank.query": 2}),
        space.proposal({"pooling": "mean", "rank.query": 2, "layers": 2}),
    ]
    found = losses(evaluator.evaluate(candidates, batch))
    for candidate, mine in zip(candidates, found, strict=True):
        torch.testing.assert_close(mine, oracle.alone(evaluator, candidate, batch), **EXACT)
    assert len(evaluator._features[batch]) == 2  # architectures whose features are remembered
    again = losses(evaluator.evaluate(candidates, batch))
    torch.testing.assert_close(again, found, **EXACT)
    some = [candidates[i] for i in (1, 3, 4, 0)]  # by their first adapted layer in no order
    expected = [evaluator.features([p], batch.support)[0] for p in some]
    for mine, own in zip(evaluator.features(some, batch.support), expected, strict=True):
        torch.testing.assert_close(mine, own, **EXACT)
    frozen = FrozenPass(
        evaluator.net, {k: v for k, v in batch.support.items() if k != "labels"}, some
    )
    with pytest.raises(ValueError, match=r"by their first adapted layer, got \[3, 0, 0, 3\]"):
        LivePass(frozen, range(4))


def test_tasks_of_unequal_size_and_candidates_that_diverge(sentences):
    space, _, tokenizer = sentences
    texts = fm.data.builtin_tasks()
    small = {n: t.restrict(t.classes[:w]) for (n, t), w in zip(texts.items(), (3, 6), strict=False)}
    loader = fm.data.TaskDataset(small, tokenizer, 2, 2, 2, num_batches=1, prefetch=0)
    batch = next(iter(loader))
    wild = fm.search.Space(space.model, lora=[2], lr=[1e200, 0.1], optimizer="adamw",
                           weight_decay=1.0, steps=4)  # fmt: skip
    other = fm.search.Evaluator(wild)
    bad, good = other.evaluate([wild.proposal(lr=1e200), wild.proposal(lr=0.1)], batch)
    assert bad.diverged == 2 and bad.accuracy == 0
    single = other.evaluate([wild.proposal(lr=0.1)], batch)[0]
    assert good.losses == pytest.approx(single.losses, rel=1e-12) and good.diverged == 0
    for t in range(2):  # a task's numbers do not depend on its neighbour's padding
        ways = int(batch.ways[t])
        rows = slice(0, 2 * ways)
        one = fm.TaskBatch(
            {k: v[t : t + 1, rows] for k, v in batch.support.items()},
            {k: v[t : t + 1, rows] for k, v in batch.query.items()},
            batch.ways[t : t + 1],
        )
        mine = other.evaluate([wild.proposal(lr=0.1)], one)[0]
        assert mine.losses[0] == pytest.approx(good.losses[t], rel=1e-9)


def test_ordering_by_importance_changes_no_result(setting):
    space, _, batch = setting
    inputs = {k: v[0] for k, v in batch.support.items() if k != "labels"}
    with torch.no_grad():
        expected = space.model(**inputs).logits
        for calibration in (None, inputs):
            ordered = ordered_copy(space.model, space.anatomy, calibration)
            torch.testing.assert_close(ordered(**inputs).logits, expected, **EXACT)
    scaled = ordered_copy(space.model, space.anatomy)  # the first units matter most
    out = scaled.bert.encoder.layer[0].output.dense.weight.norm(dim=0)
    before = scaled.bert.encoder.layer[0].intermediate.dense.weight.norm(dim=1)
    assert ((out * before).diff() <= 1e-12).all()


def test_heads_that_share_a_norm_keep_their_order():
    """OLMo 2's norms are over the queries and keys of all heads, each with a weight of its own."""
    with keep_float64():
        torch.manual_seed(0)
        model = oracle.disturbed(oracle.FAMILIES["olmo2"]())
        space = fm.search.Space(model, widths=[1.0, 0.5], lora=[0, 2])
        inputs = {k: v[0] for k, v in oracle.rows_of().support.items() if k != "labels"}
        with torch.no_grad():
            ordered = ordered_copy(model, space.anatomy, inputs)
            torch.testing.assert_close(ordered(**inputs).logits, model(**inputs).logits, **EXACT)
        query = [m.model.layers[0].self_attn.q_proj.weight for m in (model, ordered)]
        assert torch.equal(*query) and space.anatomy.layers[0].width == 48
        with pytest.raises(ValueError, match=r"attention heads of Olmo2.* cannot be narrowed"):
            fm.search.Space(model, heads=[4, 2])


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "llama"])
def test_families(family):
    import transformers as tf

    small = {"vocab_size": 400, "num_labels": 3, "pad_token_id": 0}
    models = {
        "distilbert": lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **small)
        ),
        "roberta": lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                             intermediate_size=64, max_position_embeddings=40, **small)
        ),
        "electra": lambda: tf.ElectraForSequenceClassification(
            tf.ElectraConfig(hidden_size=32, embedding_size=32, num_hidden_layers=2,
                             num_attention_heads=4, intermediate_size=64, **small)
        ),
        "llama": lambda: tf.LlamaForSequenceClassification(
            tf.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=4, intermediate_size=64, **small)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    with keep_float64():
        model = models[family]().double().eval()
        target = {"distilbert": "q_lin", "llama": "q_proj"}.get(family, "query")
        space = fm.search.Space(
            model, layers="each", heads=[4, 1], widths=[1.0, 0.25], uniform=False, steps=[1, 2],
            lora={target: [0, 2]}, lr=[0.05, 0.2],
        )  # fmt: skip
        ids = torch.randint(1, 400, (2, 3, 7))
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "labels": torch.tensor([[0, 1, 2], [2, 0, 1]])}  # fmt: skip
        batch = fm.TaskBatch(rows, rows)
        evaluator = fm.search.Evaluator(space)
        candidates = [*space.sample(3, seed=2), space.proposal({f"rank.{target}": 2})]
        found = losses(evaluator.evaluate(candidates, batch))
        for candidate, mine in zip(candidates, found, strict=True):
            torch.testing.assert_close(mine, oracle.alone(evaluator, candidate, batch), **EXACT)


@pytest.mark.parametrize(
    ("family", "target"),
    [("deberta", "query_proj"), ("opt", "q_proj"), ("bloom", "query_key_value"), ("gpt2", None)],
)
def test_searching_families_that_call_their_layers_in_other_ways(family, target):
    """Tuples with more than states, rows of tokens, biases by head, weights that are transposed."""
    with keep_float64():
        torch.manual_seed(0)
        model = oracle.disturbed(oracle.FAMILIES[family]())
        terms = {} if target is None else {"lora": {target: [2, 0]}}
        space = fm.search.Space(model, layers="each", steps=1, lr=[0.05, 0.2], **terms)
        batch, cost = oracle.rows_of(), fm.search.CostModel(space, rounds=1)
        found = fm.search.run(
            space, batch, controller="random", evaluations=4, population=4, cost=cost,
            progress=False,
        )  # fmt: skip
        assert found.baseline.cost["relative_flops"] == 1
        for some in ([space.proposal({"layer.0": False}), space.proposal()], [None]):
            some = [p or space.proposal({"layer.0": False, "lr": 0.2}) for p in some]
            mine = losses(fm.search.Evaluator(space).evaluate(some, batch))
            for candidate, values in zip(some, mine, strict=True):
                alone = oracle.alone(found.evaluator, candidate, batch)
                torch.testing.assert_close(values, alone, **EXACT)


def test_layers_with_something_between_them_are_refused():
    with pytest.raises(ValueError, match=r"DebertaV2.* has a convolution between them"):
        fm.search.Space(oracle.FAMILIES["deberta"](conv_kernel_size=3))
