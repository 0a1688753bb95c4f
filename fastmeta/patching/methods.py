"""Methods of transformers' modules that compute something all rows of a task share.

Relative position biases and embeddings have no batch axis, so no rule for the leaf inside can
give each task its own. The method around it is small: it runs per task, and what it returns gets
the axis that the rest of the model expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class SharedMethod:
    """One such method.

    Attributes:
        rows: Arguments with a batch axis ``[T * N * k, ...]``.
        stacked: Arguments that another such method returned as ``[T, ...]``, with the number of
            axes they have without the task axis.
        returns: ``"rows"``: results get the batch axis ``[T * N, ...]``; ``"stacked"``: they are
            ``[T, ...]``.
        reads: Children whose parameters it reads without calling them.
    """

    rows: tuple[str, ...] = ()
    stacked: tuple[tuple[str, int], ...] = ()
    returns: str = "rows"
    reads: tuple[str, ...] = ()


_DISENTANGLED = SharedMethod(rows=("query_layer", "key_layer"), stacked=(("rel_embeddings", 2),))

SHARED_METHODS: dict[str, SharedMethod] = {
    "compute_bias": SharedMethod(),  # T5 and its relatives: [1, heads, Lq, Lk]
    "compute_position_bias": SharedMethod(rows=("x",)),  # MPNet: [rows, heads, L, L]
    "get_rel_embedding": SharedMethod(  # DeBERTa: [2 * span, hidden]
        returns="stacked", reads=("rel_embeddings",)
    ),
    "disentangled_attention_bias": _DISENTANGLED,  # DeBERTa-v2, SEW-D
    "disentangled_att_bias": _DISENTANGLED,  # DeBERTa
}


def shared_methods(structure: nn.Module) -> Iterator[tuple[str, str]]:
    """(module name, method name) of every such method in `structure`."""
    for name, module in structure.named_modules():
        for method in SHARED_METHODS:
            if inspect.isfunction(getattr(type(module), method, None)):
                yield name, method


def key(module_name: str, method: str) -> str:
    """How plans and traces name a method."""
    return f"{module_name}.{method}()" if module_name else f"{method}()"


def split_key(unit: str) -> tuple[str, str]:
    """Module name and method (``"forward"`` for a plain module) of a unit's name."""
    if not unit.endswith("()"):
        return unit, "forward"
    module_name, _, method = unit[:-2].rpartition(".")
    return module_name, method


def argument_roles(method: SharedMethod, function: Any, args: tuple, kwargs: dict) -> list[str]:
    """``"rows"``, ``"stacked"`` or ``"shared"`` of each positional, then each keyword argument."""
    names = [p for p in inspect.signature(function).parameters if p != "self"]
    stacked = dict(method.stacked)
    roles = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if name in method.rows:
            roles.append("rows")
        elif name in stacked and isinstance(value, Tensor) and value.dim() > stacked[name]:
            roles.append("stacked")
        else:
            roles.append("shared")
    return roles
