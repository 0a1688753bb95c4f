"""Captured inner steps: the numbers of eager code, few graphs, and eager code where none can be."""

from __future__ import annotations

import copy
import pickle
import warnings

import episode_oracle as oracle
import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm
from fastmeta import rules
from fastmeta._library import has_extension
from fastmeta.engine.capture import Capture
from fastmeta.engine.graphs import TapePair
from fastmeta.ops import use_impl
from fastmeta.patching.leaf_params import LeafParams
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
TASKS = oracle.make_tasks(3)
BATCH = oracle.as_batch(oracle.make_tasks(4))


def captured(learner: fm.MAML, graphs: int | None = None) -> None:
    """Assert that graphs served, as tapes if traced, and how many."""
    steps = learner.capture.steps
    assert steps and all(step is not None for step in steps.values())
    if learner.capture.how == "trace" and has_extension("cpu"):
        assert all(isinstance(step.function.pair, TapePair) for step in steps.values())
    assert graphs is None or len(steps) == graphs


def check(learner: fm.MAML, tasks=TASKS, **kwargs) -> None:
    out = learner(oracle.as_batch(tasks))
    oracle.assert_same(learner, out, oracle.loop(learner, tasks, **kwargs), tasks)
    captured(learner)


MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "auto": {"memory": "auto"},
    "recompute-chunk2": {"memory": "recompute", "task_chunk": 2},
    "first order": {"memory": "unroll", "order": 1},
    "truncated": {"memory": "recompute", "truncate": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    check(fm.MAML(patched, lr=0.1, steps=3, compile=True, **MODES[mode]))


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_prefix_shared_weights_learned_rates_and_adam(memory: str) -> None:
    patched = fm.patch(oracle.tiny_bert(layers=2), fm.Params("bert.encoder.layer.1", "classifier"))
    learner = fm.MAML(
        patched,
        lr=fm.LearnedRate(per=("layer", "step"), init=0.05),
        steps=3,
        optimizer=rules.Adam(eps=1e-3),
        memory=memory,
        clip_norm=0.5,
        compile=True,
    )
    oracle.with_varied_rates(learner)
    check(learner, rule=lambda *args: oracle.adam(*args, eps=1e-3))


def test_ragged_tasks() -> None:
    tasks = oracle.make_tasks(4, ragged=True)
    patched = fm.patch(oracle.tiny_bert(), fm.LoRA(r=2) + fm.Params("classifier.*"))
    check(fm.MAML(patched, lr=0.1, steps=3, memory="unroll", compile=True), tasks)


def test_implicit_gradients() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    found = []
    for compile in (False, True):
        learner = fm.IMAML(patched, lr=0.1, steps=2, compile=compile)
        found.append(oracle.gradients(learner, learner(BATCH).loss))
    captured(learner)
    oracle.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "family", ["gpt2", "modernbert", "mistral", "bloom", "deberta_v2_relative"]
)
def test_families(family: str) -> None:
    """Whatever prepares the attention masks."""
    labels = torch.arange(6).view(2, 3) % 3
    sets = [families.inputs(family, 2, 3, padding="right", seed=s) for s in (1, 2)]
    batch = fm.TaskBatch(*({**given, "labels": labels} for given in sets))
    with keep_float64():  # the eager loop sums in another order, and norms would round to float32
        compare_with_eager(families.build(family), batch)


def test_eager_attention() -> None:
    model = oracle.tiny_bert()
    model.set_attn_implementation("eager")
    compare_with_eager(model, BATCH)


def test_frozen_layers_and_normalised_features() -> None:
    """Whose operators have numbers among their arguments."""
    model = fm.models.SentenceClassifier(oracle.tiny_bert().bert, num_labels=3, scale=10)
    compare_with_eager(model.double().eval(), BATCH, fm.LoRA(r=2))


def compare_with_eager(model, batch: fm.TaskBatch, spec: fm.Spec = EVERYTHING) -> None:
    found = {}
    for compile in (False, True):
        learner = fm.MAML(fm.patch(model, spec), lr=0.1, steps=2, memory="unroll", compile=compile)
        found[compile] = oracle.gradients(learner, learner(batch).loss)
    captured(learner)
    oracle.assert_close(found[True], found[False])


# -- what a trace must not fix ---------------------------------------------------------------


def gradients_of(learner: fm.MAML, batch: fm.TaskBatch = BATCH, seed: int = 5):
    torch.manual_seed(seed)
    out = learner(batch)
    return oracle.gradients(learner, out.loss) | {"loss": out.loss}


@pytest.mark.parametrize("spec", [EVERYTHING, fm.Head()], ids=repr)
@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_dropout_draws_the_masks_of_eager_code(memory: str, spec: fm.Spec) -> None:
    patched = fm.patch(oracle.tiny_bert(dropout=0.3), spec)
    eager = fm.MAML(patched, lr=0.1, steps=3, memory=memory)
    learner = fm.MAML(patched, lr=0.1, steps=3, memory=memory, compile=True)
    for seed in (5, 6):
        found = gradients_of(learner, seed=seed)
        oracle.assert_close(found, gradients_of(eager, seed=seed), 1e-12)
    captured(learner)
    before = len(learner.capture.steps)
    learner.eval()
    oracle.assert_close(gradients_of(learner), gradients_of(eager), 1e-12)
    assert len(learner.capture.steps) > before


def test_weights_that_changed_are_seen() -> None:
    """Adapted, shared and frozen ones."""
    model = oracle.tiny_bert(layers=2)
    model.bert.embeddings.requires_grad_(False)
    patched = fm.patch(model, fm.Head() + fm.Bias())
    learner = fm.MAML(patched, lr=0.1, steps=2, memory="unroll", compile=True)
    check_against = fm.MAML(patched, lr=0.1, steps=2, memory="unroll")
    first = gradients_of(learner)
    graphs = len(learner.capture.steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = gradients_of(learner)
    oracle.assert_close(found, gradients_of(check_against))
    assert (found["loss"] - first["loss"]).abs() > 1e-4
    captured(learner, graphs)


@pytest.mark.parametrize("by_leaf", [False, True])
def test_changing_shared_weights_before_backward_is_refused(by_leaf: bool) -> None:
    """Also those that graphs only look at in another way."""
    spec = fm.Params("*query*") if by_leaf else fm.Head() + fm.Norm()
    patched = fm.patch(oracle.tiny_bert(), spec)
    learner = fm.MAML(patched, steps=2, memory="unroll", compile=True)
    out = learner(BATCH)
    assert isinstance(out.params, LeafParams) == by_leaf
    with torch.no_grad():
        patched.model.bert.pooler.dense.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def weighted(outputs, batch):
    """Mean cross-entropy times a factor per task; labels are ``[T, N, (class, factor)]``."""
    labels, factors = batch["labels"][..., 0].long(), batch["labels"][:, 0, 1]
    rows = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
    return rows.mean(1) * factors


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_a_diverged_task_is_frozen(memory: str) -> None:
    batch = oracle.as_batch(oracle.make_tasks(4))
    for task_set in (batch.support, batch.query):
        factors = torch.ones(task_set["labels"].shape, dtype=torch.float64)
        task_set["labels"] = torch.stack([task_set["labels"].double(), factors], -1)
    batch.support["labels"][1, :, 1] = float("nan")
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    settings = {"lr": 0.1, "steps": 3, "memory": memory, "loss_fn": weighted}
    eager, learner = fm.MAML(patched, **settings), fm.MAML(patched, compile=True, **settings)
    oracle.assert_close(gradients_of(learner, batch), gradients_of(eager, batch))
    assert learner(batch).diverged.tolist() == [False, True, False, False]
    captured(learner)


def test_autocast() -> None:
    found = []
    for compile in (False, True):
        patched = fm.patch(oracle.tiny_bert().float(), EVERYTHING)
        # a bound that clips nothing: neither goes leaf by leaf, where other products are rounded
        settings = {"memory": "unroll", "clip_norm": 1e6, "compile": compile}
        learner = fm.MAML(patched, lr=0.1, steps=2, **settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = learner(BATCH)
        found.append(oracle.gradients(learner, out.loss))
    captured(learner)
    oracle.assert_close(found[1], found[0], 1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_bfloat16_reads_shared_layers_anew(memory: str, lora: bool) -> None:
    """Of layers that only the outer loop learns, a graph keeps no rounded copy: they have their
    gradient, and are seen when they change."""
    model = oracle.tiny_bert(layers=2)
    spec = fm.LoRA(r=2, targets=["query"]) if lora else fm.Params("*query*")
    exact = fm.MAML(fm.patch(model, spec), lr=0.1, steps=2)
    narrow = copy.deepcopy(model).float()
    settings = {"memory": memory, "compile": True, "compute_dtype": torch.bfloat16}
    learner = fm.MAML(fm.patch(narrow, spec), lr=0.1, steps=2, **settings)
    learner.load_state_dict(exact.state_dict())
    for _ in range(2):
        expected, found = gradients_of(exact), gradients_of(learner)
        for name in (n for n in expected if n.endswith("dense.weight")):
            difference = (found[name].double() - expected[name]).norm()
            assert difference <= 0.3 * expected[name].norm(), name  # rounding: up to 0.1
        graphs = len(learner.capture.steps)
        with torch.no_grad():
            for one, other in zip(model.parameters(), narrow.parameters(), strict=True):
                one.mul_(1.5)
                other.copy_(one)
    captured(learner, graphs)


def test_what_a_loss_reads_of_the_inputs_shapes() -> None:
    """Three shapes on a line do not tell what it does at a fourth."""

    def first_five(outputs, batch):
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="none")
        return losses[:, :5].sum(1) / max(losses.shape[1], 6)

    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    eager, learner = (
        fm.MAML(patched, lr=0.1, steps=2, memory="unroll", loss_fn=first_five, compile=c)
        for c in (False, True)
    )
    generator = torch.Generator().manual_seed(0)
    for rows in (3, 4, 5, 6, 9):
        ids = torch.randint(3, 20, (2, rows, 4), generator=generator)
        labels = (torch.arange(rows) % 3).expand(2, -1).contiguous()
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        batch = fm.TaskBatch(texts, texts)
        oracle.assert_close(gradients_of(learner, batch), gradients_of(eager, batch))
    captured(learner)


# -- graphs ----------------------------------------------------------------------------------


def test_graphs_do_not_depend_on_k_and_are_shared() -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    for steps in (2, 5, 9):
        learner = fm.MAML(patched, lr=0.1, steps=steps, memory="recompute", compile=True)
        learner(BATCH)
        # the first step's rows are one row in memory, later ones are not; and the query losses
        captured(learner, 3)
    learner(oracle.as_batch(TASKS))
    captured(learner, 6)


def test_loops_by_leaf_have_three_graphs() -> None:
    """Of the first step, which reads weights that all tasks share, of the others, and of the query
    losses; where rows are kept, with room for those of K steps, each K has its own."""
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    for number, steps in enumerate((2, 5, 9), 1):
        learner = fm.MAML(patched, lr=0.1, steps=steps, memory="unroll", compile=True)
        assert isinstance(learner(BATCH).params, LeafParams)
        captured(learner)
        assert 3 <= len(learner.capture.steps) <= 3 * number


def test_implementations_have_graphs_of_their_own() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*query*"))
    learner = fm.MAML(patched, steps=1, memory="unroll", compile=True)
    learner(BATCH)
    before = len(learner.capture.steps)
    with use_impl("reference"):
        learner(BATCH)
    assert len(learner.capture.steps) > before


def test_operators_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmeta.engine.graphs.written", lambda *_, **__: None)
    patched = fm.patch(oracle.tiny_bert(layers=2), fm.LoRA(r=2) + fm.Params("classifier.*"))
    learner = fm.MAML(patched, steps=1, memory="unroll", compile=True)
    learner(BATCH)
    step = next(iter(learner.capture.steps.values()))
    for graph, suffix in (("forward", "backward"), ("backward", "double_backward")):
        used = {str(node.target) for node in getattr(step.function.pair, graph).graph.nodes}
        assert {f"fastmeta.{op}_{suffix}.default" for op in ("attention", "lora_linear")} <= used
        assert used & {f"fastmeta.{op}.default" for op in ("batched_mm", "batched_mms_")}


def test_adapting() -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    kwargs = {"steps": 3, "lr": 0.1, "optimizer": "adam"}
    expected = fm.adapt(patched, BATCH.support, **kwargs)
    for _ in range(2):
        found = fm.adapt(patched, BATCH.support, compile="trace", **kwargs)
        torch.testing.assert_close(found.params.packed, expected.params.packed, rtol=1e-9, atol=0)
        (capture,) = patched.captures.values()
        assert len(capture.steps) == 2


def test_copies_capture_for_themselves() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.MAML(patched, steps=1, memory="unroll", compile=True)
    learner(BATCH)
    for twin in (copy.deepcopy(learner.capture), pickle.loads(pickle.dumps(learner.capture))):
        assert isinstance(twin, Capture) and not twin.steps


# -- errors ----------------------------------------------------------------------------------


def reads_values(outputs, batch):
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="none")
    return losses.mean(1) * (2.0 if bool((losses > 0).all()) else 3.0)


def test_what_cannot_be_captured_runs_eagerly_with_one_warning() -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", "loss_fn": reads_values}
    learner = fm.MAML(patched, compile=True, **settings)
    with pytest.warns(RuntimeWarning, match="could not be captured and runs eagerly") as seen:
        found = gradients_of(learner)
    assert len(seen) == 1
    oracle.assert_close(found, gradients_of(fm.MAML(patched, **settings)), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(oracle.as_batch(TASKS))


def test_too_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmeta.engine.capture._MOST", 2)
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    learner = fm.MAML(patched, steps=1, memory="unroll", compile=True)
    learner(BATCH)
    with pytest.warns(RuntimeWarning, match="2 graphs are captured already; pad texts"):
        learner(oracle.as_batch(TASKS))


def test_arguments() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    with pytest.raises(ValueError, match="False, True, 'trace', 'inductor' or 'cudagraph'"):
        fm.MAML(patched, compile="jit")
    with pytest.raises(TypeError, match="compile_cache must be the path of a folder or None"):
        fm.MAML(patched, compile=True, compile_cache=3)


@pytest.mark.slow
def test_inductor(tmp_path) -> None:
    """The same numbers; what one model compiled, another of the same shape reads from the cache."""
    patched = fm.patch(oracle.tiny_bert(), fm.Params("bert.encoder.layer.0.output", "classifier"))
    settings = {"compile": "inductor", "compile_cache": tmp_path}
    check(fm.MAML(patched, lr=0.1, steps=3, memory="unroll", **settings))
    counters = torch._dynamo.utils.counters["inductor"]
    before = counters["fxgraph_cache_hit"]
    patched = fm.patch(oracle.tiny_bert(), fm.Params("bert.encoder.layer.0.output", "classifier"))
    check(fm.MAML(patched, lr=0.1, steps=3, memory="unroll", **settings))
    assert counters["fxgraph_cache_hit"] == before + 2


def pair(patched: fm.Patched, make=fm.MAML, **settings) -> list:
    """The same learner, captured and not."""
    return [make(patched, lr=0.1, compile=c, **settings) for c in (True, False)]


def same_gradients(learners: list, batch: fm.TaskBatch, tolerance: float = 1e-9) -> None:
    found, expected = ({**oracle.gradients(o, o(batch).loss)} for o in learners)
    oracle.assert_close(found, expected, tolerance)


def test_captured_pulls_of_another_strength() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    for lam in (1.0, 3.0):
        same_gradients(
            pair(patched, fm.IMAML, steps=2, lam=lam), oracle.as_batch(oracle.make_tasks(4))
        )


def test_one_captured_learner_in_and_out_of_autocast() -> None:
    patched = fm.patch(oracle.tiny_bert().float(), fm.Params("*"))
    learners = pair(patched, steps=2, memory="unroll", clip_norm=1e6)
    batch = oracle.as_batch(oracle.make_tasks(4))
    same_gradients(learners, batch, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [learner(batch).loss for learner in learners]
    gradients = (oracle.gradients(o, loss) for o, loss in zip(learners, losses, strict=True))
    oracle.assert_close(*gradients, 1e-5)


class Wide(nn.Module):
    """Reads one word of a text, by a layer so wide that steps keep its inputs, not its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(20, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(
            logits=self.head(self.mid(self.words(input_ids[..., 0])).tanh())
        )


def test_numbers_of_steps_where_rows_are_kept() -> None:
    torch.manual_seed(0)
    patched = fm.patch(Wide().double(), fm.Params("mid", "head"))
    batch = oracle.as_batch(oracle.make_tasks(4))
    for rows in (batch.support, batch.query):
        del rows["attention_mask"]
    for steps in (2, 3, 4):
        learners = pair(patched, steps=steps, memory="unroll")
        same_gradients(learners, batch)
        assert all(step is not None for step in learners[0].capture.steps.values())
    assert len(learners[0].capture.steps) == 9  # three of each number of steps


def test_captured_and_truncated() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    batch = oracle.as_batch(oracle.make_tasks(4))
    for memory in ("unroll", "recompute"):
        same_gradients(pair(patched, steps=3, truncate=1, memory=memory), batch)
