"""Which tokens of padded inputs count: asked once for every mask, which waits for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastmeta.patching.plan import Plan
from fastmeta.patching.unpadded import IDS, MASK, Tokens, ignored_by, is_traced, tokens_of


class KnownTokens:
    """The answers, for as long as their masks live."""

    def __init__(self) -> None:
        self._answers = WeakIdKeyDictionary()

    def of(self, plan: Plan, inputs: Mapping[str, Any], widths: int = 0) -> Tokens | None:
        """The positions of inputs ``[T, N, ...]`` that count; None where all are to be computed.

        Args:
            widths: See :func:`tokens_of`.
        """
        mask = inputs.get(MASK)
        if not isinstance(mask, Tensor) or is_traced(mask):
            return None
        # what the answer depends on; kept, so that their ids stay their own
        asked = [mask]
        asked += [inputs.get(IDS)] if plan.padding_word is not None else []
        asked += [inputs.get("labels")] if plan.shows_padding else []
        state = [(id(t), _version(t)) for t in asked]
        answers: dict[int, tuple[list, list, Tokens | None]] = self._answers.setdefault(mask, {})
        known = answers.get(widths)
        if known is None or known[0] != state or any(version is None for _, version in state):
            # Made while a model is evaluated, they may serve its training too.
            with torch.inference_mode(False):
                tokens = _ask(plan, inputs, widths)
            known = answers[widths] = state, asked[1:], tokens
        return known[2]


def _ask(plan: Plan, inputs: Mapping[str, Any], widths: int) -> Tokens | None:
    mask, word = inputs[MASK], plan.padding_word
    tokens = tokens_of(mask, widths)
    if tokens is None:
        return None
    if word is not None and not bool(((inputs.get(IDS) == word) | (mask != 0)).all()):
        return None
    if plan.shows_padding and not ignored_by(inputs.get("labels"), mask):
        return None
    return tokens


def _version(t: Any) -> int | None:
    """Changes when a tensor is written to; those of inference mode do not count that."""
    if not isinstance(t, Tensor):
        return 0
    return None if t.is_inference() else t._version
