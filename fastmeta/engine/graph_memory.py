"""Whose memory the nodes of a recorded graph look at, and which of them write to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten._unsafe_view.default}


def arguments(node: fx.Node) -> list[tuple[Any, Any]]:
    """Every argument of a node's operator, with its value."""
    schema = node.target._schema.arguments
    values = [*node.args]
    for argument in schema[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return list(zip(schema, values, strict=True))


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose tensors a node writes to."""
    if not hasattr(node.target, "_schema"):
        return
    for argument, value in arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from value if isinstance(value, list | tuple) else [value]


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory another looks at, or itself: whatever may be a view counts as one."""
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
        schema = getattr(node.target, "_schema", None)  # None: an item of several results
        if schema is not None and node.target not in RESHAPES:
            if all(r.alias_info is None for r in schema.returns):
                break
        node = node.args[0]
    return node
