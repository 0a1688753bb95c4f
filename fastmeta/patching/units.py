"""Modules that no rule serves: run per task by vmap, or one task after another.

A unit is a module, or one method of it, that runs as a whole with each task's tensors bound to
its pristine copy: by `torch.func.vmap` over tasks where it allows that, else in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmeta._memory_errors import is_out_of_memory
from fastmeta._random_state import random_state, set_random_state
from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call, running
from fastmeta.patching.methods import SHARED_METHODS, argument_roles
from fastmeta.patching.probe import warn_loop


@dataclass
class Unit:
    """What runs per task.

    Attributes:
        module: Pristine: without rules.
        tensors: The call's tensors to bind, name below the module -> ``[T, *shape]``.
        slots: The slots that `tensors` reads.
        method: ``"forward"`` or one of :data:`SHARED_METHODS`.
        rows: Number of argument leaves -> which of them carry the batch axis, as the probe saw.
        name: That of the module, or of the method.
        falls_back: Whether a failure under vmap makes it loop from then on.
        loops: Whether it does so.
    """

    module: nn.Module
    tensors: Callable[[Call], dict[str, Tensor]]
    slots: frozenset[int]
    method: str = "forward"
    rows: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    name: str = ""
    falls_back: bool = False
    loops: bool = False

    def run(self, fast: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
        # The method itself, not the module's call: its hooks have run on the outside.
        return getattr(bind(self.module, fast), self.method)(*args, **kwargs)

    def roles(self, call: Call, args: tuple, kwargs: dict, leaves: list[Any]) -> list[str]:
        """``"rows"``, ``"stacked"`` or ``"shared"`` for every argument leaf."""
        if self.method != "forward":
            function = getattr(type(self.module), self.method)
            return argument_roles(SHARED_METHODS[self.method], function, args, kwargs)
        seen = self.rows.get(len(leaves))
        return [
            "rows" if _divides(leaf, call) and (seen is None or seen[i]) else "shared"
            for i, leaf in enumerate(leaves)
        ]

    @property
    def keeps_task_axis(self) -> bool:
        return self.method != "forward" and SHARED_METHODS[self.method].returns == "stacked"


def by_vmap(unit: Unit, call: Call, args: tuple, kwargs: dict) -> Any:
    """Run the unit once under vmap; in a loop, once it has failed there.

    What vmap allowed when the plan was made it may not in training or for other inputs.
    """
    if unit.loops:
        return by_loop(unit, call, args, kwargs)
    if not unit.falls_back:
        return _under_vmap(unit, call, args, kwargs)
    device = _device_of(args, kwargs)
    state = random_state(device) if unit.module.training else None
    try:
        return _under_vmap(unit, call, args, kwargs)
    except Exception as e:
        if is_out_of_memory(e):
            raise
        error = e
    if state is not None:  # a recomputation, which loops at once, must draw the same
        set_random_state(device, state)
    out = by_loop(unit, call, args, kwargs)  # whose error, if any, is the model's own
    unit.loops = True
    warn_loop(unit.name, unit.module, error)
    return out


def _under_vmap(unit: Unit, call: Call, args: tuple, kwargs: dict) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    roles = unit.roles(call, args, kwargs, leaves)
    moving = [
        leaf.unflatten(0, (call.tasks, -1)) if role == "rows" else leaf
        for leaf, role in zip(leaves, roles, strict=True)
        if role != "shared"
    ]

    template: list[Any] = []  # the output's leaves and structure; vmap itself returns tensors only

    def one(fast: dict[str, Tensor], *mine: Tensor) -> tuple[Tensor, ...]:
        rest = iter(mine)
        full = [
            leaf if role == "shared" else next(rest)
            for leaf, role in zip(leaves, roles, strict=True)
        ]
        template[:] = tree_flatten(unit.run(fast, *tree_unflatten(full, spec)))
        return tuple(leaf for leaf in template[0] if isinstance(leaf, Tensor))

    stacked = torch.func.vmap(one, randomness="different")(unit.tensors(call), *moving)
    tensors = iter(stacked if unit.keeps_task_axis else [_merge(t, call) for t in stacked])
    out, out_spec = template
    return tree_unflatten(
        [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in out], out_spec
    )


def by_loop(unit: Unit, call: Call, args: tuple, kwargs: dict) -> Any:
    """Run the unit for one task after another and join the outputs."""
    leaves, spec = tree_flatten((args, kwargs))
    roles = unit.roles(call, args, kwargs, leaves)
    # One unbind per tensor: its backward stacks, where indexing would fill T buffers of zeros.
    split = [
        leaf.unflatten(0, (call.tasks, -1)).unbind(0)
        if role == "rows"
        else leaf.unbind(0)
        if role == "stacked"
        else (leaf,) * call.tasks
        for leaf, role in zip(leaves, roles, strict=True)
    ]
    views = [v.unbind(0) if i in unit.slots else None for i, v in enumerate(call.views)]
    outputs: list[list[Any]] = []
    out_spec = None
    for t in range(call.tasks):
        mine = [v if v is None else v[t].unsqueeze(0) for v in views]
        one = Call(mine, 1, call.rows)  # type: ignore[arg-type]
        with running(one):
            fast = {name: v[0] for name, v in unit.tensors(one).items()}
            out = unit.run(fast, *tree_unflatten([s[t] for s in split], spec))
        out_leaves, out_spec = tree_flatten(out)
        outputs.append(out_leaves)
    joined = []
    for pieces in zip(*outputs, strict=True):
        if not isinstance(pieces[0], Tensor):
            joined.append(pieces[0])
            continue
        stacked = torch.stack(pieces)
        joined.append(stacked if unit.keeps_task_axis else _merge(stacked, call))
    return tree_unflatten(joined, out_spec)


def _device_of(args: tuple, kwargs: dict) -> torch.device:
    tensors = (t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


def _divides(leaf: Any, call: Call) -> bool:
    """Whether a tensor's leading size allows ``T * N`` rows (or those flattened further); without
    padding, T rows of tokens."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] == 0:
        return False
    without = call.unpadded is not None and call.unpadded.active
    return leaf.shape[0] % (call.tasks * (1 if without else call.rows)) == 0


def _merge(stacked: Any, call: Call) -> Any:
    """``[T, n, ...]`` -> ``[T * n, ...]``; a single shared row is expanded to the task's N rows."""
    if not isinstance(stacked, Tensor) or stacked.dim() < 2:
        return stacked
    if stacked.shape[1] == 1 and call.rows > 1:
        stacked = stacked.expand(-1, call.rows, *stacked.shape[2:])
    return stacked.flatten(0, 1)
