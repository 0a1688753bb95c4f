"""The linear layer whose result is a model's logits, which a loss of many classes can do without.

It is found on real inputs: its result is the output's ``logits`` itself, which nothing scales,
bounds or moves afterwards. A call that wants what this layer reads gets it in place of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.patching.bind import install
from fastmeta.patching.context import current_call


class Watch:
    """What plain linear layers give while a model runs.

    Attributes:
        calls: Names of layers, in the order of their calls.
        last: The last one's result, and what that held.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def source_of(self, out: Any) -> str | None:
        """The last layer, if it was called once and its result, of texts ``[B, L, C]``, is the
        logits of a model's output."""
        logits = getattr(out, "logits", None)
        if self.last is None or self.last[0] is not logits or logits.dim() != 3:
            return None
        once = self.calls.count(self.calls[-1]) == 1
        return self.calls[-1] if once and torch.equal(*self.last) else None


@contextmanager
def watching(structure: nn.Module) -> Iterator[Watch]:
    """Within, notes the results of the plain linear layers of a structure."""
    watch = Watch()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
            watch.calls.append(name)
            watch.last = y, y.clone()

        return hook

    plain = {
        name: module
        for name, module in structure.named_modules()
        if type(module).forward is nn.Linear.forward
        and not (module._forward_hooks or module._forward_pre_hooks)
    }
    handles = [module.register_forward_hook(note(name)) for name, module in plain.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def install_in(structure: nn.Module, name: str) -> None:
    """Make the layer of a copied structure give its input, in calls that want it."""
    module = structure.get_submodule(name)
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        return x if current_call().before_output else original(x)

    install(module, "forward", forward)


def usable(name: str | None, adapted: Collection[str], around: Collection[str]) -> bool:
    """Whether all tasks share the layer, and none of the modules `around` runs it task by task."""
    inside = any(not unit or f"{name}.".startswith(f"{unit}.") for unit in around)
    return name is not None and name not in adapted and not inside
