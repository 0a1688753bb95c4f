"""One batch of few-shot tasks: support and query sets with a leading task axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastmeta._settings import is_integer

IGNORE_INDEX = -100
"""Label of rows and tokens that take no part in a loss (the transformers convention)."""

# What a padded column holds, for the inputs that transformers' tokenizers produce.
_COLUMN_FILL = {"attention_mask": 0, "token_type_ids": 0}


class TaskBatch:
    """T tasks, each with a support set (to adapt on) and a query set (to be judged on).

    Args:
        support: Model inputs and ``labels``, each ``[T, N, ...]``.
        query: The same names, each ``[T, Q, ...]``.
        ways: Number of classes of each task, int64 ``[T]``, or one number for all; ``None`` when
            every task uses all the logits of the head. Losses of classes leave out the logits at
            and beyond a task's ``ways`` exactly; a loss of your own finds them as
            ``batch["ways"]``.

    Names that begin with ``labels`` are for the loss alone: tensors that a loss of your own reads
    besides ``labels`` (``labels_weight``, ``labels_teacher``) travel with the tasks, and the model
    is not given them.

    Raises:
        TypeError: A value is no tensor, or `ways` no integers.
        ValueError: The sets are empty, or their task counts or row counts differ.

    Labels of ``-100`` are ignored. Use :meth:`collate` to build a batch of tasks of unequal size.
    """

    def __init__(
        self,
        support: Mapping[str, Tensor],
        query: Mapping[str, Tensor],
        ways: Tensor | Sequence[int] | int | None = None,
    ) -> None:
        num_tasks = check_set("support", support)
        query_tasks = check_set("query", query)
        if num_tasks != query_tasks:
            raise ValueError(
                f"support and query must hold the same tasks: support has {num_tasks} tasks, "
                f"query has {query_tasks}"
            )
        if support.keys() != query.keys():
            raise ValueError(
                f"support and query must have the same inputs: support has {sorted(support)}, "
                f"query has {sorted(query)}"
            )
        if ways is not None:
            ways = ways_of(ways, num_tasks, next(iter(support.values())).device)
        everything = [*support.values(), *query.values(), *([] if ways is None else [ways])]
        devices = sorted({str(t.device) for t in everything})
        if len(devices) > 1:
            raise ValueError(f"all tensors of a batch must be on one device, got {devices}")
        self.support = dict(support)
        self.query = dict(query)
        self.ways = ways

    @property
    def num_tasks(self) -> int:
        return next(iter(self.support.values())).shape[0]

    def __len__(self) -> int:
        return self.num_tasks

    def __contains__(self, name: object) -> bool:
        """Whether both sets have a tensor of this name."""
        return name in self.support

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a TaskBatch is not iterable: expected batch[i:j] for some of its tasks, "
            "batch.support or batch.query for tensors by name"
        )

    @property
    def device(self) -> torch.device:
        return next(iter(self.support.values())).device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        """The same batch with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TaskBatch:
        """The same batch in page-locked memory, for copies to a GPU that do not wait."""
        return self.map(lambda t: t.pin_memory())

    def __getitem__(self, index: slice) -> TaskBatch:
        """Tasks `start:stop` as a batch."""
        if not isinstance(index, slice):
            raise TypeError(f"a TaskBatch is sliced by tasks, batch[i:j], got {index!r}")
        return self.map(lambda t: t[index])

    def select(self, index: Tensor) -> TaskBatch:
        """The tasks at `index` (int64 ``[S]``) as a batch."""
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        ways = [] if self.ways is None else [self.ways]
        return [*self.support.values(), *self.query.values(), *ways]

    def map(self, fn: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch with `fn` applied to every tensor."""
        return TaskBatch(
            {k: fn(v) for k, v in self.support.items()},
            {k: fn(v) for k, v in self.query.items()},
            None if self.ways is None else fn(self.ways),
        )

    @classmethod
    def collate(
        cls,
        tasks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        *,
        pad_token_id: int = 0,
        ways: Tensor | Sequence[int] | int | None = None,
    ) -> TaskBatch:
        """Stack tasks of unequal size, padding exactly: padding never changes a result.

        A missing row repeats the task's first row (so that its attention stays finite) with
        label ``-100``; a missing column holds `pad_token_id` under ``attention_mask`` 0 and label
        ``-100``. Labels in floating point are NaN there, other tensors for the loss 0 (integers
        ``-100``).

        Args:
            tasks: One ``(support, query)`` pair per task, tensors ``[N_t, ...]``.
            pad_token_id: Fills missing columns of ``input_ids``.
            ways: Number of classes of each task, when fewer than the head has.

        Returns:
            A batch whose sets are ``[T, max N_t, ...]`` and ``[T, max Q_t, ...]``.
        """
        if not tasks:
            raise ValueError("expected at least one task, got none")
        support, query = (
            stack_sets(name, [task[which] for task in tasks], pad_token_id)
            for which, name in enumerate(("support", "query"))
        )
        return cls(support, query, ways)

    def __repr__(self) -> str:
        shapes = {k: list(v.shape) for k, v in self.support.items()}
        queries = {k: list(v.shape) for k, v in self.query.items()}
        return f"TaskBatch(tasks={self.num_tasks}, support={shapes}, query={queries})"


def ways_of(ways: Tensor | Sequence[int] | int, num_tasks: int, device: torch.device) -> Tensor:
    """Numbers of classes as an int64 tensor ``[T]``; one number is that of every task.

    Args:
        device: Of what is no tensor yet.
    """
    if isinstance(ways, int):
        ways = [ways] * num_tasks
    if not isinstance(ways, Tensor):
        if not all(is_integer(w) for w in ways):
            raise TypeError(f"ways must be integers or an int64 tensor, got {ways!r}")
        ways = torch.tensor(ways, dtype=torch.int64, device=device)
    if ways.dtype != torch.int64:
        raise TypeError(f"ways must be integers or an int64 tensor, got {ways.dtype}")
    if tuple(ways.shape) != (num_tasks,):
        raise ValueError(f"ways must have shape [{num_tasks}], got {list(ways.shape)}")
    return ways


def check_set(name: str, tensors: Mapping[str, Tensor]) -> int:
    """The number of tasks in a support or query set, or an error that names it."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"expected a {name} set, a mapping of inputs such as batch.{name}, "
            f"got {type(tensors).__name__}"
        )
    if not tensors:
        raise ValueError(f"the {name} set must hold at least one tensor, got none")
    leading: tuple[int, int] | None = None
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{key!r}] must be a tensor, got {type(value).__name__}")
        if value.dim() < 2:
            raise ValueError(
                f"{name}[{key!r}] must be [tasks, examples, ...], got shape {list(value.shape)}"
            )
        if leading is None:
            leading = (value.shape[0], value.shape[1])
        elif leading != (value.shape[0], value.shape[1]):
            raise ValueError(
                f"every tensor of the {name} set must start with the same [tasks, examples]: "
                f"expected {list(leading)}, got {list(value.shape[:2])} for {key!r}"
            )
    assert leading is not None
    if leading[0] == 0 or leading[1] == 0:
        raise ValueError(
            f"the {name} set is empty: it has {leading[0]} tasks of {leading[1]} examples"
        )
    return leading[0]


def join_sets(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Rows of both sets, ``[T, N + Q, ...]``, columns padded to the longer."""
    return {
        key: torch.cat(
            _same_columns(
                key, [first[key], second[key]], 2, pad_token_id, "attention_mask" in first
            ),
            dim=1,
        )
        for key in first
    }


def stack_sets(
    name: str, sets: Sequence[Mapping[str, Tensor]], pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Sets of T tasks, tensors ``[N_t, ...]``, as one of ``[T, max N_t, ...]``; how they are padded
    see :meth:`TaskBatch.collate`."""
    keys = sets[0].keys()
    for t, task in enumerate(sets):
        if task.keys() != keys:
            raise ValueError(
                f"every task must have the same inputs: task 0's {name} set has "
                f"{sorted(keys)}, task {t}'s has {sorted(task)}"
            )
        if not task or any(v.shape[0] == 0 for v in task.values()):
            raise ValueError(f"the {name} set of task {t} is empty")
    masked = "attention_mask" in keys
    return {k: _stack(k, [t[k] for t in sets], pad_token_id, masked) for k in keys}


def _stack(key: str, tensors: list[Tensor], pad_token_id: int, masked: bool) -> Tensor:
    """``[N_t, *S_t]`` per task -> ``[T, max N_t, *max S_t]``."""
    rows = max(t.shape[0] for t in tensors)
    stacked = []
    for tensor in _same_columns(key, tensors, 1, pad_token_id, masked):
        missing = rows - tensor.shape[0]
        if missing and key.startswith("labels"):
            filling = tensor.new_full((missing, *tensor.shape[1:]), _ignored(key, tensor))
        else:
            filling = tensor[:1].expand(missing, *tensor.shape[1:])
        stacked.append(torch.cat([tensor, filling]))
    return torch.stack(stacked)


def _ignored(key: str, labels: Tensor) -> float:
    """The label of rows and tokens that do not count; of other numbers for a loss, such as weights,
    0."""
    if labels.is_floating_point():
        return float("nan") if key == "labels" else 0.0
    return 0 if labels.dtype == torch.bool else IGNORE_INDEX


def _same_columns(
    key: str, tensors: list[Tensor], lead: int, pad_token_id: int, masked: bool
) -> list[Tensor]:
    """The tensors padded to one size on every axis from `lead` on."""
    if len({t.dim() for t in tensors}) > 1:
        raise ValueError(
            f"{key!r} must have the same number of axes in every task, "
            f"got {[list(t.shape) for t in tensors]}"
        )
    sizes = [max(sizes) for sizes in zip(*(t.shape[lead:] for t in tensors), strict=True)]
    if all(list(t.shape[lead:]) == sizes for t in tensors):
        return tensors
    if not masked:
        raise ValueError(
            f"{key!r} must have the same size in every task where there is no 'attention_mask' "
            f"to mask padding with, got {[list(t.shape) for t in tensors]}"
        )
    fill = _COLUMN_FILL.get(key, pad_token_id if key == "input_ids" else 0)
    if key.startswith("labels"):
        fill = _ignored(key, tensors[0])
    padded = []
    for tensor in tensors:
        out = tensor.new_full((*tensor.shape[:lead], *sizes), fill)
        out[(..., *(slice(n) for n in tensor.shape[lead:]))] = tensor
        padded.append(out)
    return padded
