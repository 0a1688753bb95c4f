"""What a model can read, asked before it runs: its device, its words, how long a text may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta.patching.task_axes import check_mask
from fastmeta.patching.unpadded import is_traced

_POSITIONS = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
"""Names of tables that bound the length of a text."""

_TABLES: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""Model -> name of such a table in it, or None: the table itself may be replaced."""


def vocabulary(model: nn.Module) -> int | None:
    """How many words the model's table has; None where it has none. Tables may be resized."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


def _most_tokens(model: nn.Module) -> int | None:
    """How long a text may be, where a table of positions bounds it."""
    if model not in _TABLES:
        _TABLES[model] = next(
            (
                name
                for name, module in model.named_modules()
                if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding)
            ),
            None,
        )
    name = _TABLES[model]
    if name is None:
        return None
    table = model.get_submodule(name)
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    served = table.num_embeddings - first
    # A table may have rows that are no positions, such as OPT's first two.
    said = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(served, said) if isinstance(said, int) else served


def check_inputs(
    inputs: Mapping[str, Any], which: str, device: torch.device, model: nn.Module
) -> None:
    """Raise unless inputs are on the device, a mask fits, and the model knows all words: at one
    that it does not, a GPU stops for good.

    Args:
        which: ``"support"``, ``"query"`` or ``"given"``, for the message.
    """
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"the model is on {device}, but {which}[{key!r}] is on "
                f"{value.device}; move it with .to({str(device)!r})"
            )
    check_mask(inputs)
    ids, words = inputs.get("input_ids"), vocabulary(model)
    if ids is None or ids.is_floating_point() or is_traced(ids) or _is_recorded(ids):
        return
    most = _most_tokens(model)
    if most is not None and ids.shape[-1] > most:
        raise ValueError(
            f"the model takes at most {most} tokens, got {which} texts of {ids.shape[-1]}"
        )
    if words is None:
        return
    wrong = (ids < 0) | (ids >= words)
    if bool(wrong.any()):
        task = int(wrong.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{which} input_ids must be in 0..{words - 1} (the model's words), "
            f"got {int(ids[wrong][0])} in task {task}"
        )


def _is_recorded(t: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which cannot be asked anything."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def check_names(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise where the model's signature asks for other inputs."""
    parameters = inspect.signature(model.forward).parameters
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
        unknown: list[str] = []
    else:
        unknown = sorted(inputs.keys() - parameters.keys())
    missing = [
        name
        for name, p in parameters.items()
        if p.default is kinds.empty
        and p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        and name not in inputs
    ]
    if missing or unknown:
        raise ValueError(
            f"{type(model).__name__} expects the inputs {', '.join(missing) or 'of its signature'}"
            f", got {', '.join(sorted(inputs)) or 'none'}"
            + (f" (unknown: {', '.join(unknown)})" if unknown else "")
        )
