"""Prompts and what is to follow them: files, tokens, labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastmeta as fm
from fastmeta.data import DataError, Minibatches, prompts_from_jsonl
from fastmeta.data.prompts import tokenize_prompted

TOKENIZER = fm.data.tiny_tokenizer()
SEP = TOKENIZER.sep_token_id


def ids(text: str, special: bool = False) -> list[int]:
    return TOKENIZER(text, add_special_tokens=special)["input_ids"]


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "acme.jsonl"
    file.write_text(
        '{"prompt": "Q", "completion": "A"}\n\n{"text": "words"}\n'
        '{"prompt": "", "completion": "B", "text": "not this"}\n'
    )
    assert prompts_from_jsonl(file) == [("Q", "A"), "words", ("", "B")]
    file.write_text('{"q": "Q", "a": "A"}\n{"words": "words"}\n')
    found = prompts_from_jsonl(file, prompt="q", completion="a", text="words")
    assert found == [("Q", "A"), "words"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Q"}', "line 1: no key 'completion'; the line has 'prompt'"),
        ('{"completion": "A"}', "line 1: no key 'prompt'; the line has 'completion'"),
        (
            '{"prompt": "Q", "text": "A"}',
            "line 1: no key 'completion'; the line has 'prompt', 'text'",
        ),
        ('{"prompt": 3, "completion": "A"}', "'prompt' to be a string, got int 3"),
        ("[]", "line 1: expected a JSON object, got list"),
        ("", "expected lines of JSON, got an empty file"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "acme.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message):
        prompts_from_jsonl(file)


def test_tokens_are_those_that_a_prompt_alone_has() -> None:
    texts = [("hello there", "good day"), "good day", ("", "hello")]
    tokens, given = tokenize_prompted(texts, TOKENIZER)
    prompt = ids("hello there", special=True)[:-1]
    rows = [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:])]  # noqa: B905
    assert rows[0] == [*prompt, *ids("good day"), SEP] and given[0] == len(prompt)
    assert rows[1] == ids("good day", special=True) and given[1] == 0
    assert rows[2] == [TOKENIZER.cls_token_id, *ids("hello"), SEP] and given[2] == 1
    assert tokenize_prompted(texts[1:2], TOKENIZER)[0].ids.tolist() == rows[1]


def test_long_ones() -> None:
    prompt = ids("hello there", special=True)[:-1]
    room = len(prompt) + 1
    with pytest.warns(UserWarning, match=f"2 of 2 texts are longer than max_length={room}"):
        tokens, given = tokenize_prompted(
            [("hello there", "good day"), "hello there good day"], TOKENIZER, max_length=room
        )
    assert tokens.ids[:room].tolist() == [*prompt, ids("good day")[0]] and given[0] == len(prompt)
    with pytest.raises(DataError, match=f"leaves no room .*max_length={len(prompt)}"):
        tokenize_prompted([("hello there", "good day")], TOKENIZER, max_length=len(prompt))
    with pytest.raises(DataError, match="task 'acme': a prompt of"):
        Minibatches({"acme": [("hello there", "good")]}, TOKENIZER, max_length=len(prompt))
    for following in ("", " "):
        with pytest.raises(DataError, match="task 'acme': expected what follows a prompt to have"):
            Minibatches({"acme": [("hello there", following)]}, TOKENIZER)
    with pytest.raises(DataError) as caught:
        tokenize_prompted([("hello " * 900, "good day")], TOKENIZER)
    assert len(str(caught.value)) < 250


def test_long_texts_alone_are_counted_too() -> None:
    with pytest.warns(UserWarning, match="1 of 3 texts are longer than max_length=6 and lose"):
        tokenize_prompted(["hello " * 9, "hello", "hello " * 4], TOKENIZER, max_length=6)


def test_labels_leave_out_the_prompt() -> None:
    data = {"acme": [("hello there", "good day"), ("good day", "hello")], "bolt": ["hello"]}
    batches = Minibatches(data, TOKENIZER, batch_size=2, bucket=1)
    batch = batches.batch(0)
    assert batches.ways is None and batch.tasks == ("acme", "bolt")
    words, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    texts = {tuple(row[lab != -100].tolist()) for row, lab in zip(words[0], labels[0], strict=True)}
    assert texts == {(*ids("good day"), SEP), (*ids("hello"), SEP)}
    assert words[1, 0][labels[1, 0] != -100].tolist() == ids("hello", special=True)
    counted = labels != -100
    assert torch.equal(labels[counted], words[counted])
    state = batches.state_dict()
    other = {"acme": [("hello", "there good day"), data["acme"][1]], "bolt": ["hello"]}
    with pytest.raises(ValueError, match="that of 'acme' differs"):
        Minibatches(other, TOKENIZER, batch_size=2, bucket=1).load_state_dict(state)


class Plain(SimpleNamespace):
    """A tokenizer that adds nothing to the words, which are numbers of letters."""

    pad_token_id, eos_token_id, sep_token_id, model_max_length = 0, None, None, 100

    def __call__(self, texts, **settings):
        return {"input_ids": [[len(w) for w in t.split()] for t in texts]}

    def __len__(self) -> int:
        return 10


def test_no_end_token() -> None:
    tokens, given = tokenize_prompted([("a bcd", "efg hi")], Plain())
    assert tokens.ids.tolist() == [1, 3, 3, 2] and given.tolist() == [2]
    assert tokens.types is None


def test_an_end_token_that_is_the_prompts_own() -> None:
    """It ends a turn of a conversation, and is there as well when a model is asked to go on."""
    tokens, given = tokenize_prompted([("a bc", "efg"), ("bc", "a")], Plain(eos_token_id=2))
    assert tokens.ids.tolist() == [1, 2, 3, 2, 2, 1, 2] and given.tolist() == [2, 1]


def test_holding_out() -> None:
    texts = [(str(i), str(i)) for i in range(10)]
    left, taken = fm.data.hold_out(texts, 0.35, seed=1)
    assert len(taken) == 3 and sorted(left + taken) == texts
    assert fm.data.hold_out(texts, 0.35, seed=1) == (left, taken)
    assert fm.data.hold_out(texts, 0.35, seed=2)[1] != taken
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        fm.data.hold_out(texts, 1)
