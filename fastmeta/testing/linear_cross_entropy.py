"""The row of the operator table for the cross-entropy of a linear layer's logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastmeta import ops
from fastmeta.testing.cross_entropy import DTYPES
from fastmeta.testing.table import OpRow, Sample

# shapes of the labels, width, classes, and what is special: one, odd, empty, no row that counts, a
# class that cannot be and whole vectors, no axis, several blocks of rows and words
SHAPES = (
    ((1,), 1, 1, ""),
    ((3, 5), 6, 7, "bias"),
    ((0, 2), 4, 3, ""),
    ((2,), 3, 4, "ignored"),
    ((2, 3), 16, 64, "impossible"),
    ((), 5, 5, ""),
    ((200,), 33, 4500, "bias"),
)
SMALL = (((3,), 2, 4, ""), ((2, 2), 3, 3, "bias"))


def samples(shapes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Rows that do not count, strided rows and words, a class that cannot be, large logits."""
    for i, (shape, width, classes, special) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)

        def random(*shape: int, generator=generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x, weight = random(*shape, width), 3 * random(classes, width) / width**0.5
        if i % 2:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
            weight = weight.mT.contiguous().mT
        bias = random(classes) + 40 if special in ("bias", "impossible") else None
        labels = torch.randint(classes, shape, generator=generator)
        if labels.numel() > 1:
            labels.view(-1)[0] = -100
        if special == "ignored":
            labels[:] = -100
        if special == "impossible":
            bias[2] = float("-inf")
            labels[labels == 2] = 3
        weight, bias = (None if t is None else t.to(device, dtypes[0]) for t in (weight, bias))
        labels = labels.to(device)

        def call(x, weight=weight, labels=labels, bias=bias):
            weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
            return ops.linear_cross_entropy(x, weight, labels, bias)

        yield Sample(
            f"{'x'.join(map(str, shape))}by{width}of{classes}",
            (x.to(device, dtypes[0]),),
            call,
        )


TABLE = (
    OpRow(
        name="linear_cross_entropy",
        raw=("linear_cross_entropy", "linear_cross_entropy_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SHAPES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device),
        float_results=True,
        gpu="triton",
    ),
)
