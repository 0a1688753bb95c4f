"""Labelled texts and their readers: what is read, and what each wrong input says."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmeta.data as fd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}")


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_lists_are_grouped_by_class_in_given_order():
    data = fd.from_lists(["t0", "t1", "t2", "t3"], ["b", "a", "b", "a"])
    assert data.classes == ("a", "b")
    assert data.texts == ("t1", "t3", "t0", "t2")
    assert data.starts.tolist() == [0, 2, 4]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.counts == {"a": 2, "b": 2}
    assert data.texts_of("b") == ("t0", "t2")
    assert data[0] == ("t1", "a") and data[-1] == ("t2", "b")
    assert list(data)[2] == ("t0", "b")


def test_integer_labels_sort_as_numbers_and_index_classes():
    assert fd.from_lists(["x", "y", "z"], [10, 9, 2]).classes == ("2", "9", "10")
    named = fd.from_lists(["x", "y"], torch.tensor([2, 0]), classes=["c", "unused", "a"])
    assert named.classes == ("c", "a")  # a class without a text is left out
    assert named[0] == ("y", "c")
    assert fd.from_lists(["x"], np.array([0]), classes=["only"]).classes == ("only",)


@pytest.mark.parametrize(
    ("texts", "labels", "kwargs", "message"),
    [
        (["x"], ["a", "b"], {}, "expected one label per text, got 1 texts and 2 labels"),
        ([], [], {}, "expected at least one labelled text, got none"),
        (["x", None], ["a", "b"], {}, "expected text 1 to be a string, got NoneType None"),
        (["x"], [1.5], {}, "expected label 0 to be a string or an integer, got float 1.5"),
        (["x"], [True], {}, "expected label 0 to be a string or an integer, got bool True"),
        (["x"], ["musik"], {"classes": ["music"]}, r"label 0 is 'musik'.*did you mean 'music'"),
        (["x"], [-1], {"classes": ["music"]}, "label 0 is -1, expected one of the 1 classes"),
        (["x"], ["a"], {"classes": ["a", "a"]}, "class 'a' is named twice"),
    ],
)
def test_wrong_lists(texts, labels, kwargs, message):
    with pytest.raises(fd.DataError, match=message):
        fd.from_lists(texts, labels, **kwargs)


def test_restrict_keeps_order_and_refuses_unknown_or_repeated_classes():
    data = fd.from_lists(["t0", "t1", "t2"], ["alarm", "music", "weather"])
    part = data.restrict(["weather", "alarm"])
    assert part.classes == ("weather", "alarm") and part.texts == ("t2", "t0")
    with pytest.raises(fd.DataError, match=r"no class 'wether' .did you mean 'weather'"):
        data.restrict(["wether"])
    with pytest.raises(fd.DataError, match="'music' is named twice"):
        data.restrict(["music", "music"])
    with pytest.raises(fd.DataError, match="at least one class"):
        data.restrict([])


def test_split_is_disjoint_complete_and_seeded():
    data = fd.builtin(None)
    parts = data.split(0.5, 0.25, 0.25, seed=3)
    names = [set(p.classes) for p in parts]
    assert [len(n) for n in names] == [60, 30, 30] and len(set.union(*names)) == 120
    assert [p.classes for p in parts] == [p.classes for p in data.split(0.5, 0.25, 0.25, seed=3)]
    assert set(data.split(0.5, seed=4)[0].classes) != names[0]
    for wrong in [(), (0.0, 0.5), (0.7, 0.7), (1e-6,)]:
        with pytest.raises(ValueError, match="expected"):
            data.split(*wrong)


def test_held_out_texts_are_of_every_class_and_seeded():
    data = fd.builtin("test").restrict(fd.builtin("test").classes[:3])
    counts = data.counts
    kept, held = data.hold_out(0.25, seed=5)
    assert kept.classes == data.classes
    assert sorted([*kept, *held]) == sorted(data)
    for name, count in counts.items():
        assert sum(c == name for _, c in held) == count // 4
    assert data.hold_out(0.25, seed=5)[1] == held != data.hold_out(0.25, seed=6)[1]
    few = fd.from_lists(["a", "b", "c"], ["x", "y", "y"])
    rest, taken = few.hold_out(0.9)
    assert rest.counts == {"x": 1, "y": 1} and [c for _, c in taken] == ["y"]
    assert few.hold_out(0)[1] == []
    for wrong in (-0.1, 1):
        with pytest.raises(ValueError, match="expected a share of at least 0 and below 1"):
            data.hold_out(wrong)


def test_copies_of_a_text_are_held_out_together():
    """A text that is there six times is one of four."""
    texts, labels = ["same"] * 6 + ["b", "c", "d", "same"], ["x"] * 9 + ["y"]
    data = fd.from_lists(texts, labels)
    assert data.repeats == 5
    for seed in range(8):
        kept, held = data.hold_out(0.5, seed=seed)
        kept, held = ([t for t, c in part if c == "x"] for part in (kept, held))
        assert len(set(held)) == len(set(kept)) == 2 and not set(held) & set(kept)
        left, taken = fd.hold_out(texts[:9], 0.5, seed=seed)
        assert len(set(taken)) == 2 and not set(left) & set(taken)


@pytest.mark.parametrize(("share", "count"), [(0.29, 29), (0.57, 57), (0.999, 99)])
def test_a_share_is_rounded_down_once(share, count):
    texts = [str(i) for i in range(100)]
    assert len(fd.hold_out(texts, share)[1]) == count


def test_a_file_that_repeats_texts_says_so(tmp_path):
    rows = [{"text": t, "label": c} for t, c in ("ax", "ax", "ay", "bx", "bx")]
    with pytest.warns(UserWarning, match=r"2 of 5 texts repeat another of their class; a task may"):
        data = fd.from_jsonl(write(tmp_path / "twice.jsonl", *rows))
    assert data.repeats == 2


def test_merged_classes_of_one_name_are_refused():
    a, b = fd.from_lists(["x"], ["b/c"]), fd.from_lists(["y"], ["c"])
    with pytest.raises(fd.DataError, match="two classes would be called 'a/b/c'; rename a part"):
        fd.merge({"a": a, "a/b": b})


def test_merge_digest_and_pickle():
    a, b = fd.from_lists(["x", "y"], ["p", "q"]), fd.from_lists(["z"], ["p"])
    both = fd.merge({"a": a, "b": b})
    assert both.counts == {"a/p": 1, "a/q": 1, "b/p": 1}
    assert a.digest != b.digest and a.digest == fd.from_lists(["x", "y"], ["p", "q"]).digest
    assert fd.from_lists(["x", "y"], ["q", "p"]).digest != a.digest
    fd.tokenize(a, fd.tiny_tokenizer())
    copy = pickle.loads(pickle.dumps(a))
    assert copy.digest == a.digest and len(fd.tokenize(copy, fd.tiny_tokenizer())) == 2


def test_jsonl_keys_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "\ufeff".encode() + b'{"sentence": "one", "label": "x"}\n\n{"sentence": "two", "label": 3}'
    )
    data = fd.from_jsonl(path)
    assert data.counts == {"3": 1, "x": 1}
    other = write(tmp_path / "b.jsonl", {"utt": "one", "intent": "x"}, {"utt": "q", "intent": "y"})
    assert fd.from_jsonl(str(other), text="utt", label="intent", classes=["y"]).texts == ("q",)
    assert fd.from_jsonl(write(tmp_path / "c.jsonl", {"text": "t", "label": 0})).texts == ("t",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label"', "malformed JSON"),
        ('["a", "b"]', "expected a JSON object, got list"),
        ('{"label": "x"}', "no key 'text'; the line has 'label'"),
        ('{"text": "a", "lable": "x"}', "no key 'label'; the line has 'text', 'lable'"),
        ('{"text": 3, "label": "x"}', "expected 'text' to be a string, got int 3"),
        ('{"text": " ", "label": "x"}', "expected 'text' to be a string, got an empty one"),
        ('{"text": "a", "label": null}', "expected 'label' to be a string or an integer"),
        ('{"text": "a", "label": true}', "expected 'label' to be a string or an integer"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"text": "fine", "label": "x"}, "", line)
    with pytest.raises(fd.DataError, match=rf"bad\.jsonl, line 3: .*{message}"):
        fd.from_jsonl(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(fd.DataError, match=r"none\.jsonl: cannot be read .No such file"):
        fd.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(fd.DataError, match=r"cannot be read .Is a directory"):
        fd.from_jsonl(tmp_path)
    with pytest.raises(fd.DataError, match="got an empty file"):
        fd.from_jsonl(write(tmp_path / "empty.jsonl", ""))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "a", "label": "x"}\n{"text": "caf\xe9", "label": "x"}\n')
    with pytest.raises(fd.DataError, match="line 2: expected UTF-8 text, got byte 0xe9"):
        fd.from_jsonl(latin)


def test_clinc_json(tmp_path):
    content = {
        "train": [["hi", "greet"], ["bye", "leave"]],
        "val": [["hello", "greet"]],
        "oos_train": [["what", "oos"]],
    }
    path = write(tmp_path / "data_full.json", content)
    assert fd.from_clinc_json(path).counts == {"greet": 2, "leave": 1}
    assert fd.from_clinc_json(path, parts="oos_train").classes == ("oos",)
    assert fd.from_clinc_json(path, parts=["val"], classes=["greet"]).texts == ("hello",)
    with pytest.raises(fd.DataError, match="no part 'dev'; it has 'train', 'val', 'oos_train'"):
        fd.from_clinc_json(path, parts="dev")
    for wrong, message in [
        ({"train": [["hi", "greet"], ["hi"]]}, "entry 1 of 'train'"),
        ({"train": {"hi": "greet"}}, "expected part 'train' to be a list"),
        (["hi"], "expected a JSON object of parts, got list"),
        ("{", "line 1: malformed JSON"),
        ("", "got an empty file"),
    ]:
        with pytest.raises(fd.DataError, match=message):
            fd.from_clinc_json(write(tmp_path / "wrong.json", wrong))


def test_huggingface_dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    ds = datasets.Dataset.from_dict(rows, features=features)
    data = fd.from_huggingface(ds)
    assert data.classes == ("no", "yes") and data.texts == ("b", "a", "c")
    assert fd.from_huggingface(ds.to_iterable_dataset()).digest == data.digest
    assert fd.from_huggingface(ds, classes=["yes"]).texts == ("a", "c")
    renamed = ds.rename_columns({"text": "utterance", "label": "intent"})
    assert fd.from_huggingface(renamed, "utterance", "intent").counts == data.counts
    with pytest.raises(fd.DataError, match="no column 'text'; it has 'utterance', 'intent'"):
        fd.from_huggingface(renamed)
    with pytest.raises(fd.DataError, match="one split of a data set, got a mapping with 'train'"):
        fd.from_huggingface(datasets.DatasetDict(train=ds))
    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    with pytest.raises(fd.DataError, match=r"row 0 has no label .got -1"):
        fd.from_huggingface(unlabelled)


def benchmark_folder(root: Path) -> Path:
    rows = [{"sentence": f"{c} {i}", "label": c} for c in "abcdef" for i in range(3)]
    write(root / "full.jsonl", *rows)
    for part, classes in {"train": "ab", "valid": "cd", "test": "fe"}.items():
        write(root / "splits" / "01" / f"labels.{part}.txt", *classes)
    return root


def test_benchmark_folder(tmp_path):
    root = benchmark_folder(tmp_path)
    assert fd.clinc(root).classes == ("a", "b")
    assert fd.hwu(root, split=1, part="test").classes == ("f", "e")
    assert fd.hwu(root, split="01", part="test").classes == ("f", "e")
    assert len(fd.clinc(root, split=None).classes) == len(fd.clinc(root, part=None).classes) == 6
    with pytest.raises(fd.DataError, match=r"02: no such split; found 01"):
        fd.clinc(root, split=2)
    with pytest.raises(fd.DataError, match=r"first: no such split; found 01"):
        fd.clinc(root, split="first")
    with pytest.raises(ValueError, match=r"expected part to be one of .* got 'dev'"):
        fd.clinc(root, part="dev")
    write(root / "domains.json", {"one": ["b", "a"], "two": ["c", "d", "e"]})
    tasks = fd.clinc_tasks(root)
    assert tasks["one"].classes == ("b", "a") and len(tasks["two"].classes) == 3
    write(root / "domains.json", ["a"])
    with pytest.raises(fd.DataError, match="expected an object of domain -> list of intents"):
        fd.clinc_tasks(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["c", "b"], r"valid.txt, line 2: class 'b' is already in .*labels.train.txt, line 2"),
        (["c", "c"], r"valid.txt, line 2: class 'c' is already in .*labels.valid.txt, line 1"),
        ([""], r"labels.valid.txt: expected one class name per line, got an empty file"),
        (["c", "nowhere"], r"class 'nowhere' of split 1, part 'valid', does not occur"),
    ],
)
def test_wrong_split_files(tmp_path, lines, message):
    root = benchmark_folder(tmp_path)
    write(root / "splits" / "01" / "labels.valid.txt", *lines)
    with pytest.raises(fd.DataError, match=message):
        fd.clinc(root, part="valid")


@needs_data
@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
def test_real_splits_are_disjoint_and_complete(split):
    for folder, total in [("clinc150", 150), ("hwu64", 64)]:
        parts = fd.read_split(DATA / folder, split)
        assert sum(map(len, parts.values())) == total
        assert len(set().union(*parts.values())) == total


@needs_data
def test_real_data():
    clinc = fd.clinc(DATA / "clinc150", split=1, part="test")
    assert len(clinc.classes) == 50 and set(clinc.counts.values()) == {150}
    hwu = fd.hwu(DATA / "hwu64", split=1, part="train")
    assert len(hwu.classes) == 16 and hwu.classes[0] == "alarm/query"
    domains = fd.clinc_tasks(DATA / "clinc150")
    assert len(domains) == 10 and {len(d.classes) for d in domains.values()} == {15}
    scenarios = fd.hwu_tasks(DATA / "hwu64")
    assert "alarm" in scenarios and all(len(s.classes) > 1 for s in scenarios.values())
    assert sum(len(s.classes) for s in scenarios.values()) <= 64
