"""Whose memory the nodes of a recorded graph look at, and which of them write to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# the same tensor, as far as operators without autograd see
SAME = {aten.detach.default, aten.alias.default}
RESHAPES = {aten.view.default, aten._unsafe_view.default}
VIEWS = {
    *RESHAPES, aten.transpose.int,
    aten.t.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.diagonal.default,
}  # fmt: skip
# several views of one tensor
PARTS = {
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default,
}  # fmt: skip


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


def looks(node: fx.Node) -> list[fx.Node] | None:
    """The views by which a node looks at an input of its graph, in order; None if at none."""
    found = []
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        item = not hasattr(node.target, "_schema") and source.target in PARTS
        if not (item or node.target in SAME | VIEWS | PARTS):
            return None
        found.append(node)
        node = source
    return found[::-1]


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory another looks at, or itself: whatever may be a view counts as one."""
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
        schema = getattr(node.target, "_schema", None)  # None: an item of several results
        if schema is not None and node.target not in RESHAPES:
            if all(r.alias_info is None for r in schema.returns):
                break
        node = node.args[0]
    return node
