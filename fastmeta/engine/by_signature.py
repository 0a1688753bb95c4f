"""What is made once for every signature: captured steps, recorded meta-steps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any


class BySignature:
    """What was made for each signature; None where that failed, with one warning for all.

    Args:
        most: Signatures at most; more have None.
        failed: What the warning says, before the reason.
        passed_on: Whether an error is to reach the caller instead, so that he may try again.

    Attributes:
        steps: Signature -> what was made.
    """

    def __init__(
        self,
        most: int,
        failed: str,
        passed_on: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self.most, self.failed, self.passed_on = most, failed, passed_on
        self.steps: dict[Hashable, Any] = {}
        self.lock = threading.Lock()
        self.maker: int | None = None  # the thread that makes one now
        self.warned = False

    def find(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What there is for a signature, by `make` if it is new; None within another's `make`."""
        if key not in self.steps:
            if self.maker == threading.get_ident():
                return None
            with self.lock:
                if key not in self.steps:
                    self.maker = threading.get_ident()
                    try:
                        self.steps[key] = self._make(make)
                    finally:
                        self.maker = None
        return self.steps[key]

    def _make(self, make: Callable[[], Any]) -> Any:
        if len(self.steps) >= self.most:
            self._warn(f"{self.most} graphs are captured already; pad texts to a few lengths")
            return None
        try:
            return make()
        except Exception as error:  # whatever a model, a loss, a compiler or a driver may raise
            if self.passed_on(error):
                raise
            self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None

    def _warn(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"{self.failed} ({reason})", RuntimeWarning, stacklevel=2)
