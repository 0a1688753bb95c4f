"""Frozen-prefix reuse: modules before the first adapted one run once per batch.

Their outputs do not depend on the fast weights, so every inner step and every vector-Jacobian
product reads the stored ones. Where the prefix is itself meta-learned, its gradient gathers at
the stored tensors and flows back through the prefix once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmeta._settings import is_number
from fastmeta.patching.bind import install
from fastmeta.patching.context import current_call

if TYPE_CHECKING:
    from fastmeta.patching.unpadded import Tokens


class PrefixCache:
    """Outputs of the frozen prefix on one set of inputs, module by module, call by call.

    Args:
        tokens: Those that layers' outputs are of, without padding; None where they are padded.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.outputs: dict[str, list[Any]] = {}
        self.recording = True
        self.tokens = tokens

    def replay(self) -> Replay:
        return Replay(self)


class Replay:
    """One pass over a cache: each module's stored outputs in the order of its calls."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.position: dict[str, int] = {}

    def run(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if not self.cache.recording and name not in self.cache.outputs:
            return forward(*args, **kwargs)  # it holds tokens only
        if self.cache.recording:
            output = forward(*args, **kwargs)
            self.cache.outputs.setdefault(name, []).append(output)
            return output
        position = self.position.get(name, 0)
        self.position[name] = position + 1
        if position == len(self.cache.outputs[name]):
            raise RuntimeError(
                f"the frozen module {name!r} runs more often than when its outputs were stored: "
                "what runs may depend on inputs only, not on weights that adapt"
            )
        return self.cache.outputs[name][position]


def install_in(structure: nn.Module, names: Iterable[str]) -> None:
    """Make the named modules of a copied structure store and replay their outputs."""
    for name in names:
        module = structure.get_submodule(name)
        original = module.forward

        def forward(*args, _name: str = name, _original: Callable = original, **kwargs):
            replay = current_call().prefix
            if replay is None:
                return _original(*args, **kwargs)
            return replay.run(_name, _original, args, kwargs)

        install(module, "forward", forward)


def is_random(module: nn.Module) -> bool:
    """Whether the module may draw random numbers when it runs in its present mode."""
    return any(m.training for m in module.modules()) and has_dropout(module)


def has_dropout(module: nn.Module) -> bool:
    """Whether the module may draw random numbers in training mode."""
    for m in module.modules():
        if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0:
            return True
        config = getattr(m, "config", None)
        if config is not None and any(
            "drop" in key and is_number(p) and p > 0 for key, p in vars(config).items()
        ):
            return True
    return False
