"""``fastmeta tune``: many customers' files to a folder of each; stopping, going on, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import flags, interrupted_at, write_jsonl
from safetensors.torch import load_file

import fastmeta as fm

DATA = fm.data.builtin("test")
MODEL = ["--model", "builtin:hidden=16,layers=1", "--quiet"]
SPEC = ["--spec", "lora:r=2,targets=query+value + head"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of two customers: 2 classes of 12 texts, 3 classes of 6."""
    found = []
    for name, classes, count in (("acme", DATA.classes[:2], 12), ("bolt", DATA.classes[2:5], 6)):
        pairs = [(text, c) for c in classes for text in DATA.texts_of(c)[:count]]
        found.append(write_jsonl(tmp_path / f"{name}.jsonl", pairs))
    return found


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter_model.safetensors")


def test_a_folder_of_each_and_a_table(call, files, tmp_path) -> None:
    out = tmp_path / "out"
    status, table, _ = call(
        *("tune", *files, "--out", out, *MODEL, *SPEC),
        *("--epochs", 2, "--batch-size", 5, "--hold-out", 0.25, "--lr", 0.01),
    )
    assert status == 0
    rows = [line.split() for line in table.splitlines()]
    assert [row[:4] for row in rows[1:]] == [["acme", "2", "18", "8"], ["bolt", "3", "15", "6"]]
    assert sorted(p.name for p in out.iterdir()) == ["acme", "base", "bolt"]
    for row, name, classes in zip(rows[1:], ("acme", "bolt"), (2, 3), strict=True):
        about = json.loads((out / name / "fastmeta.json").read_text())
        assert about["labels"] == sorted(about["labels"]) and len(about["labels"]) == classes
        assert about["format"] == "peft" and about["steps"] == int(row[3])
        assert row[4] == f"{100 * about['held_out_accuracy']:.1f}"
        assert Path(about["base_model"]) == out / "base"
        found = weights(out, name)
        assert any("lora_B" in n and t.abs().max() > 0 for n, t in found.items())


def test_a_customer_alone_gets_the_same(call, files, tmp_path) -> None:
    more = [*MODEL, *SPEC, "--dtype", "float64", "--batch-size", 5]
    assert call("tune", *files, "--out", tmp_path / "both", *more)[0] == 0
    assert call("tune", files[1], "--out", tmp_path / "one", *more)[0] == 0
    both, one = (weights(tmp_path / folder, "bolt") for folder in ("both", "one"))
    for name, t in one.items():
        torch.testing.assert_close(both[name], t, rtol=1e-9, atol=1e-12)


def test_stopped_and_gone_on_with(call, files, tmp_path, monkeypatch) -> None:
    more = [*MODEL, *SPEC, "--epochs", 3, "--batch-size", 5]
    assert call("tune", *files, "--out", tmp_path / "whole", *more)[0] == 0
    calls = interrupted_at(monkeypatch, 4)
    out = tmp_path / "halves"
    status, _, err = call("tune", *files, "--out", out, *more)
    assert status == 130 and "stopped after 4 of 15 steps" in err and "--resume" in err
    assert [p.name for p in out.iterdir()] == ["tuning.pt"]
    status, _, err = call("tune", *files, "--out", out, *more[:-1], 6, "--resume")
    assert status == 2 and "is of a run with batch_size=5, got 6" in err
    for change in (["--optimizer", "adam"], ["--lr", "0.1"], ["--dtype", "float64"]):
        status, _, err = call("tune", *files, "--out", out, *more, *change, "--resume")
        assert status == 2 and f"is of a run with {change[0][2:]}=" in err and len(calls) == 4
    text = files[0].read_text()
    files[0].write_text(text.replace(DATA.classes[0], "zoo"))
    status, _, err = call("tune", *files, "--out", out, *more, "--resume")
    assert status == 2 and "belongs to other data: that of 'acme' differs" in err
    files[0].write_text(text)
    assert call("tune", *files, "--out", out, *more, "--resume")[0] == 0
    assert len(calls) == 15 and not (out / "tuning.pt").exists()
    for name in ("acme", "bolt"):
        whole, halves = (weights(tmp_path / folder, name) for folder in ("whole", "halves"))
        assert all(torch.equal(whole[n], halves[n]) for n in whole)


def test_from_what_was_meta_learned(call, lora_run, files, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["tune", *files, "--checkpoint", lora_run, "--out", out, "--quiet"]
    assert call(*arguments, "--epochs", 1, "--lr", 1e-9)[0] == 0
    found = weights(out, "acme")
    factors = [t for n, t in found.items() if "lora_B" in n]
    assert factors and all(t.abs().max() > 1e-3 for t in factors)  # a new LoRA starts at 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--spec", "lora:r=0"], "LoRA"),
        (["--lr", "0"], "lr must be positive, got 0.0"),
        (["--epochs", "0"], "epochs must be an integer of at least 1, got 0"),
        (["--hold-out", "1"], "--hold-out: expected a share of at least 0 and below 1, got 1.0"),
        (["--resume"], "holds no state of an unfinished run to go on with"),
        (["--save-every", "0"], "--save-every: expected at least 1, got 0"),
        (["--checkpoint", "RUN", "--spec", "head"], "spec comes with the checkpoint"),
    ],
)
def test_refusals(fails, files, tmp_path, more, message: str) -> None:
    assert message in fails("tune", *files, "--out", tmp_path / "out", *MODEL, *more)
    assert not (tmp_path / "out").exists()


def test_refused_files(fails, files, tmp_path, lora_run) -> None:
    def refused(*given: Path | str) -> str:
        return fails("tune", *given, "--out", tmp_path / "out", "--quiet")

    assert "different stems, got 'acme' twice" in refused(files[0], files[0])
    for name in ("base", "...", ".", ".hidden", "tuning.pt"):
        file = write_jsonl(tmp_path / f"{name}jsonl", [("a", "x")]) if name == "." else None
        file = file or write_jsonl(tmp_path / f"{name}.jsonl", [("a", "x"), ("b", "y")])
        assert "no customer can be called" in refused(file)
    single = write_jsonl(tmp_path / "one.jsonl", [("a", "x"), ("b", "x")])
    assert "task 'one': expected 2 classes or more, got 1" in refused(single)
    four = write_jsonl(tmp_path / "four.jsonl", [(c, c) for c in "abcd"])
    message = "trained with ways=3, but a file has 4 classes"
    assert message in refused(four, "--checkpoint", lora_run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").touch()
    assert "exists already" in refused(*files)


def test_metric_checkpoints_are_refused(fails, call, files, tmp_path) -> None:
    run = tmp_path / "run"
    assert call("train", "--quiet", *flags(method="protonet", out=run, inner_steps=None))[0] == 0
    message = fails("tune", *files, "--checkpoint", run, "--out", tmp_path / "out")
    assert "a checkpoint of protonet has no initial weights to tune from" in message


def test_a_damaged_state(fails, files, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tuning.pt").write_bytes(b"no state")
    message = fails("tune", *files, "--out", out, *MODEL, *SPEC, "--resume")
    assert "tuning.pt cannot be read" in message


def test_a_new_head_that_does_not_adapt_is_kept(call, files, tmp_path) -> None:
    """Weights of norms alone are adapted under a head that no other place has."""
    bert, tokenizer = fm.data.tiny_bert(hidden_size=16, num_layers=1)
    bert.bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    arguments = ["tune", *files, "--model", tmp_path / "encoder", "--quiet", "--epochs", 1]
    for spec, bases in (("norm", 1), ("lora:r=2 + head", 0)):
        out = tmp_path / f"out{bases}"
        assert call(*arguments, "--spec", spec, "--out", out)[0] == 0
        assert (out / "base").is_dir() == bool(bases)
        about = json.loads((out / "acme" / "fastmeta.json").read_text())
        assert about["ways"] == 3 and about["pooling"] is None and len(about["labels"]) == 2
        assert Path(about["base_model"]) == (out / "base" if bases else tmp_path / "encoder")


@pytest.mark.parametrize("scale", [30, 10])
def test_a_pooling_that_the_model_does_not_say_is_kept(call, files, tmp_path, scale) -> None:
    bert, tokenizer = fm.data.tiny_bert(hidden_size=16, num_layers=1)
    bert.bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    out = tmp_path / "out"
    pooling = ["--pooling", "mean", "--pooling-scale", scale, "--epochs", 1, "--quiet"]
    arguments = ["tune", files[0], "--model", tmp_path / "encoder", "--out", out, *SPEC, *pooling]
    assert call(*arguments)[0] == 0
    assert (out / "base").is_dir() == (scale != 30) and not (out / "acme" / "base").exists()


def test_a_file_that_is_not_there(fails, tmp_path) -> None:
    said = fails("tune", tmp_path / "acme.jsonl", "--out", tmp_path / "out", *MODEL)
    assert said.startswith(f"{tmp_path / 'acme.jsonl'}: cannot be read")
