"""A function of tensors and its vector-Jacobian product as two flat graphs.

Both come from one trace, cut where a cotangent is first read: what autograd would save between
a forward and a backward pass is what the second graph reads of the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.utils import import_utils

Compiler = Callable[[fx.GraphModule, Callable[[], list[Tensor]]], Callable]
"""``(graph, what makes example inputs) -> callable`` that does the same."""


@dataclass(frozen=True)
class Pair:
    """A captured function with its vector-Jacobian product.

    Attributes:
        constants: Tensors that the function read beside its operands (weights, buffers): the live
            ones, so that later changes in place are seen.
        forward: ``(*operands, *constants) -> (*outputs, *computed)``.
        kept: Which of the operands and constants the backward graph reads.
        backward: ``(*kept, *computed, *cotangents) -> gradients``, or None where none were asked
            for.
        random: Whether random numbers are drawn.
    """

    constants: list[Tensor]
    forward: Callable
    kept: list[int]
    backward: Callable | None
    random: bool


def capture(
    function: Callable[..., Sequence[Tensor | None]],
    operands: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    outputs: int,
    compiler: Compiler,
) -> Pair:
    """Trace `function` once on real tensors and compile what it did.

    Args:
        function: ``(*operands, *cotangents)`` -> `outputs` tensors, then gradients, None where
            there is none. Its control flow may not depend on values.
        operands: Example inputs. Shapes and strides are fixed by them.
        cotangents: Examples, none where there are no gradients.
        outputs: Number of results that do not depend on the cotangent.
        compiler: What turns a graph into a callable; not used on graphs that draw random numbers,
            which have to draw what eager code draws.
    """
    with tracing():
        joint = make_fx(function)(*operands, *cotangents)
    constants = _lift(joint)
    joint.graph.eliminate_dead_code()
    inputs = [*operands, *constants]
    random = any(torch.Tag.nondeterministic_seeded in _tags(n) for n in joint.graph.nodes)
    if random:
        compiler = _as_it_is
    if not cotangents:
        return Pair(constants, compiler(_finished(joint), lambda: inputs), [], None, random)
    first, second, kept = _cut(joint, len(operands), len(cotangents), outputs)

    def read_by_second() -> list[Tensor]:
        with torch.no_grad():
            computed = first(*inputs)[outputs:]
        return [*(inputs[i] for i in kept), *computed, *cotangents]

    forward, backward = compiler(first, lambda: inputs), compiler(second, read_by_second)
    return Pair(constants, forward, kept, backward, random)


@contextmanager
def tracing() -> Iterator[None]:
    """Within, transformers prepares attention masks without reading their values, in this thread;
    random numbers drawn are forgotten."""
    thread, original = threading.get_ident(), import_utils.is_jit_tracing
    import_utils.is_jit_tracing = lambda: threading.get_ident() == thread or original()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        import_utils.is_jit_tracing = original


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    return getattr(node.target, "tags", ()) if node.op == "call_function" else ()


def _as_it_is(graph: fx.GraphModule, examples: Callable) -> Callable:
    return graph


def _finished(graph: fx.GraphModule) -> fx.GraphModule:
    graph.graph.lint()
    graph.recompile()
    return graph


def _lift(traced: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a trace closed over into inputs, after the others; returns them."""
    constants: dict[int, tuple[Tensor, fx.Node]] = {}
    body = next(n for n in traced.graph.nodes if n.op != "placeholder")
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(traced, node.target)
        if id(tensor) not in constants:
            with traced.graph.inserting_before(body):
                place = traced.graph.placeholder(f"constant_{len(constants)}")
            place.meta = dict(node.meta)
            constants[id(tensor)] = tensor, place
        node.replace_all_uses_with(constants[id(tensor)][1])
        traced.graph.erase_node(node)
    return [tensor for tensor, _ in constants.values()]


def _cut(
    joint: fx.GraphModule, operands: int, cotangents: int, outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule, list[int]]:
    """The graph before a cotangent is read, the graph from there on, and which inputs of the
    first the second reads.

    In the order of the trace, so that operators which write in place stay where they were.
    """
    nodes = [n for n in joint.graph.nodes if n.op not in ("placeholder", "output")]
    places = [n for n in joint.graph.nodes if n.op == "placeholder"]
    late_inputs = set(places[operands : operands + cotangents])
    inputs = [n for n in places if n not in late_inputs]
    start = next((i for i, n in enumerate(nodes) if late_inputs & {*n.all_input_nodes}), len(nodes))
    (results,) = joint.graph.output_node().args
    results, gradients = list(results[:outputs]), list(results[outputs:])
    late = {*nodes[start:], *late_inputs}
    wanted = [n for node in nodes[start:] for n in node.all_input_nodes] + [
        g for g in gradients if g is not None
    ]
    read = dict.fromkeys(n for n in wanted if n not in late)
    kept = [i for i, n in enumerate(inputs) if n in read]
    computed = [n for n in read if n.op != "placeholder"]
    first = _subgraph(joint, inputs, nodes[:start], [*results, *computed])
    before = [*(inputs[i] for i in kept), *computed, *places[operands : operands + cotangents]]
    return first, _subgraph(joint, before, nodes[start:], gradients), kept


def _subgraph(
    joint: fx.GraphModule,
    inputs: Sequence[fx.Node],
    body: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
) -> fx.GraphModule:
    graph, at = fx.Graph(), {}
    for node in inputs:
        at[node] = graph.placeholder(node.name)
        at[node].meta = dict(node.meta)
    for node in body:
        at[node] = graph.node_copy(node, at.__getitem__)
    graph.output([None if n is None else at[n] for n in results])
    graph.eliminate_dead_code()
    return _finished(fx.GraphModule(joint, graph))
