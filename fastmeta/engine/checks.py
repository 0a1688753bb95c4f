"""One clear sentence for every wrong batch or setting, before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta._settings import integer, is_integer, is_number
from fastmeta.batch import IGNORE_INDEX
from fastmeta.engine.losses import WAYS, LossFn, name_of
from fastmeta.patching import Patched
from fastmeta.patching.inputs import check_inputs
from fastmeta.patching.task_axes import has_choices


def check_steps(steps: object, least: int = 1) -> int:
    """The number of inner steps, an integer of at least `least`."""
    if not is_integer(steps):
        raise TypeError(f"steps must be an integer of at least {least}, got {steps!r}")
    return integer("steps", steps, least)


def check_order(order: object) -> int:
    """1 or 2."""
    if order not in (1, 2) or not is_integer(order):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    return order


def check_truncate(truncate: object, steps: int) -> int | None:
    """A number of the `steps`, or None."""
    if truncate is None:
        return None
    if not is_integer(truncate):
        raise TypeError(f"truncate must be an integer or None, got {truncate!r}")
    if not 0 <= truncate <= steps:
        raise ValueError(f"truncate must be between 0 and steps={steps}, got {truncate}")
    return truncate


def check_clip_norm(clip_norm: object) -> float | None:
    """A positive number, or None."""
    if clip_norm is None:
        return None
    if not is_number(clip_norm):
        raise TypeError(f"clip_norm must be a positive number or None, got {clip_norm!r}")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm}")
    return clip_norm


def check_sets(patched: Patched, loss_fn: LossFn, sets: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless the model and the loss can take these task sets.

    Args:
        patched: The model.
        loss_fn: The resolved loss; labels are checked for the losses that the library brings.
        sets: Name (``"support"``, ``"query"``) -> inputs, labels and ways of T tasks.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adapting takes gradients, which torch.inference_mode() forbids; "
            "evaluate under torch.no_grad()"
        )
    loss = name_of(loss_fn)
    for which, batch in sets.items():
        check_inputs(batch, which, patched.device, patched.model)
        if loss in _LABELS:
            setting, dim = _LABELS[loss]
            first = 1 if loss == "causal_lm" else 0  # the first token has nothing before it
            check_labels(batch, which, setting, dim, setting_of(patched, setting), first)
        elif loss == "regression":
            check_targets(batch, which)
        if loss in ("causal_lm", "seq2seq_lm"):
            _check_decoder(patched, loss, batch)
    if patched.rows_meet:
        warn_of_ignored_rows(*sets.values())


def warn_of_ignored_rows(*sets: Mapping[str, Tensor]) -> None:
    """Warn of rows that should not count, to a model in which rows meet."""
    if any(map(_has_ignored_rows, sets)):
        warnings.warn(
            "there are rows without a label, as those that pad uneven tasks, and BatchNorm "
            "normalises over them too: give all tasks as many rows, or use GroupNorm or LayerNorm",
            UserWarning,
            stacklevel=5,
        )


def _has_ignored_rows(batch: Mapping[str, Tensor]) -> bool:
    if "labels" not in batch:
        return False
    labels = batch["labels"]
    ignored = labels.isnan() if labels.is_floating_point() else labels == IGNORE_INDEX
    return bool(ignored.reshape(*labels.shape[:2], -1).all(2).any())


def _check_decoder(patched: Patched, loss: str, batch: Mapping[str, Tensor]) -> None:
    """Raise where a model predicts the words that it is given."""
    kind = type(patched.model).__name__
    moves = getattr(getattr(patched.model, "config", None), "is_encoder_decoder", None)
    if moves and loss == "causal_lm" and "decoder_input_ids" not in batch:
        raise ValueError(
            f"{kind} is an encoder-decoder, whose decoder reads the labels moved by one word: "
            "loss_fn must be 'seq2seq_lm', got 'causal_lm'"
        )
    if moves is False and loss == "seq2seq_lm":
        raise ValueError(
            f"{kind} is no encoder-decoder: loss_fn must be 'causal_lm' (next words) or "
            "'masked_lm' (words where they stand), got 'seq2seq_lm'"
        )


_LABELS = {
    "classification": ("num_labels", 2),
    "causal_lm": ("vocab_size", 3),
    "masked_lm": ("vocab_size", 3),
    "seq2seq_lm": ("vocab_size", 3),
    "token_classification": ("num_labels", 3),
}
"""Of a loss of classes: the configuration entry that bounds its labels, and their axes."""


def setting_of(patched: Patched, name: str) -> int | None:
    """An entry of the model's configuration; None for a bare backbone, whose head is missing, and
    where choices are the classes."""
    if getattr(patched.model, "base_model", None) is patched.model or has_choices(patched.model):
        return None
    value = getattr(getattr(patched.model, "config", None), name, None)
    return value if isinstance(value, int) else None


def check_targets(batch: Mapping[str, Tensor], which: str) -> None:
    """Labels of a regression are floating-point ``[T, N]`` or ``[T, N, D]``, and every task has one
    that counts.

    Args:
        which: ``"support"`` or ``"query"``, for the message.
    """
    labels = _labels(batch, which)
    if not labels.is_floating_point():
        raise TypeError(f"{which} labels must be floating point, got {labels.dtype}")
    if labels.dim() not in (2, 3):
        raise ValueError(
            f"{which} labels must have shape [T, N] or [T, N, D], got {list(labels.shape)}"
        )
    empty = labels.isnan().flatten(1).all(1)
    if bool(empty.any()):
        task = int(empty.nonzero()[0])
        raise ValueError(f"the {which} set of task {task} is empty: all its labels are NaN")


def _labels(batch: Mapping[str, Tensor], which: str) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"the {which} set needs 'labels', got {sorted(batch)}")
    return batch["labels"]


def check_labels(
    batch: Mapping[str, Tensor],
    which: str,
    setting: str,
    dim: int,
    num_classes: int | None,
    first: int = 0,
) -> None:
    """Labels are int64, of the right rank, in range, and every task has one that counts.

    Args:
        which: ``"support"`` or ``"query"``, for the message.
        setting: The configuration entry that bounds the labels, for the message.
        dim: Axes of the labels: 2 for ``[T, N]``, 3 for ``[T, N, L]``.
        num_classes: Labels must be below it; None where unknown.
        first: Of the tokens, the first whose label counts.
    """
    labels, ways = _labels(batch, which), batch.get(WAYS)
    if labels.dtype != torch.int64:
        raise TypeError(f"{which} labels must be int64 class indices, got {labels.dtype}")
    if labels.dim() != dim:
        axes = "[T, N]" if dim == 2 else "[T, N, L]"
        raise ValueError(f"{which} labels must have shape {axes}, got {list(labels.shape)}")
    counted = labels if dim == 2 else labels[:, :, first:]
    valid = (counted != IGNORE_INDEX).flatten(1)
    wrong = (labels != IGNORE_INDEX) & (labels < 0)
    if num_classes is not None:
        wrong = wrong | (labels >= num_classes)
    if ways is not None:
        wrong = wrong | (labels >= ways.view(-1, *[1] * (dim - 1)))
    # One question to the device where all is well.
    if not bool(wrong.any() | (~valid.any(1)).any()):
        return
    if bool(wrong.any()):
        task = int(wrong.flatten(1).any(1).nonzero()[0])
        bounds = (num_classes, None if ways is None else ways[task])
        bound = min((int(b) for b in bounds if b is not None), default=0)
        what = "the task's ways" if ways is not None and bound != num_classes else setting
        raise ValueError(
            f"{which} labels must be in 0..{bound - 1} ({what} is {bound}) or -100 to ignore, "
            f"got {int(labels[wrong][0])} in task {task}"
        )
    task = int((~valid.any(1)).nonzero()[0])
    raise ValueError(f"the {which} set of task {task} is empty: all its labels are -100")


def check_support_of_queries(support: Tensor, query: Tensor) -> None:
    """Raise unless every query row's class has support rows in its task; labels ``[T, N]``."""
    known = (query.unsqueeze(2) == support.unsqueeze(1)).any(2)
    wrong = (query != IGNORE_INDEX) & ~known
    if bool(wrong.any()):
        task = int(wrong.any(1).nonzero()[0])
        raise ValueError(
            f"task {task} has a query row of class {int(query[wrong][0])}, but no support row of it"
        )


def check_classes(labels: Tensor, ways: Tensor, most: int) -> None:
    """Raise unless every class of every task fits a head of `most` and has support rows.

    Args:
        labels: Of the support sets, ``[T, N]``.
        ways: Number of classes of each task, ``[T]``.
    """
    if int(ways.max()) > most:
        raise ValueError(f"a task has {int(ways.max())} classes, but the head {most}")
    classes = torch.arange(most, device=labels.device)
    without = (classes < ways.unsqueeze(1)) & ~(labels.unsqueeze(2) == classes).any(1)
    if bool(without.any()):
        task, missing = without.nonzero()[0].tolist()
        raise ValueError(
            f"task {task} has {int(ways[task])} classes, but no support row of class {missing}"
        )


_COMPUTE = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype_of(dtype: torch.dtype | str | None, weights: torch.dtype) -> torch.dtype | None:
    """The dtype of products, also by name; ValueError where it does not fit the weights'."""
    if dtype is None:
        return None
    dtype = _COMPUTE.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _COMPUTE.values():
        raise ValueError(
            f"compute_dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}"
        )
    if weights != torch.float32:
        raise ValueError(f"compute_dtype needs a model in float32, got {weights}")
    return dtype
