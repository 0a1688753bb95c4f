"""`fm.data.Minibatches`: every text once an epoch, each task by itself, tasks that end."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

import fastmeta as fm
from fastmeta.data import DataError, LabelledTexts, Minibatches

TOKENIZER = fm.data.tiny_tokenizer()
BUILTIN = fm.data.builtin("train")


def texts(count: int, first: int = 0, classes: int = 3) -> LabelledTexts:
    """`count` texts of some classes."""
    names = BUILTIN.classes[first : first + classes]
    picked = [(t, c) for i in range(count) for c in names for t in BUILTIN.texts_of(c)[i : i + 1]]
    return LabelledTexts(*zip(*picked[:count], strict=True))


TASKS = {"few": texts(5), "many": texts(18, first=3, classes=4), "some": texts(11, first=9)}


def rows_of(batch, task: int) -> list[tuple[str, int]]:
    """Words and label of each row that counts."""
    found = []
    for ids, mask, label in zip(
        *(batch.inputs[k][task] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        if label != -100:
            words = TOKENIZER.decode(ids[mask == 1], skip_special_tokens=True)
            found.append((words, int(label)))
    return found


def test_every_text_once_an_epoch_and_tasks_end_in_turn() -> None:
    batches = Minibatches(TASKS, TOKENIZER, batch_size=4, epochs=2)
    assert batches.names == ("many", "some", "few") and batches.ways == [4, 3, 3]
    seen = {name: [] for name in TASKS}
    present = []
    for batch in batches:
        present.append(len(batch.tasks))
        assert batch.tasks == batches.names[: len(batch.tasks)]
        for place, name in enumerate(batch.tasks):
            seen[name] += rows_of(batch, place)
    assert present == [3, 3, 3, 3, 2, 2, 1, 1, 1, 1] and len(batches) == 10
    for name, data in TASKS.items():
        expected = Counter(zip(data.texts, data.labels.tolist(), strict=True))
        half = len(data)
        assert Counter(seen[name][:half]) == Counter(seen[name][half:]) == expected
        assert seen[name][:half] != seen[name][half:]


def test_a_task_reads_the_same_whoever_else_is_there() -> None:
    together = Minibatches(TASKS, TOKENIZER, batch_size=4, epochs=None, seed=3)
    alone = Minibatches({"some": TASKS["some"]}, TOKENIZER, batch_size=4, epochs=None, seed=3)
    for one, both in islice(zip(alone, together, strict=True), 7):
        assert both.tasks == together.names
        assert rows_of(one, 0) == rows_of(both, 1)
    other = Minibatches(TASKS, TOKENIZER, batch_size=4, seed=4)
    assert rows_of(other.batch(0), 0) != rows_of(together.batch(0), 0)


def test_texts_of_a_language_model_are_their_own_labels() -> None:
    data = {"a": list(TASKS["many"].texts[:5]), "b": list(TASKS["few"].texts[:2])}
    batches = Minibatches(data, TOKENIZER, batch_size=4)
    assert batches.ways is None
    batch = batches.batch(0)
    ids, mask, labels = (batch.inputs[k] for k in ("input_ids", "attention_mask", "labels"))
    assert labels.shape == ids.shape == (2, 4, ids.shape[2])
    counted = labels != -100
    assert torch.equal(labels[counted], ids[counted])
    assert torch.equal(counted[0], mask[0] == 1)
    assert torch.equal(counted[1, :2], mask[1, :2] == 1) and not counted[1, 2:].any()


def test_going_on_from_a_position() -> None:
    batches = Minibatches(TASKS, TOKENIZER, batch_size=4, epochs=2)
    for _ in islice(batches, 3):
        pass
    state = batches.state_dict()
    other = Minibatches(TASKS, TOKENIZER, batch_size=4, epochs=2)
    other.load_state_dict(state)
    for one, same in zip(batches, other, strict=True):
        assert one.tasks == same.tasks
        assert all(torch.equal(one.inputs[k], same.inputs[k]) for k in one.inputs)
    with pytest.raises(ValueError, match="batch_size=4, these have batch_size=5"):
        Minibatches(TASKS, TOKENIZER, batch_size=5, epochs=2).load_state_dict(state)
    few = TASKS["few"]
    other = TASKS | {"few": LabelledTexts(few.texts, [*few.labels[1:].tolist(), 0])}
    with pytest.raises(ValueError, match="belongs to other data: that of 'few' differs"):
        Minibatches(other, TOKENIZER, batch_size=4, epochs=2).load_state_dict(state)


class OfWords:
    """A tokenizer that adds nothing to the words."""

    pad_token_id, model_max_length = 0, 100

    def __call__(self, texts, **_):
        return {"input_ids": [[len(w) for w in t.split()] for t in texts]}

    def __len__(self) -> int:
        return 100


def test_a_text_without_a_next_word() -> None:
    data = {"a": ["two words", "three words here"], "b": ["two words", "one"]}
    with pytest.raises(
        DataError, match="task 'b': a text of one token has no next word: str 'one'"
    ):
        Minibatches(data, OfWords())
    batch = Minibatches({"a": data["a"]}, OfWords(), bucket=1).batch(0)
    assert sorted(batch.inputs) == ["attention_mask", "input_ids", "labels"]
    assert sorted(batch.inputs["labels"][0].tolist()) == [[3, 5, -100], [5, 5, 4]]


def test_number_of_batches() -> None:
    assert len(Minibatches(TASKS, TOKENIZER, 4, epochs=2, num_batches=3)) == 3
    assert len(Minibatches(TASKS, TOKENIZER, 4, epochs=2, num_batches=30)) == 10
    assert len(Minibatches(TASKS, TOKENIZER, 4, epochs=None, num_batches=30)) == 30
    with pytest.raises(IndexError, match="there is no batch 10: expected 0 to 9"):
        Minibatches(TASKS, TOKENIZER, 4, epochs=2).batch(10)
    with pytest.raises(TypeError, match="endless"):
        len(Minibatches(TASKS, TOKENIZER, 4, epochs=None))


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        ({}, {}, DataError, "at least one task, got none"),
        ({"a": TASKS["few"], "b": ["x"]}, {}, TypeError, "of every task or of none, got both"),
        ({"a": texts(2, classes=1)}, {}, DataError, "task 'a': expected 2 classes or more, got 1"),
        ({"a": []}, {}, DataError, "task 'a': expected at least one text, got none"),
        ({"a": "text"}, {}, TypeError, "task 'a': expected labelled texts, or a list of strings"),
        ({0: ["one", "two"]}, {}, TypeError, "expected names of tasks to be texts, got 0"),
        ({"a": [1]}, {}, TypeError, "task 'a': expected labelled texts, or a list of strings"),
        ({"a": [("x", "y", "z")]}, {}, TypeError, r"or of \(prompt, completion\)"),
        (TASKS, {"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
        (TASKS, {"epochs": 0}, ValueError, "epochs must be an integer of at least 1, got 0"),
        (TASKS, {"seed": -1}, ValueError, "seed"),
    ],
)
def test_wrong_arguments(data, settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Minibatches(data, TOKENIZER, **settings)


def test_tuning_reads_them() -> None:
    """Three customers; what each learns is what it learns alone."""
    bert = fm.data.tiny_bert(hidden_size=32)[0]
    model = fm.models.SentenceClassifier(bert.bert, num_labels=4, scale=10).double().eval()
    patched = fm.patch(model, fm.LoRA(r=2) + fm.Head())

    def tuned(data: dict[str, LabelledTexts]) -> fm.FineTuner:
        batches = Minibatches(data, TOKENIZER, batch_size=4, epochs=2)
        tuner = fm.FineTuner(patched, batches.names, lr=0.01, ways=batches.ways)
        for batch in batches:
            tuner.step(batch.inputs, batch.tasks)
        return tuner

    together = tuned(TASKS)
    assert together.steps.tolist() == [10, 6, 4]
    for name, data in TASKS.items():
        alone = tuned({name: data})
        torch.testing.assert_close(
            together.task(name).packed, alone.task(name).packed, rtol=1e-8, atol=1e-10
        )
