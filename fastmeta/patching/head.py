"""A plain linear head: the one adapted module, on features that no fast weight reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmeta.patching.context import running
from fastmeta.patching.plan import WHOLE, inside_any
from fastmeta.patching.prefix import PrefixCache
from fastmeta.patching.rules import Adapted
from fastmeta.patching.spec import Head
from fastmeta.patching.task_params import TaskParams

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


def classifying_head(patched: Patched) -> Adapted | None:
    """The adapted `nn.Linear` with an adapted bias that comes last in the model's head."""
    try:
        head = {request.name.rpartition(".")[0] for request in Head().resolve(patched.model)}
    except ValueError:  # a model without a head
        return None
    found = None
    for name, module in patched.model.named_modules():
        if name in head and name in patched.slots.owners:
            adapted = patched.slots.owners[name]
            linear = type(module).forward is nn.Linear.forward
            found = adapted if linear and {"weight", "bias"} <= adapted.slots.keys() else None
    return found


def read_by(
    patched: Patched,
    name: str,
    params: TaskParams,
    inputs: Mapping[str, Any],
    prefix: PrefixCache | None,
) -> Tensor | None:
    """The rows ``[T, N, D]`` from which the head `name` gives the model's logits, by one pass.

    Returns:
        None where the logits are anything but what its one call gives on one row per example.
    """
    flat, tasks, rows = patched.flatten(params, inputs)
    plan = patched.plan(inputs)
    call = patched.call(params.bound(plan), inputs, prefix_cache=prefix)
    call.tap = tap = Tap()
    with running(call):
        out = plan.run(flat)
    calls = [call for call in tap.calls if call[0] == name]
    if len(calls) != 1:
        return None
    _, x, y, version = calls[0]
    if getattr(out, "logits", out) is not y or y._version != version:
        return None
    if x.dim() != 2 or x.shape[0] != tasks * rows:
        return None
    return x.unflatten(0, (tasks, rows))


def why_unread(patched: Patched, name: str, inputs: Mapping[str, Any]) -> str:
    """What keeps :func:`read_by` from finding the rows."""
    for unit, mode in patched.plan(inputs).modes.items():
        if mode in WHOLE and inside_any(name, [unit]):
            return (
                f"{name!r} must run for all tasks at once, but lies in "
                f"{repr(unit) if unit else 'a model'} that runs task by task: adapt fewer "
                "parameters of it"
            )
    return (
        f"the logits must be what {name!r} gives on one row per example, and "
        f"{type(patched.model).__name__}'s are not"
    )
