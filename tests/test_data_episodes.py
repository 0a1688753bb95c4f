"""Episodes and whole tasks: contents, order, resume, prefetch, and what wrong settings say."""

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fastmeta.data as fd
from fastmeta.data.prefetch import Prefetch


@pytest.fixture(scope="module")
def tokenizer():
    return fd.tiny_tokenizer()


@pytest.fixture(scope="module")
def numbered():
    """Text ``c i`` is example i of class c: 7 classes of 9 to 15 examples."""
    pairs = [(f"c{c} x{i}", f"class{c}") for c in range(7) for i in range(9 + c)]
    return fd.from_lists([t for t, _ in pairs], [c for _, c in pairs])


def equal(a, b):
    same = a.support.keys() == b.support.keys() and (a.ways is None) == (b.ways is None)
    pairs = [(x[k], y[k]) for x, y in [(a.support, b.support), (a.query, b.query)] for k in x]
    return same and all(torch.equal(x, y) for x, y in pairs)


def decode(rows, tokenizer):
    return [[tokenizer.decode(r, skip_special_tokens=True) for r in task] for task in rows]


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "fastmeta-prefetch"]


def test_shapes_labels_and_texts_of_an_episode(numbered, tokenizer):
    loader = fd.Episodes(numbered, tokenizer, ways=3, shots=2, queries=4, tasks=6, seed=1)
    batch = loader.batch(2)
    assert batch.num_tasks == 6 and batch.ways is None
    assert batch.support["input_ids"].shape == (6, 6, 8)
    assert batch.query["attention_mask"].shape == (6, 12, 8)
    assert batch.support["labels"].tolist() == [[0, 0, 1, 1, 2, 2]] * 6
    assert batch.query["labels"].dtype == torch.int64
    names = loader.classes(2)
    support = decode(batch.support["input_ids"], tokenizer)
    query = decode(batch.query["input_ids"], tokenizer)
    for t in range(6):
        assert len(set(names[t])) == 3
        assert len({*support[t], *query[t]}) == 6 + 12  # no text twice, none in both sets
        for sets, labels in [(support, batch.support["labels"]), (query, batch.query["labels"])]:
            for text, label in zip(sets[t], labels[t].tolist(), strict=True):
                assert text in numbered.texts_of(names[t][label])


def test_label_order_is_random(numbered, tokenizer):
    loader = fd.Episodes(numbered, tokenizer, ways=3, shots=1, queries=1, tasks=400)
    names = loader.classes(0)
    assert len({tuple(sorted(n)) for n in names}) == 35  # all 7-choose-3 sets occur
    assert 0.4 < sum(n[0] < n[1] for n in names) / 400 < 0.6


def test_episode_depends_only_on_seed_and_number(numbered, tokenizer):
    def texts(tasks, indices, seed=0):
        loader = fd.Episodes(numbered, tokenizer, 3, 1, 2, tasks, seed=seed)
        return [x for i in indices for x in decode(loader.batch(i).support["input_ids"], tokenizer)]

    assert texts(4, range(3)) == texts(2, range(6)) == texts(12, [0])
    assert texts(4, range(3)) != texts(4, range(3), seed=1)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_iteration_length_and_repeat(numbered, tokenizer, prefetch):
    loader = fd.Episodes(numbered, tokenizer, 2, 1, 1, 2, num_batches=5, prefetch=prefetch)
    assert len(loader) == 5
    first = list(loader)
    again = list(loader)  # a finite loader starts again
    assert len(first) == 5 and all(map(equal, first, again))
    assert not equal(first[0], first[1])
    assert all(equal(b, loader.batch(i)) for i, b in enumerate(first))
    endless = fd.Episodes(numbered, tokenizer, 2, 1, 1, 2, prefetch=prefetch)
    assert all(map(equal, itertools.islice(endless, 8), itertools.chain(first, [endless.batch(5)])))
    with pytest.raises(TypeError, match="endless"):
        len(endless)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("num_batches", [None, 9])
def test_exact_resume(numbered, tokenizer, prefetch, num_batches):
    def make(**kwargs):
        return fd.Episodes(
            numbered, tokenizer, 2, 1, 1, 2, prefetch=prefetch, num_batches=num_batches, **kwargs
        )

    loader = make()
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["position"] == 4  # what was only prefetched does not count
    want = [next(batches) for _ in range(4)]
    resumed = make()
    resumed.load_state_dict(state)
    assert all(map(equal, want, resumed))
    assert all(map(equal, want, make(start=4)))
    batches.close()
    assert equal(next(iter(loader)), loader.batch(8))  # a loop left early goes on


def test_state_of_other_episodes_is_refused(numbered, tokenizer):
    loader = fd.Episodes(numbered, tokenizer, 2, 1, 1, 2, start=3)
    state = loader.state_dict()
    other = fd.Episodes(numbered, tokenizer, 3, 1, 1, 2)
    with pytest.raises(ValueError, match="belongs to batches with ways=2, these have ways=3"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="position must be an integer of at least 0, got -1"):
        loader.load_state_dict({**state, "position": -1})
    with pytest.raises(ValueError, match="expected a state with 'position' and 'settings'"):
        loader.load_state_dict({"step": 3})
    changed = fd.from_lists([*numbered.texts[:-1], "new"], numbered.labels)
    with pytest.raises(ValueError, match="with data="):
        fd.Episodes(changed, tokenizer, 2, 1, 1, 2).load_state_dict(state)
    assert other.position == 0 and loader.position == 3


def test_stopping_early_leaves_no_thread(numbered, tokenizer):
    loader = fd.Episodes(numbered, tokenizer, 2, 1, 1, 2, prefetch=2)
    for _ in loader:
        assert prefetch_threads()
        break
    gc.collect()
    assert not prefetch_threads()
    batches = iter(loader)
    next(batches)
    del batches
    gc.collect()
    assert not prefetch_threads()


def test_prefetch_bounds_its_lead_and_keeps_order():
    made = []

    def produce(n):
        made.append(n)
        return n

    items = Prefetch(produce, itertools.count(), depth=3)
    for want in range(5):
        assert next(items) == want
    deadline = time.monotonic() + 5
    while len(made) < 8 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == list(range(8))  # 5 taken, 3 ready, nothing beyond
    items.close()
    items.close()
    with pytest.raises(StopIteration):
        next(items)
    assert not prefetch_threads()
    assert list(Prefetch(produce, range(4), depth=9)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected depth >= 1, got 0"):
        Prefetch(produce, range(4), depth=0)


def test_prefetch_passes_exceptions_in_their_turn():
    def produce(n):
        if n == 2:
            raise KeyError("broken")
        return n

    items = Prefetch(produce, itertools.count(), depth=8)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="broken"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    assert not prefetch_threads()


@pytest.mark.parametrize("broken", [False, True], ids=["end", "error"])
def test_prefetch_ends_for_every_thread(broken):
    def produce(n):
        if broken and n == 20:
            raise KeyError("broken")
        return n

    items = Prefetch(produce, range(40), depth=2)
    taken, errors = [], []

    def consume():
        try:
            for item in items:
                taken.append(item)
        except KeyError as error:
            errors.append(error)

    threads = [threading.Thread(target=consume, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(taken) == list(range(20 if broken else 40)) and len(errors) == broken
    assert not prefetch_threads()


def test_a_fork_is_told_that_the_thread_stayed_behind():
    source = Path(fd.__file__).with_name("prefetch.py")  # alone: one process, one other thread
    program = (
        f"import itertools, os, runpy; Prefetch = runpy.run_path({str(source)!r})['Prefetch']\n"
        "items = Prefetch(lambda n: n, itertools.count(), 2); next(items)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        for _ in range(9): next(items)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "    items.close()\n"
        "else:\n"
        "    os.waitpid(child, 0)\n"
        "    print(next(items))\n"
    )
    ignored = ["-W", "ignore::DeprecationWarning"]  # of forks where there are threads
    run = [sys.executable, *ignored, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, timeout=20)
    first, second = done.stdout.splitlines()
    assert first.startswith("items are prepared by a thread of the process that made") and (
        (done.returncode, second, done.stderr) == (0, "1", "")
    )


def test_whole_tasks_are_ragged_and_keep_their_labels(tokenizer):
    parts = {
        name: fd.from_lists(
            [f"{name} c{c} x{i}" for c in range(ways) for i in range(4)],
            [f"k{c}" for c in range(ways) for _ in range(4)],
        )
        for name, ways in [("music", 2), ("mail", 4), ("bank", 3)]
    }
    loader = fd.TaskDataset(parts, tokenizer, shots=2, queries=1, tasks=3, seed=5)
    assert loader.max_ways == 4
    batch, names = loader.batch(1), loader.tasks_of(1)
    assert sorted(names) == ["bank", "mail", "music"]
    ways = [len(parts[n].classes) for n in names]
    assert batch.ways.tolist() == ways
    assert batch.support["input_ids"].shape[:2] == (3, 8) and batch.query["labels"].shape == (3, 4)
    support = decode(batch.support["input_ids"], tokenizer)
    for t, name in enumerate(names):
        labels = batch.support["labels"][t]
        assert labels.tolist() == [c for c in range(ways[t]) for _ in range(2)] + [-100] * (
            8 - 2 * ways[t]
        )
        for text, label in zip(support[t], labels.tolist(), strict=True):
            assert text.startswith(name)
            if label >= 0:
                assert f"c{label}" in text
    order = [n for i in range(4) for n in loader.tasks_of(i)]
    assert all(sorted(order[i : i + 3]) == sorted(parts) for i in range(0, 12, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 12, 3)}) > 1
    narrow = fd.TaskDataset(parts, tokenizer, 2, 1, tasks=1, seed=5)
    assert order == [n for i in range(12) for n in narrow.tasks_of(i)]
    assert [b.num_tasks for b in itertools.islice(loader, 2)] == [3, 3]
    state = loader.state_dict()
    resumed = fd.TaskDataset(parts, tokenizer, 2, 1, 3, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert equal(next(iter(resumed)), loader.batch(2))


def lettered(names):
    return {
        n: fd.from_lists([f"{n} c{i % 2} x{i}" for i in range(12)], [i % 2 for i in range(12)])
        for n in names
    }


def test_a_state_knows_the_order_of_tasks_and_the_tokens(tokenizer, numbered):
    state = json.loads(json.dumps(fd.TaskDataset(lettered("abc"), tokenizer).state_dict()))
    fd.TaskDataset(lettered("abc"), tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with names=.*'a', 'b', 'c'.*'c', 'b', 'a'"):
        fd.TaskDataset(lettered("cba"), tokenizer).load_state_dict(state)
    other = fd.tiny_tokenizer()
    other.add_tokens(["c1"])  # which was two
    with pytest.raises(ValueError, match="other tokens: that of 'a' and 2 more differs"):
        fd.TaskDataset(lettered("abc"), other).load_state_dict(state)
    state = fd.Episodes(numbered, tokenizer, 2, 1, 1).state_dict()
    with pytest.raises(ValueError, match="belongs to batches with tokens="):
        fd.Episodes(numbered, other, 2, 1, 1).load_state_dict(state)
    state["settings"].pop("tokens")  # of an older version
    fd.Episodes(numbered, tokenizer, 2, 1, 1).load_state_dict(state)


def test_an_order_of_tasks_is_drawn_once(tokenizer, monkeypatch):
    import fastmeta.data.task_dataset as module

    loader, draw, turns = fd.TaskDataset(lettered("abcd"), tokenizer), module.sample_episodes, []

    def counted(starts, *args):
        turns.append(args[-1]) if list(starts) == [0, 4] else None
        return draw(starts, *args)

    monkeypatch.setattr(module, "sample_episodes", counted)
    first = [loader._name(i) for i in range(12)]
    assert turns == [0, 1, 2] and [loader._name(i) for i in (5, 0)] == [first[5], first[0]]


def test_permuted_labels_of_whole_tasks(tokenizer):
    data = {"t": fd.from_lists([f"c{i % 3} x{i}" for i in range(30)], [i % 3 for i in range(30)])}
    loader = fd.TaskDataset(data, tokenizer, 1, 1, tasks=50, permute_labels=True)
    rows = decode(loader.batch(0).support["input_ids"], tokenizer)
    orders = {tuple(t[1] for t in task) for task in rows}
    assert len(orders) == 6  # all permutations of three classes


def test_too_small_classes_and_too_few(numbered, tokenizer):
    with pytest.raises(
        fd.DataError,
        match=r"class 'class0' has 9 examples, but 5 support \+ 6 query need 11 .1 other classes",
    ):
        fd.Episodes(numbered, tokenizer, 5, 5, 6)
    with pytest.raises(TypeError, match=r"fm.data.from_lists\(texts, labels\) gives, got list"):
        fd.Episodes(["a text"], tokenizer)
    with pytest.raises(fd.DataError, match="expected 8 classes or more, got 7"):
        fd.Episodes(numbered, tokenizer, 8, 1, 1)
    single = fd.from_lists(["a", "b"], ["x", "x"])
    with pytest.raises(fd.DataError, match="task 'one': expected 2 classes or more, got 1"):
        fd.TaskDataset({"one": single}, tokenizer)
    pair = fd.from_lists(["a", "b", "c"], ["x", "y", "y"])
    with pytest.raises(fd.DataError, match=r"class 'x' has 1 example, but 1 support \+ 1 query"):
        fd.TaskDataset({"two": pair}, tokenizer, 1, 1)
    with pytest.raises(fd.DataError, match="expected at least one task, got none"):
        fd.TaskDataset({}, tokenizer)
    with pytest.raises(fd.DataError, match="expected task 'x' to be LabelledTexts, got list"):
        fd.TaskDataset({"x": ["a"]}, tokenizer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ways", 0, "ways must be an integer of at least 1, got 0"),
        ("shots", 0, "shots must be an integer of at least 1, got 0"),
        ("queries", 0, "queries must be an integer of at least 1, got 0"),
        ("tasks", -1, "tasks must be an integer of at least 1, got -1"),
        ("tasks", 1.5, "tasks must be an integer of at least 1, got 1.5"),
        ("bucket", 0, "bucket must be an integer of at least 1, got 0"),
        ("num_batches", 0, "num_batches must be an integer of at least 1, got 0"),
        ("start", -1, "start must be an integer of at least 0, got -1"),
        ("prefetch", -1, "prefetch must be an integer of at least 0, got -1"),
        ("seed", -1, "seed must be an integer of at least 0, got -1"),
        ("seed", 2**64, "seed must lie in 0"),
        ("max_length", 0, "expected max_length >= 1, got 0"),
    ],
)
def test_wrong_settings(numbered, tokenizer, name, value, message):
    with pytest.raises(ValueError, match=message):
        fd.Episodes(numbered, tokenizer, **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_pinning_needs_a_device(numbered, tokenizer):
    with pytest.raises(ValueError, match="pin_memory=True needs a CUDA device"):
        fd.Episodes(numbered, tokenizer, pin_memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(numbered, tokenizer):
    batch = next(iter(fd.Episodes(numbered, tokenizer, pin_memory=True)))
    assert all(v.is_pinned() for v in [*batch.support.values(), *batch.query.values()])


def test_a_live_prefetch_does_not_hold_up_exit():
    source = Path(fd.__file__).with_name("prefetch.py")  # alone: it needs no torch
    program = (
        f"import itertools, runpy; Prefetch = runpy.run_path({str(source)!r})['Prefetch']\n"
        "items = Prefetch(lambda n: n, itertools.count(), 2); print(next(items), next(items))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [b"0", b"1"], b"")
