"""What a running patched model knows of its call: tasks, fast weights, stored prefix.

Rules are installed once on a shared structure; everything that differs between calls lives here,
per thread, so several threads may run one patched model at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastmeta.patching.head import Tap
    from fastmeta.patching.prefix import Replay
    from fastmeta.patching.unpadded import Tokens, Unpadded


@dataclass
class Call:
    """One forward pass over T tasks of N rows each.

    Attributes:
        views: Fast weights by slot, each ``[T, *shape]``.
        tasks: T.
        rows: N; module inputs have ``T * N`` leading rows, task-major.
        prefix: Outputs of the frozen prefix, being recorded or replayed.
        only_prefix: Stop at the first adapted module.
        tap: Notes what the adapted modules with a rule are called on, where wanted.
        gates: What a search's candidates leave of the layers (see `fastmeta.search.gates`).
        unpadded: The tokens that layers work on in place of padded texts, where wanted.
        before_output: The output layer gives what it reads, which comes in place of logits.
    """

    views: list[Tensor]
    tasks: int
    rows: int
    prefix: Replay | None = None
    only_prefix: bool = False
    tap: Tap | None = None
    gates: Any = None
    unpadded: Unpadded | None = None
    before_output: bool = False


class _Local(threading.local):
    call: Call | None = None


_local = _Local()


def current_call() -> Call:
    """The call being run by this thread."""
    call = _local.call
    if call is None:
        raise RuntimeError(
            "a patched module ran outside its patched model's call, as under "
            "torch.utils.checkpoint: switch that off in the model, learners have memory modes"
        )
    return call


def active_tokens() -> Tokens | None:
    """The tokens that the layer under way works on, or None where it has padded texts."""
    unpadded = None if _local.call is None else _local.call.unpadded
    return unpadded.tokens if unpadded is not None and unpadded.active else None


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """Make `call` the current one; calls nest."""
    outer, _local.call = _local.call, call
    try:
        yield call
    finally:
        _local.call = outer
