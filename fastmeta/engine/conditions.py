"""What a forward pass ran under, restored when its graph is built again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from fastmeta._random_state import random_state, set_random_state
from fastmeta.patching import Patched
from fastmeta.patching.prefix import has_dropout


def computing(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Within, the model's matrix products are in `dtype`; None: nothing changes."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def no_cast_is_kept() -> Iterator[None]:
    """Within, autocast converts weights anew wherever they are read. What it keeps is forgotten at
    the end of its region: a graph would read weights as they were when it was captured, without a
    gradient, or memory that is gone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


Versions = Sequence[tuple[Tensor, int]]


def versions(patched: Patched, inputs: Iterable[Tensor]) -> Versions:
    """Inputs and frozen weights with what changes where they are written to; autograd itself looks
    after weights that learn."""
    frozen = (p for p in patched.model.parameters() if not p.requires_grad)
    return [(t, t._version) for t in (*inputs, *frozen) if not t.is_inference()]


class Conditions:
    """Random state (so that dropout draws the same masks), autocast and training mode.

    What runs once more must draw just what the forward pass drew; where it draws otherwise,
    :meth:`finish` is not to be called, and nothing is expected of it.

    Args:
        patched: The model that is about to run.
        device: Where it runs.
        read: What it reads besides weights that learn, which must not be written to meanwhile.
    """

    def __init__(self, patched: Patched, device: torch.device, read: Versions = ()) -> None:
        self.read = read
        self.device = device
        self.training = patched.training
        self.autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)
        # while a CUDA graph is recorded nothing is random, and nothing can be asked
        recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.random = None if recorded else random_state(self.device)  # a loss may draw, too
        self.drawn: list[Tensor] | None = None  # the state after the forward pass

    def finish(self) -> None:
        """The forward pass is over: forget the random state if nothing was drawn from it."""
        if self.random is not None:
            self.drawn = random_state(self.device)
            if _same(self.random, self.drawn):
                self.random = self.drawn = None

    @contextmanager
    def restored(self, patched: Patched) -> Iterator[None]:
        """Run under these conditions, with gradients; the global random state is left alone.

        Raises:
            RuntimeError: The model was switched between training and evaluation meanwhile, a batch
                or a frozen weight was changed in place, or another thread drew random numbers
                among those of dropout.
        """
        if any(t._version != version for t, version in self.read):
            raise RuntimeError(
                "a batch or a frozen weight was changed in place before backward() has run, which "
                "reads it once more"
            )
        if patched.training != self.training:
            raise RuntimeError(
                "the model must stay in the mode of its forward pass until backward() has run: "
                f"expected training={self.training}, got {patched.training}"
            )
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast)
        with torch.enable_grad(), autocast:
            if self.random is None:
                yield
                return
            on_gpu = self.device.type == "cuda"
            with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
                set_random_state(self.device, self.random)
                yield
                self._check_draws(patched)

    def _check_draws(self, patched: Patched) -> None:
        """Raise if the random state is another one than after the forward pass, unless no number
        was drawn for the model: what other threads draw does not matter to it then."""
        if self.drawn is None:
            return
        now = random_state(self.device)
        if _same(now, self.drawn) or _same(now, self.random):
            return
        if self.training and has_dropout(patched.model):
            raise RuntimeError(
                "another thread drew from torch's random generator during the forward or backward "
                "pass, so that its dropout masks cannot be drawn again: give that thread a "
                "torch.Generator of its own, or use memory='unroll'"
            )


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))
