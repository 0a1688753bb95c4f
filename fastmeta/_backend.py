"""Which implementation serves an operator.

By default the dispatcher decides: the kernel registered for the tensors' device, else the
reference. ``use_impl`` asks for one by name and never falls back silently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmeta import _library
from fastmeta._library import OPS, Op

IMPLS = ("auto", "reference", "cpp", "cuda", "triton")

_local = threading.local()
_lock = threading.Lock()
_overrides = 0  # open use_impl blocks of all threads: the hot path reads this one integer


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Run every operator of this thread with one implementation, inside a ``with`` block.

    Args:
        name: ``"auto"`` (the default choice), ``"reference"`` (plain torch, differentiated by
            autograd itself), ``"cpp"`` (compiled, CPU), ``"cuda"`` (compiled, CUDA) or
            ``"triton"``. Within ``torch.compile`` only the first two are possible, and mean the
            same: the reference is traced and fused by the compiler.

    Raises:
        ValueError: an unknown name.
        RuntimeError: from the operator called inside, where it has no such implementation, or not
            for the device of its tensors.
    """
    global _overrides
    known = {*IMPLS, *(impl for op in OPS.values() for impl in op.kernels)}
    if name not in known:
        raise ValueError(f"implementation must be one of {', '.join(sorted(known))}, got {name!r}")
    previous = requested()
    with _lock:
        _overrides += 1
    _local.impl = name
    try:
        yield
    finally:
        _local.impl = previous
        with _lock:
            _overrides -= 1


def requested() -> str:
    """The implementation asked for in this thread, ``"auto"`` when none is."""
    return getattr(_local, "impl", "auto")


def use_reference() -> bool:
    """Whether the reference is to be called itself, differentiated by autograd.

    True under ``use_impl("reference")`` and inside ``torch.compile``: the compiler fuses plain
    torch operators, while it loses the derivative of an autograd.Function under ``torch.func``.

    Raises:
        RuntimeError: another implementation was requested inside ``torch.compile``.
    """
    name = requested() if _overrides else "auto"
    if not torch.compiler.is_compiling():
        return name == "reference"
    if name not in ("auto", "reference"):
        raise RuntimeError(f"use_impl({name!r}): torch.compile traces the reference alone")
    return True


def by_reference(op: Op, device: torch.device) -> bool:
    """Whether autograd is to differentiate the reference: asked for, or no kernel is there."""
    if use_reference():
        return True
    return requested() == "auto" and not _library.dispatched(op.name, device.type)


def takes(op: Op, x: Tensor) -> bool:
    """Whether a kernel serves this tensor, where those for the CPU take float32 and float64."""
    narrow = x.device.type == "cpu" and x.dtype not in (torch.float32, torch.float64)
    return not (narrow or by_reference(op, x.device))


def kernel(op: Op, device: str) -> Callable:
    """The callable that serves ``op`` for tensors on ``device``.

    Raises:
        RuntimeError: an implementation was requested that is not there.
    """
    if not _overrides:
        return op.overload
    name = requested()
    if name == "auto":
        return op.overload
    if name == "reference":
        return op.reference
    if name not in op.kernels:
        raise RuntimeError(
            f"use_impl({name!r}): {op.name} has no such implementation here ({why_absent(name)})"
        )
    served, call = op.kernels[name]
    if served != device:
        raise RuntimeError(
            f"use_impl({name!r}): {op.name} expects tensors on {served}, got {device}"
        )
    return call


def why_absent(name: str) -> str:
    """The reason an implementation is missing, for messages and ``fastmeta.info``."""
    for extension in _library.parts():
        if extension.impl == name and extension.state != "loaded":
            return f"{extension.module}: {extension.state}, {extension.detail}"
    return "none is registered"
