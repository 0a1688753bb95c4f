"""Attention on texts that lie one after another: what padded texts give, in every order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from second_order import by_cotangents
from torch import Tensor

from fastmeta.ops import use_impl
from fastmeta.ops._attention import attend
from fastmeta.reference.attention import Setting, as_rows, as_texts

LENGTH = 9
# positions of each text that are there, for two tasks of three texts; a text may be missing
TEXTS = ((0, 9), (0, 4), (5, 9), (0, 1), (0, 0), (2, 8))


def places_of(each: int = 22) -> Tensor:
    """``[B, L]``, with a row of no text in front and some behind."""
    places = torch.full((len(TEXTS), LENGTH), -1)
    for task in range(2):
        row = task * each + 1
        for b in range(3 * task, 3 * task + 3):
            first, end = TEXTS[b]
            places[b, first:end] = torch.arange(row, row + end - first)
            row += end - first
    return places


PLACES = places_of()


def made(heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v ``[T, H, M, D]``: heads within rows, and before them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        random(2, 22, heads, 5).transpose(1, 2),
        random(2, groups, 22, 5),
        random(2, 22, groups, 7).transpose(1, 2),
    ]


def mask_of(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "bool":
        mask = torch.rand(len(TEXTS), 1, LENGTH, LENGTH, generator=generator) < 0.7
        return mask | torch.eye(LENGTH, dtype=torch.bool)
    if kind == "bias":
        return torch.randn(1, 4, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    if kind == "keys":
        return torch.rand(len(TEXTS), 1, 1, LENGTH, generator=generator) < 0.8
    return None


CASES = [
    ("none", {}),
    ("bool", {}),
    ("bias", {}),
    ("keys", {}),
    ("none", {"upper": 0}),
    ("bool", {"dropout_p": 0.4, "period": len(TEXTS)}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_texts_give_what_padded_ones_give(cpu_impl, kind, options):
    setting = Setting(**{"scale": 0.4, "lower": -LENGTH, "upper": LENGTH, **options})
    mask, seed = mask_of(kind), torch.tensor(7)

    def of_rows(q, k, v):
        return attend(q, k, v, mask, seed, replace(setting, places=PLACES))

    def padded(q, k, v):
        texts = (as_texts(t, PLACES) for t in (q, k, v))
        real = (PLACES >= 0)[:, None, None]
        if kind == "bias":
            both = mask.masked_fill(~real, float("-inf"))
        else:
            both = real if mask is None else mask & real
        return as_rows(attend(*texts, both, seed, setting), PLACES, q)

    found = by_cotangents(of_rows, made())
    with use_impl("reference"):
        expected = by_cotangents(padded, made())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    outside = torch.ones(44, dtype=torch.bool)
    outside[PLACES[PLACES >= 0]] = False
    assert outside.any() and not found[0].transpose(1, 2).flatten(0, 1)[outside].any()


def test_rows_of_a_text_must_follow_each_other(cpu_impl):
    if cpu_impl[0] == "reference":
        pytest.skip("the reference takes rows in any order")
    q, k, v = made()
    for places in (PLACES.flip(1), PLACES + (PLACES >= 0) * 20, PLACES + (PLACES >= 0) * 30):
        with pytest.raises(RuntimeError, match="rows of a text must follow each other"):
            attend(q, k, v, None, None, Setting(0.4, -LENGTH, LENGTH, places=places))


def test_samples_of_vmap_share_the_places(cpu_impl):
    q, k, v = made()
    setting = Setting(0.4, -LENGTH, LENGTH, places=PLACES)
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def call(factor):
        return attend(factor * q, k, v, None, None, setting)

    got = torch.func.vmap(torch.func.jacrev(call))(factors)
    expected = torch.stack([torch.func.jacrev(call)(f) for f in factors])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
