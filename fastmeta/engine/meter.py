"""Count the bytes that tensors take while a piece of code runs, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within the block, follow every tensor that operators create until it is freed.

    Args:
        apart: Sizes in bytes of tensors that are counted apart.

    Attributes:
        peak: Most bytes alive at once, of tensors created in the block.
        now: Bytes alive at present.
        others: The same without tensors counted apart.
        apart_then: Bytes of those at that moment.

    What an operator allocates inside and frees again is not seen.
    """

    def __init__(self, apart: Collection[int] = ()) -> None:
        super().__init__()
        self.apart = apart
        self.peak = self.now = self.others = self.apart_then = self._apart_now = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._see((args, kwargs), created=False)
        out = func(*args, **kwargs)
        self._see(out, created=True)
        return out

    def _see(self, tree: Any, created: bool) -> None:
        """Note storages not met before: created ones count, those from outside do not."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes() if created else 0
            self._known[key] = weakref.ref(storage, partial(self._freed, key, size))
            self._count(size, 1)
            apart = self._apart_now
            self.peak = max(self.peak, self.now)
            then = self.others, self.apart_then
            self.others, self.apart_then = max(then, (self.now - apart, apart))

    def _count(self, size: int, sign: int) -> None:
        self.now += sign * size
        if size in self.apart:
            self._apart_now += sign * size

    def _freed(self, key: int, size: int, _: weakref.ref) -> None:
        self._known.pop(key, None)
        self._count(size, -1)
