"""TaskBatch: shapes, slices, and padding of unequal tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.batch import join_sets


def task_set(rows: int, length: int, start: int = 0) -> dict[str, Tensor]:
    ids = torch.arange(start, start + rows * length).view(rows, length) + 1
    labels = torch.arange(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stacked(tasks: int, rows: int, length: int = 3) -> dict[str, Tensor]:
    return {k: v.expand(tasks, *v.shape).clone() for k, v in task_set(rows, length).items()}


def test_shape_and_access() -> None:
    batch = fm.TaskBatch(stacked(4, 2), stacked(4, 5), ways=torch.tensor([2, 3, 2, 3]))
    assert batch.num_tasks == len(batch) == 4
    assert batch.device == torch.device("cpu")
    part = batch[1:3]
    assert part.num_tasks == 2 and part.ways.tolist() == [3, 2]
    assert part.query["input_ids"].shape == (2, 5, 3)
    chosen = batch.select(torch.tensor([3, 0]))
    assert chosen.ways.tolist() == [3, 2]
    assert batch.to("cpu").num_tasks == 4
    assert repr(batch).startswith("TaskBatch(tasks=4, support={'input_ids': [4, 2, 3]")
    with pytest.raises(TypeError, match=r"a TaskBatch is sliced by tasks, batch\[i:j\], got 1"):
        batch[1]


def test_names_are_in_a_batch_and_it_is_not_iterable() -> None:
    batch = fm.TaskBatch(stacked(4, 2), stacked(4, 5))
    assert "labels" in batch and "input_ids" in batch
    assert "label" not in batch and 0 not in batch
    with pytest.raises(TypeError, match=r"a TaskBatch is not iterable: expected batch\[i:j\]"):
        list(batch)


def test_ways_are_one_number_or_one_for_each_task() -> None:
    for ways in (2, [2, 2, 2, 2], torch.tensor([2] * 4)):
        found = fm.TaskBatch(stacked(4, 2), stacked(4, 5), ways=ways).ways
        assert torch.equal(found, torch.tensor([2] * 4))


def test_collate_pads_rows_and_columns() -> None:
    tasks = [(task_set(2, 3), task_set(1, 2)), (task_set(1, 4, 50), task_set(3, 2, 70))]
    batch = fm.TaskBatch.collate(tasks, pad_token_id=9, ways=[2, 1])
    assert batch.support["input_ids"].tolist() == [
        [[1, 2, 3, 9], [4, 5, 6, 9]],
        [[51, 52, 53, 54], [51, 52, 53, 54]],  # a missing row repeats the first
    ]
    assert batch.support["attention_mask"].tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1]],
    ]
    assert batch.support["labels"].tolist() == [[0, 1], [0, -100]]
    assert batch.query["labels"].tolist() == [[0, -100, -100], [0, 1, 2]]
    assert batch.ways.tolist() == [2, 1] and batch.ways.dtype == torch.int64


def test_collate_pads_token_labels() -> None:
    def lm(rows: int, length: int) -> dict[str, Tensor]:
        found = task_set(rows, length)
        return {**found, "labels": found["input_ids"].clone()}

    batch = fm.TaskBatch.collate([(lm(1, 2), lm(1, 2)), (lm(2, 3), lm(1, 2))])
    assert batch.support["labels"].tolist() == [
        [[1, 2, -100], [-100, -100, -100]],
        [[1, 2, 3], [4, 5, 6]],
    ]


def test_collate_changes_nothing_of_equal_tasks() -> None:
    task = (task_set(2, 3), task_set(3, 3))
    batch = fm.TaskBatch.collate([task, task])
    for key, value in task[0].items():
        assert torch.equal(batch.support[key][1], value)


def test_join_sets() -> None:
    joined = join_sets(stacked(2, 2, 3), stacked(2, 1, 4), pad_token_id=7)
    assert joined["input_ids"].tolist() == [[[1, 2, 3, 7], [4, 5, 6, 7], [1, 2, 3, 4]]] * 2
    assert joined["attention_mask"][0].sum(1).tolist() == [3, 3, 4]
    assert joined["labels"].tolist() == [[0, 1, 0]] * 2


def collate(first: dict, second: dict):
    return lambda: fm.TaskBatch.collate([(first, first), (second, second)])


def unmasked(rows: int, length: int) -> dict[str, Tensor]:
    return {k: v for k, v in task_set(rows, length).items() if k != "attention_mask"}


GOOD = stacked(2, 2)
BAD = [
    (lambda: fm.TaskBatch({}, GOOD), "the support set must hold at least one tensor, got none"),
    (lambda: fm.TaskBatch(GOOD, {}), "the query set must hold at least one tensor, got none"),
    (
        lambda: fm.TaskBatch(GOOD, stacked(3, 2)),
        "must hold the same tasks: support has 2 tasks, query has 3",
    ),
    (lambda: fm.TaskBatch(stacked(2, 0), GOOD), "is empty: it has 2 tasks of 0 examples"),
    (lambda: fm.TaskBatch(stacked(0, 2), stacked(0, 2)), "is empty: it has 0 tasks of 2 examples"),
    (
        lambda: fm.TaskBatch(GOOD, {k: v for k, v in GOOD.items() if k != "labels"}),
        "support and query must have the same inputs: support has",
    ),
    (
        lambda: fm.TaskBatch({**GOOD, "labels": torch.zeros(2, 3)}, GOOD),
        "expected [2, 2], got [2, 3] for 'labels'",
    ),
    (
        lambda: fm.TaskBatch({**GOOD, "labels": torch.zeros(2)}, GOOD),
        "support['labels'] must be [tasks, examples, ...], got shape [2]",
    ),
    (
        lambda: fm.TaskBatch({**GOOD, "labels": [0, 1]}, GOOD),
        "support['labels'] must be a tensor, got list",
    ),
    (
        lambda: fm.TaskBatch(GOOD, {k: v.to("meta") for k, v in GOOD.items()}),
        "all tensors of a batch must be on one device, got ['cpu', 'meta']",
    ),
    (
        lambda: fm.TaskBatch(GOOD, GOOD, ways=torch.ones(2, dtype=torch.int64, device="meta")),
        "all tensors of a batch must be on one device",
    ),
    (
        lambda: fm.TaskBatch(GOOD, GOOD, ways=torch.ones(3, dtype=torch.int64)),
        "ways must have shape [2], got [3]",
    ),
    (
        lambda: fm.TaskBatch(GOOD, GOOD, ways=torch.ones(2)),
        "ways must be integers or an int64 tensor, got torch.float32",
    ),
    (lambda: fm.TaskBatch.collate([]), "expected at least one task, got none"),
    (
        collate(task_set(2, 3), unmasked(2, 3)),
        "every task must have the same inputs: task 0's support set has",
    ),
    (collate(task_set(2, 3), task_set(0, 3)), "the support set of task 1 is empty"),
    (
        collate(unmasked(2, 3), unmasked(2, 4)),
        "'input_ids' must have the same size in every task where there is no 'attention_mask'",
    ),
    (
        collate(task_set(2, 3), {**task_set(2, 3), "labels": torch.zeros(2, 3).long()}),
        "'labels' must have the same number of axes in every task, got [[2], [2, 3]]",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text[-40:] for _, text in BAD])
def test_errors(make, text: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_of_tensors_for_the_loss() -> None:
    def rows(n: int, length: int) -> dict[str, Tensor]:
        ids = torch.ones(n, length, dtype=torch.int64)
        more = {"labels_tags": ids, "labels_weight": torch.ones(n, length)}
        return {"input_ids": ids, "attention_mask": ids, "labels": torch.ones(n, length), **more}

    found = fm.TaskBatch.collate([(rows(1, 1), rows(1, 1)), (rows(2, 2), rows(2, 2))]).support
    absent = torch.tensor([[False, True], [True, True]])
    assert bool((found["labels_tags"][0][absent] == -100).all())
    assert bool((found["labels_weight"][0][absent] == 0).all())
    assert bool(found["labels"][0][absent].isnan().all())
