"""The command line of model-based methods: train, resume, eval, adapt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import SUPPORT, flags, write_jsonl
from safetensors.torch import load_file

import fastmeta as fm
from fastmeta.training import find_checkpoint, read_checkpoint, read_metrics

SMALL = {"learned_hidden": 3, "learned_layers": 1, "spec": "head", "pooling": "mean"}
UNROLL = SMALL | {"method": "learnedopt", "horizon": 2, "truncation": 1}
HYPER = {"method": "hypernet", "hyper_latent": 4, "hyper_hidden": 6, "spec": "lora:r=2 + head"}
METHODS = [
    HYPER,
    HYPER | {"refine_steps": 1, "train_encoder": True, "train": "all", "inner_optimizer": "adam"},
    SMALL | {"method": "lstmmeta", "learn_lr": "layer", "learned_layers": None},
    SMALL | {"method": "learnedopt"},
    UNROLL | {"unroll": "truncated"},
    UNROLL | {"unroll": "pes", "pes_pairs": 1},
    SMALL | {"method": "anil", "inner_optimizer": "learned", "learned_kind": "mlp"},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_train_eval_adapt(call, tmp_path, settings) -> None:
    out = tmp_path / "run"
    more = {"checkpoint_every": 1, "steps": 2, "outer_lr": 0.01}
    assert call("train", "--quiet", *flags(out=out, **more, **settings))[0] == 0
    assert all(r["loss"] > 0 for r in read_metrics(out / "metrics.jsonl"))
    meta = read_checkpoint(find_checkpoint(out))["meta"]
    own = "hypernet." if settings["method"] == "hypernet" else "optimizer."
    assert any(name.startswith(own) for name in meta)
    status, text, _ = call("eval", "--quiet", "--checkpoint", out, "--episodes", 3)
    assert status == 0 and settings["method"] in text
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    folder = tmp_path / "adapted"
    status, text, err = call(
        "adapt", "--checkpoint", out, "--support", support, "--out", folder, "--predict", support
    )
    assert status == 0 and "accuracy" in err
    assert [json.loads(line)["label"] for line in text.splitlines()] == ["cancel", "play", "mail"]
    lora = settings["method"] == "hypernet"
    written = load_file(folder / ("adapter_model.safetensors" if lora else "adapted.safetensors"))
    assert any("classifier" in name for name in written)


@pytest.mark.parametrize("settings", [METHODS[i] for i in (1, 2, 4, 5)])
def test_resume_is_exact(call, tmp_path, settings) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # an unroll is under way when the run stops
    settings = {"checkpoint_every": 1, "outer_lr": 0.01, **settings}
    assert call("train", "--quiet", *flags(out=whole, steps=3, **settings))[0] == 0
    assert call("train", "--quiet", *flags(out=parts, steps=1, **settings))[0] == 0
    assert call("train", "--quiet", "--resume", parts, "--steps=3")[0] == 0
    first, second = (read_checkpoint(find_checkpoint(run))["meta"] for run in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_for_another_specification(call, fails, tmp_path) -> None:
    out = tmp_path / "run"
    assert call("train", "--quiet", *flags(out=out, steps=1, **HYPER))[0] == 0
    bert, tokenizer = fm.data.tiny_bert(3, 16, 1)
    bert.requires_grad_(False)
    learner = fm.HyperNetwork(fm.patch(bert, fm.LoRA(r=3) + fm.Head()), latent=4, hidden=6)
    episodes = fm.data.Episodes(fm.data.builtin(), tokenizer, ways=3, tasks=2)
    outer = torch.optim.SGD(learner.parameters(), lr=0.1)
    trainer = fm.training.Trainer(learner, episodes, outer, out=out, progress=False)
    with pytest.raises(fm.training.CheckpointError, match="is of another"):
        trainer.resume()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=maml", "--unroll=pes"], "unroll: expected whole for maml, got 'pes'"),
        (
            ["--method=learnedopt", "--unroll=pes", "--horizon=10", "--truncation=3"],
            "horizon must be a multiple of truncation=3, got 10",
        ),
        (["--method=lstmmeta", "--inner-lr=2"], "rate must be a number in (0, 1), got 2.0"),
        (["--method=hypernet", "--inner-optimizer=learned"], "expected another for hypernet"),
        (["--method=hypernet", "--refine-steps=-1"], "refine_steps: expected at least 0, got -1"),
    ],
)
def test_user_errors(fails, tmp_path: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails("train", "--model=builtin:hidden=16,layers=1", *arguments)
    assert list(tmp_path.iterdir()) == []
