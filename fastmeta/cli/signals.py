"""Ctrl-C and termination requests: finish the step, save, then end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SAME = 0.5  # seconds


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGINT or SIGTERM; a second one ends at once, but for one of the
    same moment, which a launcher passes on.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is not None:
            if now - asked < _SAME:
                return
            raise KeyboardInterrupt
        asked = now
        print("\nfastmeta: finishing this step and saving; again to quit now", file=sys.stderr)
        stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(n, handle) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
