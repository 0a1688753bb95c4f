"""Nested Python state as JSON and tensors, and back: what safetensors and JSON files can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]


def pack(value: Any, name: str, tensors: Tensors) -> Any:
    """Return `value` as JSON values; its tensors go into `tensors`, named after where they are.

    Dictionaries, lists, tuples, numbers, strings, booleans and None come back unchanged from
    `unpack`, floats bit by bit.

    Raises:
        TypeError: The state holds anything else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, list):
        return [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": pack(list(value), name, tensors)}
    if isinstance(value, Mapping):
        plain = all(isinstance(k, str) and not k.startswith("$") for k in value)
        if plain:
            return {k: pack(v, f"{name}.{k}", tensors) for k, v in value.items()}
        items = [
            [pack(k, f"{name}.{i}.key", tensors), pack(v, f"{name}.{i}", tensors)]
            for i, (k, v) in enumerate(value.items())
        ]
        return {"$items": items}
    raise TypeError(
        f"a checkpoint holds tensors and JSON values only, got {type(value).__name__} in {name}"
    )


def apart(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors on the CPU, contiguous, each alone in its memory, as safetensors wants them."""
    found: Tensors = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(memory.data_ptr())
        found[name] = tensor
    return found


def unpack(value: Any, tensors: Tensors) -> Any:
    """Undo `pack`.

    Raises:
        KeyError: A tensor that is not in `tensors`.
    """
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "$float":
            return float(inner)
        if kind == "$tensor":
            return tensors[inner]
        if kind == "$tuple":
            return tuple(unpack(inner, tensors))
        if kind == "$items":
            return {unpack(k, tensors): unpack(v, tensors) for k, v in inner}
    return {k: unpack(v, tensors) for k, v in value.items()}
