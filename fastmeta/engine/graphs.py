"""A function of tensors and its vector-Jacobian product as two flat graphs.

Both come from one trace, cut where a cotangent is first read: what autograd would save between
a forward and a backward pass is what the second graph reads of the first.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from transformers.utils import import_utils

from fastmeta._recorder import record
from fastmeta.engine.fused_additions import fuse_additions
from fastmeta.engine.graph_memory import looks
from fastmeta.engine.tape import Tape
from fastmeta.engine.tape_writer import written

Compiler = Callable[[fx.GraphModule, Callable[[], list[Tensor]]], Callable]
"""``(graph, what makes example inputs) -> callable`` that does the same."""


@dataclass(frozen=True)
class Pair:
    """A captured function with its vector-Jacobian product.

    Attributes:
        constants: Tensors that the function read beside its operands (weights, buffers): the live
            ones, so that later changes in place are seen.
        kept: Which of the operands and constants the vector-Jacobian product reads.
        outputs: Number of results.
        forward: ``(*operands, *constants) -> (*outputs, *computed)``.
        backward: ``(*kept, *computed, *cotangents) -> gradients``, or None where none were asked
            for.
    """

    constants: list[Tensor]
    kept: list[int]
    outputs: int
    forward: Callable
    backward: Callable | None

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Results for operands and constants, and what :meth:`pull` reads of the way there."""
        results = list(self.forward(*tensors))
        return results[: self.outputs], results[self.outputs :]

    def pull(
        self, kept: Sequence[Tensor], saved: Any, cotangents: Iterable[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        """Gradients; `saved` can be used again only where it is to be kept."""
        computed = [*saved]
        if not keep:
            saved.clear()
        return self.backward(*kept, *computed, *cotangents)


@dataclass(frozen=True)
class TapePair(Pair):
    """One whose graphs are tapes."""

    forward: Tape
    backward: Tape | None

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        return self.forward.run(tensors)

    def pull(
        self, kept: Sequence[Tensor], saved: Any, cotangents: Iterable[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        gradients, _ = self.backward.run([*kept, *cotangents], saved, keep)
        return gradients


def capture(
    function: Callable[..., Sequence[Tensor | None]],
    operands: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    outputs: int,
    compiler: Compiler | None,
) -> Pair:
    """Trace `function` once on real tensors and compile what it did.

    Args:
        function: ``(*operands, *cotangents)`` -> `outputs` tensors, then gradients, None where
            there is none. Its control flow may not depend on values.
        operands: Example inputs. Shapes and strides are fixed by them.
        cotangents: Examples, none where there are no gradients.
        outputs: Number of results that do not depend on the cotangent.
        compiler: What turns a graph into a callable; not used on graphs that draw random numbers,
            which have to draw what eager code draws. None: they become tapes, if tapes can hold
            them.
    """
    with tracing():
        joint, constants = record(function, [*operands, *cotangents])
    joint.eliminate_dead_code()
    inputs = [*operands, *constants]
    if compiler is not None and any(_is_random(n) for n in joint.nodes):
        compiler = _as_it_is
    if not cotangents:
        first, second, kept = joint, None, []
    else:
        first, second, kept = _cut(joint, len(operands), len(cotangents), outputs)
    if compiler is None:
        count = len(first.output_node().args[0]) - outputs
        return _taped(constants, kept, outputs, count, len(cotangents), first, second)
    first = _callable(first)
    forward = compiler(first, lambda: inputs)
    if second is None:
        return Pair(constants, kept, outputs, forward, None)

    def read_by_second() -> list[Tensor]:
        with torch.no_grad():
            computed = first(*inputs)[outputs:]
        return [*(inputs[i] for i in kept), *computed, *cotangents]

    return Pair(constants, kept, outputs, forward, compiler(_callable(second), read_by_second))


def _taped(
    constants: list[Tensor],
    kept: list[int],
    outputs: int,
    computed: int,
    cotangents: int,
    first: fx.Graph,
    second: fx.Graph | None,
) -> Pair:
    """The graphs as tapes, or as they are where tapes cannot hold them."""
    for graph in (first, second):
        if graph is not None:
            fuse_additions(graph)
    forward = written(first, saved=[False] * outputs + [True] * computed)
    backward = None
    if forward is not None and second is not None:
        come = [False] * len(kept) + [True] * computed + [False] * cotangents
        backward = written(second, frame=come)
    if forward is None or (backward is None and second is not None):
        code = (None if graph is None else _callable(graph) for graph in (first, second))
        return Pair(constants, kept, outputs, *code)
    return TapePair(constants, kept, outputs, forward, backward)


@contextmanager
def tracing() -> Iterator[None]:
    """Within, transformers prepares attention masks without reading their values, in this thread;
    random numbers drawn are forgotten."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with masks_unread(threading.get_ident()), torch.random.fork_rng(devices=devices):
        yield


_lock = threading.Lock()
_unread: Counter[int | None] = Counter()  # threads that are within, None for all
_asked = import_utils.is_jit_tracing


@contextmanager
def masks_unread(thread: int | None = None) -> Iterator[None]:
    """Within, transformers prepares attention masks without reading their values, in one thread or
    in all."""
    with _lock:
        _unread[thread] += 1
        import_utils.is_jit_tracing = _is_unread
    try:
        yield
    finally:
        with _lock:
            _unread[thread] -= 1
            if not +_unread:
                import_utils.is_jit_tracing = _asked


def _is_unread() -> bool:
    return _unread[None] > 0 or _unread[threading.get_ident()] > 0 or _asked()


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
    return torch.Tag.nondeterministic_seeded in tags


def _as_it_is(graph: fx.GraphModule, examples: Callable) -> Callable:
    return graph


def _callable(graph: fx.Graph) -> fx.GraphModule:
    """As code, which takes about as long to generate as the graph to record."""
    return fx.GraphModule(torch.nn.Module(), graph)


def _cut(
    joint: fx.Graph, operands: int, cotangents: int, outputs: int
) -> tuple[fx.Graph, fx.Graph, list[int]]:
    """The graph before a cotangent is read, the graph from there on, and which inputs of the
    first the second reads.

    In the order of the trace, so that operators which write in place stay where they were. Views
    of inputs are not handed on but looked at again: then autograd sees that weights were changed
    in place between the two.
    """
    nodes = [n for n in joint.nodes if n.op not in ("placeholder", "output")]
    places = [n for n in joint.nodes if n.op == "placeholder"]
    late_inputs = set(places[operands : operands + cotangents])
    inputs = [n for n in places if n not in late_inputs]
    start = next((i for i, n in enumerate(nodes) if late_inputs & {*n.all_input_nodes}), len(nodes))
    (results,) = joint.output_node().args
    results, gradients = list(results[:outputs]), list(results[outputs:])
    late = {*nodes[start:], *late_inputs}
    wanted = [n for node in nodes[start:] for n in node.all_input_nodes] + [
        g for g in gradients if g is not None
    ]
    read = dict.fromkeys(n for n in wanted if n not in late)
    again = {n: found for n in read if (found := looks(n)) is not None}
    views = dict.fromkeys(view for found in again.values() for view in found)
    roots = [found[0].args[0] if found else n for n, found in again.items()]
    read = dict.fromkeys([n for n in read if n not in again] + roots)
    kept = [i for i, n in enumerate(inputs) if n in read]
    computed = [n for n in read if n.op != "placeholder"]
    first = _subgraph(inputs, nodes[:start], [*results, *computed])
    before = [*(inputs[i] for i in kept), *computed, *places[operands : operands + cotangents]]
    return first, _subgraph(before, [*views, *nodes[start:]], gradients), kept


def _subgraph(
    inputs: Sequence[fx.Node],
    body: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
) -> fx.Graph:
    graph, at = fx.Graph(), {}
    for node in inputs:
        at[node] = graph.placeholder(node.name)
        at[node].meta = dict(node.meta)
    for node in body:
        at[node] = graph.node_copy(node, at.__getitem__)
    graph.output([None if n is None else at[n] for n in results])
    graph.eliminate_dead_code()
    graph.lint()
    return graph
