"""Whether fast weights are held without the rows of an embedding's table that no step changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, model_inputs
from fastmeta.engine.optimizers import RULES
from fastmeta.patching.narrow_params import narrowing
from fastmeta.patching.task_params import shared_row


def narrowed(loop: InnerLoop, packed: Tensor, support: Support) -> tuple[Tensor, Support]:
    """Initial fast weights ``[T, P]`` and the support set, without rows of an embedding's table
    that no step changes where there is one."""
    row = shared_row(packed)
    if row is None or not may_narrow(loop):
        return packed, support
    found = narrowing(loop.patched, row, model_inputs(support.inputs))
    if found is None:
        return packed, support
    held, start = found
    pulled = start.detach() if loop.proximal else None
    return start, replace(support, start=pulled, narrowing=held, rows=held.support_rows())


def may_narrow(loop: InnerLoop) -> bool:
    """Whether a word without a gradient stays where it is."""
    decay = getattr(loop.rule, "weight_decay", None)
    known = type(loop.rule) in RULES.values() and isinstance(decay, float | int) and decay == 0
    return known and not torch._C._are_functorch_transforms_active()
