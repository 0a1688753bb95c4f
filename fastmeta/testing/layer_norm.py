"""Rows of the operator table for normalisation, activations and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
)

# T, rows of a task, D: one, odd, empty, several blocks of rows, whole vectors
SHAPES = ((1, 1, 1), (3, 5, 7), (0, 2, 3), (2, 0, 3), (2, 70, 33), (4, 9, 64))
SMALL = ((2, 2, 3), (1, 3, 4), (3, 1, 3))


def norms(
    op: str, shapes, dtypes, device: str | torch.device = "cpu", expanded: bool = True
) -> Iterator[Sample]:
    """Gains and biases of each task as views of one buffer, shared, of both kinds, without."""
    for i, (tasks, rows, width) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)

        def random(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        packed = 1 + 0.3 * random(tasks, 2 * width + 3)
        own = packed[:, 1 : 1 + width], packed[:, 3 + width :]
        x = random(tasks, rows, width) + 0.5
        if expanded and i % 3 == 1:
            x = random(tasks, width, rows).mT
        vectors = (list(own), [own[0]], [own[0], random(width)], [random(width)])[i % 4]
        if op == "rms_norm":
            vectors = vectors[:1]
        function = getattr(ops, op)
        tensors = (x, *vectors)
        yield Sample(
            f"{tasks}x{rows}x{width}",
            tuple(t.to(device, dtypes[0]) for t in tensors),
            lambda x, *vectors, function=function: function(x, *vectors, eps=1e-3),
        )


def activations(
    op: str, sizes, dtypes, device: str | torch.device = "cpu", **options
) -> Iterator[Sample]:
    """Every size and strides; from the tail of one side to that of the other."""
    for i, shape in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x.mT if i % 2 and len(shape) > 1 else x
        function = getattr(ops, op)
        yield Sample(
            "x".join(map(str, shape)),
            (x.to(device, dtypes[0]),),
            lambda x, function=function: function(x, **options),
        )


SIZES = ((1,), (5, 3), (0, 4), (67,), (70, 130))
FEW = ((3,), (2, 2))


def dropouts(sizes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Few and many dropped; squared, so that the second derivative is not zero."""
    for p in (0.1, 0.7):
        for sample in activations("dropout", sizes, dtypes, device, p=p, seed=2**40 + len(sizes)):
            yield replace(
                sample,
                id=f"{sample.id}-{p}",
                call=lambda x, call=sample.call: call(x).square(),
            )


def _norm_row(op: str) -> OpRow:
    return OpRow(
        name=op,
        raw=("layer_norm", "layer_norm_backward", "layer_norm_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": norms(op, SHAPES, dtypes, device),
        small=lambda device="cpu": norms(op, SMALL, DTYPES[1], device, expanded=False),
        gpu="triton",
    )


def _activation_row(name: str, op: str, **options) -> OpRow:
    return OpRow(
        name=name,
        raw=("activation", "activation_backward", "activation_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": activations(op, SIZES, dtypes, device, **options),
        small=lambda device="cpu": activations(op, FEW, DTYPES[1], device, **options),
        gpu="triton",
    )


TABLE = (
    _norm_row("layer_norm"),
    _norm_row("rms_norm"),
    _activation_row("gelu", "gelu"),
    _activation_row("gelu-tanh", "gelu", approximate="tanh"),
    _activation_row("silu", "silu"),
    OpRow(
        name="dropout",
        raw=("dropout",),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": dropouts(SIZES, dtypes, device),
        small=lambda device="cpu": dropouts(FEW, DTYPES[1], device),
        gpu="triton",
    ),
)
