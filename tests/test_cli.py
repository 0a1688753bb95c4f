"""The command line: what it does, what it writes, and one sentence for every user error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from command_line import SUPPORT, TINY, flags, write_jsonl
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import fastmeta as fm
from fastmeta.cli import main
from fastmeta.training import Trainer, find_checkpoint, read_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parent.parent


# -- train ---------------------------------------------------------------------------------------


def test_train_writes_a_run(call, tmp_path):
    out = tmp_path / "run"
    settings = flags(out=out, eval_every=2, checkpoint_every=1, warmup=2, schedule="cosine")
    status, text, _ = call("train", "--quiet", *settings)
    assert status == 0 and "2 steps done" in text and "validation classes" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "curve.png",
        "metrics.jsonl",
    ]
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2]
    assert {"loss", "accuracy", "tasks_per_s", "peak_memory_mb", "lr"} <= records[0].keys()
    assert "valid_accuracy" in records[1] and records[0]["lr"] == 0.5e-3
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["spec"] == "all" and saved["order"] == 2 and saved["train"] == "adapted"
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_progress_bar_shows_accuracy_and_rate(call, tmp_path):
    status, _, err = call("train", *flags(out=tmp_path / "run", steps=1))
    assert status == 0 and "accuracy=" in err and "tasks/s=" in err


def test_flags_win_over_the_file(call, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TINY | {"outer_lr": "1e-2", "steps": 1, "spec": ["head"]}))
    out = tmp_path / "run"
    assert call("train", "--quiet", "--config", file, "--out", out, "--inner-lr", "2e-2")[0] == 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["outer_lr"], saved["inner_lr"], saved["spec"]) == (0.01, 0.02, "head")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fomaml", "pooling": "mean"},
        {"method": "anil"},
        {"method": "reptile", "outer": "sgd", "outer_lr": 1},
        {"method": "metasgd", "rates_lr": 1e-4},
        {"method": "imaml", "spec": "bias"},
        {"spec": "norm + head", "learn_lr": "layer+step", "dtype": "bfloat16"},
        {"spec": "prefix:length=2", "train": "all", "dtype": "float64", "task_chunk": 1},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_method_trains_and_evaluates(call, tmp_path, settings):
    out = tmp_path / "run"
    assert call("train", "--quiet", *flags(out=out, steps=1, **settings))[0] == 0
    assert read_metrics(out / "metrics.jsonl")[0]["loss"] > 0
    status, text, _ = call("eval", "--quiet", "--checkpoint", out, "--episodes", 3)
    assert status == 0 and settings.get("method", "maml") in text


def test_resume_is_exact_and_keeps_the_configuration(call, tmp_path):
    straight, resumed = tmp_path / "a", tmp_path / "b"
    settings = {"eval_every": 2, "model": "builtin:hidden=16,layers=1,dropout=0.1", "dropout": True}
    torch.manual_seed(1)
    assert call("train", "--quiet", *flags(out=straight, steps=6, **settings))[0] == 0
    torch.manual_seed(2)
    assert call("train", "--quiet", *flags(out=resumed, steps=3, **settings))[0] == 0
    status, text, _ = call("train", "--quiet", "--resume", resumed, "--steps", 6)
    assert status == 0 and "6 steps done" in text
    states = [read_checkpoint(find_checkpoint(p)) for p in (straight, resumed)]
    for state in states:
        state["config"].pop("out")
    (a, tree), (b, other) = (tree_flatten(s) for s in states)
    assert tree == other
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )
    records = [read_metrics(p / "metrics.jsonl") for p in (straight, resumed)]
    for key in ("step", "loss", "accuracy", "lr", "valid_accuracy", "valid_loss"):
        assert [r.get(key) for r in records[0]] == [r.get(key) for r in records[1]]


def test_resume_refuses_changes_and_finished_runs(fails, lora_run):
    message = fails("train", "--resume", lora_run, "--steps", 5, "--inner-lr", 0.3)
    assert "inner_lr=0.5, got 0.3" in message
    assert "has done 2 of 2 steps already" in fails("train", "--resume", lora_run)
    message = fails("train", "--resume", lora_run, "--steps", 5, "--spec", "head")
    assert "spec='lora" in message


def test_a_run_is_not_overwritten_by_mistake(call, fails, tmp_path):
    out = tmp_path / "run"
    assert call("train", "--quiet", *flags(out=out, steps=1))[0] == 0
    assert "already holds a run" in fails("train", *flags(out=out))
    (out / "mine.txt").write_text("keep")
    assert call("train", "--quiet", "--overwrite", *flags(out=out, steps=2))[0] == 0
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1, 2]
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(call, tmp_path, monkeypatch, number):
    step = Trainer._train_step

    def interrupted(self, batches):
        if self.step == 1:
            signal.raise_signal(number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    before = signal.getsignal(number)
    out = tmp_path / "run"
    status, _, err = call("train", "--quiet", *flags(out=out, steps=5))
    assert status == 130 and "stopped after step 2; saved in" in err and f"--resume {out}\n" in err
    assert signal.getsignal(number) is before
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert call("train", "--quiet", "--resume", out, "--steps", 3)[0] == 0
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]


def test_from_the_shell_with_ctrl_c(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastmeta", "train", *flags(out=out, steps=100000)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "saved in" in err
    state = read_checkpoint(find_checkpoint(out))
    assert state["step"] == read_metrics(out / "metrics.jsonl")[-1]["step"]


# -- eval ----------------------------------------------------------------------------------------


def test_eval_prints_a_table_and_writes_json(call, lora_run, tmp_path):
    file = tmp_path / "result.json"
    status, text, _ = call(
        "eval", "--checkpoint", lora_run, "--episodes", 5, "--quiet", "--shots", 2, "--json", file
    )
    assert status == 0 and "3-way 2-shot, 5 episodes" in text
    assert "nearest class mean" in text and "not adapted" in text and "±" in text
    rows = json.loads(file.read_text())
    assert len(rows) == 3 and all(0 <= r["accuracy"] <= 1 for r in rows.values())
    again = call("eval", "--checkpoint", find_checkpoint(lora_run), "--episodes", 5, "--quiet",
                 "--shots", 2)[1]  # fmt: skip
    assert again.splitlines()[1:] == text.splitlines()[1:]  # all but the time


def test_eval_of_damaged_or_foreign_checkpoints(fails, lora_run, tmp_path):
    assert "is no folder" in fails("eval", "--checkpoint", tmp_path / "nowhere")
    message = fails("eval", "--checkpoint", lora_run, "--model", "builtin:hidden=32,layers=1")
    assert "of another model" in message
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    source = find_checkpoint(lora_run)
    (folder / "state.json").write_bytes((source / "state.json").read_bytes())
    tensors = (source / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(tensors[: len(tensors) // 2])
    assert "truncated or damaged" in fails("eval", "--checkpoint", folder)
    (folder / "state.json").write_text('{"format": 1,')
    assert "state.json is damaged" in fails("eval", "--checkpoint", folder)


# -- adapt ---------------------------------------------------------------------------------------


def predictions(call, run, folder, support, texts, *more):
    status, text, err = call(
        "adapt", "--checkpoint", run, "--support", support, "--predict", texts, *more,
        *(["--out", folder] if folder else []),
    )  # fmt: skip
    assert status == 0, err
    return [json.loads(line) for line in text.splitlines()], err


def test_adapt_writes_a_folder_that_peft_reads(call, lora_run, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    folder = tmp_path / "adapter"
    rows, err = predictions(call, lora_run, folder, support, support)
    assert "(peft)" in err and "accuracy" in err
    about = json.loads((folder / "fastmeta.json").read_text())
    assert about["labels"] == ["cancel", "mail", "play"]
    base = AutoModelForSequenceClassification.from_pretrained(about["base_model"])
    tokenizer = AutoTokenizer.from_pretrained(about["base_model"])
    inputs = tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        unadapted = base.eval()(**inputs).logits.softmax(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
            model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        probabilities = model(**inputs).logits.softmax(-1)
    for row, p in zip(rows, probabilities, strict=True):
        best = about["labels"].index(row["predicted"])
        assert row["probability"] == pytest.approx(float(p[best]), abs=2e-6)
    assert (probabilities - unadapted).abs().max() > 1e-3  # the adapter matters
    assert list(load_file(folder / "adapter_model.safetensors"))  # no pickle


def test_adapt_without_lora_writes_named_weights(call, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "adapted"
    assert call("train", "--quiet", *flags(out=run, spec="head", inner_lr=1, outer_lr=0.1))[0] == 0
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT[:2])  # fewer classes than the head
    rows, err = predictions(call, run, folder, support, support, "--inner-steps", 20)
    assert "(safetensors)" in err
    weights = load_file(folder / "adapted.safetensors")
    assert sorted(weights) == ["classifier.bias", "classifier.weight"]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()
    model.load_state_dict(weights, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    inputs = tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits[:, :2]
    for row, p in zip(rows, logits.softmax(-1), strict=True):
        assert row["probability"] == pytest.approx(float(p.max()), abs=2e-6)
        assert row["predicted"] == ["cancel", "play"][int(p.argmax())]


def test_adapt_errors(fails, lora_run, tmp_path):
    support = write_jsonl(tmp_path / "support.jsonl", SUPPORT)
    start = ("adapt", "--checkpoint", lora_run, "--support")
    assert "expected --out DIR or --predict FILE" in fails(*start, support)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    assert "exists already" in fails(*start, support, "--out", full)
    new = tmp_path / "new"
    many = write_jsonl(tmp_path / "many.jsonl", [(f"text {i}", f"label {i}") for i in range(4)])
    assert "expected 2 to 3 classes" in fails(*start, many, "--out", new)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(support.read_text() + "{oops\n")
    assert f"{bad}, line 4: malformed JSON" in fails(*start, bad, "--out", new)
    assert f"{bad}, line 4: malformed JSON" in fails(*start, support, "--predict", bad)
    assert "nowhere.jsonl: cannot be read" in fails(
        *start, tmp_path / "nowhere.jsonl", "--out", new
    )
    assert not new.exists()


# -- info, demo ----------------------------------------------------------------------------------


def test_info_names_the_operators(call):
    status, text, _ = call("info")
    assert status == 0 and "torch" in text and "sgd_update" in text


def test_demo_in_small(call, tmp_path):
    out = tmp_path / "demo"
    status, text, _ = call("demo", "--out", out, "--steps", 2, "--episodes", 3, "--quiet")
    assert status == 0 and "after MAML" in text and "before" in text
    assert (out / "curve.png").exists() and (out / "results.json").exists()
    assert call("demo", "--out", out, "--steps", 1, "--episodes", 3, "--quiet")[0] == 0  # again
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1]


# -- errors --------------------------------------------------------------------------------------

WRONG = [
    ([], "expected a command"),
    (["trian"], "invalid choice: 'trian'"),
    (
        ["train", "--inner-step=3"],
        "unknown argument '--inner-step=3' (did you mean '--inner-steps'",
    ),
    (["train", "--steps=0"], "steps: expected at least 1, got 0"),
    (["train", "--steps=2.5"], "steps: expected an integer, got 2.5"),
    (["train", "--inner-lr=-1"], "inner_lr: expected a number above 0, got -1"),
    (["train", "--outer-lr=nan"], "outer_lr: expected a finite number"),
    (["train", "--method=mamll"], "expected one of maml, fomaml, anil"),
    (["train", "--order=3"], "order: expected one of 1, 2, got 3"),
    (
        ["train", "--compile=jit"],
        "compile: expected one of False, True, trace, inductor, cudagraph",
    ),
    (["train", "--method=fomaml", "--order=2"], "fomaml is first-order: expected order 1, got 2"),
    (["train", "--dropout=maybe"], "dropout: expected true or false, got 'maybe'"),
    (["train", "--task-chunk=0"], "task_chunk: expected null, 'auto' or an integer"),
    (["train", "--spec=lora:rank=3"], "spec 'lora:rank=3': unknown option 'rank'"),
    (["train", "--spec=lora:r=two"], "expected r to be an integer, got 'two'"),
    (["train", "--spec=lora:r=0"], "rank r must be an integer of at least 1, got 0"),
    (["train", "--spec=lor"], "expected one of lora, prefix, params"),
    (["train", "--spec=lora+head"], "expected terms joined by ' + ', as in 'lora:r=8 + head'"),
    (["train", "--spec=lora head"], "expected terms joined by ' + '"),
    (["train", "--spec=head + "], "expected terms such as"),
    (["train", "--spec=params:clasifier.*"], "near matches: classifier.bias"),
    (
        ["train", "--spec=params:classifier.*+norm"],
        "expected spaces around + before the term 'norm'",
    ),
    (["train", "--method=anil", "--spec=all"], "ANIL adapts the head only"),
    (["train", "--learn-lr=depth"], "a learned rate is per step, task, layer, param; got 'depth'"),
    (["train", "--model=/no/such/model"], "model '/no/such/model': no such folder"),
    (["train", "--model=builtin:width=3"], "model: unknown option 'width'"),
    (["train", "--data=/no/such/data"], "data '/no/such/data': no such file or folder"),
    (["train", "--data=/no/such/data.jsonl"], "data '/no/such/data.jsonl': no such file or folder"),
    (["train", "--ways=100"], "expected 100 classes or more, got 72"),
    (["train", "--shots=100"], "has 60 examples, but 100 support"),
    (["train", "--device=abacus"], "device 'abacus' cannot be used"),
    (["train", "--config=/no/such/file.yaml"], "/no/such/file.yaml: cannot be read"),
    (["train", "--resume=/no/such/run"], "/no/such/run is no folder"),
    (["eval"], "the following arguments are required: --checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:40])
def test_user_errors_are_one_sentence(fails, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 2\nstepss: 3\n", "unknown key 'stepss' (did you mean 'steps'"),
        ("steps: [1\nmodel: x\n", "line 2: malformed YAML"),
        ("- steps\n", "expected a table of 'key: value' lines, got list"),
        ("", "got an empty file"),
        ("outer_lr: fast\n", "outer_lr: expected a finite number, got 'fast'"),
        ("spec: [lora, 3]\n", "spec: expected a text, got ['lora', 3]"),
    ],
)
def test_wrong_configuration_files(fails, tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    sentence = fails("train", "--config", file)
    assert message in sentence and sentence.startswith(str(file))


def test_a_folder_that_cannot_be_written(fails, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for command in (["train", *flags()], ["demo"]):
        assert f"{file} is a file" in fails(*command, "--out", file / "run")
    assert list(tmp_path.iterdir()) == [file]


def test_unexpected_errors_keep_their_traceback(tmp_path, monkeypatch):
    def broken(self, batches):
        raise ValueError("a bug")

    monkeypatch.setattr(Trainer, "_train_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "--quiet", *flags(out=tmp_path / "run")])


def test_examples_are_valid_configurations():
    from fastmeta.cli.config import make_config, read_yaml
    from fastmeta.cli.specs import parse_spec

    files = sorted((ROOT / "examples").glob("*.yaml"))
    assert files
    for file in files:
        parse_spec(make_config(read_yaml(file)).spec)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora:r=8,targets=query+value + params:classifier.*",
         fm.LoRA(8, 16, ("query", "value")) + fm.Params("classifier.*")),
        ("lora", fm.LoRA()),
        ("params:a.*+b", fm.Params("a.*", "b")),
        ("bias + norm + head + prefix:length=4", fm.Bias() + fm.Norm() + fm.Head() + fm.Prefix(4)),
        ("all", fm.Params("*")),
    ],
)  # fmt: skip
def test_spec_syntax(text, expected):
    from fastmeta.cli.specs import parse_spec

    assert repr(parse_spec(text)) == repr(expected)
