"""The row of the operator table for cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
)

# shapes of the labels, classes, and what is special: one, odd, empty, no row that counts, a class
# that cannot be and whole vectors, no axis, several blocks
SHAPES = (
    ((1,), 1, ""),
    ((3, 5), 7, ""),
    ((0, 2), 3, ""),
    ((2,), 4, "ignored"),
    ((2, 3), 64, "impossible"),
    ((), 5, ""),
    ((70,), 4500, ""),
)
SMALL = (((3,), 4, ""), ((2, 2), 3, ""))


def samples(shapes, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Rows that do not count, strided logits, a class that cannot be, large logits."""
    for i, (shape, classes, special) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)
        x = 3 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if i % 2 else x + 40 * i
        labels = torch.randint(classes, shape, generator=generator)
        if labels.numel() > 1:
            labels.view(-1)[0] = -100
        if special == "ignored":
            labels[:] = -100
        if special == "impossible":
            x[..., 2] = float("-inf")
            labels[labels == 2] = 3
        labels = labels.to(device)
        yield Sample(
            f"{'x'.join(map(str, shape))}of{classes}",
            (x.to(device, dtypes[0]),),
            lambda x, labels=labels: ops.cross_entropy(x, labels),
        )


TABLE = (
    OpRow(
        name="cross_entropy",
        raw=("cross_entropy", "cross_entropy_backward", "cross_entropy_double_backward"),
        dtypes=DTYPES,
        samples=lambda dtypes, device="cpu": samples(SHAPES, dtypes, device),
        small=lambda device="cpu": samples(SMALL, DTYPES[1], device),
        float_results=True,
        gpu="triton",
    ),
)
