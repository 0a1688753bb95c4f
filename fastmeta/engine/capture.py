"""Captured inner gradients: one inner step's gradient and its derivative as compiled graphs.

A graph serves every step k of every batch of the same shapes, so the time to compile it does not
depend on K. What differs between steps (update rule, learned rates, frozen tasks) stays outside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from tqdm import tqdm

from fastmeta import _backend
from fastmeta.engine import graphs
from fastmeta.engine.backward import backpropagate
from fastmeta.engine.by_signature import BySignature
from fastmeta.engine.conditions import no_cast_is_kept
from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.held import held_by
from fastmeta.engine.inner import InnerLoop, Support, gradient
from fastmeta.engine.losses import LossFn
from fastmeta.engine.tape_family import Family
from fastmeta.patching import Patched
from fastmeta.patching.packing import by_copies

HOW = ("trace", "inductor")
_MOST = 256
"""Graphs captured of one model; more than this run eagerly."""
_FREE, _USES = 16, 16
"""So many graphs are captured whatever they are used for, and one more for so many uses of all."""


def capture_of(
    patched: Patched,
    compile: bool | str,
    cache: str | Path | None = None,
    others: Sequence[str] = (),
) -> Capture | None:
    """The capture that all learners of a patched model share, or None without one.

    Args:
        compile: False, True (``"trace"`` on a CPU, ``"inductor"`` on a GPU), or one of
            :data:`HOW`, or of `others`.
        cache: Folder of what Inductor compiles, or None for its own, one for every user.
        others: Ways that are not of steps, and served elsewhere.

    Raises:
        TypeError: `cache` is no path.
        ValueError: `compile` is none of these.
    """
    known = [*HOW, *others]
    if not (isinstance(compile, bool) or compile in known):
        *most, last = map(repr, known)
        raise ValueError(
            f"compile must be False, True, {', '.join(most)} or {last}; got {compile!r}"
        )
    if cache is not None and not isinstance(cache, str | Path):
        raise TypeError(f"compile_cache must be the path of a folder or None, got {cache!r}")
    if compile is False or compile in others:
        return None
    if compile is True:
        compile = "inductor" if patched.device.type == "cuda" else "trace"
    folder = None if cache is None else str(Path(cache).expanduser().absolute())
    return patched.captures.setdefault((compile, folder), Capture(compile, folder))


class Unsuited(Exception):
    """Another graph serves, or eager code should: no reason for a warning."""


class Capture(BySignature):
    """The captured gradients of one patched model.

    Args:
        how: ``"trace"`` replays the operators that eager code ran, without autograd and Python
            around them (`fastmeta.engine.tape`); ``"inductor"`` has Inductor fuse what lies between
            our operators and products.
        folder: Of Inductor's cache, or None for its own.
    """

    def __init__(self, how: str, folder: str | None) -> None:
        super().__init__(_MOST, "an inner step could not be captured and runs eagerly")
        self.how, self.folder = how, folder
        self.families: dict[Hashable, Family] = {}
        self.uses = 0

    @property
    def widths(self) -> int:
        """Numbers of tokens to which others are rounded up; compiling takes long for each."""
        return 64 if self.how == "trace" else 16

    @property
    def by_leaf(self) -> bool:
        """Whether it serves weights kept by leaf: compilers copy what operators write to."""
        return self.how == "trace"

    def __reduce__(self):
        return Capture, (self.how, self.folder)  # graphs hold the tensors of one model

    def gradient(
        self, loop: InnerLoop, packed: Tensor, support: Support, create_graph: bool
    ) -> tuple[Tensor, Tensor] | None:
        """What :func:`fastmeta.engine.inner.gradient` returns, or None where eager code serves."""
        if self.how == "inductor":
            packed = packed.contiguous()  # the first step's rows are one: no graph of its own
        shared = loop.shared if create_graph else []
        operands = [packed, *support.stored(), *support.inputs.values(), *token_tensors(support)]
        if loop.proximal:
            operands.append(support.start)
        own = signature(loop, support, operands, shared, "gradient", create_graph)
        step = self.captured(
            own, partial(_Step.make, loop, support, operands, shared, create_graph)
        )
        return None if step is None else step.run(operands)

    def captured(self, own: Signature, make: Callable[[graphs.Compiler | None], Any]) -> Any:
        """What was captured for a signature or is told by others, else captured now by `make`; None
        where that fails, or where shapes seldom repeat: then capturing would take most of the time.
        """
        found = None
        if own not in self.steps:
            family = self.families.get(own.fixed)
            found = None if family is None else family.find(own.sizes)
            if found is None and len(self.steps) >= _FREE + self.uses // _USES:
                self._warn("shapes of batches seldom repeat; pad texts and sets to a few sizes")
                return None
        if found is None:
            found = self.find(own, partial(self._captured, own, make))
        self.uses += found is not None
        return found

    def _captured(self, own: Signature, make: Callable[[graphs.Compiler | None], Any]) -> Any:
        found = self._new(make)
        if found is not None:
            self.families.setdefault(own.fixed, Family()).add(own.sizes, found)
        return found

    def _new(self, make: Callable[[graphs.Compiler | None], Any]) -> Any:
        total = 2 if self.how == "inductor" else None
        try:
            with (
                tqdm(desc="capturing", total=total, leave=False, disable=None) as bar,
                by_copies() if self.how == "inductor" else nullcontext(),
                no_cast_is_kept(),
            ):
                return make(None if self.how == "trace" else partial(self._compile, bar))
        except Unsuited:
            return None

    def _compile(self, bar: tqdm, graph: fx.GraphModule, examples: Callable) -> Callable:
        bar.update()
        # Inductor keeps no graph that comes without one of these.
        context = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
        with torch.no_grad(), _cache_in(self.folder), tracing(context):
            return torch._inductor.compile(graph, [t.detach() for t in examples()])


@contextmanager
def _cache_in(folder: str | None) -> Iterator[None]:
    """Within, Inductor keeps its files there; it takes the folder from the environment only."""
    with nullcontext() if folder is None else patch.dict(os.environ, {_INDUCTOR: folder}):
        yield


_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def token_tensors(support: Support) -> tuple[Tensor, ...]:
    """Which positions of the texts are computed, where padding is left out."""
    prefix = support.prefix
    return () if prefix is None or prefix.tokens is None else prefix.tokens.tensors


class Signature(NamedTuple):
    """Everything that a trace fixes.

    Attributes:
        fixed: What other traces cannot tell: also the inputs' shapes, which a model's or a loss's
            code may read. What remains is how many tokens are computed, which only ours sees.
        sizes: Shapes and strides of the operands.
    """

    fixed: Hashable
    sizes: tuple[int, ...]


def signature(
    loop: InnerLoop,
    support: Support,
    operands: list[Tensor],
    shared: list[Tensor],
    *more: Hashable,
) -> Signature:
    """That of an inner step or of losses.

    Args:
        more: What else is fixed.
    """
    device = operands[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    fixed = (
        *more,
        loop.patched.training,
        _told_by(loop.loss_fn),
        loop.proximal,
        autocast,
        _backend.requested(),
        tuple((name, t.shape) for name, t in support.inputs.items()),
        tuple(
            (tuple(s == 0 for s in t.stride()), t.dtype, t.device, t.requires_grad)
            for t in operands
        ),
        tuple((id(t), t.stride()) for t in shared),
    )
    return Signature(fixed, tuple(n for t in operands for n in (*t.shape, *t.stride())))


def _told_by(loss_fn: LossFn) -> Hashable:
    """What tells one loss from another: itself, the tensors it holds and, of a module, modes."""
    try:
        hash(loss_fn)
        own: Hashable = loss_fn
    except TypeError:
        own = _Itself(loss_fn)
    held = list(held_by(loss_fn))
    tensors = tuple(_Itself(t) for t in held if isinstance(t, Tensor))
    return own, tuple(m.training for m in held if isinstance(m, nn.Module)), tensors


class _Itself:
    """In place of what has no hash, or one that may come again: equal to the same object alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value


def traced_support(support: Support, stored: list[Tensor], given: Iterator[Tensor]) -> Support:
    """The support set with operands of a trace in place of its tensors.

    Args:
        stored: In place of its stored prefix's.
        given: The others; as many as there are are taken, in the order of `support.inputs` and
            :func:`token_tensors`.
    """
    own = support.with_stored(stored)
    own = replace(own, inputs={name: next(given) for name in support.inputs})
    tokens = len(token_tensors(support))
    if tokens:
        own.prefix.tokens = own.prefix.tokens.traced([next(given) for _ in range(tokens)])
    return own


class _Step:
    """A captured gradient, for operands of one signature.

    Attributes:
        function: Losses and gradient, of operands.
    """

    outline = None

    def __init__(self, function: GraphFunction) -> None:
        self.function = function

    def with_pair(self, pair: graphs.Pair) -> _Step:
        """The same with other graphs."""
        return _Step(self.function.with_pair(pair))

    @classmethod
    def make(
        cls,
        loop: InnerLoop,
        support: Support,
        operands: list[Tensor],
        shared: list[Tensor],
        create_graph: bool,
        compiler: graphs.Compiler | None,
    ) -> _Step:
        loop = replace(loop, capture=None)
        stored = len(support.stored())
        carrying = [i for i in range(1, 1 + stored) if operands[i].requires_grad]

        def function(*args: Tensor) -> list[Tensor | None]:
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in args[: 1 + stored]]
            packed = leaves[0].requires_grad_()
            given = iter(args[1 + stored :])
            own = traced_support(support, leaves[1:], given)
            if loop.proximal:
                own = replace(own, start=next(given))
            losses, grad = gradient(loop, packed, own, create_graph)
            results = [losses, grad.detach()]  # before the cotangent is read
            if not create_graph:
                return results
            wanted = [packed, *(leaves[i] for i in carrying), *shared]
            found = [None] * len(wanted)
            if grad.requires_grad:
                found = backpropagate([grad], [args[-1]], wanted)
            return [*results, *found]

        cotangent = torch.ones_like(operands[0], memory_format=torch.contiguous_format)
        pair = graphs.capture(function, operands, [cotangent] * create_graph, 2, compiler)
        pulled = [0, *carrying] if create_graph else []
        shared = shared if create_graph else []
        return cls(GraphFunction(pair, 1, [0], pulled, len(operands), shared))

    def run(self, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
        if self.function.pair.backward is None:
            with torch.no_grad():
                return self.function(operands, {}, {})
        return self.function(operands, {}, {})
