"""`fm.ops.dropout`: what it drops, wrong arguments; the operator table has its derivatives."""

from __future__ import annotations

import math

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta._library import has_extension
from fastmeta.ops import dropout, use_impl
from fastmeta.reference.hashing import WORD, mixed

X = torch.ones(300, 500, dtype=torch.float64)


def kept(seed: int, p: float = 0.3) -> Tensor:
    return dropout(X, p, seed) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_shares_and_values(p: float) -> None:
    y = dropout(X, p, 7)
    share = float((y == 0).double().mean())
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / X.numel())
    assert set(y.unique().tolist()) == ({1.0} if p == 0 else {0.0, 1 / (1 - p)})


def test_neighbours_and_seeds_are_independent() -> None:
    bound = 5 / math.sqrt(X.numel())
    mine = kept(3)
    for shift, axis in ((1, 1), (1, 0), (2, 1), (64, 1)):
        assert abs(correlation(mine, mine.roll(shift, axis))) < bound
    for other in (4, -3, 3 + 2**32, 3 ^ 2**20):
        assert abs(correlation(mine, kept(other))) < bound
    assert torch.equal(mine, kept(3))
    assert bool((kept(3, 0.4) <= mine).all())  # what is dropped stays so where more is


def test_what_is_dropped_depends_on_numbers_alone() -> None:
    flat = dropout(X.flatten(), 0.3, 5)
    assert torch.equal(dropout(X, 0.3, 5).flatten(), flat)
    assert torch.equal(dropout(X.flatten()[:777], 0.3, 5), flat[:777])
    assert torch.equal(dropout(X.float(), 0.3, torch.tensor(5)) != 0, kept(5))
    assert torch.equal(dropout(X.mT, 0.3, 5), dropout(X.mT.contiguous(), 0.3, 5))


def test_the_definition() -> None:
    """Two hashes of 32 bits, of the element's number and of both words of the seed."""
    for seed in (5, 2**40 + 5, -7):
        low, high = torch.tensor(seed) & WORD, (torch.tensor(seed) >> 32) & WORD
        words = mixed(mixed(low ^ torch.arange(X.numel())) + high)
        assert torch.equal(kept(seed).flatten(), words >= int(0.3 * 2**32))


def test_samples_of_a_vmap_drop_the_same() -> None:
    shared = torch.func.vmap(lambda x: dropout(x, 0.3, 5), in_dims=1)(X)
    assert torch.equal(shared, dropout(X[:, 0], 0.3, 5).expand(500, -1))
    with pytest.raises(ValueError, match="the seed must be shared by all samples of vmap"):
        torch.func.vmap(lambda x, s: dropout(x, 0.3, s))(X, torch.arange(300))


def test_not_a_number_is_dropped_too() -> None:
    with use_impl("reference"):
        expected = dropout(X * math.nan, 0.3, 5)
    got = dropout(X * math.nan, 0.3, 5)
    assert torch.equal(got == 0, ~kept(5)) and torch.equal(expected == 0, ~kept(5))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.long(), 0.1, 1), "dropout: x must be a floating-point tensor, got"),
        ((None, 0.1, 1), "dropout: x must be a floating-point tensor, got"),
        ((X, 1.0, 1), "dropout: p must be"),
        ((X, -0.1, 1), "dropout: p must be"),
        ((X, 0.1, None), "dropout: dropout needs a seed, an integer of 64 bits or an int64 scalar"),
        ((X, 0.1, 2**63), "dropout: dropout needs a seed"),
        ((X, 0.1, torch.tensor([1])), "dropout: dropout needs a seed"),
    ],
)
def test_wrong_arguments(args: tuple, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dropout(*args)


@pytest.mark.skipif(not has_extension("cpu"), reason="the extension is not built")
def test_patched_models_keep_no_masks() -> None:
    """Dropping costs a seed: a training pass keeps no more than one of evaluation."""
    found = {}
    for p in (0.0, 0.2):
        model = oracle.tiny_bert()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p
        patched = fm.patch(model.train(), fm.Params("*"))
        batch = oracle.as_batch(oracle.make_tasks(2))
        inputs = {k: v for k, v in batch.support.items() if k != "labels"}
        patched(patched.init(2), **inputs)
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            first = patched(patched.init(2), **inputs).logits
        found[p] = sum(sizes)
        torch.manual_seed(1)
        assert torch.equal(first, patched(patched.init(2), **inputs).logits)
        assert torch.equal(first, patched(patched.init(2), **inputs).logits) == (p == 0)
    assert found[0.2] - found[0.0] < 100
