"""Almost no inner loop: only the head adapts."""

from __future__ import annotations

from typing import Any

from fastmeta.algorithms.learner import GradientLearner
from fastmeta.patching import Head, Patched


class ANIL(GradientLearner):
    """ANIL: the inner loop adapts the head, the outer loop learns head and body.

    The body runs once per batch, whatever K is, if nothing before the head draws dropout. Freeze it
    with ``model.requires_grad_(False)`` before patching to learn the head's initial values only. A
    head that is one linear layer, if SGD or momentum adapts it on its cross-entropy, takes all
    steps in one operator, `fm.ops.head_inner_loop`. Clipping, other optimizers and losses, rates
    per layer or parameter, and dropout before the head take the general loop, which gives the same
    numbers.

    Args:
        patched: A model patched with ``fm.Head()`` (or ``fm.Params`` naming the head only).
        **settings: As for `fm.MAML`.

    Raises:
        TypeError: As for `fm.MAML`.
        ValueError: The specification adapts more than the head, or as for `fm.MAML`.

    Differentiable as `fm.MAML`.

    Source: Raghu et al. 2020, https://arxiv.org/abs/1909.09157
    """

    def __init__(self, patched: Patched, **settings: Any) -> None:
        if isinstance(patched, Patched):
            head = {request.name for request in Head().resolve(patched.model)}
            body = [name for name in patched.layout.names if name not in head]
            if body:
                raise ValueError(
                    f"ANIL adapts the head only, but the specification adapts {body[0]!r} too "
                    f"({len(body)} parameters of the body); patch with fm.Head(), or use fm.MAML"
                )
        super().__init__(patched, **settings)
