"""Look at how a structure runs: in which order modules are called, on what, with what results."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils._pytree import tree_flatten

from fastmeta.patching.bind import install
from fastmeta.patching.methods import key, shared_methods

TASKS = 2
ROWS = 2
"""Probe batches hold two tasks of two rows, then of three."""


class PerformanceWarning(UserWarning):
    """Part of a patched model runs one task after another."""


class PatchError(RuntimeError):
    """A model that cannot be adapted per task, with the module and the remedy."""


@dataclass
class Trace:
    """One forward pass of a structure.

    Attributes:
        order: ("enter" | "exit", module or method) in the order of events. Modules called from
            inside a shared method are left out: the method stands for them.
        leads: Module -> one tuple per call, the leading size of each argument leaf (None: no
            tensor, or a scalar).
        outputs: Module -> the result of each call, where they are kept (None: of one under vmap).
        open: Modules entered and not left, outermost first; after an error the last is its place.
        inside: Modules called from inside a shared method.
        written: Modules whose results were written in place after they had returned them.
    """

    order: list[tuple[str, str]] = field(default_factory=list)
    leads: dict[str, list[tuple[int | None, ...]]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


def watch_methods(structure: nn.Module, traces: list[Trace]) -> None:
    """Make the shared methods of a structure report to the last of `traces` while they run."""
    for module_name, method in list(shared_methods(structure)):
        module = structure.get_submodule(module_name)
        original, name = getattr(module, method), key(module_name, method)

        def run(*args: Any, _original=original, _name: str = name, **kwargs: Any) -> Any:
            if not traces or (traces[-1].open and traces[-1].open[-1].endswith("()")):
                return _original(*args, **kwargs)
            trace = traces[-1]
            trace.order.append(("enter", _name))
            trace.open.append(_name)
            out = _original(*args, **kwargs)
            trace.open.pop()
            trace.order.append(("exit", _name))
            return out

        install(module, method, run)


@contextmanager
def record(structure: nn.Module, trace: Trace, keep_outputs: bool = False) -> Iterator[Trace]:
    """Fill `trace` while the structure, or a clone bound from it, runs."""

    def enter(name: str):
        def hook(module, args, kwargs):
            if trace.open and trace.open[-1].endswith("()"):
                trace.inside.add(name)
                return
            trace.order.append(("enter", name))
            trace.open.append(name)
            leaves = tree_flatten((args, kwargs))[0]
            trace.leads.setdefault(name, []).append(tuple(map(_lead, leaves)))

        return hook

    def leave(name: str):
        def hook(module, args, output):
            if not trace.open or trace.open[-1] != name:
                return
            trace.open.pop()
            trace.order.append(("exit", name))
            found = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
            mapped = any(map(is_batchedtensor, found))  # no tensor outside of vmap
            if not mapped:
                results.extend((name, t, t._version) for t in found if not t.is_inference())
            if keep_outputs:
                trace.outputs.setdefault(name, []).append(None if mapped else output)

        return hook

    results: list[tuple[str, Tensor, int]] = []  # and how often each had been written by then
    handles: list[Any] = []
    for name, module in structure.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
        trace.written |= {name for name, t, version in results if t._version != version}


@contextmanager
def word_tables(structure: nn.Module, ids: Any) -> Iterator[list[str]]:
    """The embeddings that are called once while the structure runs, on these ids."""
    calls: dict[str, list[bool]] = {}

    def note(name: str):
        def hook(module, args):
            given = args[0] if args else None
            same = isinstance(ids, Tensor) and isinstance(given, Tensor) and torch.equal(given, ids)
            calls.setdefault(name, []).append(same)

        return hook

    found: list[str] = []
    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in structure.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += [name for name, same in calls.items() if same == [True]]


def _lead(leaf: Any) -> int | None:
    return leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() > 0 else None


@dataclass
class CallKind:
    """How a module is called, from two traces with different numbers of rows.

    Attributes:
        kind: ``"batched"``: every call's first tensor has the batch axis; ``"single"``: one
            leading row shared by all; ``"shared"``: no batch axis; ``"mixed"``: several of these.
        rows: Number of argument leaves -> which of them carry the batch axis.
    """

    kind: str
    rows: dict[int, tuple[bool, ...]]


def call_kinds(small: Trace, large: Trace, rows: tuple[int, int]) -> dict[str, CallKind]:
    """The kind of every called module."""
    found: dict[str, CallKind] = {}
    for name, calls in small.leads.items():
        other = large.leads.get(name, [])
        kinds: set[str] = set()
        flags: dict[int, tuple[bool, ...]] = {}
        if len(calls) != len(other):
            kinds.add("mixed")
        for a, b in zip(calls, other, strict=False):
            carries = tuple(
                x is not None and y is not None and x > 0 and x * rows[1] == y * rows[0]
                for x, y in zip(a, b, strict=False)
            )
            before = flags.get(len(carries), (False,) * len(carries))
            flags[len(carries)] = tuple(p or q for p, q in zip(before, carries, strict=True))
            first = next((i for i, size in enumerate(a) if size is not None), None)
            if first is None:
                kinds.add("shared")
            elif carries[first]:
                kinds.add("batched")
            else:
                kinds.add("single" if a[first] == 1 else "shared")
        found[name] = CallKind(kinds.pop() if len(kinds) == 1 else "mixed", flags)
    return found


def prefix_modules(trace: Trace, adapted: set[str]) -> list[str]:
    """Outermost modules whose calls all end before the first adapted module is entered, and whose
    results nobody writes to: those can be stored."""
    boundary = next(
        (i for i, (kind, name) in enumerate(trace.order) if kind == "enter" and name in adapted),
        None,
    )
    if boundary is None:
        return []
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, (_kind, name) in enumerate(trace.order):
        first.setdefault(name, i)
        last[name] = i
    others = trace.inside | trace.written
    done = {n for n in last if last[n] < boundary and not n.endswith("()") and n not in others}
    return sorted(
        (n for n in done if not any(p in done for p in ancestors(n))), key=lambda n: first[n]
    )


def ancestors(name: str) -> list[str]:
    """Names of the modules around a module, outermost (``""``) first."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))] if name else []


def first_difference(
    actual: Trace, expected: list[Trace], ignore: set[str], tolerance: float
) -> str | None:
    """The first module, in order of completion, whose results differ from the per-task ones.

    Args:
        actual: The patched model's pass over all tasks, possibly cut short by an error.
        expected: One pass per task.
        ignore: Modules whose calls cannot be matched one to one.
    """
    position: dict[str, int] = {}
    for kind, name in actual.order:
        if kind != "exit" or name in ignore or name not in actual.outputs:
            continue
        i = position.get(name, 0)
        position[name] = i + 1
        if actual.outputs[name][i] is None:
            continue
        want = [trace.outputs.get(name, []) for trace in expected]
        if all(i < len(w) for w in want):
            if not agrees(actual.outputs[name][i], [w[i] for w in want], tolerance):
                return name
    return None


def agrees(actual: Any, expected: list[Any], tolerance: float) -> bool:
    """Whether a result over all tasks holds what each task's own result holds."""
    got = tree_flatten(actual)[0]
    for t, task in enumerate(expected):
        want = tree_flatten(task)[0]
        if len(got) != len(want):
            return False
        for x, y in zip(got, want, strict=True):
            if not isinstance(y, Tensor) or not y.is_floating_point():
                continue
            if not isinstance(x, Tensor) or not _close(_task_part(x, y, t), y, tolerance):
                return False
    return True


def _task_part(x: Tensor, y: Tensor, task: int) -> Tensor:
    """The rows of `x` that belong to a task, where `y` is what the task alone computes."""
    if x.dim() == y.dim() and x.dim() > 0:
        if x.shape[0] == y.shape[0] * TASKS:
            return x.unflatten(0, (TASKS, -1))[task]
        if y.shape[0] == 1 and x.shape[0] == TASKS * ROWS:
            return x.unflatten(0, (TASKS, -1))[task, :1]
    if x.dim() == y.dim() + 1:
        if x.shape[0] == TASKS * ROWS:  # lifted: every row has a copy
            return x[task * ROWS]
        if x.shape[0] == TASKS:
            return x[task]
    return x


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within `tolerance` of the expected tensor's scale."""
    if x.shape != y.shape:
        return False
    finite = torch.isfinite(y)
    if not bool((torch.isfinite(x) == finite).all()):
        return False
    if not bool(finite.any()):
        return True
    scale = y[finite].abs().max().clamp_min(1e-6)
    return float((x[finite] - y[finite]).abs().max()) <= tolerance * float(scale)


def warn_loop(name: str, module: nn.Module, error: Exception | None = None) -> None:
    """Warn of a module that runs by the loop.

    Args:
        error: What vmap, under which it ran at first, raised.
    """
    if error is not None:
        where, advice = f"module {name!r}", "adapt fewer of its parameters, or use LoRA"
        why = f"torch.func.vmap, under which it ran before, raised {type(error).__name__}"
    elif name:
        where, why = f"module {name!r}", "no task-batched rule fits it"
        advice = "adapt fewer of its parameters, or use LoRA"
    else:
        where, why = "the whole model", "rows of a batch meet in it, or no rule fits its parameters"
        advice = "patch a part of it, such as an encoder, or adapt fewer of its parameters"
    warnings.warn(
        f"{where} ({type(module).__name__}) runs one task after another: {why}; {advice}, "
        "to run all tasks at once",
        PerformanceWarning,
        stacklevel=2,
    )
