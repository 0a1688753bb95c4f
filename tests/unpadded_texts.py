"""Texts of two tasks with padding anywhere, and what the layers of a patched model see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastmeta as fm
from fastmeta.patching import unpadded
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
LENGTH = 8

# Real tokens of every row of two tasks; which ones, `masks` says.
TEXTS = torch.tensor([[5, 3, 2], [4, 1, 3]])
UNEVEN = torch.tensor([[8, 6, 7], [1, 2, 1]])
EMPTY = torch.tensor([[5, 0, 2], [4, 3, 0]])
NEARLY_FULL = torch.tensor([[8, 8, 8], [8, 7, 8]])
ONE_FULL = torch.tensor([[1, 2, 1], [8, 8, 8]])


def masks(lengths: Tensor, side: str = "right", seed: int = 0) -> Tensor:
    """``[T, N, L]`` with so many ones in every row: in front, at the end, or anywhere."""
    place = torch.arange(LENGTH).expand(*lengths.shape, -1)
    if side == "left":
        place = place.flip(-1)
    elif side == "holes":
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(place.shape, generator=generator).argsort(-1)
    return (place < lengths.unsqueeze(-1)).long()


def texts(
    lengths: Tensor = TEXTS, side: str = "right", seed: int = 0, padding: int | None = 0
) -> dict[str, Tensor]:
    """Inputs of two tasks; None leaves words where padding is."""
    generator = torch.Generator().manual_seed(seed)
    mask = masks(lengths, side, seed)
    ids = torch.randint(3, 20, mask.shape, generator=generator)
    ids = ids if padding is None else ids.masked_fill(mask == 0, padding)
    return {"input_ids": ids, "attention_mask": mask}


def padded(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> object:
    """What `run` gives where no layer leaves out padding; it makes inputs of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(unpadded, "_WORTH", 0.0)
        return run()


@contextmanager
def watched(plan, layers: list[str] | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Leading shapes ``(rows, length)`` that linear modules of the layers are called on."""
    layers = plan.unpadded if layers is None else layers
    shapes: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
        for name in layers
        for module in plan.structure.get_submodule(name).modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    assert handles
    yield shapes
    for handle in handles:
        handle.remove()


def layer_shapes(patched: fm.Patched, inputs: dict[str, Tensor], **kwargs) -> set:
    """``(rows, length)`` within layers that can leave out padding, in one call."""
    with watched(patched.plan(inputs), **kwargs) as shapes:
        patched(patched.init(2), **inputs)
    assert shapes
    return set(shapes)


def model_logits(patched: fm.Patched, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the user's model, ``[T, N, ...]``."""
    with keep_float64():
        out = patched.model(**{k: v.flatten(0, 1) for k, v in inputs.items()})
    tasks, rows = inputs["input_ids"].shape[:2]
    return out.logits.unflatten(0, (tasks, rows))


def assert_right(patched: fm.Patched, inputs: dict[str, Tensor]) -> None:
    """The patched model gives what the user's model gives."""
    with keep_float64():
        got = patched(patched.init(2), **inputs).logits
    torch.testing.assert_close(got, model_logits(patched, inputs), rtol=1e-9, atol=1e-12)
