"""Run a producer ahead of its consumer in a background thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Iterator[Item], Generic[Item]):
    """Iterator over ``produce(n) for n in numbers``, computed up to ``depth`` items ahead.

    The thread ends when the numbers do, when ``produce`` raises (the exception reaches the consumer
    in its turn), on ``close()``, when the iterator is dropped, and at interpreter exit. Several
    threads may share one: each item goes to one of them, the end to all.

    Args:
        produce: called in the background thread, one call at a time, in order.
        numbers: its arguments; may be endless.
        depth: items kept ready at most, >= 1.

    Raises:
        RuntimeError: Asked for an item in a process forked from the one that made it.
    """

    def __init__(self, produce: Callable[[int], Item], numbers: Iterable[int], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"expected depth >= 1, got {depth}")
        # The consumer hands out slots and the worker fills them, so neither ever polls: closing
        # means setting `stop` and handing out one more slot.
        self._slots = threading.Semaphore(depth)
        self._ready: SimpleQueue = SimpleQueue()  # ("item" | "error" | "end", value)
        stop = threading.Event()
        thread = threading.Thread(
            target=_work,
            args=(produce, iter(numbers), self._slots, self._ready, stop),
            name="fastmeta-prefetch",
            daemon=True,
        )
        # finalize runs on close(), on collection and at exit, once; it must not refer to self.
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _shut_down, thread, self._slots, stop, self._pid)
        thread.start()

    def __next__(self) -> Item:
        if not self._finalizer.alive:
            raise StopIteration
        if os.getpid() != self._pid:
            raise RuntimeError(
                "items are prepared by a thread of the process that made this iterator, which a "
                "forked process does not have: expected an iterator that is made in the fork"
            )
        kind, value = self._ready.get()
        if kind == "item":
            self._slots.release()
            return value
        self._ready.put(("end", None))  # for the next thread that waits
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; further ``next`` calls raise StopIteration."""
        self._finalizer()


def _work(
    produce: Callable[[int], Any],
    numbers: Iterator[int],
    slots: threading.Semaphore,
    ready: SimpleQueue,
    stop: threading.Event,
) -> None:
    try:
        while True:
            slots.acquire()
            if stop.is_set():
                break
            try:
                number = next(numbers)
            except StopIteration:
                break
            ready.put(("item", produce(number)))
        ready.put(("end", None))
    except BaseException as error:
        ready.put(("error", error))


def _shut_down(
    thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event, pid: int
) -> None:
    if os.getpid() != pid:
        return  # a fork has no such thread, and its locks may be held for good
    stop.set()
    slots.release()
    # The collector may run this inside the worker itself, which then ends by `stop`.
    if thread is not threading.current_thread():
        thread.join()
