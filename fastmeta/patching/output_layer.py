"""The linear layer whose result is a model's logits, which a loss of many classes can do without.

It is found on real inputs: its result is the output's ``logits`` itself, which nothing scales,
bounds or moves afterwards, neither in evaluation nor in training. A call that wants what this layer
reads gets it in place of the logits. (What a model does to the logits of some texts only, and to
none of the first ones, is not seen.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._memory_errors import is_out_of_memory
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
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    }
    handles = [module.register_forward_hook(note(name)) for name, module in plain.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def in_training(structure: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """The layer that gives the logits of an evaluated structure while it trains."""
    devices = {t.device for t in inputs.values() if isinstance(t, Tensor) and t.is_cuda}
    structure.train()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), watching(structure) as watch:
            return watch.source_of(structure(**inputs))
    except Exception as e:
        if is_out_of_memory(e):
            raise
        return None  # as where inputs are too few for training
    finally:
        structure.eval()


def install_in(structure: nn.Module, name: str) -> nn.Linear:
    """Make the layer of a copied structure give its input, in calls that want it."""
    module = structure.get_submodule(name)
    original = module.forward

    def forward(input: Tensor) -> Tensor:  # named as nn.Linear does
        return input if current_call().before_output else original(input)

    install(module, "forward", forward)
    return module


def usable(name: str | None, adapted: Collection[str], around: Collection[str]) -> bool:
    """Whether all tasks share the layer, and none of the modules `around` runs it task by task."""
    inside = any(not unit or f"{name}.".startswith(f"{unit}.") for unit in around)
    return name is not None and name not in adapted and not inside
