"""The command line with files of classes: how they are split, and what each command reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import flags, write_jsonl

import fastmeta as fm
from fastmeta.cli import main


@pytest.fixture(scope="module")
def class_files(tmp_path_factory) -> dict[str, Path]:
    """JSONL files of 5 to 20 classes, none in two of them."""
    texts, folder = fm.data.builtin(), tmp_path_factory.mktemp("classes")
    pairs = [texts[i] for i in range(60 * 50)]
    ends = {"train": (0, 20), "valid": (20, 25), "test": (25, 30), "other": (30, 50)}
    return {
        name: write_jsonl(folder / f"{name}.jsonl", pairs[60 * begin : 60 * end])
        for name, (begin, end) in ends.items()
    }


@pytest.fixture(scope="module")
def runs_on_files(tmp_path_factory, class_files) -> dict[str, Path]:
    """A run whose data is split, and one with files of its own."""
    folder = tmp_path_factory.mktemp("runs")
    files = {"split": {}, "own": {k: class_files[k] for k in ("valid", "test")}}
    for name, more in files.items():
        settings = flags(data=class_files["train"], out=folder / name, steps=1, **more)
        assert main(["train", "--quiet", *settings]) == 0
    return {name: folder / name for name in files}


def test_one_file_of_classes_is_split_and_that_is_said(call, fails, tmp_path, class_files):
    data, out = class_files["train"], tmp_path / "run"
    status, _, err = call("train", "--quiet", *flags(data=data, out=out, steps=1, ways=2))
    said = f"the classes of {data} are split at random: 60 % train, 20 % valid, 20 % test; "
    assert status == 0 and said + "--valid FILE and --test FILE give your own\n" in err
    assert call("eval", "--quiet", "--checkpoint", out, "--episodes", 2)[2].count(said) == 1
    own = {k: class_files[k] for k in ("valid", "test")}
    settings = flags(data=data, out=tmp_path / "own", steps=1, **own)
    assert "at random" not in call("train", "--quiet", *settings)[2]
    message = fails("train", *flags(data=data, ways=5, eval_every=1, out=tmp_path / "x"))
    assert "(20 % of its classes, at random, for valid): expected 5 classes or more" in message
    few = write_jsonl(tmp_path / "few.jsonl", [("a", "x"), ("b", "y")])
    message = fails("train", *flags(data=few, out=tmp_path / "x"))
    assert "expected enough classes to split" in message and "got 2; give --valid" in message


def test_files_of_classes_that_are_missing(fails, tmp_path, class_files):
    data, out = class_files["train"], tmp_path / "run"
    message = fails("train", *flags(data=data, test=class_files["test"], eval_every=1, out=out))
    assert "no valid classes" in message
    for key in ("valid", "test"):
        message = fails("train", *flags(data=data, out=out, **{key: "nowhere.jsonl"}))
        assert message == f"{key} 'nowhere.jsonl': no such file"
    assert not out.exists()


@pytest.mark.parametrize(
    ("run", "given", "read"),
    [
        ("own", {}, "test"),
        ("own", {"data": "other"}, "other"),
        ("own", {"data": "train", "test": "other"}, "other"),
        ("own", {"part": "train"}, "train"),
        ("own", {"part": "valid", "valid": "other"}, "other"),
        ("split", {"test": "other"}, "other"),
    ],
)
def test_what_eval_names_is_what_it_evaluates(
    call, monkeypatch, runs_on_files, class_files, run, given, read
):
    from fastmeta.cli import data as texts

    seen, whole = [], texts.Episodes
    monkeypatch.setattr(texts, "Episodes", lambda d, *a, **k: seen.append(d) or whole(d, *a, **k))
    files = [f"--{k}={v if k == 'part' else class_files[v]}" for k, v in given.items()]
    status, text, err = call(
        "eval", "--quiet", "--no-baselines", "--checkpoint", runs_on_files[run],
        "--episodes", 2, *files,
    )  # fmt: skip
    assert status == 0, err
    assert text.startswith(f"{given.get('part', 'test')} classes of {class_files[read]}: 3-way")
    assert set(seen[0].classes) <= set(fm.data.from_jsonl(class_files[read]).classes)


def test_eval_needs_the_files_it_is_given(fails, runs_on_files, lora_run, class_files):
    start = ("eval", "--quiet", "--checkpoint")
    for run in (*runs_on_files.values(), lora_run):
        assert fails(*start, run, "--test=no.jsonl") == "test 'no.jsonl': no such file"
        message = fails(*start, run, "--data=no.jsonl")
        assert message == "data 'no.jsonl': no such file or folder"
    both = (f"--test={class_files['test']}", "--data=no.jsonl")
    assert "data 'no.jsonl': no such file" in fails(*start, lora_run, *both)
    message = fails(*start, lora_run, f"--valid={class_files['test']}")
    assert message == "--valid is for --part valid: expected no other, got test"


def test_a_file_of_test_classes_serves_any_run(call, lora_run, class_files):
    status, text, _ = call(
        "eval", "--quiet", "--checkpoint", lora_run, "--episodes", 2, "--test", class_files["test"]
    )
    assert status == 0 and f"test classes of {class_files['test']}" in text


def test_classes_that_are_trained_on_and_judged_by_are_counted(call, tmp_path, class_files):
    data = fm.data.from_jsonl(class_files["train"])
    own = [data[i] for i in range(60)] + [(f"new {i}", c) for i in range(60) for c in "xyz"]
    file = write_jsonl(tmp_path / "valid.jsonl", own)
    out = tmp_path / "run"
    settings = flags(data=class_files["train"], valid=file, out=out, steps=1)
    said = f"fastmeta: {file} shares 1 of its 4 classes and 60 of its 240 texts with "
    said += f"{class_files['train']}, which is trained on\n"
    status, _, err = call("train", "--quiet", *settings)
    assert status == 0 and err.count(said) == 1
    arguments = ["eval", "--quiet", "--checkpoint", out, "--part", "valid", "--episodes", 2]
    assert call(*arguments)[2].count(said) == 1
