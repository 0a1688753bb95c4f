"""Whole meta-steps as CUDA graphs: all launches of an episode and of its gradient in one.

Where tasks are small a GPU computes faster than a host launches; a graph is launched once. It is
recorded for one signature (shapes, settings, weights) and reads a batch from memory of its own.
What an episode asks the device for is asked before (which positions are padding) or after (whether
all tasks stayed finite); where a task diverged, the episode runs again without the graph.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._memory_errors import is_out_of_memory
from fastmeta.batch import TaskBatch
from fastmeta.engine.aliases import aliased
from fastmeta.engine.by_signature import BySignature
from fastmeta.engine.conditions import Conditions, no_cast_is_kept
from fastmeta.engine.free_memory import note_graphs
from fastmeta.engine.graphs import masks_unread
from fastmeta.engine.inner import InnerLoop, model_inputs
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.initial_params import InitialParams
from fastmeta.patching.unpadded import Tokens

CUDA_GRAPH = "cudagraph"
"""The ``compile`` that asks for this."""
_MOST = 64
"""Graphs of one learner; more signatures than this run without."""

_REFUSED = "called a synchronizing CUDA operation", "AccumulateGrad node's stream does not match"
"""Torch's warnings."""

Found = tuple[Sequence[Tensor], list[Tensor | None]]
"""Results, and the gradient of their losses' sum."""
Step = Callable[[InnerLoop, TaskBatch, Tensor, TaskParams], Found]
"""``(loop, batch, places of its tasks, initial fast weights) -> found``."""


def replays_of(patched: Patched, compile: bool | str) -> Replays | None:
    """What replays a learner's meta-steps, or None.

    Raises:
        ValueError: It was asked for, and the model is not on a GPU.
    """
    if compile != CUDA_GRAPH:
        return None
    if patched.device.type != "cuda":
        raise ValueError(
            f"compile={CUDA_GRAPH!r} needs a model on a GPU, got one on {patched.device}"
        )
    return Replays()


class Replays(BySignature):
    """The recorded meta-steps of one learner."""

    widths = 16
    """Numbers of tokens to which others are rounded up: each has a graph, with its memory."""

    def __init__(self) -> None:
        failed = "a meta-step could not be recorded and runs without a CUDA graph"
        super().__init__(_MOST, failed, is_out_of_memory)
        self.one_at_a_time = threading.Lock()  # a graph has one batch's memory
        self.own: tuple[Hashable, InnerLoop] | None = None
        self.pool, self.stream = None, None  # graphs share memory where they share both

    def __reduce__(self):
        return Replays, ()  # graphs hold the memory of one process

    def run(
        self,
        loop: InnerLoop,
        mode: Hashable,
        batch: TaskBatch,
        start: TaskParams,
        weights: Sequence[Tensor],
        step: Step,
    ) -> Found | None:
        """What `step` computes, by a graph; None where it has to run itself.

        Args:
            loop: What runs, part of the signature like all that follows but the values.
            mode: The memory mode.
            batch: All tasks.
            start: Initial fast weights; those of all tasks are read where they are too.
            weights: What else a gradient is taken of; read where they are.
        """
        tokens = _tokens(loop, batch)
        key = _signature(loop, mode, batch, tokens, start, weights)
        with self.one_at_a_time, torch.cuda.device(start.device):
            recorded = self.find(key, partial(self._recorded, loop, batch, start, step))
            return None if recorded is None else recorded.replay(batch, tokens, start)

    def _recorded(
        self, loop: InnerLoop, batch: TaskBatch, start: TaskParams, step: Step
    ) -> _Recorded:
        if _Recorded.broken:
            raise RuntimeError("an earlier recording of this process failed")
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return _Recorded(self._own(loop), batch, start, step, self.pool, self.stream)

    def _own(self, loop: InnerLoop) -> InnerLoop:
        """The loop on leaves that no other graph knows."""
        key = _places_of(loop)
        if self.own is None or self.own[0] != key:
            self.own = key, aliased(loop)
        own = self.own[1]
        own.patched.train(loop.patched.training)
        return replace(loop, patched=own.patched, rates=own.rates, head=own.head)


class _Recorded:
    """A meta-step of one signature: the memory it reads, its graph, and what that writes."""

    broken = False
    """Whether a recording failed, which leaves torch's own state broken: there are no others."""

    def __init__(
        self,
        loop: InnerLoop,
        batch: TaskBatch,
        start: TaskParams,
        step: Step,
        pool: object,
        stream: torch.cuda.Stream,
    ) -> None:
        with torch.no_grad():
            self.batch = batch.map(torch.clone)
            self.start = start if _alike(start) else start.clone()
            self.tokens = _tokens(loop, self.batch)  # found again while the step is recorded
        self.places = torch.arange(batch.num_tasks, device=start.device)

        def run() -> tuple[Found, Tensor]:
            results, gradients = step(loop, self.batch, self.places, self.start)
            losses, *_, active, _ = results
            return (results, gradients), (active & torch.isfinite(losses)).all()

        self.graph = torch.cuda.CUDAGraph()
        with no_cast_is_kept(), masks_unread():
            conditions = Conditions(loop.patched, start.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles kernels, makes workspaces
                with _waits_raise():  # here, as a recording must not fail
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            conditions.finish()
            if conditions.random is not None:
                raise RuntimeError("it draws random numbers, which a graph would draw again")
            try:
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),  # again, should it fail
                    torch.cuda.graph(  # torch's own stream stays on the device it was made for
                        self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ),
                ):
                    self.found, self.finite = run()
            except BaseException:
                _Recorded.broken = True
                raise
        note_graphs()

    def replay(
        self, batch: TaskBatch, tokens: Sequence[Tokens | None], start: TaskParams
    ) -> Found | None:
        """What the step computes for these values, None where a task diverged."""
        with torch.no_grad():
            for own, given in zip(self._reads(), _values(batch, tokens, start), strict=True):
                own.copy_(given)
            self.graph.replay()
            results, gradients = self.found  # overwritten by the next replay, on any stream
            results = [t.clone() for t in results]
            gradients = _clones(gradients)
            return (results, gradients) if bool(self.finite) else None  # waits for all of this

    def _reads(self) -> list[Tensor]:
        return _values(self.batch, self.tokens, self.start)


def _clones(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of tensors of one device, in few launches."""
    found = [None if t is None else torch.empty_like(t) for t in tensors]
    pairs = [(new, t) for new, t in zip(found, tensors, strict=True) if t is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    return found


def _alike(start: TaskParams) -> bool:
    """Whether all tasks start from the model's own weights."""
    return isinstance(start, InitialParams)


def _values(batch: TaskBatch, tokens: Sequence[Tokens | None], start: TaskParams) -> list[Tensor]:
    """Every tensor that differs from batch to batch."""
    positions = [t for each in tokens if each is not None for t in each.tensors]
    return [*batch.tensors(), *positions, *([] if _alike(start) else start.tensors())]


def _tokens(loop: InnerLoop, batch: TaskBatch) -> tuple[Tokens | None, ...]:
    """Which positions of the support and the query set are computed."""
    return tuple(
        loop.patched.tokens(model_inputs(inputs), loop.widths)
        for inputs in (batch.support, batch.query)
    )


def _signature(
    loop: InnerLoop,
    mode: Hashable,
    batch: TaskBatch,
    tokens: Sequence[Tokens | None],
    start: TaskParams,
    weights: Sequence[Tensor],
) -> Hashable:
    """Everything that a recording fixes."""
    device = start.device.type
    weights = [*weights, *(start.tensors() if _alike(start) else [])]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (
        loop,
        loop.rates.constant,
        mode,
        autocast,
        _backend.requested(),
        loop.patched.training,
        tuple(batch.support),
        tuple(batch.query),
        tuple(None if each is None else each.width for each in tokens),
        tuple((t.shape, t.dtype) for t in _values(batch, tokens, start)),
        tuple((t.data_ptr(), t.requires_grad) for t in weights),
        _places_of(loop),
    )


def _places_of(loop: InnerLoop) -> Hashable:
    """Where the loop's weights and buffers lie, and which of them learn."""
    modules = [m for m in (loop.patched.model, loop.rates, loop.head) if m is not None]
    weights = [p for m in modules for p in m.parameters()] + loop.patched.slots.initial
    buffers = [b for m in modules for b in m.buffers()]
    return tuple((t.data_ptr(), t.requires_grad) for t in [*weights, *buffers])


@contextmanager
def _waits_raise() -> Iterator[None]:
    """Raise at the end where anything within has waited for the device, or for a gradient's stream;
    other threads may."""
    before, always = torch.cuda.get_sync_debug_mode(), torch.is_warn_always_enabled()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.set_warn_always(True)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.set_warn_always(always)
    for warning in seen:
        if any(known in str(warning.message) for known in _REFUSED):
            raise RuntimeError(f"it {warning.message}")
