"""Views of packed fast weights whose gradients are written where they belong.

Autograd would concatenate the gradients of all views into a new ``[T, P]``, and add up those of
views that are read twice (in the forward pass and in the gradient of a second-order step): a tenth
of the time of a small model's step. Here products write weight gradients straight into the packed
buffer, and add to what is there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastmeta._autograd import Function, transformed
from fastmeta.patching.layout import ParamLayout


class _Local(threading.local):
    by_copies = False


_local = _Local()


@contextmanager
def by_copies() -> Iterator[None]:
    """Within, in this thread, nothing is written in place: for compilers that take such code apart
    and put it together again."""
    before, _local.by_copies = _local.by_copies, True
    try:
        yield
    finally:
        _local.by_copies = before


def unpack(layout: ParamLayout, packed: Tensor) -> list[Tensor]:
    """``[T, P]`` -> one view ``[T, *shape]`` per segment, differentiable to any order."""
    plain = not (packed.requires_grad and torch.is_grad_enabled())
    if plain or _local.by_copies or transformed():
        return layout.unpack(packed)
    sink = Sink(layout)
    views = _Unpack.call(layout, sink, packed)
    for slot, view in enumerate(views):
        view.fastmeta_landing = Landing(sink, slot)
    return list(views)


class Sink:
    """The packed gradients being gathered, one for every backward pass under way.

    A backward pass is known by autograd's number of it: the same views are differentiated once
    for the inner gradient and once more for the meta-gradient.
    """

    def __init__(self, layout: ParamLayout) -> None:
        self.layout = layout
        self.open: dict[int, tuple[Tensor, list[Tensor], set[int]]] = {}
        self.like: tuple[int, torch.dtype, torch.device] | None = None

    def gathered(self) -> tuple[Tensor, list[Tensor], set[int]]:
        """The buffer ``[T, P]`` of this backward pass, its views, and which of them are written."""
        key = torch._C._current_graph_task_id()
        found = self.open.get(key)
        if found is None:
            tasks, dtype, device = self.like
            buffer = torch.empty(tasks, self.layout.num_params, dtype=dtype, device=device)
            found = self.open[key] = (buffer, self.layout.unpack(buffer), set())
        return found

    def close(self) -> tuple[Tensor, list[Tensor], set[int]]:
        """:meth:`gathered`, for the last time."""
        found = self.gathered()
        del self.open[torch._C._current_graph_task_id()]
        return found


class Landing:
    """Where gradients of one view are written; see :class:`fastmeta.ops.batched_linear.Landing`."""

    def __init__(self, sink: Sink, slot: int) -> None:
        self.sink, self.slot = sink, slot

    def place(self, differentiable: bool) -> tuple[Tensor, bool] | None:
        _, views, written = self.sink.gathered()
        more = self.slot in written
        if more and differentiable:
            return None  # autograd has to know the terms of a sum that is differentiated
        written.add(self.slot)
        return views[self.slot], more


def landing_of(view: Tensor) -> Landing | None:
    """The landing of a view from :func:`unpack`."""
    return getattr(view, "fastmeta_landing", None)


class _Unpack(Function):
    """Packed weights -> their views."""

    @staticmethod
    def forward(layout: ParamLayout, sink: Sink, packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(layout.unpack(packed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, ctx.sink, packed = inputs
        ctx.sink.like = (packed.shape[0], packed.dtype, packed.device)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if transformed(*grads):
            return None, None, _concatenated(ctx.sink, grads)
        buffer, views, written = ctx.sink.close()
        if torch.is_grad_enabled():
            return None, None, _Pack.call(ctx.sink.layout, buffer, views, *grads)
        _fill(ctx.sink.layout, buffer, views, written, grads)
        return None, None, buffer


class _Pack(Function):
    """Gradients of the views -> packed gradient; those that lie in `buffer` already stay there."""

    @staticmethod
    def forward(
        layout: ParamLayout, buffer: Tensor, views: list[Tensor], *grads: Tensor | None
    ) -> Tensor:
        there = {
            slot
            for slot, (view, grad) in enumerate(zip(views, grads, strict=True))
            if grad is not None and grad.data_ptr() == view.data_ptr() and grad.numel()
        }
        missing = [None if slot in there else grad for slot, grad in enumerate(grads)]
        _fill(layout, buffer, views, there, missing)
        return buffer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.layout = inputs[0]

    @staticmethod
    def backward(ctx: Any, d_packed: Tensor) -> tuple:
        wanted = zip(ctx.layout.unpack(d_packed), ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(view if need else None for view, need in wanted)


def _concatenated(sink: Sink, grads: Sequence[Tensor | None]) -> Tensor:
    """The packed gradient as autograd would make it, by copies."""
    tasks, dtype, device = sink.like
    shapes = sink.layout.shapes
    return sink.layout.pack(
        [
            torch.zeros(tasks, *shape, dtype=dtype, device=device) if grad is None else grad
            for grad, shape in zip(grads, shapes, strict=True)
        ]
    )


def _fill(
    layout: ParamLayout,
    buffer: Tensor,
    views: list[Tensor],
    written: set[int],
    grads: Sequence[Tensor | None],
) -> None:
    """Complete a packed gradient: add to what is `written`, write the rest, zeros where nothing
    came and between the segments."""
    for slot, (view, grad) in enumerate(zip(views, grads, strict=True)):
        if slot in written:
            if grad is not None:
                view.add_(grad)
        elif grad is None:
            view.zero_()
        else:
            view.copy_(grad)
    for start, stop in layout.gaps:
        buffer[:, start:stop].zero_()
