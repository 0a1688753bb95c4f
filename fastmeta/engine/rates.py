"""Inner learning rates: a number, or meta-parameters per task, layer, step or parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmeta._dtypes import wide_dtype
from fastmeta._settings import is_number
from fastmeta.patching import ParamLayout

AXES = ("step", "task", "layer", "param")


@dataclass(frozen=True)
class LearnedRate:
    """A learning rate that the outer loop learns.

    Args:
        per: Axes along which the rate varies: ``"step"``, ``"task"``, ``"layer"`` (one adapted
            tensor), ``"param"`` (every scalar, as in Meta-SGD), or several, e.g.
            ``("layer", "step")`` as in MAML++. ``()`` learns one number.
        init: Initial value of every rate, positive.
        num_tasks: Number of tasks per batch; needed when `per` has ``"task"``.

    Sources: Li et al. 2017, https://arxiv.org/abs/1707.09835; Antoniou et al. 2019,
    https://arxiv.org/abs/1810.09502
    """

    per: str | Sequence[str] = "param"
    init: float = 1e-2
    num_tasks: int | None = None

    def __post_init__(self) -> None:
        axes = (self.per,) if isinstance(self.per, str) else tuple(self.per)
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"a learned rate is per {', '.join(AXES)}; got {axis!r}")
        if "layer" in axes and "param" in axes:
            raise ValueError("a learned rate per 'param' already varies per 'layer': give one")
        if "task" in axes and not (isinstance(self.num_tasks, int) and self.num_tasks >= 1):
            raise ValueError(
                "a learned rate per 'task' needs num_tasks, an integer of at least 1, got "
                f"{self.num_tasks!r}"
            )
        check_rate(self.init)
        object.__setattr__(self, "per", axes)


def check_rate(lr: object) -> float:
    """A positive finite number, or ValueError."""
    if not is_number(lr):
        raise TypeError(f"lr must be a positive number or a fm.LearnedRate, got {lr!r}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    return float(lr)


class Rates(nn.Module):
    """The rate of every inner step, in the shapes that the update operators take."""

    def __init__(
        self,
        lr: float | LearnedRate,
        layout: ParamLayout,
        steps: int,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.constant: float | None = None
        self.axes: tuple[str, ...] = ()
        if not isinstance(lr, LearnedRate):
            self.constant = check_rate(lr)
            return
        self.axes = tuple(a for a in AXES if a in lr.per)
        sizes = {
            "step": steps,
            "task": lr.num_tasks,
            "layer": len(layout),
            "param": layout.num_params,
        }
        shape = [sizes[a] for a in self.axes]
        dtype = wide_dtype(like.dtype)
        self.values = nn.Parameter(torch.full(shape, lr.init, dtype=dtype, device=like.device))

    @classmethod
    def of_tasks(cls, values: Tensor, layout: ParamLayout) -> Rates:
        """Rates ``[T]`` of tasks, which are given and not learned."""
        rates = cls(LearnedRate(per="task", num_tasks=len(values)), layout, 1, values)
        rates.values = nn.Parameter(values, requires_grad=False)
        return rates

    @property
    def segments(self) -> ParamLayout | None:
        """The layout, where the rate is per layer."""
        return self.layout if "layer" in self.axes else None

    def at(self, step: int, tasks: Tensor | None = None) -> float | Tensor:
        """The rate of one step: a number, or ``[1 or T, 1 or S or P]``.

        Args:
            step: From 0.
            tasks: Which tasks of the learner's batch take the step, int64 ``[T]``; None for all.

        Steps beyond those learned reuse the last one, so evaluation may take more steps.
        """
        if self.constant is not None:
            return self.constant
        values = self.values
        if "step" in self.axes:
            values = values[min(step, values.shape[0] - 1)]
        if "task" not in self.axes:
            values = values.unsqueeze(0)
        elif tasks is not None:
            values = values[tasks]
        if "layer" not in self.axes and "param" not in self.axes:
            values = values.unsqueeze(-1)
        return values

    def check_tasks(self, num_tasks: int) -> None:
        """Raise unless a rate learned per task fits this many tasks."""
        if "task" in self.axes:
            expected = self.values.shape[self.axes.index("task")]
            if expected != num_tasks:
                raise ValueError(
                    f"the rate is learned per task for {expected} tasks, got {num_tasks} tasks"
                )

    def extra_repr(self) -> str:
        return f"{self.constant}" if self.constant is not None else f"per={self.axes}"
