"""How features are compared: a metric, its learned part, and a temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import ops
from fastmeta._settings import above_0
from fastmeta.ops.pairwise import METRICS

PRECISIONS = ("diagonal", "full")
_FLOOR = 1e-6  # of a full precision's eigenvalues


class Comparison(nn.Module):
    """``logits = -distance / temperature``.

    Args:
        metric: A metric of `fm.ops.pairwise_distance`; ``"mahalanobis"`` learns its precision,
            which starts at the identity.
        p: Order of ``"minkowski"``.
        precision: ``"diagonal"``: ``softplus(a)`` per coordinate; ``"full"``: ``L L^T + 1e-6 I``.
        temperature: Positive, or ``"learned"``: ``exp(b)``.
        initial_temperature: Where a learned temperature starts.
        width: D, where the metric has a learned part.

    Raises:
        ValueError: An unknown metric or precision, an argument of another metric, a temperature
            that is not positive.
    """

    def __init__(
        self,
        metric: str,
        *,
        p: float | None = None,
        precision: str = "diagonal",
        temperature: float | str = 1.0,
        initial_temperature: float = 1.0,
        width: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if (p is not None) != (metric == "minkowski"):
            need = "takes no p" if p is not None else "needs p"
            raise ValueError(f"metric {metric!r} {need}, got p={p!r}")
        self.metric, self.p, self.kind = metric, p, precision
        self.constant: float | None = None
        like = {"device": device, "dtype": dtype}
        if temperature == "learned":
            start = math.log(above_0("initial_temperature", initial_temperature))
            self.log_temperature = nn.Parameter(torch.full((), start, **like))
        else:
            self.constant = above_0("temperature", temperature, " or 'learned'")
        if metric == "mahalanobis":
            if precision == "diagonal":
                one = math.log(math.expm1(1.0))  # softplus of it is 1
                self.raw_precision = nn.Parameter(torch.full((width,), one, **like))
            else:
                self.factor = nn.Parameter(torch.eye(width, **like))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if self.constant is None else self.constant

    @property
    def precision(self) -> Tensor | None:
        """The metric's positive definite matrix ``[D, D]``, or its diagonal ``[D]``."""
        if self.metric != "mahalanobis":
            return None
        if self.kind == "diagonal":
            return F.softplus(self.raw_precision)
        factor = self.factor.tril()
        floor = _FLOOR * torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
        return factor @ factor.mT + floor

    def arguments(self) -> dict:
        """The metric as `fm.ops` takes it."""
        return {"metric": self.metric, "p": self.p, "precision": self.precision}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``[T, N, D]`` and ``[T, M, D]`` to logits ``[T, N, M]``."""
        return -ops.pairwise_distance(x, y, **self.arguments()) / self.temperature

    def extra_repr(self) -> str:
        parts = [f"metric={self.metric!r}"]
        if self.p is not None:
            parts.append(f"p={self.p:g}")
        if self.metric == "mahalanobis":
            parts.append(f"precision={self.kind!r}")
        shown = "'learned'" if self.constant is None else f"{self.constant:g}"
        return ", ".join([*parts, f"temperature={shown}"])
