"""The outer loop from Python: exact resume, interruption, checkpoints that cannot be half there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import fastmeta as fm
from fastmeta.training import (
    CheckpointError,
    Evaluation,
    Interrupted,
    Trainer,
    TrainingError,
    evaluate,
    evaluate_unadapted,
    find_checkpoint,
    nearest_class_mean,
    read_checkpoint,
    read_metrics,
)
from fastmeta.training.checkpoint import list_checkpoints, write_checkpoint
from fastmeta.training.files import whole_file, whole_folder
from fastmeta.training.trees import pack, unpack

TIMING = ("tasks_per_s", "peak_memory_mb")


def make_learner(spec=None, *, dropout=0.1, hidden=16, seed=0, algorithm=fm.MAML, **settings):
    model, tokenizer = fm.data.tiny_bert(3, hidden, 1, num_heads=2, dropout=dropout, seed=seed)
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", **settings}
    learner = algorithm(fm.patch(model, spec or fm.Params("*")), **settings)
    return learner, tokenizer


def make_episodes(tokenizer, part="train", **settings):
    return fm.data.Episodes(fm.data.builtin(part), tokenizer, 3, 1, 2, 3, **settings)


def make_trainer(out=None, *, learner=None, schedule=True, optimizer=torch.optim.AdamW, **settings):
    learner, tokenizer = learner or make_learner()
    outer = optimizer(learner.parameters(), lr=1e-2)
    if schedule:
        settings["schedule"] = torch.optim.lr_scheduler.LambdaLR(outer, lambda s: 0.9**s)
    valid = make_episodes(tokenizer, "valid")
    return Trainer(
        learner,
        make_episodes(tokenizer),
        outer,
        valid=valid,
        eval_every=2,
        eval_episodes=4,
        out=out,
        progress=False,
        **settings,
    )


def same(left, right) -> bool:
    (a, tree), (b, other) = tree_flatten(left), tree_flatten(right)
    if tree != other:
        return False
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def without_timing(records):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in records]


@pytest.mark.parametrize(
    ("algorithm", "memory"),
    [(fm.MAML, "auto"), (fm.MetaSGD, "recompute"), (fm.Reptile, "unroll")],
)
def test_resumed_run_gives_the_same_bits(tmp_path, algorithm, memory):
    def trainer(name):
        learner = make_learner(algorithm=algorithm, memory=memory)
        return make_trainer(tmp_path / name, learner=learner)

    torch.manual_seed(1)
    trainer("straight").fit(6)
    torch.manual_seed(1)
    trainer("resumed").fit(3)
    torch.manual_seed(999)  # must not matter: dropout goes on from the saved state
    second = trainer("resumed")
    assert second.resume() == 3
    second.fit(6)
    a, b = (read_checkpoint(find_checkpoint(tmp_path / n)) for n in ("straight", "resumed"))
    assert a["step"] == 6 and a["outer"]["state"]
    assert same(a, b)
    records = [read_metrics(tmp_path / n / "metrics.jsonl") for n in ("straight", "resumed")]
    assert without_timing(records[0]) == without_timing(records[1])
    assert [r["step"] for r in records[0]] == [1, 2, 3, 4, 5, 6]
    assert ["valid_accuracy" in r for r in records[0]] == [False, True] * 3


def test_stop_during_an_evaluation_resumes_with_that_evaluation(tmp_path):
    torch.manual_seed(1)
    make_trainer(tmp_path / "straight").fit(4)
    torch.manual_seed(1)
    first = make_trainer(tmp_path / "cut")
    forward = first.learner.forward

    def stop_while_evaluating(*args, **kwargs):
        if not first.learner.training:
            first.stop()
        return forward(*args, **kwargs)

    first.learner.forward = stop_while_evaluating
    with pytest.raises(Interrupted, match=r"stopped after step 2; saved in .*step-00000002"):
        first.fit(4)
    assert [r["step"] for r in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [1]
    second = make_trainer(tmp_path / "cut")
    second.resume()
    second.fit(4)
    a, b = (read_checkpoint(find_checkpoint(tmp_path / n)) for n in ("straight", "cut"))
    assert same(a, b)
    records = [read_metrics(tmp_path / n / "metrics.jsonl") for n in ("straight", "cut")]
    assert without_timing(records[0]) == without_timing(records[1])


def test_stop_without_a_folder_ends_the_loop():
    trainer = make_trainer()
    trainer.stop()
    with pytest.raises(Interrupted, match=r"stopped after step 0$"):
        trainer.fit(2)
    assert trainer.fit(1)[-1]["step"] == 1  # and it may go on


def test_metrics_after_the_checkpoint_are_done_again(tmp_path):
    make_trainer(tmp_path, checkpoint_every=2).fit(2)
    metrics = tmp_path / "metrics.jsonl"
    with open(metrics, "a") as file:  # a crash after the checkpoint: one more step, half a line
        file.write(json.dumps({"step": 3, "loss": -1.0}) + "\n" + '{"step": 4, "lo')
    trainer = make_trainer(tmp_path)
    trainer.resume()
    trainer.fit(3)
    records = read_metrics(metrics)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[-1]["loss"] > 0


def test_training_lowers_the_loss_and_draws_the_curve(tmp_path):
    trainer = make_trainer(tmp_path, learner=make_learner(dropout=0.0), schedule=False)
    batch = trainer.episodes.batch(0)
    trainer.episodes._make = lambda index: batch  # the same tasks again and again can be learnt
    losses = [r["loss"] for r in trainer.fit(25)]
    assert min(losses) < 0.7 * losses[0]  # at this rate the way down is not straight
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_last_checkpoints_are_kept_and_nothing_half_written(tmp_path):
    make_trainer(tmp_path, checkpoint_every=1, keep=2).fit(4)
    folder = tmp_path / "checkpoints"
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]
    assert sorted(p.name for p in list_checkpoints(folder)[0].iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]
    with pytest.raises(TypeError, match=r"got object in state\.bad"):
        write_checkpoint(folder, 5, {"bad": object()}, keep=2)
    assert len(list(folder.iterdir())) == 2


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    make_trainer(tmp_path).fit(1)
    left = tmp_path / "checkpoints" / ".partial-abc"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    trainer = make_trainer(tmp_path)
    assert trainer.resume() == 1
    trainer.fit(2)
    assert not left.exists()


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_checkpoint_is_one_clear_sentence(tmp_path, name, damage):
    make_trainer(tmp_path).fit(1)
    file = find_checkpoint(tmp_path) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    trainer = make_trainer(tmp_path)
    before = {n: p.clone() for n, p in trainer.learner.state_dict().items()}
    with pytest.raises(CheckpointError, match=name) as caught:
        trainer.resume()
    assert "\n" not in str(caught.value)
    assert same(before, dict(trainer.learner.state_dict()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"spec": fm.Head()}, "of another specification: expected Head()"),
        ({"algorithm": fm.MetaSGD}, "of another learner: expected MetaSGD, got MAML"),
        ({"hidden": 32}, "expected shape"),
    ],
)
def test_checkpoint_of_something_else_is_refused(tmp_path, other, message):
    make_trainer(tmp_path).fit(1)
    trainer = make_trainer(tmp_path, learner=make_learner(**other))
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(").replace(")", r"\)")):
        trainer.resume()


def test_frozen_weights_of_another_model_are_noticed(tmp_path):
    def learner(seed):
        learner, tokenizer = make_learner(fm.Head(), seed=seed)
        learner.patched.model.requires_grad_(False)
        return learner, tokenizer

    make_trainer(tmp_path, learner=learner(0)).fit(1)
    make_trainer(tmp_path, learner=learner(0)).resume()
    with pytest.raises(CheckpointError, match="of another model: its frozen weights differ"):
        make_trainer(tmp_path, learner=learner(1)).resume()


def test_other_optimizer_schedule_or_data_are_refused(tmp_path):
    make_trainer(tmp_path).fit(1)
    with pytest.raises(CheckpointError, match="another outer optimizer than SGD"):
        make_trainer(tmp_path, optimizer=torch.optim.SGD).resume()
    with pytest.raises(CheckpointError, match="written with a schedule, this trainer has none"):
        make_trainer(tmp_path, schedule=False).resume()
    trainer = make_trainer(tmp_path)
    trainer.episodes.seed = 5
    with pytest.raises(CheckpointError, match="seed=0"):
        trainer.resume()
    with pytest.raises(CheckpointError, match="is no folder"):
        trainer.resume(tmp_path / "nowhere")


def test_a_batch_that_diverges_whole_is_an_error_not_nan(tmp_path):
    learner, tokenizer = make_learner()
    trainer = make_trainer(tmp_path, learner=(learner, tokenizer))
    with torch.no_grad():
        learner.patched.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="all 3 tasks of step 1 diverged"):
        trainer.fit(2)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_wrong_arguments():
    learner, tokenizer = make_learner()
    episodes = make_episodes(tokenizer)
    outer = torch.optim.SGD(learner.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        Trainer(learner, episodes, outer, keep=0)
    with pytest.raises(ValueError, match="clip_norm must be positive or None, got -1"):
        Trainer(learner, episodes, outer, clip_norm=-1)
    with pytest.raises(ValueError, match="none of the learner's meta-parameters"):
        Trainer(learner, episodes, torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(ValueError, match="cannot save"):
        Trainer(learner, episodes, outer).save()
    finite = make_episodes(tokenizer, num_batches=1)
    with pytest.raises(TrainingError, match="the episodes ended after 1 steps"):
        Trainer(learner, finite, outer, progress=False).fit(2)


def test_evaluation_counts_exactly_and_leaves_the_mode():
    learner, tokenizer = make_learner()
    episodes = make_episodes(tokenizer, "test")
    learner.train()
    result = evaluate(learner, episodes, 7)
    assert len(result.accuracies) == len(result.losses) == 7 and learner.training
    again = evaluate(learner, episodes, 7)
    assert torch.equal(result.accuracies, again.accuracies)  # no dropout while evaluating
    with torch.no_grad():
        learner.eval()
        first = learner(episodes.batch(0)).accuracy
    assert torch.equal(result.accuracies[:3], first)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        evaluate(learner, episodes, 0)


def test_evaluation_of_a_list():
    learner, tokenizer = make_learner()
    episodes = make_episodes(tokenizer, "test")
    batches = [episodes.batch(n) for n in range(3)]
    for given in (batches, tuple(batches)):
        for count, seen in ((7, 7), (600, 9)):
            found, want = evaluate(learner, given, count), evaluate(learner, episodes, seen)
            assert torch.equal(found.accuracies, want.accuracies)
    wrong = {"generator": iter(batches), "TaskBatch": batches[0], "a list with int": [1]}
    for given in wrong.values():
        with pytest.raises(TypeError, match=r"expected a loader .* or a list of fm.TaskBatch, got"):
            evaluate(learner, given)
    with pytest.raises(ValueError, match="at least one task batch, got none"):
        evaluate(learner, [])


def test_training_on_a_list(tmp_path):
    """As on episodes, whose batches it holds; a run goes on where it was."""
    settings = {"eval_every": 2, "eval_episodes": 6, "progress": False}
    _, tokenizer = make_learner()
    episodes, valid = make_episodes(tokenizer), make_episodes(tokenizer, "valid")
    batches, held = ([e.batch(n) for n in range(4)] for e in (episodes, valid))

    def trainer(given, valid, out=None):
        learner, _ = make_learner(dropout=0.0)
        outer = torch.optim.SGD(learner.parameters(), lr=0.1)
        return Trainer(learner, given, outer, valid=valid, out=out, **settings)

    expected = without_timing(trainer(episodes, valid).fit(4))
    found = trainer(batches, held, tmp_path)
    assert without_timing(found.fit(4)) == expected
    whole = without_timing(found.fit(6))
    again = trainer(batches, held, tmp_path)
    assert again.resume(tmp_path / "checkpoints" / "step-00000004") == 4
    assert without_timing(again.fit(6)) == whole
    with pytest.raises(CheckpointError, match="batches with sizes="):
        trainer(batches[:3], held, tmp_path).resume()
    for wrong in ((iter(batches), None), (batches[0], None), ([1], None), (batches, [1])):
        with pytest.raises(TypeError, match=r"expected a loader .* or a list of fm.TaskBatch, got"):
            trainer(*wrong)


def test_interval_is_the_textbook_one():
    result = Evaluation(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert result.accuracy == pytest.approx(0.5)
    assert result.interval == pytest.approx(1.96 * 0.2581988897 / 2)
    assert str(result) == "50.00 ± 25.30 %"


def test_baselines_match_a_loop_over_tasks():
    learner, tokenizer = make_learner(dropout=0.0)
    model, episodes = learner.patched.model.eval(), make_episodes(tokenizer, "test")
    means = nearest_class_mean(model, episodes, 3).accuracies
    plain = evaluate_unadapted(learner.patched, episodes, 3).accuracies
    batch = episodes.batch(0)
    for t in range(3):
        support, query = ({k: v[t] for k, v in s.items()} for s in (batch.support, batch.query))

        def features(s):
            inputs = {k: v for k, v in s.items() if k != "labels"}
            with torch.no_grad():
                states = model.bert(**inputs).last_hidden_state
            mask = s["attention_mask"].unsqueeze(-1)
            return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

        predicted = (features(query) @ features(support).T).argmax(1)  # one shot: row c is class c
        assert means[t] == (predicted == query["labels"]).float().mean()
        labels = query.pop("labels")
        with torch.no_grad():
            right = model(**query).logits.argmax(-1) == labels
        assert plain[t] == right.float().mean()


def test_trees_come_back_as_they_were():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "buffer": None}},
        "betas": (0.9, 0.999),
        "lr": 0.1 + 0.2,
        "inf": float("-inf"),
        "$tensor": [1, True, "x"],
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(tree, "t", tensors), allow_nan=False)
    back = unpack(json.loads(text), tensors)
    assert same(tree, back) and type(back["betas"]) is tuple and 0 in back["state"]


def test_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("x")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):  # a second time replaces the first
        with whole_folder(tmp_path / "folder") as temporary:
            (temporary / text).write_text(text)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_checkpoints_hold_no_pickle(tmp_path):
    make_trainer(tmp_path).fit(1)
    folder = find_checkpoint(tmp_path)
    tensors = load_file(folder / "tensors.safetensors")
    assert "state.rng.0.cpu" in tensors
    assert any(name.startswith("state.meta.") for name in tensors)
    assert any(name.startswith("state.outer.") for name in tensors)
    assert json.loads((folder / "state.json").read_text())["step"] == 1
