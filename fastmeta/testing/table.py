"""What the operator table consists of: rows, and samples of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Inputs of one call.

    Attributes:
        id: readable name.
        tensors: the differentiable inputs.
        call: ``call(*tensors)`` runs the operator with everything else bound.
        composed: whether plain torch operators compute it, in every implementation.
    """

    id: str
    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]
    composed: bool = False


@dataclass(frozen=True)
class OpRow:
    """One operator.

    Attributes:
        name: public name, ``fm.ops.<name>``, and after a dash what is special.
        raw: the dispatcher's operators behind it, the forward one first.
        dtypes: (parameters, gradients) pairs it accepts.
        samples: ``samples(dtypes, device)``: odd, empty, large, strided and expanded inputs.
        small: ``small(device)``: float64 inputs of a few elements, for finite differences.
        float_results: whether results of narrower inputs are float32.
        gpu: the implementation that serves it on a GPU, ``"cuda"`` or ``"triton"``.
    """

    name: str
    raw: tuple[str, ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    samples: Callable[..., Iterator[Sample]]
    small: Callable[..., Iterator[Sample]]
    float_results: bool = False
    gpu: str = "cuda"
