"""Inputs ``[T, N, ...]`` as the model takes them, ``[T * N, ...]``, and its outputs back."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmeta.patching.unpadded import IDS, MASK

LABELS = "labels"
"""What names begin with whose tensors are for the loss alone."""


def is_input(name: str) -> bool:
    """Whether a model is given what has this name in a task set."""
    return not name.startswith(LABELS)


def leading_axes(inputs: Mapping[str, Any]) -> tuple[str, int, int]:
    """The input that counts, T and N."""
    for name in (IDS, *inputs):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return name, value.shape[0], value.shape[1]
    raise ValueError(
        f"expected at least one input of shape [T, N, ...], got {sorted(inputs) or 'none'}"
    )


def _has_axes(value: Any, tasks: int, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (tasks, rows)


def flat_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with: rows of all tasks on one axis, nothing of the loss alone."""
    _, tasks, rows = leading_axes(inputs)
    flat = {
        k: v.flatten(0, 1) if _has_axes(v, tasks, rows) else v
        for k, v in inputs.items()
        if is_input(k)
    }
    labels = inputs.get(LABELS)
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is not None and prepare is not None and "decoder_input_ids" not in flat:
        if labels.dim() == 3:
            flat["decoder_input_ids"] = prepare(labels=labels.flatten(0, 1))
    return flat


def has_choices(model: nn.Module) -> bool:
    """Whether a row is several texts, of which the model chooses one."""
    return type(model).__name__.endswith("ForMultipleChoice")


def few(inputs: Mapping[str, Any], tasks: int, rows: int) -> dict[str, Any]:
    """A few of the real inputs' rows, repeated as needed: ``[tasks, rows, ...]``."""
    name, given_tasks, given_rows = leading_axes(inputs)
    index = torch.arange(tasks * rows, device=inputs[name].device) % (given_tasks * given_rows)
    return {
        k: v.flatten(0, 1)[index].unflatten(0, (tasks, rows))
        if _has_axes(v, given_tasks, given_rows)
        else v
        for k, v in inputs.items()
    }


def unflatten_output(out: Any, tasks: int, rows: int) -> Any:
    """A model's output with ``[T, N, ...]`` in place of ``[T * N, ...]``."""

    def fn(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == tasks * rows:
            return t.view(tasks, rows, *t.shape[1:])
        return t

    return tree_map(fn, out)


def check_mask(inputs: Mapping[str, Any]) -> None:
    """Raise unless a mask ``[T, N, L]`` has the shape of the words that it is of.

    transformers drops a mask that hides nothing before anyone sees its shape.
    """
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    both = isinstance(ids, Tensor) and isinstance(mask, Tensor)
    if both and ids.dim() == mask.dim() == 3 and ids.shape != mask.shape:
        raise ValueError(
            f"{MASK} must have the shape of {IDS}, {list(ids.shape)}, got {list(mask.shape)}"
        )


def warn_of_unknown(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Warn of tensors that no module of the model names: forwards that take any may drop them."""
    names = {n for n, v in inputs.items() if isinstance(v, Tensor) and is_input(n)}
    known = {p for m in model.modules() for p in inspect.signature(m.forward).parameters}
    for name in sorted(names - known):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        warnings.warn(
            f"no module of {type(model).__name__} names an input {name!r}, which may have no "
            f"effect{hint}",
            UserWarning,
            stacklevel=2,
        )
