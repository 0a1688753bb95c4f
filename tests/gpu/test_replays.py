"""Whole meta-steps replayed as CUDA graphs: the same numbers, for every batch, and when not."""

from __future__ import annotations

import copy

import episode_oracle as oracle
import metric_oracle as metric
import pytest
import test_engine_losses as losses
import torch
from standin import gpu, on_cpu, on_gpu

import fastmeta as fm
from fastmeta.engine import replays
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
ADAPTERS = fm.LoRA(r=2) + fm.Head()
SPECS = {"all": EVERYTHING, "adapters": ADAPTERS, "head": fm.Head()}
RATE = fm.LearnedRate(per=("layer", "step"), init=0.1)
SETTINGS = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "auto": {"memory": "auto"},
    "first order": {"order": 1},
    "learned rates": {"lr": RATE},
    "adam": {"optimizer": fm.rules.Adam(eps=1e-3), "clip_norm": 1.0},
    "one chunk": {"task_chunk": 8},
    "rates of tasks": {"lr": fm.LearnedRate(per="task", init=0.1, num_tasks=3)},
}
BATCHES = [oracle.as_batch(oracle.make_tasks(seed=seed)) for seed in range(3)]


def learner_of(model: torch.nn.Module, spec: fm.Spec = EVERYTHING, **settings) -> fm.MAML:
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", **settings}
    return fm.MAML(fm.patch(model, spec), **settings)


def pair(model: torch.nn.Module, spec: fm.Spec = EVERYTHING, **settings):
    """A learner on the CPU, and one of the same weights that replays on the GPU."""
    here = learner_of(copy.deepcopy(model), spec, **settings)
    return here, learner_of(on_gpu(model), spec, compile="cudagraph", **settings)


def step(learner: fm.MAML, batch: fm.TaskBatch, loss=lambda out: out.loss) -> dict:
    out = learner(batch.to(learner.device))
    grads = oracle.gradients(learner, loss(out))
    found = {"losses": out.task_losses, "logits": out.logits, "params": out.params.packed}
    return on_cpu({n: t.detach() for n, t in (found | grads).items()})


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_of_few_of_the_words(name: str) -> None:
    with gpu():
        here, there = pair(oracle.tiny_bert(words=400), **SETTINGS[name])
        for batch in BATCHES:
            oracle.assert_close(step(there, batch), step(here, batch))
        assert len(there.replays.steps) == 1 and None not in there.replays.steps.values()


@pytest.mark.parametrize(
    ("spec", "name"),
    [*(("all", name) for name in SETTINGS), ("adapters", "unroll"), ("head", "unroll")],
)
def test_exact_for_every_batch(spec: str, name: str) -> None:
    with gpu() as device:
        here, there = pair(oracle.tiny_bert(), SPECS[spec], **SETTINGS[name])
        for batch in BATCHES:
            device.waits.clear()
            oracle.assert_close(step(there, batch), step(here, batch))
        steps = there.replays.steps
        assert len(steps) == 1 and None not in steps.values()
        # words, labels and padding of both sets are asked about before, and who diverged after
        assert len([w for w in device.waits if "copy" not in w]) <= 9


def nearly_full(seed: int, fullest: int) -> fm.TaskBatch:
    """Three tasks of 5 texts of 11 words, of which the fullest has so many."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(2):
        ids = torch.randint(3, 20, (3, 5, 11), generator=generator)
        short = torch.tensor([fullest, 30 + seed, 40]) - 44  # of each task's last text
        place = torch.arange(55).view(5, 11)
        mask = (place < (44 + short).view(3, 1, 1)).long()
        mask[:, :, 0] = 1
        labels = torch.arange(5).expand(3, 5) % 3
        sets.append({"input_ids": ids, "attention_mask": mask, "labels": labels.contiguous()})
    return fm.TaskBatch(*sets)


@pytest.mark.parametrize("name", ["unroll", "recompute", "auto"])
def test_every_number_of_tokens(name: str) -> None:
    """Also those that rounding up makes all of them: which are computed is read for each batch."""
    with gpu():
        here, there = pair(oracle.tiny_bert(layers=2), **SETTINGS[name])
        for seed, fullest in enumerate((51, 51, 53, 50, 45)):
            batch = nearly_full(seed, fullest)
            oracle.assert_close(step(there, batch), step(here, batch))
        assert None not in there.replays.steps.values()


OTHERS = {
    "anil": (fm.ANIL, fm.Head(), {}),
    "metasgd": (fm.MetaSGD, ADAPTERS, {}),
    "imaml": (fm.IMAML, ADAPTERS, {"cg_steps": 2}),
    "protomaml": (fm.ProtoMAML, ADAPTERS, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_learners(name: str) -> None:
    kind, spec, settings = OTHERS[name]
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", **settings}
    batch = oracle.as_batch(metric.make_tasks(3))
    with gpu():
        model = oracle.tiny_bert()
        here = kind(fm.patch(copy.deepcopy(model), spec), **settings)
        there = kind(fm.patch(on_gpu(model), spec), compile="cudagraph", **settings)
        for _ in range(2):
            oracle.assert_close(step(there, batch), step(here, batch))
        assert len(there.replays.steps) == 1 and None not in there.replays.steps.values()


@pytest.mark.parametrize("name", losses.NAMED)
def test_other_losses(name: str) -> None:
    batch = oracle.as_batch(losses.named_tasks(name))
    with gpu(), keep_float64():
        here, there = pair(losses.NAMED[name][0](), fm.LoRA(r=2), loss_fn=name)
        for _ in range(2):
            oracle.assert_close(step(there, batch), step(here, batch))
        assert len(there.replays.steps) == 1 and None not in there.replays.steps.values()


def test_graphs_that_live_meanwhile() -> None:
    """Nodes of their weights are on another stream than a recording."""
    with gpu():
        here, there = pair(oracle.tiny_bert(), ADAPTERS, lr=RATE)
        kept = []
        for batch in (BATCHES[0], BATCHES[0][:2]):
            oracle.assert_close(step(there, batch), step(here, batch))
            kept.append(there(batch.to(there.device)))
        assert len(there.replays.steps) == 2 and None not in there.replays.steps.values()
        kept[0].loss.backward()


def test_after_a_recording_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other in the process, which every learner says; graphs that are there serve."""
    with gpu():
        (here, there), (_, other) = (pair(oracle.tiny_bert()) for _ in range(2))
        step(there, BATCHES[0])
        monkeypatch.setattr(replays._Recorded, "broken", True)
        oracle.assert_close(step(there, BATCHES[1]), step(here, BATCHES[1]))
        assert len(there.replays.steps) == 1
        with pytest.warns(RuntimeWarning, match="an earlier recording of this process failed"):
            found = step(other, BATCHES[1])
        oracle.assert_close(found, step(here, BATCHES[1]))


def test_weights_that_changed_are_read() -> None:
    with gpu():
        here, there = pair(oracle.tiny_bert(), ADAPTERS)
        for learner in (here, there):
            optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
            for _ in range(2):
                optimizer.zero_grad()
                learner(BATCHES[0].to(learner.device)).loss.backward()
                optimizer.step()
        oracle.assert_close(step(there, BATCHES[1]), step(here, BATCHES[1]))
        assert len(there.replays.steps) == 1


def test_another_shape_has_a_graph_of_its_own() -> None:
    with gpu():
        here, there = pair(oracle.tiny_bert())
        for batch in (BATCHES[0], BATCHES[0][:2], BATCHES[1]):
            oracle.assert_close(step(there, batch), step(here, batch))
        assert len(there.replays.steps) == 2


def test_losses_that_weigh_tasks_differently() -> None:
    """Their gradient is not the one that was recorded."""
    with gpu():
        here, there = pair(oracle.tiny_bert())
        for _ in range(2):
            found, expected = (step(x, BATCHES[0], oracle.weighted) for x in (there, here))
            oracle.assert_close(found, expected)
        scaled = [step(x, BATCHES[0], lambda out: 3 * out.loss) for x in (there, here)]
        oracle.assert_close(*scaled)


def test_a_task_that_diverges() -> None:
    with gpu():
        here, there = pair(oracle.tiny_bert(), lr=1e200)
        for _ in range(2):
            outs = [x(BATCHES[0].to(x.device)) for x in (there, here)]
            assert bool(outs[0].diverged.all()) and bool(outs[1].diverged.all())


def test_ragged_tasks() -> None:
    with gpu():
        here, there = pair(oracle.tiny_bert())
        batch = oracle.as_batch(oracle.make_tasks(ragged=True))
        for _ in range(2):
            oracle.assert_close(step(there, batch), step(here, batch))


def test_evaluation_has_no_graph() -> None:
    with gpu(), torch.no_grad():
        _, there = pair(oracle.tiny_bert())
        there(BATCHES[0].to("cuda"))
        assert not there.replays.steps


def test_dropout_runs_without_a_graph() -> None:
    with gpu():
        _, there = pair(oracle.tiny_bert(dropout=0.3))
        with pytest.warns(RuntimeWarning, match="draws random numbers"):
            first = there(BATCHES[0].to("cuda")).loss
        assert float(on_cpu(first.detach())) != float(
            on_cpu(there(BATCHES[0].to("cuda")).loss.detach())
        )


def test_a_copy_records_its_own() -> None:
    with gpu():
        _, there = pair(oracle.tiny_bert())
        step(there, BATCHES[0])
        assert not copy.deepcopy(there.replays).steps


def test_not_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="needs a model on a GPU, got one on cpu"):
        learner_of(oracle.tiny_bert(), compile="cudagraph")
