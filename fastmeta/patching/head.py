"""A plain linear head: the one adapted module, on features that no fast weight reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmeta.patching.context import Call, running
from fastmeta.patching.layout import TaskParams
from fastmeta.patching.prefix import PrefixCache
from fastmeta.patching.rules import Adapted

if TYPE_CHECKING:
    from fastmeta.patching.patched import Patched


@dataclass
class Tap:
    """What an adapted module was called on during one pass over the model.

    Attributes:
        calls: Module name, input, output, and how often the output had been written by then.
    """

    calls: list[tuple[str, Tensor, Tensor, int]] = field(default_factory=list)

    def record(self, name: str, x: Tensor, y: Tensor) -> None:
        self.calls.append((name, x, y, y._version))


def linear_head(patched: Patched) -> Adapted | None:
    """What of the model adapts, if that is one `nn.Linear`, with its bias where it has one."""
    owners = list(patched.slots.owners.values())
    if len(owners) != 1 or patched.slots.prefixes:
        return None
    adapted = owners[0]
    module = patched.model.get_submodule(adapted.name)
    if type(module).forward is not nn.Linear.forward:
        return None
    own = {n for n, p in module._parameters.items() if p is not None}
    return adapted if set(adapted.slots) == own else None


def head_features(
    patched: Patched,
    adapted: Adapted,
    params: TaskParams,
    inputs: Mapping[str, Any],
    prefix: PrefixCache,
) -> Tensor | None:
    """The rows that the head reads, ``[T, N, D]``, by one pass over the model.

    Returns:
        None where the model's logits are anything but what the head gave on one row per example.
    """
    flat, tasks, rows = patched._flatten(params, inputs)
    plan = patched.plan(inputs)
    if plan.modes.get(adapted.name) != "rule":
        return None
    tap = Tap()
    with running(Call(params.views, tasks, rows, prefix=prefix.replay(), tap=tap)):
        out = plan.run(flat)
    if len(tap.calls) != 1:
        return None
    _, x, y, version = tap.calls[0]
    if getattr(out, "logits", out) is not y or y._version != version:
        return None
    if x.dim() != 2 or x.shape[0] != tasks * rows:
        return None
    return x.unflatten(0, (tasks, rows))
