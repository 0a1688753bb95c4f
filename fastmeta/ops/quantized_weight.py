"""Frozen weights of few bits, which operators read as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._checks import describe
from fastmeta._dtypes import wide_dtype
from fastmeta.reference import lora_linear as reference


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight ``[N, K]`` in 8 or 4 bits: ``W = values * scale``, symmetric about 0.

    Attributes:
        values: int8 ``[N, K]``, or uint8 ``[N, K / 2]`` of 4-bit numbers plus 8, the even column in
            the low half of a byte.
        scale: ``[N, K / group_size]``, float32, or float64 of a float64 weight.

    Raises:
        ValueError: Other dtypes or shapes, or tensors on two devices.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        kinds = (torch.int8, torch.uint8), (torch.float32, torch.float64)
        for name, t, allowed in (("values", values, kinds[0]), ("scale", scale, kinds[1])):
            if not isinstance(t, Tensor) or t.dim() != 2 or t.dtype not in allowed:
                known = " or ".join(str(d).removeprefix("torch.") for d in allowed)
                raise ValueError(
                    f"QuantizedWeight: {name} must be {known} of two axes, got {describe(t)}"
                )
        rows, columns = self.shape
        groups = scale.shape[1]
        fits = scale.shape[0] == rows and columns % max(groups, 1) == 0 and bool(groups or not rows)
        if not fits or scale.device != values.device:
            raise ValueError(
                f"QuantizedWeight: scale must be [{rows}, G] on {values.device} with G dividing "
                f"K = {columns}, got {describe(scale)}"
            )
        object.__setattr__(self, "values", values.contiguous())  # as kernels read them
        object.__setattr__(self, "scale", scale.contiguous())

    @classmethod
    def quantize(
        cls, weight: Tensor, bits: int = 8, group_size: int | None = None
    ) -> QuantizedWeight:
        """Round a weight to the nearest of ``2^bits - 1`` multiples of each group's scale.

        Args:
            weight: ``[N, K]``, floating point.
            bits: 8 or 4. Default 8.
            group_size: Columns that share a scale; divides K. Default K (one scale for each output)
                with 8 bits, and 64 with 4, which needs an even number.

        Raises:
            ValueError: another shape, number of bits or group size.
        """
        op = "QuantizedWeight.quantize"
        if (
            not isinstance(weight, Tensor)
            or weight.dim() != 2
            or weight.dtype not in _checks.FLOATING
        ):
            raise ValueError(
                f"{op}: weight must be a floating-point tensor [N, K], got {describe(weight)}"
            )
        if bits not in (4, 8):
            raise ValueError(f"{op}: bits must be 8 or 4, got {bits!r}")
        width = weight.shape[1]
        group = group_size if group_size is not None else width if bits == 8 else 64
        if not isinstance(group, int) or group < 1 or width % group or (bits == 4 and group % 2):
            even = " and be even" if bits == 4 else ""
            raise ValueError(f"{op}: group_size must divide K = {width}{even}, got {group!r}")
        dtype = wide_dtype(weight.dtype)
        return cls(*reference.quantise(weight.detach().to(dtype), bits, group))

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``."""
        rows, columns = self.values.shape
        return torch.Size((rows, columns * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def to(self, device: str | torch.device) -> QuantizedWeight:
        """The same on another device."""
        return QuantizedWeight(self.values.to(device), self.scale.to(device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[N, K]`` in a dtype, by default that of its scale."""
        dense = reference.dequantise(self.values, self.scale, self.shape[1])
        return dense if dtype is None else dense.to(dtype)
