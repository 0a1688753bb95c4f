"""``fastmeta tune --loss causal_lm``: many customers' language models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from command_line import interrupted_at
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import fastmeta as fm

WORDS = ["hello", "good", "day", "there", "book", "table", "please", "today"]
MORE = ["--loss", "causal_lm", "--spec", "lora:r=2,targets=q_proj+v_proj", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = fm.data.tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of two customers: each prompt is answered by its own word, another for each customer."""
    found = []
    for name, shift, count in (("acme", 1, 12), ("bolt", 2, 8)):
        file = tmp_path / f"{name}.jsonl"
        pairs = [(WORDS[i % 8], WORDS[(i + shift) % 8]) for i in range(count)]
        rows = [{"prompt": a, "completion": b} for a, b in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(file)
    return found


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter_model.safetensors")


def test_a_folder_of_each_and_a_table(call, files, model, tmp_path) -> None:
    out = tmp_path / "out"
    status, table, _ = call(
        *("tune", *files, "--model", model, "--out", out, *MORE),
        *("--epochs", 20, "--batch-size", 4, "--hold-out", 0.25, "--lr", 0.03),
    )
    assert status == 0
    header, *rows = table.splitlines()
    assert "perplexity of held-out texts, before and after" in header
    assert [row.split()[:3] for row in rows] == [["acme", "9", "60"], ["bolt", "6", "40"]]
    assert sorted(p.name for p in out.iterdir()) == ["acme", "bolt"]
    for row, name, count in zip(rows, ("acme", "bolt"), (3, 2), strict=True):
        about = json.loads((out / name / "fastmeta.json").read_text())
        before, after = about["held_out_loss_before"], about["held_out_loss"]
        assert after < before - 0.02 and row.endswith(
            f"{math.exp(before):.4g} -> {math.exp(after):.4g}, {count} texts"
        )
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == str(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
def test_held_out_losses_are_those_of_peft(call, files, model, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["tune", *files, "--model", model, "--out", out, *MORE]
    assert call(*arguments, "--hold-out", 0.25, "--epochs", 3, "--lr", 0.03)[0] == 0
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    read = fm.data.prompts_from_jsonl(files[1])
    _, held = fm.data.hold_out(read, 0.25, seed=0)
    assert len(held) == 2
    tuned = AutoPeftModelForCausalLM.from_pretrained(out / "bolt").eval()
    total, count = 0.0, 0
    for prompt, completion in held:
        given = tokenizer(prompt)["input_ids"][:-1]
        rest = tokenizer(completion)["input_ids"][1:]  # with its end token
        words = torch.tensor([given + rest])
        labels = torch.tensor([[-100] * len(given) + rest])
        with torch.no_grad():
            total += float(tuned(input_ids=words, labels=labels).loss) * len(rest)
        count += len(rest)
    about = json.loads((out / "bolt" / "fastmeta.json").read_text())
    assert about["held_out_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_customer_alone_gets_the_same(call, files, model, tmp_path) -> None:
    more = ["--model", model, *MORE, "--batch-size", 5]
    assert call("tune", *files, "--out", tmp_path / "both", *more)[0] == 0
    assert call("tune", files[1], "--out", tmp_path / "one", *more)[0] == 0
    both, one = (weights(tmp_path / folder, "bolt") for folder in ("both", "one"))
    for name, t in one.items():
        torch.testing.assert_close(both[name], t, rtol=1e-4, atol=1e-6)


def test_stopped_and_gone_on_with(call, files, model, tmp_path, monkeypatch) -> None:
    more = ["--model", model, *MORE, "--epochs", 3, "--batch-size", 5]
    assert call("tune", *files, "--out", tmp_path / "whole", *more)[0] == 0
    interrupted_at(monkeypatch, 4)
    out = tmp_path / "halves"
    assert call("tune", *files, "--out", out, *more)[0] == 130
    assert call("tune", *files, "--out", out, *more, "--resume")[0] == 0
    for name in ("acme", "bolt"):
        whole, halves = (weights(tmp_path / folder, name) for folder in ("whole", "halves"))
        assert all(torch.equal(whole[n], halves[n]) for n in whole)


def test_what_is_held_out_is_read_before_anything_is_trained(fails, model, tmp_path) -> None:
    rows = [{"prompt": "hello", "completion": "day"}] * 20
    rows[3] = {"prompt": "hello " * 40, "completion": "day"}
    file = tmp_path / "acme.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(4):  # in some it is held out
        said = fails(
            *("tune", file, "--out", tmp_path / "out", "--model", model, *MORE),
            *("--max-length", 20, "--hold-out", 0.5, "--seed", seed),
        )
        assert "task 'acme': a prompt of 41 tokens leaves no room" in said


def test_an_encoder_continues_nothing(fails, files, tmp_path) -> None:
    bert, tokenizer = fm.data.tiny_bert(hidden_size=16)
    tf.BertLMHeadModel(bert.config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    said = fails("tune", *files, "--model", tmp_path / "bert", "--out", tmp_path / "out",
                 "--loss", "causal_lm", "--quiet")  # fmt: skip
    assert "sees words that come later" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "builtin"], "none that is built in is a language model; give --model"),
        (["--checkpoint", "RUN"], "--checkpoint holds a classifier"),
        (["--pooling", "mean"], "pooling is of classifiers and cannot be given with causal_lm"),
        (["--hold-out", "1"], "--hold-out: expected a share of at least 0 and below 1, got 1.0"),
        (["--max-length", "2"], "task 'acme': a prompt of 2 tokens leaves no room"),
    ],
)
def test_refusals(fails, files, model, tmp_path, more, message: str) -> None:
    given = [] if "--model" in more else ["--model", model]
    said = fails("tune", *files, "--out", tmp_path / "out", *given, *MORE, *more)
    assert message in said
    assert not (tmp_path / "out").exists()
