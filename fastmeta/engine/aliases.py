"""A loop on the same memory, whose weights are leaves of their own.

Autograd keeps a node for every weight of a graph that lives, on the stream that it was made on, and
waits there for gradients: of a caller's graph, on another stream than a CUDA graph is recorded on,
which no recording survives. Other leaves have other nodes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain

from torch import Tensor, nn

from fastmeta.engine.inner import InnerLoop


def aliased(loop: InnerLoop) -> InnerLoop:
    """The same loop on other leaves, which read and show what is written to its weights.

    Of loops whose rule and loss are the library's, which hold no weights.
    """
    patched = loop.patched
    modules = [m for m in (patched.model, loop.rates, loop.head) if m is not None]
    weights = chain(patched.slots.initial, *(m.parameters() for m in modules))
    memo: dict[int, object] = {id(patched.layout): patched.layout}
    memo |= {id(t): t for m in modules for t in m.buffers()}
    for t in weights:
        if id(t) not in memo:
            memo[id(t)] = _alias(t)
    own = {name: copy.deepcopy(getattr(loop, name), memo) for name in ("patched", "rates", "head")}
    return replace(loop, **own)


def _alias(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), t.requires_grad)
