"""Where each adapted parameter lies in a task's row of the packed ``[T, P]`` buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ALIGNMENT = 16
"""Every segment starts at a multiple of this many elements, so that kernels can use wide loads."""


class ParamLayout:
    """Where each adapted parameter lies in a task's row of the packed buffer.

    Args:
        names: One name per segment, in order.
        shapes: Shape of each parameter, without the task axis.
        scales: Module name -> alpha / r of its LoRA terms.

    Attributes:
        num_params: ``P``, the length of a row, alignment padding included.
        num_elements: Adapted scalars of one task, without padding.
        gaps: The columns of padding, (start, stop) where there are any.
        offsets: Start of each segment in the row, multiples of :data:`ALIGNMENT`.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.scales = dict(scales or {})
        self.names = tuple(names)
        self.shapes = tuple(tuple(s) for s in shapes)
        self.index = {name: i for i, name in enumerate(self.names)}
        if len(self.index) != len(self.names):
            raise ValueError(f"parameter names must be distinct, got {list(names)}")
        self.numels = tuple(prod(s) for s in self.shapes)
        # Sizes for one torch.split: parameter, padding, parameter, padding, ...
        self.split_sizes: list[int] = []
        self.gaps: list[tuple[int, int]] = []
        offsets, position = [], 0
        for numel in self.numels:
            offsets.append(position)
            padding = -numel % ALIGNMENT
            self.split_sizes += [numel, padding]
            if padding:
                self.gaps.append((position + numel, position + numel + padding))
            position += numel + padding
        self.offsets = tuple(offsets)
        self.num_params = position
        self.num_elements = sum(self.numels)
        self._starts: dict[str, Tensor] = {}
        self._with_rows: dict[tuple[int, int], ParamLayout] = {}

    def __getstate__(self) -> dict:
        # the first are of the devices of one process
        return self.__dict__ | {"_starts": {}, "_with_rows": {}}

    def with_rows(self, slot: int, rows: int) -> ParamLayout:
        """The layout with another number of rows of one parameter."""
        found = self._with_rows.get((slot, rows))
        if found is None:
            shapes = list(self.shapes)
            shapes[slot] = (rows, *shapes[slot][1:])
            found = self._with_rows[slot, rows] = ParamLayout(self.names, shapes, self.scales)
        return found

    def difference(self, other: ParamLayout) -> str | None:
        """How another layout differs from this one, as a clause; None where it does not."""
        if other is self:
            return None
        if (other.names, other.shapes) == (self.names, self.shapes):
            for module, scale in self.scales.items():
                found = other.scales.get(module)
                if found is None or not math.isclose(found, scale, rel_tol=1e-6):
                    return f"expected alpha / r = {scale:g} in {module}, got {found}"
            return None
        missing = [n for n in self.names if n not in other.index]
        extra = [n for n in other.names if n not in self.index]
        if missing or extra:
            return f"expected {_few(missing) or 'no more'}, got {_few(extra) or 'none'}"
        for name, shape in zip(self.names, self.shapes, strict=True):
            found = other.shapes[other.index[name]]
            if found != shape:
                return f"expected {name} of shape {list(shape)}, got {list(found)}"
        return f"expected parameters in the order of {self.names[:2]}, got {other.names[:2]}"

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ParamLayout({len(self)} parameters, {self.num_elements} elements)"

    def segment_offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """Segment starts and the row's end, int64 ``[S + 1]``; padding counts to its segment."""
        key = str(device)
        if key in self._starts:
            return self._starts[key]
        with torch.inference_mode(False):
            found = torch.tensor([*self.offsets, self.num_params], dtype=torch.int64, device=device)
        if not (torch.compiler.is_compiling() or isinstance(found, FakeTensor)):
            self._starts[key] = found  # the next step need not wait for a copy to the device
        return found

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors ``[*lead, *shape]`` by segment -> ``[*lead, P]``, padding zero."""
        pieces: list[Tensor] = []
        for tensor, shape, numel in zip(tensors, self.shapes, self.numels, strict=True):
            lead = tensor.shape[: tensor.dim() - len(shape)]
            pieces.append(tensor.reshape(*lead, numel))
            padding = -numel % ALIGNMENT
            if padding:
                pieces.append(tensor.new_zeros(*lead, padding))
        return torch.cat(pieces, dim=-1)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """``[T, P]`` -> one view ``[T, *shape]`` per segment, by a single differentiable split."""
        pieces = packed.split(self.split_sizes, dim=1)[::2]
        return [
            p.view(packed.shape[0], *shape) for p, shape in zip(pieces, self.shapes, strict=True)
        ]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
