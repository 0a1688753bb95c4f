"""A run and its folder: other runs in it, older checkpoints, what cannot be trained or written."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_training import make_episodes, make_learner, make_trainer, same, without_timing
from torch import nn

import fastmeta as fm
from fastmeta.training import (
    Interrupted,
    Trainer,
    TrainingError,
    find_checkpoint,
    nearest_class_mean,
    read_checkpoint,
    read_metrics,
)
from fastmeta.training.checkpoint import list_checkpoints
from fastmeta.training.evaluation import evaluating
from fastmeta.training.files import sweep, whole_folder
from fastmeta.training.trees import apart


def steps(folder) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in list_checkpoints(folder / "checkpoints")]


# -- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [lambda t: t.fit(1), lambda t: t.save()], ids=["fit", "save"])
def test_the_folder_of_another_run_is_refused(tmp_path, begin):
    first = make_trainer(tmp_path, checkpoint_every=1)
    first.fit(2)
    before = [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    with pytest.raises(FileExistsError, match="already holds a run: resume"):
        begin(make_trainer(tmp_path))
    assert [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()] == before
    assert len(first.fit(3)) == 3  # its own


def test_an_older_checkpoint_leaves_no_later_ones(tmp_path):
    make_trainer(tmp_path, checkpoint_every=1, keep=9).fit(4)
    trainer = make_trainer(tmp_path, checkpoint_every=1, keep=2)
    assert trainer.resume(tmp_path / "checkpoints" / "step-00000001") == 1
    assert steps(tmp_path) == [1, 2, 3, 4]  # nothing is lost before it trains
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    trainer.fit(2)
    assert steps(tmp_path) == [1, 2]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_nothing_is_removed_before_something_is_done_again(tmp_path):
    make_trainer(tmp_path, checkpoint_every=1, keep=9).fit(3)
    trainer = make_trainer(tmp_path, checkpoint_every=1, keep=9)
    trainer.resume(tmp_path / "checkpoints" / "step-00000002")
    trainer.fit(2)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_without_a_checkpoint_leaves_its_folder_to_another(tmp_path):
    make_trainer(tmp_path).fit(2)
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        shutil.rmtree(checkpoint)
    make_trainer(tmp_path).fit(1)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_the_last_evaluation_can_be_finished(tmp_path):
    torch.manual_seed(1)
    make_trainer(tmp_path / "straight").fit(2)
    torch.manual_seed(1)
    first = make_trainer(tmp_path / "cut")
    evaluation = first._evaluate
    first._evaluate = lambda bar: (first.stop(), evaluation(bar))
    with pytest.raises(Interrupted, match="stopped after step 2"):
        first.fit(2)
    second = make_trainer(tmp_path / "cut")
    assert second.resume() == 2 and not second.is_done(2)
    second.fit(2)
    assert second.is_done(2)
    a, b = (read_checkpoint(find_checkpoint(tmp_path / n)) for n in ("straight", "cut"))
    assert same(a, b) and b["unfinished"] is None
    records = [read_metrics(tmp_path / n / "metrics.jsonl") for n in ("straight", "cut")]
    assert without_timing(records[0]) == without_timing(records[1])


def test_a_stop_at_the_very_end_is_no_interruption(tmp_path):
    trainer = make_trainer(tmp_path)
    step = trainer._train_step
    trainer._train_step = lambda batches: (step(batches), trainer.stop())[0]
    assert len(trainer.fit(1)) == 1 and (tmp_path / "curve.png").exists()
    trainer._train_step = step
    assert len(trainer.fit(2)) == 2


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "step") as temporary:
        (temporary / "old").write_text("old")
    rename = type(tmp_path).rename

    def killed(self, target):
        if target == tmp_path / "step":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", killed)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "step") as temporary:
        (temporary / "new").write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "step").exists()
    sweep(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["step", "step/old"]


# -- what is trained -------------------------------------------------------------------------


def test_a_meta_gradient_that_is_not_finite_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_every=1)
    first = next(iter(trainer.learner.parameters()))
    before = {n: p.clone() for n, p in trainer.learner.state_dict().items()}
    first.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="meta-gradient of step 1 is not finite, although 3 of"):
        trainer.fit(2)
    assert same(before, dict(trainer.learner.state_dict())) and steps(tmp_path) == []


def test_parameters_beside_the_learners_are_clipped_and_saved(tmp_path):
    """As of a loss that is a function with parameters of its own."""

    def trainer():
        factor = nn.Parameter(torch.tensor(3.0))
        learner, tokenizer = make_learner(
            fm.Head(),
            dropout=0.0,
            loss_fn=lambda out, batch: out.logits.exp().mean((1, 2)) * factor,
        )
        outer = torch.optim.SGD([*learner.parameters(), factor], lr=0.5)
        made = Trainer(
            learner, make_episodes(tokenizer), outer, out=tmp_path, clip_norm=1e-3, progress=False
        )
        return made, factor

    first, factor = trainer()
    first.fit(1)
    assert 0 < abs(factor.item() - 3) <= 0.5e-3 * 1.001
    second, other = trainer()
    second.resume()
    assert torch.equal(other, factor)


def test_a_schedule_of_more_steps_is_followed_when_resumed(tmp_path):
    def trainer(steps):
        learner, tokenizer = make_learner()
        outer = torch.optim.SGD(learner.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(outer, lambda s: max(0.0, 1 - s / steps))
        return Trainer(
            learner,
            make_episodes(tokenizer),
            outer,
            schedule=schedule,
            out=tmp_path,
            progress=False,
        )

    trainer(2).fit(2)
    second = trainer(4)
    second.resume()
    assert [r["lr"] for r in second.fit(4)] == [1.0, 0.5, 0.5, 0.25]


def test_one_episode_has_no_interval(tmp_path):
    learner, tokenizer = make_learner()
    episodes = make_episodes(tokenizer)
    outer = torch.optim.SGD(learner.parameters(), lr=0.1)
    settings = {"valid": episodes, "eval_every": 1, "eval_episodes": 1, "progress": False}
    Trainer(learner, episodes, outer, out=tmp_path, **settings).fit(2)
    assert [r["valid_interval"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


@pytest.mark.parametrize("unroll", [False, True])
def test_a_learner_without_accuracies_is_not_evaluated(unroll):
    rule = fm.LearnedOptimizer(hidden=2, layers=1) if unroll else "sgd"
    learner, tokenizer = make_learner(
        fm.Head(), loss_fn=lambda out, batch: out.logits.mean((1, 2)), optimizer=rule, order=1
    )
    if unroll:
        learner = fm.TruncatedUnroll(learner, horizon=2, truncation=1)
    outer = torch.optim.SGD(learner.parameters(), lr=0.1)
    episodes = make_episodes(tokenizer)
    with pytest.raises(ValueError, match="needs accuracies, which this learner does not give"):
        Trainer(learner, episodes, outer, valid=episodes, eval_every=3)
    Trainer(learner, episodes, outer, valid=episodes)


# -- evaluation ------------------------------------------------------------------------------


class Directions(nn.Module):
    """Tokens 0 and 1 are two axes, 2 lies opposite both, nearer to the first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.1, -0.995]]))

    def embed(self, input_ids, attention_mask):
        return self.weight[input_ids[:, 0]]


def test_a_class_without_support_is_no_nearest_one():
    def rows(ids, labels):
        ids = torch.tensor(ids)[:, None]
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}

    two = rows([0, 1], [0, 1]), rows([2], [0])
    three = rows([0, 1, 1], [0, 1, 2]), rows([0], [0])
    for tasks, ways in (([two], [2]), ([two, three], [2, 3])):
        batch = fm.TaskBatch.collate(tasks, ways=ways)
        episodes = SimpleNamespace(batch=lambda index, batch=batch: batch)
        assert nearest_class_mean(Directions(), episodes, len(tasks)).accuracies[0] == 1


@pytest.mark.parametrize("name", ["model", "maml", "unroll", "protonet"])
def test_every_module_gets_its_own_mode_back(name):
    maml, tokenizer = make_learner(
        fm.Head(), optimizer=fm.LearnedOptimizer(hidden=2, layers=1), order=1
    )
    if name == "model":
        module = maml.model
        quiet = module.dropout
    elif name == "protonet":
        module = fm.ProtoNet(maml.model)
        quiet = module.embedding
    else:
        module = maml if name == "maml" else fm.TruncatedUnroll(maml, horizon=2, truncation=1)
        quiet = maml.rule
        maml(make_episodes(tokenizer).batch(0))  # the model's copy is made
    module.train()
    quiet.eval()
    with evaluating(module):
        assert not module.training and not quiet.training
    assert module.training and not quiet.training
    plans = [plan for plan in maml.patched._plans.values() if name in ("maml", "unroll")]
    assert all(plan.structure.dropout.training for plan in plans)


def test_tensors_that_share_memory_are_written_apart():
    whole = torch.arange(6.0)
    found = apart({"a": whole, "again": whole, "view": whole[2:4], "turned": whole.view(2, 3).T})
    places = [t.untyped_storage().data_ptr() for t in found.values()]
    assert len(set(places)) == 4 and found["view"].tolist() == [2, 3]
    assert json.dumps(found["turned"].tolist()) == "[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]"
