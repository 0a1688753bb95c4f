"""Whether fast weights are held without the rows of an embedding's table that no step changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.engine.inner import InnerLoop, Support, model_inputs
from fastmeta.engine.optimizers import RULES
from fastmeta.patching import TaskParams
from fastmeta.patching.initial_params import InitialParams
from fastmeta.patching.narrow_params import look_up, narrowing


def narrowed(loop: InnerLoop, start: TaskParams, support: Support) -> tuple[Tensor, Support]:
    """Initial fast weights as the general loop holds them, ``[T, P]``, and the support set as it
    reads it: without rows of an embedding's table that no step changes, where there is one."""
    found = None
    if isinstance(start, InitialParams) and may_narrow(loop):
        found = narrowing(loop.patched, start, model_inputs(support.inputs))
    if found is None:
        packed = start.packed
    else:
        held, packed = found
        support = replace(support, narrowing=held, rows=held.support_rows(start.looked_up))
    return packed, replace(support, start=packed.detach() if loop.proximal else None)


def looked_up(
    loop: InnerLoop,
    start: TaskParams,
    support: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    most: float = math.inf,
) -> TaskParams:
    """The start with the rows that all texts of these sets read of a table of words, if there is
    one, steps leave rows of it out, and those are at most this many times the table's."""
    if not isinstance(start, InitialParams) or start.looked_up is not None or not may_narrow(loop):
        return start
    return look_up(loop.patched, start, model_inputs(support), model_inputs(query), most)


def may_narrow(loop: InnerLoop) -> bool:
    """Whether a word without a gradient stays where it is."""
    decay = getattr(loop.rule, "weight_decay", None)
    known = type(loop.rule) in RULES.values() and isinstance(decay, float | int) and decay == 0
    return known and not torch._C._are_functorch_transforms_active()
