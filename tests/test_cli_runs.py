"""The command line's runs: what is gone on with, what is left alone, keys without an effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import SUPPORT, flags, write_jsonl

from fastmeta.cli.applies import check_given
from fastmeta.cli.config import METHODS, make_config, read_yaml
from fastmeta.training import Trainer, find_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parent.parent
HEAD = {"spec": "head", "method": "fomaml", "inner_steps": 1}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    """A run with a checkpoint of each of three steps."""
    from fastmeta.cli import main

    out = tmp_path_factory.mktemp("runs") / "three"
    assert main(["train", "--quiet", *flags(out=out, steps=3, checkpoint_every=1, **HEAD)]) == 0
    return out


@pytest.fixture
def run(three_steps, tmp_path) -> Path:
    return shutil.copytree(three_steps, tmp_path / "run")


@pytest.mark.parametrize(
    ("named", "step"), [("", 3), ("checkpoints", 3), ("checkpoints/step-00000001", 1)]
)
def test_what_is_named_is_gone_on_with(call, monkeypatch, run, named, step):
    seen, fit = [], Trainer.fit

    def noted(self, steps):
        seen.append((self.step, self.out))
        return fit(self, steps)

    monkeypatch.setattr(Trainer, "fit", noted)
    out = Path(f"{run.parent}/other/../run")  # the same folder
    arguments = ["train", "--quiet", "--resume", run / named, "--out", out, "--steps", 4]
    assert call(*arguments)[0] == 0
    assert seen == [(step, run)]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "curve.png",
        "metrics.jsonl",
    ]


def test_a_flag_may_repeat_what_the_run_has(call, tmp_path):
    """Its effect is that in the run, whose other keys need not be given again."""
    out = tmp_path / "run"
    own = {"method": "learnedopt", "unroll": "truncated", "horizon": 2, "truncation": 1}
    assert call("train", "--quiet", *flags(out=out, steps=1, spec="head", **own))[0] == 0
    again = ["--resume", out, "--steps", 2, "--unroll", "truncated", "--horizon", 2]
    assert call("train", "--quiet", *again)[0] == 0


def test_a_checkpoint_with_nothing_left_to_do_loses_nothing(fails, run):
    first = run / "checkpoints" / "step-00000001"
    message = fails("train", "--resume", first, "--steps", 1)
    assert "has done 1 of 1 steps already" in message
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert len(read_metrics(run / "metrics.jsonl")) == 3


def test_a_run_goes_on_in_its_own_folder(fails, run, tmp_path):
    other = tmp_path / "other"
    message = fails("train", "--resume", run, "--out", other, "--steps", 5)
    assert message == f"--resume {run} goes on in {run}: expected no other --out, got {other}"
    assert not other.exists()


def test_a_stop_while_the_last_step_is_evaluated_can_be_finished(call, monkeypatch, tmp_path):
    out, evaluation = tmp_path / "run", Trainer._evaluate

    def stopped(self, bar):
        self.stop()
        return evaluation(self, bar)

    monkeypatch.setattr(Trainer, "_evaluate", stopped)
    status, _, err = call("train", "--quiet", *flags(out=out, eval_every=2, **HEAD))
    assert status == 130 and f"--resume {out}" in err
    monkeypatch.undo()
    status, text, _ = call("train", "--quiet", "--resume", out)
    assert status == 0 and "2 steps done" in text
    assert [r.get("valid_accuracy") is None for r in read_metrics(out / "metrics.jsonl")] == [
        True,
        False,
    ]
    status, _, err = call("train", "--quiet", "--resume", out)
    assert status == 2 and "has done 2 of 2 steps already" in err


def test_resumed_with_more_steps_the_rate_follows_the_schedule(call, tmp_path):
    out = tmp_path / "run"
    settings = HEAD | {"schedule": "linear", "outer_lr": 1.0, "outer": "sgd"}
    assert call("train", "--quiet", *flags(out=out, steps=2, **settings))[0] == 0
    assert call("train", "--quiet", "--resume", out, "--steps", 4)[0] == 0
    assert [r["lr"] for r in read_metrics(out / "metrics.jsonl")] == [1.0, 0.5, 0.5, 0.25]


def test_one_episode_has_no_interval(call, tmp_path):
    out, file = tmp_path / "run", tmp_path / "result.json"
    status, text, _ = call(
        "train", "--quiet", *flags(out=out, steps=1, eval_every=1, **HEAD | {"eval_episodes": 1})
    )
    assert status == 0 and "±" not in text
    arguments = ["eval", "--quiet", "--checkpoint", out, "--episodes", 1, "--json", file]
    assert call(*arguments)[0] == 0
    assert "Infinity" not in file.read_text()
    assert {row["interval"] for row in json.loads(file.read_text()).values()} == {None}


def test_the_demo_leaves_other_runs_alone(fails, run):
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    assert "already holds a run" in fails("demo", "--out", run, "--steps", 1, "--quiet")
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


# -- keys that would have no effect ----------------------------------------------------------

IDLE = [
    ({"method": "hypernet", "inner_steps": 3}, "inner_steps", "method: hypernet"),
    ({"method": "protonet", "inner_lr": 0.3}, "inner_lr", "method: protonet"),
    ({"method": "protonet", "order": 1}, "order", "method: protonet"),
    ({"method": "matchingnet", "learn_lr": "layer"}, "learn_lr", "method: matchingnet"),
    ({"method": "relationnet", "compile": True}, "compile", "method: relationnet"),
    ({"method": "relationnet", "temperature": 2}, "temperature", "method: relationnet"),
    ({"method": "imaml", "order": 1}, "order", "method: imaml"),
    ({"method": "imaml", "truncate": 1}, "truncate", "method: imaml"),
    ({"method": "reptile", "truncate": 1}, "truncate", "order: 1"),
    ({"method": "lstmmeta", "inner_optimizer": "adam"}, "inner_optimizer", "method: lstmmeta"),
    ({"method": "maml", "refine_steps": 2}, "refine_steps", "method: maml"),
    ({"method": "maml", "metric": "cosine"}, "metric", "method: maml"),
    ({"method": "protonet", "metric_p": 3}, "metric_p", "metric: sqeuclidean"),
    ({"momentum": 0.9}, "momentum", "outer: adamw"),
    ({"horizon": 5}, "horizon", "unroll: whole"),
]
IDLE += [
    ({"method": "protomaml", "spec": "head", key: value}, key, "method: protomaml with a spec")
    for key, value in (("pooling", "last"), ("normalize", True), ("projection", 4))
]


@pytest.mark.parametrize(("given", "key", "why"), IDLE, ids=lambda v: str(v)[:50])
@pytest.mark.parametrize("where", ["flags", "file"])
def test_a_key_without_an_effect_is_refused(fails, tmp_path, monkeypatch, given, key, why, where):
    monkeypatch.chdir(tmp_path)
    if where == "flags":
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    else:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
        arguments = ["--config=run.yaml"]
    assert fails("train", *arguments).startswith(f"{key} has no effect with {why}, only with ")


@pytest.mark.parametrize(
    ("command", "key"), [("eval", "--refine-steps=2"), ("adapt", "--refine-steps=5")]
)
def test_keys_without_an_effect_on_a_checkpoint(fails, run, tmp_path, command, key):
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    more = ["--support", support, "--predict", support] if command == "adapt" else []
    message = fails(command, "--checkpoint", run, key, *more)
    assert message == "refine_steps has no effect with method: fomaml, only with method: hypernet"


@pytest.mark.parametrize("method", METHODS)
def test_a_runs_own_configuration_has_all_keys(method):
    config = make_config({"method": method})
    check_given(config, {}, config.to_dict())


def test_examples_have_no_idle_keys(run):
    files = [*(ROOT / "examples").glob("*.yaml"), run / "config.yaml"]
    for file in files:
        check_given(make_config(read_yaml(file)), {}, read_yaml(file))


def test_bfloat16_holds_for_predictions_too(call, tmp_path):
    out, support = tmp_path / "run", write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    assert call("train", "--quiet", *flags(out=out, dtype="bfloat16", **HEAD))[0] == 0
    state = find_checkpoint(out) / "state.json"
    found = []
    for dtype in ("bfloat16", "float32"):
        state.write_text(state.read_text().replace('"dtype": "bfloat16"', f'"dtype": "{dtype}"'))
        status, text, _ = call(
            "adapt", "--checkpoint", out, "--support", support, "--predict", support
        )
        assert status == 0
        found.append([json.loads(line)["probability"] for line in text.splitlines()])
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], abs=0.05)
