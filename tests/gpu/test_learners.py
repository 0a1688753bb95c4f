"""Learners whose model is on a GPU do what they do on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import episode_oracle as oracle
import families
import metric_oracle as metric
import pytest
import torch
from families import FAMILIES
from standin import gpu, on_cpu, on_gpu

import fastmeta as fm
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
ADAPTERS = fm.LoRA(r=2) + fm.Head()


def outcome(learner: torch.nn.Module, batch: fm.TaskBatch) -> dict[str, torch.Tensor]:
    """Losses and the meta-gradient."""
    out = learner(batch)
    out.loss.backward()
    found = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    return on_cpu({"losses": out.task_losses.detach(), **found})


def check(
    make: Callable[[torch.nn.Module], torch.nn.Module],
    model: torch.nn.Module | None = None,
    batch: fm.TaskBatch | None = None,
) -> None:
    """The same on both devices, in the first step and in another."""
    model = oracle.tiny_bert() if model is None else model
    batch = oracle.as_batch(oracle.make_tasks()) if batch is None else batch
    torch.manual_seed(0)  # of what a learner begins with
    expected = outcome(make(copy.deepcopy(model)), batch)
    assert max(float(t.abs().max()) for t in expected.values()) > 1e-4
    there = on_gpu(model)
    with gpu():
        batch = batch.to("cuda")
        torch.manual_seed(0)
        learner = make(there)
        oracle.assert_close(outcome(learner, batch), expected)
        for p in learner.parameters():
            p.grad = None
        oracle.assert_close(outcome(learner, batch), expected)


MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "chunks": {"memory": "unroll", "task_chunk": 2},
    "captured": {"memory": "unroll", "compile": "trace"},
    "captured-recompute": {"memory": "recompute", "compile": "trace"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [EVERYTHING, ADAPTERS, fm.Head()], ids=str)
def test_maml(spec: fm.Spec, mode: str) -> None:
    check(lambda model: fm.MAML(fm.patch(model, spec), lr=0.1, steps=2, **MODES[mode]))


@pytest.mark.parametrize("spec", [EVERYTHING, ADAPTERS, fm.Head()], ids=str)
def test_first_order(spec: fm.Spec) -> None:
    check(lambda model: fm.MAML(fm.patch(model, spec), lr=0.1, steps=3, order=1))


@pytest.mark.parametrize("rule", [fm.rules.Momentum(), fm.rules.AdamW(eps=1e-3)], ids=str)
def test_rules(rule) -> None:
    rate = fm.LearnedRate(per=("layer", "step"), init=0.05)
    check(lambda m: fm.MAML(fm.patch(m, ADAPTERS), lr=rate, steps=2, optimizer=rule, clip_norm=1.0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_texts_of_few_of_the_words(optimizer: str, mode: str) -> None:
    settings = {"lr": 0.1, "steps": 2, "optimizer": optimizer, **MODES[mode]}
    model = oracle.tiny_bert(words=100)
    check(lambda model: fm.MAML(fm.patch(model, EVERYTHING), **settings), model)


def test_ragged_tasks() -> None:
    batch = oracle.as_batch(oracle.make_tasks(ragged=True))
    check(lambda model: fm.MAML(fm.patch(model, EVERYTHING), lr=0.1, steps=2), batch=batch)


NO_CLASSIFIERS = {"bert_mlm", "gpt2_lm", "mixtral", "qwen3_moe"}  # or of parts that cannot adapt
SOME = {"gpt2", "modernbert", "deberta_v2_relative"}
CLASSIFIERS = [
    name
    for name, family in FAMILIES.items()
    if family.kind in ("encoder", "decoder") and name not in NO_CLASSIFIERS
]


def texts_of(name: str) -> fm.TaskBatch:
    """Two tasks of three padded texts each."""
    labels = torch.arange(3).expand(2, 3).contiguous()
    sets = [families.inputs(name, 2, 3, padding="right", seed=seed) for seed in (1, 2)]
    return fm.TaskBatch(*({**each, "labels": labels} for each in sets))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in CLASSIFIERS]
)
def test_families(name: str) -> None:
    with keep_float64():  # rotations in float32 differ between devices
        check(
            lambda model: fm.MAML(fm.patch(model, EVERYTHING), lr=0.1, steps=2),
            families.build(name),
            texts_of(name),
        )


OTHERS = {
    "anil": lambda model: fm.ANIL(fm.patch(model, fm.Head()), lr=0.1, steps=2),
    "metasgd": lambda model: fm.MetaSGD(fm.patch(model, ADAPTERS), lr=0.1, steps=2),
    "imaml": lambda model: fm.IMAML(fm.patch(model, ADAPTERS), lr=0.1, steps=4, cg_steps=3),
    "reptile": lambda model: fm.Reptile(fm.patch(model, ADAPTERS), lr=0.1, steps=2),
    "protonet": fm.ProtoNet,
    "matchingnet": fm.MatchingNet,  # full contexts run torch's LSTM cell, which is CUDA's own
    "relationnet": lambda model: fm.RelationNet(model, hidden=6),
    "protomaml": lambda model: fm.ProtoMAML(model, ways=3, lr=0.1, steps=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_learners(name: str) -> None:
    check(OTHERS[name], batch=oracle.as_batch(metric.make_tasks(3)))


BFLOAT16 = {
    "all": (EVERYTHING, {}),
    "biases": (ADAPTERS + fm.Bias(), {}),
    "recompute": (ADAPTERS, {"memory": "recompute"}),
    "captured": (EVERYTHING, {"compile": "trace"}),
    "cudagraph": (EVERYTHING, {"compile": "cudagraph"}),
}


def near_in_bfloat16(
    model: torch.nn.Module, batch: fm.TaskBatch, spec: fm.Spec, settings: dict
) -> None:
    """Products in bfloat16: near the exact meta-gradient, everything else in float32."""
    common = {"lr": 0.01, "steps": 2, "memory": "unroll"}
    model = model.float()
    exact = outcome(fm.MAML(fm.patch(copy.deepcopy(model), spec), **common), batch)
    with gpu():
        there = fm.patch(on_gpu(model), spec)
        learner = fm.MAML(there, compute_dtype=torch.bfloat16, **(common | settings))
        found = outcome(learner, batch.to("cuda"))
    assert {t.dtype for t in found.values()} == {torch.float32}
    names = [n for n in exact if n != "losses"]
    a, b = (torch.cat([each[n].flatten() for n in names]) for each in (found, exact))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16(name: str) -> None:
    batch = oracle.as_batch(oracle.make_tasks())
    near_in_bfloat16(oracle.tiny_bert(), batch, *BFLOAT16[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_families_in_bfloat16(name: str) -> None:
    near_in_bfloat16(families.build(name), texts_of(name), EVERYTHING, {})
