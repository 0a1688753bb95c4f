"""Additions of a captured graph that become the base of a product: ``A B + C`` in one pass.

Where several layers read the same rows, or a residual goes around them, autograd adds up their
gradients one by one, each time reading and writing all of them. The products that make them can add
while they write.
"""

from __future__ import annotations

import torch
from torch import fx

from fastmeta._recorder import Shape
from fastmeta.engine.graph_memory import RESHAPES, memory_of, written_by
from fastmeta.ops.batched_linear import NOTHING

aten = torch.ops.aten
_MM, _MMS_ = torch.ops.fastmeta.batched_mm.default, torch.ops.fastmeta.batched_mms_.default


def fuse_additions(graph: fx.Graph) -> None:
    """Rewrite a graph in place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = _writes(order)
    for node in order:
        if node.target is aten.add.Tensor and not node.kwargs and _alike(*node.args):
            for product, other in (node.args, node.args[::-1]):
                if _laid_out_as(node, product) and _absorbed(node, product, other, order, writes):
                    node.replace_all_uses_with(product)
                    graph.erase_node(node)
                    break
    graph.lint()


def _alike(a: object, b: object) -> bool:
    """Whether they are tensors of one shape and dtype."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return False
    a, b = a.meta["val"], b.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype


def _laid_out_as(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors of one shape have their elements in the same order: what looks at one of
    them later may then look at the other."""
    a, b = a.meta["val"], b.meta["val"]
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True))


def _absorbed(
    add: fx.Node,
    product: fx.Node,
    other: fx.Node,
    order: dict[fx.Node, int],
    writes: dict[fx.Node, list[int]],
) -> bool:
    """Make `other` the base of a product that nobody but `add` reads, if that is one, and `other`
    is there before it and the same until `add`."""
    root, after = product, add
    while root.target in RESHAPES and len(root.users) == 1:
        root, after = root.args[0], root
    found = _entry(root, after)
    if found is None:
        return False
    at, entry = found
    while other.target in RESHAPES and order[other] > order[at]:
        other = other.args[0]
    shape, memory = root.meta["val"].shape, memory_of(other)
    if order[other] > order[at] or any(order[at] <= i < order[add] for i in writes.get(memory, ())):
        return False
    if other.meta["val"].shape != shape:
        if not other.meta["val"].empty("meta").is_contiguous():
            return False
        with add.graph.inserting_before(at):
            seen = add.graph.call_function(aten.view.default, (other, list(shape)))
        seen.meta["val"] = Shape.of(other.meta["val"].empty("meta").view(shape))
        other = seen
    if entry is None:
        at.args = (*at.args[:2], other, *at.args[3:])
    else:
        to, a, b, bases, which, bf16 = at.args
        which = [len(bases) if i == entry else w for i, w in enumerate(which)]
        at.args = (to, a, b, [*bases, other], which, bf16)
    return True


def _entry(root: fx.Node, reader: fx.Node) -> tuple[fx.Node, int | None] | None:
    """The node of the product that makes `root` for `reader` alone, without a base, and its place
    among those that run together; None where there is none."""
    if root.target is _MM:
        alone = len(root.users) == 1 and (len(root.args) < 3 or root.args[2] is None)
        return (root, None) if alone else None
    if (
        root.target is not aten.new_empty.default
        or len(root.users) != 2
        or reader not in root.users
    ):
        return None
    (at,) = (n for n in root.users if n is not reader)
    if at.target is not _MMS_:
        return None
    to, a, b, bases, which, _ = at.args
    places = [i for i, t in enumerate(to) if t is root]
    if len(places) != 1 or root in (*a, *b, *bases):
        return None
    (place,) = places
    summed = root.meta["val"].shape[0] != a[place].meta["val"].shape[0]
    return None if which[place] != NOTHING or summed else (at, place)


def _writes(nodes: dict[fx.Node, int]) -> dict[fx.Node, list[int]]:
    """Where each node's memory is written to."""
    found: dict[fx.Node, list[int]] = {}
    for node, place in nodes.items():
        for target in written_by(node):
            found.setdefault(memory_of(target), []).append(place)
    return found
