"""Candidates in one batch against each candidate alone, on a physically pruned model."""

from __future__ import annotations

import pytest
import search_oracle as oracle
import torch

import fastmeta as fm
from fastmeta.search.passes import FrozenPass

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
