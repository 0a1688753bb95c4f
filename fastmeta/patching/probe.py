"""Choose how each adapted module runs, by looking at one small forward pass of the real inputs.

The pass runs the pristine structure on a few rows with two batch sizes and records how every
module is called. It tells which inputs carry the batch, which modules lie before the first
adapted one, and, run again through the rules with two different tasks, whether the patched model
computes what two separate models compute. A module that does not moves down the ladder: its rule,
its own code under vmap, a loop over tasks, then the same for the module around it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

TASKS = 2
ROWS = 2
"""Probe batches hold two tasks of two rows, then of three."""


class PerformanceWarning(UserWarning):
    """Part of a patched model runs one task after another."""


class PatchError(RuntimeError):
    """A model that cannot be adapted per task, with the module and the remedy."""


@dataclass
class Trace:
    """How one forward pass called the modules of a structure."""

    order: list[tuple[str, str]] = field(default_factory=list)  # ("enter" | "exit", module name)
    lead: dict[str, list[int | None]] = field(default_factory=dict)  # leading size of each call
    outputs: dict[str, list[Any]] = field(default_factory=dict)

    def record(self, structure: nn.Module, keep_outputs: frozenset[str] = frozenset()):
        return _Recorder(self, structure, keep_outputs)


class _Recorder:
    def __init__(self, trace: Trace, structure: nn.Module, keep: frozenset[str]) -> None:
        self.trace, self.structure, self.keep = trace, structure, keep
        self.handles: list[Any] = []

    def __enter__(self) -> Trace:
        for name, module in self.structure.named_modules():
            self.handles.append(
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            )
            self.handles.append(module.register_forward_hook(self._exit(name)))
        return self.trace

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str):
        def hook(module, args, kwargs):
            self.trace.order.append(("enter", name))
            tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            lead = next((t.shape[0] for t in tensors if t.dim() > 0), None)
            self.trace.lead.setdefault(name, []).append(lead)

        return hook

    def _exit(self, name: str):
        def hook(module, args, output):
            self.trace.order.append(("exit", name))
            if name in self.keep:
                self.trace.outputs.setdefault(name, []).append(output)

        return hook


def batch_kind(small: list[int | None], large: list[int | None], rows: tuple[int, int]) -> str:
    """``"batched"``, ``"single"`` (one shared row) or ``"shared"``, from two traces' lead sizes."""
    kinds = set()
    for a, b in zip(small, large, strict=False):
        if a is not None and b is not None and a * rows[1] == b * rows[0] and a % rows[0] == 0:
            kinds.add("batched")
        elif a == b == 1:
            kinds.add("single")
        else:
            kinds.add("shared")
    if len(small) != len(large) or len(kinds) != 1:
        return "shared"
    return kinds.pop()


def prefix_modules(trace: Trace, adapted: set[str]) -> list[str]:
    """Outermost modules whose calls all end before the first adapted module is entered."""
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
    done = {n for n in last if last[n] < boundary}
    return sorted(
        (n for n in done if not any(p in done for p in _ancestors(n))), key=lambda n: first[n]
    )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))] if name else []


def max_difference(actual: Any, expected: Any) -> float:
    """Largest difference of two output trees, relative to the expected tensors' scale."""
    a, b = tree_flatten(actual)[0], tree_flatten(expected)[0]
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if x.shape != y.shape:
            return float("inf")
        finite = torch.isfinite(y)
        if not bool((torch.isfinite(x) == finite).all()):
            return float("inf")
        if bool(finite.any()):
            scale = y[finite].abs().max().clamp_min(1e-6)
            worst = max(worst, float((x[finite] - y[finite]).abs().max() / scale))
    return worst


def warn_loop(name: str, module: nn.Module) -> None:
    where = f"module {name!r}" if name else "the whole model"
    warnings.warn(
        f"{where} ({type(module).__name__}) runs one task after another: no task-batched rule "
        "fits it; adapt fewer of its parameters, or use LoRA, to run all tasks at once",
        PerformanceWarning,
        stacklevel=2,
    )
