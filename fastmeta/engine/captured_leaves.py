"""Captured passes of a loop that keeps weights by leaf: a step, or the losses at the end.

A pass reads the rest in its packed buffer and what each leaf is made of; those are operands of a
graph, and what a step makes of them is among its results. Steps after the first are alike and share
a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from fastmeta.engine import graphs
from fastmeta.engine.backward import backpropagate
from fastmeta.engine.capture import Unsuited, signature, token_tensors, traced_support
from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.inner import InnerLoop, Support, task_losses
from fastmeta.engine.leaf_step import one_step
from fastmeta.engine.losses import logits_of
from fastmeta.patching import TaskParams
from fastmeta.patching.adapted_linear import Gate, Gathering
from fastmeta.patching.leaf_params import LeafParams


def captured_step(
    loop: InnerLoop, rate: Tensor | float, params: LeafParams, support: Support, gate: Gate
) -> tuple[Tensor, Tensor, LeafParams] | None:
    """What :func:`~fastmeta.engine.leaf_step.one_step` returns, differentiable once; None where
    eager code serves."""
    if not isinstance(rate, Tensor):
        rate = params.rest.packed.new_full((1,), rate)

    def step(own: _Operands, before: LeafParams, texts: Support) -> _Computed:
        found = one_step(loop, *own.rate, before, texts, gate, True)
        if found is None:
            raise Unsuited("weights cannot be kept by leaf")
        losses, finite, after = found
        return _Computed([losses, finite], [], after)

    found = _captured("step", loop, [rate], params, support, step)
    if found is None:
        return None
    (losses, finite), _, after = found
    for leaf in after.leaves.values():
        leaf.gate = gate  # not that of the loop that was captured
    return losses, finite, after


def captured_losses(
    loop: InnerLoop, params: LeafParams, support: Support
) -> tuple[Tensor, Tensor | None] | None:
    """Losses ``[T]`` and logits of a set of texts, differentiable once; None where eager code
    serves."""

    def losses_of(own: _Operands, before: LeafParams, texts: Support) -> _Computed:
        params = before.reading(texts.rows)
        losses, outputs = task_losses(loop, params, texts.inputs, texts.prefix)
        logits = logits_of(outputs)
        return _Computed([], [losses] if logits is None else [losses, logits], None)

    found = _captured("losses", loop, [], params, support, losses_of)
    if found is None:
        return None
    _, (losses, *logits), _ = found
    return losses, logits[0] if logits else None


@dataclass(frozen=True)
class _Operands:
    """What a pass reads.

    Attributes:
        rate: The learning rate ``[1 or T]`` of a step.
        rest: The packed buffer ``[T, P']``.
        written: What steps write anew of leaves.
        read: What else of them passes read.
        stored: The stored prefix.
        given: The texts.
    """

    rate: list[Tensor]
    rest: list[Tensor]
    written: list[Tensor]
    read: list[Tensor]
    stored: list[Tensor]
    given: list[Tensor]

    def _all(self) -> tuple[list[Tensor], ...]:
        return self.rate, self.rest, self.written, self.read, self.stored, self.given

    @property
    def first_written(self) -> int:
        """The place of the first of :attr:`written`."""
        return len(self.rate) + len(self.rest)

    def joined(self) -> list[Tensor]:
        return [t for part in self._all() for t in part]

    def like(self, tensors: Sequence[Tensor]) -> _Operands:
        """Others in their place."""
        others = iter(tensors)
        return _Operands(*([*islice(others, len(part))] for part in self._all()))


@dataclass(frozen=True)
class _Computed:
    """What a pass computes.

    Attributes:
        shown: Without a gradient.
        results: With one.
        after: The fast weights after a step, whose tensors are results too.
    """

    shown: list[Tensor]
    results: list[Tensor]
    after: LeafParams | None

    def results_of(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """All results: also the rest after a step, what it wrote of leaves, and what else it made
        for them, of these operands."""
        if self.after is None:
            return self.results
        states = [leaf.state() for leaf in self.after.leaves.values()]
        known = {id(t) for t in operands}
        made = [t for _, read in states for t in read if id(t) not in known]
        return [self.after.rest.packed, *(t for written, _ in states for t in written), *made]


_Pass = Callable[[_Operands, LeafParams, Support], _Computed]


def _captured(
    kind: str,
    loop: InnerLoop,
    rate: list[Tensor],
    params: LeafParams,
    support: Support,
    compute: _Pass,
) -> tuple[Sequence[Tensor], Sequence[Tensor], LeafParams | None] | None:
    """What is shown, the results and the fast weights after, by a graph."""
    states = [leaf.state() for leaf in params.leaves.values()]
    operands = _Operands(
        rate,
        [params.rest.packed],
        [t for written, _ in states for t in written],
        [t for _, read in states for t in read],
        support.stored(),
        [*support.inputs.values(), *token_tensors(support)],
    )
    shared = loop.shared
    layout = (*params.leaves, *((len(written), len(read)) for written, read in states))
    steps = loop.steps if states else None  # leaves know it
    own = signature(loop, support, operands.joined(), shared, kind, steps, layout)
    make = partial(_Graph.make, operands, params, support, shared, compute)
    graph = loop.capture.captured(own, make)
    return None if graph is None else graph.run(params, operands)


def _at(params: LeafParams, operands: _Operands) -> LeafParams:
    """The fast weights made of these operands."""
    written, read = iter(operands.written), iter(operands.read)
    leaves = {}
    for slot, leaf in params.leaves.items():
        mine, more = leaf.state()
        leaves[slot] = leaf.at([*islice(written, len(mine))], [*islice(read, len(more))])
    return LeafParams(params.layout, TaskParams(params.rest.layout, *operands.rest), leaves)


class _After:
    """How fast weights after a step are made of operands and results.

    Args:
        params: Some after such a step.
        operands: Of that step.
        results: Of that step.

    Attributes:
        leaves: Slot -> the leaf, without what it is made of; how many tensors steps write of it;
            and the sources of what it reads: the place of an operand, or of a result from -1 down.
    """

    def __init__(
        self, params: LeafParams, operands: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        places = {id(t): -i - 1 for i, t in enumerate(results)}
        places |= {id(t): i for i, t in enumerate(operands)}
        self.layout, self.rest = params.layout, params.rest.layout
        self.leaves = {}
        for slot, leaf in params.leaves.items():
            written, read = leaf.state()
            bare = leaf.at([_NOTHING] * len(written), [_NOTHING] * len(read))
            self.leaves[slot] = bare, len(written), [places[id(t)] for t in read]

    @property
    def sources(self) -> Hashable:
        """By slot how many tensors are written, and the sources of what is read."""
        return tuple((s, count, tuple(read)) for s, (_, count, read) in self.leaves.items())

    def params(self, operands: Sequence[Tensor], results: Sequence[Tensor]) -> LeafParams:
        rest, *written = results
        written, leaves = iter(written), {}
        for slot, (bare, count, sources) in self.leaves.items():
            read = [operands[i] if i >= 0 else results[-i - 1] for i in sources]
            leaves[slot] = bare.at([*islice(written, count)], read)
        return LeafParams(self.layout, TaskParams(self.rest, rest), leaves)


_NOTHING = torch.empty(0)


def _landings(params: LeafParams) -> list[Gathering | None]:
    """Where the gradient of every tensor that steps write anew gathers."""
    return [landing for leaf in params.leaves.values() for landing in leaf.landings()]


class _Graph:
    """A captured pass, for operands of one signature.

    Attributes:
        function: What is shown and the results, of operands.
        after: Of a step.
    """

    def __init__(self, function: GraphFunction, after: _After | None) -> None:
        self.function, self.after = function, after

    @property
    def outline(self) -> Hashable:
        after = None if self.after is None else self.after.sources
        return tuple(self.function.differentiable), after

    def with_pair(self, pair: graphs.Pair) -> _Graph:
        """The same with other graphs."""
        return _Graph(self.function.with_pair(pair), self.after)

    @classmethod
    def make(
        cls,
        operands: _Operands,
        params: LeafParams,
        support: Support,
        shared: list[Tensor],
        compute: _Pass,
        compiler: graphs.Compiler | None,
    ) -> _Graph:
        tensors = operands.joined()

        def run(args: Sequence[Tensor]):
            """The pass on leaves of a graph of its own."""
            leaves = [
                t.detach().requires_grad_() if like.requires_grad else t
                for t, like in zip(args, tensors, strict=False)
            ]
            own = operands.like(leaves)
            before = _at(params, own)
            landings = _landings(before)  # a step changes its leaves
            computed = compute(own, before, traced_support(support, own.stored, iter(own.given)))
            return leaves, landings, computed

        with graphs.tracing():
            leaves, _, example = run(tensors)
        results = example.results_of(leaves)
        after = None if example.after is None else _After(example.after, leaves, results)
        places = [i for i, t in enumerate(results) if t.requires_grad]
        cotangents = [
            torch.ones_like(results[i], memory_format=torch.contiguous_format) for i in places
        ]
        shown, count = len(example.shown), len(example.shown) + len(results)
        del leaves, example, results

        def function(*args: Tensor) -> list[Tensor | None]:
            leaves, landings, computed = run(args)
            results = computed.results_of(leaves)
            # before cotangents are read; no operand itself
            given = [t.detach() if t.is_floating_point() else t.clone() for t in results]
            for landing in _landings(computed.after) if computed.after is not None else ():
                if landing is not None:
                    landing.given_away = True
            pulled = backpropagate(
                [results[i] for i in places], args[len(tensors) :], [*leaves, *shared]
            )
            for i, landing in enumerate(landings, operands.first_written):
                if landing is not None:
                    pulled[i] = landing.finish(pulled[i])
            return [*computed.shown, *given, *pulled]

        pair = graphs.capture(function, tensors, cotangents, count, compiler)
        count = len(tensors)
        return cls(GraphFunction(pair, shown, places, range(count), count, shared), after)

    def run(
        self, params: LeafParams, operands: _Operands
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], LeafParams | None]:
        tensors = operands.joined()
        before = dict(enumerate(_landings(params), operands.first_written))
        landings: dict[int, Gathering | None] = {}
        found = self.function(tensors, before, landings)
        shown, results = found[: self.function.shown], found[self.function.shown :]
        after = None if self.after is None else self.after.params(tensors, results)
        if after is not None:
            landings |= enumerate(_landings(after), 1)  # the rest comes first
        return shown, results, after
