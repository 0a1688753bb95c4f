"""The command line of metric-based methods: train, resume, eval, adapt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from command_line import SUPPORT, flags, write_jsonl
from safetensors.torch import load_file

import fastmeta as fm
from fastmeta.training import find_checkpoint, read_checkpoint, read_metrics

METHODS = [
    {"method": "protonet", "learn_temperature": True, "temperature": 0.5, "normalize": True},
    {"method": "protonet", "metric": "mahalanobis", "precision": "full", "projection": 4},
    {"method": "protonet", "spec": "lora:r=2", "pooling": "cls", "metric": "cityblock"},
    {"method": "matchingnet", "full_context": True, "fce_steps": 2, "pooling": "last"},
    {"method": "relationnet", "relation_hidden": 8, "relation_loss": "mse", "rates_lr": 1e-2},
    {"method": "protomaml", "temperature": 4, "normalize": True},
    {"method": "protomaml", "spec": "norm + head", "learn_temperature": True},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_train_eval_adapt(call, tmp_path, settings) -> None:
    out = tmp_path / "run"
    more = {"checkpoint_every": 1, "steps": 2, "outer_lr": 0.05}
    assert call("train", "--quiet", *flags(out=out, **more, **settings))[0] == 0
    assert all(r["loss"] > 0 for r in read_metrics(out / "metrics.jsonl"))
    status, text, _ = call("eval", "--quiet", "--checkpoint", out, "--episodes", 3)
    assert status == 0 and settings["method"] in text and "nearest class mean" in text
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    folder = tmp_path / "adapted"
    status, text, err = call(
        "adapt", "--checkpoint", out, "--support", support, "--out", folder, "--predict", support
    )
    assert status == 0 and "accuracy" in err
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["label"] for r in rows] == ["cancel", "play", "mail"]
    tensors = load_file(folder / "adapted.safetensors")
    name = {"matchingnet": "support", "protomaml": "classifier.weight"}.get(
        settings["method"], "prototypes"
    )
    assert name in tensors
    about = json.loads((folder / "fastmeta.json").read_text())
    assert sorted(about["labels"]) == ["cancel", "mail", "play"]
    assert (folder / "base" / "model.safetensors").is_file()


def test_written_prototypes_serve_without_the_library(call, tmp_path) -> None:
    """A query belongs to the nearest written prototype of the written encoder's mean state."""
    out, folder = tmp_path / "run", tmp_path / "adapted"
    assert call("train", "--quiet", *flags(out=out, method="protonet", outer_lr=0.05))[0] == 0
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    status, text, _ = call(
        "adapt", "--checkpoint", out, "--support", support, "--out", folder, "--predict", support
    )
    assert status == 0
    rows = [json.loads(line) for line in text.splitlines()]
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "base")
    model = tf.BertForSequenceClassification.from_pretrained(folder / "base").bert.eval()
    labels = json.loads((folder / "fastmeta.json").read_text())["labels"]
    prototypes = load_file(folder / "adapted.safetensors")["prototypes"]
    for row in rows:
        with torch.no_grad():
            states = model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state
        probabilities = (-(states.mean(1) - prototypes).square().sum(1)).softmax(0)
        assert labels[int(probabilities.argmax())] == row["predicted"]
        assert float(probabilities.max()) == pytest.approx(row["probability"], abs=1e-4)


@pytest.mark.parametrize("spec", ["lora:r=2", "prefix:length=2"])
def test_a_folder_holds_all_that_was_learned(call, tmp_path, spec: str) -> None:
    """Base and folder together give the predictions: factors, temperature and settings."""
    run, folder = tmp_path / "run", tmp_path / "adapted"
    settings = {"spec": spec, "metric": "cosine", "temperature": 0.5, "normalize": True}
    settings |= {"outer_lr": 0.1, "steps": 3, "pooling": "cls"}
    assert call("train", "--quiet", *flags(out=run, method="protonet", **settings))[0] == 0
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    status, text, _ = call(
        "adapt", "--checkpoint", run, "--support", support, "--out", folder, "--predict", support
    )
    assert status == 0
    about = json.loads((folder / "fastmeta.json").read_text())
    model = tf.BertForSequenceClassification.from_pretrained(folder / "base")
    adapts = fm.LoRA(r=2, targets="all-linear") if "lora" in spec else fm.Prefix(2)
    assert about["spec"] == spec
    named = ("metric", "temperature", "normalize", "pooling")
    learner = fm.ProtoNet(
        fm.patch(model.requires_grad_(False), adapts), **{k: about[k] for k in named}
    )
    learner.eval()
    tensors = load_file(folder / "adapted.safetensors")
    state = {n: tensors.pop(n).unsqueeze(0) for n in ("prototypes", "counts")}
    learner.load_state_dict(tensors)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in text.splitlines()]
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = learner.predict(state, **{k: v.unsqueeze(0) for k, v in inputs.items()})
    found = logits[0].softmax(-1).max(-1)
    for row, p, label in zip(rows, *found, strict=True):
        assert row["predicted"] == about["labels"][label]
        assert float(p) == pytest.approx(row["probability"], abs=2e-6)


@pytest.mark.parametrize("method", ["protonet", "protomaml"])
def test_resume_is_exact(call, tmp_path, method: str) -> None:
    straight, resumed = tmp_path / "a", tmp_path / "b"
    settings = {"method": method, "learn_temperature": True, "dropout": True}
    settings["model"] = "builtin:hidden=16,layers=1,dropout=0.1"
    torch.manual_seed(1)
    assert call("train", "--quiet", *flags(out=straight, steps=4, **settings))[0] == 0
    torch.manual_seed(2)
    assert call("train", "--quiet", *flags(out=resumed, steps=2, **settings))[0] == 0
    assert call("train", "--quiet", "--resume", resumed, "--steps", 4)[0] == 0
    states = [read_checkpoint(find_checkpoint(p))["meta"] for p in (straight, resumed)]
    assert states[0].keys() == states[1].keys() and "metric" in list(states[0])[-1]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_checkpoint_knows_its_learner(call, fails, tmp_path) -> None:
    out = tmp_path / "run"
    assert (
        call("train", "--quiet", *flags(out=out, steps=1, method="protonet", train="all"))[0] == 0
    )
    message = fails("train", "--resume", out, "--steps", 2, "--method", "relationnet")
    assert "method='protonet', got 'relationnet'" in message
    bert, tokenizer = fm.data.tiny_bert(3, 16, 1)
    bert.bert.embeddings.requires_grad_(False)
    episodes = fm.data.Episodes(fm.data.builtin(), tokenizer, ways=3, tasks=2)

    def trainer(learner) -> fm.training.Trainer:
        outer = torch.optim.SGD(learner.parameters(), lr=0.1)
        return fm.training.Trainer(learner, episodes, outer, out=tmp_path / "own", progress=False)

    trainer(fm.ProtoNet(bert)).fit(1)
    assert trainer(fm.ProtoNet(bert)).resume() == 1
    with torch.no_grad():
        bert.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(fm.training.CheckpointError, match="its frozen weights differ"):
        trainer(fm.ProtoNet(bert)).resume()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=maml", "--pooling=cls"], "pooling: expected null or mean for maml, got 'cls'"),
        (["--method=protonet", "--metric=l2"], "metric: expected one of sqeuclidean"),
        (["--method=protonet", "--metric=minkowski"], "metric 'minkowski' needs p, got p=None"),
        (["--method=protonet", "--train=adapted"], "nothing would learn"),
        (["--method=protomaml", "--spec=norm"], "a linear head with a bias from prototypes"),
        (["--method=protonet", "--temperature=0"], "temperature: expected a number above 0"),
    ],
)
def test_user_errors(fails, tmp_path: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails("train", "--model=builtin:hidden=16,layers=1", *arguments)
    assert list(tmp_path.iterdir()) == []
