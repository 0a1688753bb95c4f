"""Rows of the operator table for attention: masks of all kinds, grouped heads, windows, dropout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta.testing.table import OpRow, Sample

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)

# B, H, Hk, Lq, Lk, D, E: one, odd, empty, grouped, widths that vectors divide or not, several
# blocks of queries
SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 5, 7, 3, 3),
    (2, 4, 2, 6, 6, 8, 5),
    (0, 2, 1, 3, 4, 4, 4),
    (2, 1, 1, 0, 3, 4, 4),
    (2, 2, 1, 3, 0, 4, 4),
    (1, 6, 2, 17, 33, 16, 16),
    (3, 2, 2, 32, 32, 32, 32),
    (1, 2, 1, 70, 90, 20, 36),
)
# what a call may be told; the mask by its kind
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"mask": "padding"},
    "causal": {"causal": True, "mask": "padding"},
    "window": {"window": (2, 1), "scale": 0.3},
    "heads": {"mask": "heads", "causal": True, "offset": 1},
    "finite": {"mask": "finite"},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7, "mask": "rows"},
}
# not "finite": differences of scores vanish beside its number, their derivatives do not
SMALL = (
    ((2, 2, 1, 3, 4, 2, 3), tuple(c for c in CASES if c != "finite")),
    ((1, 2, 2, 2, 3, 2, 2), ("bias",)),
)


def mask_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``padding`` and ``rows``: bool ``[B, 1, 1, Lk]`` and ``[B, 1, Lq, Lk]``, the last row of the
    batch without a key; ``heads``: additive ``[H, Lq, Lk]`` with an excluded key; ``finite``:
    additive ``[B, 1, Lq, Lk]`` with a large number in place of -inf, everywhere in one row."""
    batch, heads, _, queries, keys, _, _ = shape
    if kind == "heads":
        made = torch.randn(heads, queries, keys, generator=generator, dtype=torch.float64)
        made[:, :, keys // 2 : keys // 2 + 1] = float("-inf")
        return made
    if kind == "finite":
        made = torch.zeros(batch, 1, queries, keys, dtype=torch.float64)
        made[batch - 1 :, :, :1] = made[:, :, 1:, keys // 2 :] = -1e30
        return made
    rows = 1 if kind == "padding" else queries
    made = torch.rand(batch, 1, rows, keys, generator=generator) < 0.7
    made[batch - 1 :, :, :1] = False
    return made


def operands(shape, generator: torch.Generator) -> list[Tensor]:
    batch, heads, groups, queries, keys, width, width_v = shape
    sizes = (
        (batch, heads, queries, width),
        (batch, groups, keys, width),
        (batch, groups, keys, width_v),
    )
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


def laid_out(t: Tensor, layout: int) -> Tensor:
    """The same values: contiguous, heads within rows (as projections give them), or strided."""
    if layout == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == 2:
        return t.repeat_interleave(2, 3)[..., ::2]
    return t


def samples(shapes_and_cases, dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    for i, (shape, cases) in enumerate(shapes_and_cases):
        for j, case in enumerate(cases):
            generator = torch.Generator().manual_seed(i)
            tensors = [
                laid_out(t, (i + j + k) % 3) for k, t in enumerate(operands(shape, generator))
            ]
            tensors = [t.to(device, dtypes[0]) for t in tensors]
            label = f"{case}-{'x'.join(map(str, shape))}"
            if case == "bias":  # which is learned: plain torch then computes it all
                bias = mask_of("heads", shape, generator).nan_to_num(neginf=0.0)[None, :, :1]
                tensors.append(bias.to(device, dtypes[0]))
                yield Sample(label, tuple(tensors), partial(ops.attention, causal=True), True)
                continue
            options = dict(CASES[case])
            if "mask" in options:
                mask = mask_of(options["mask"], shape, generator).to(device)
                options["mask"] = mask if mask.dtype == torch.bool else mask.to(dtypes[0])
            yield Sample(label, tuple(tensors), partial(ops.attention, **options))


def some(dtypes, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """Every shape in two cases, every case with several shapes."""
    names = list(CASES)
    n = len(names)
    chosen = [(s, (names[i % n], names[(i + 2 + i // n) % n])) for i, s in enumerate(SHAPES)]
    return samples([*chosen, (SHAPES[1], ("bias",))], dtypes, device)


TABLE = (
    OpRow(
        name="attention",
        raw=("attention", "attention_backward", "attention_double_backward"),
        dtypes=DTYPES,
        samples=some,
        small=partial(samples, SMALL, DTYPES[1]),
        gpu="triton",
    ),
)
