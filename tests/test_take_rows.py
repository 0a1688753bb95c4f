"""`fm.ops.take_rows`: wrong arguments; the operator table has its values."""

from __future__ import annotations

import pytest
import torch

from fastmeta.ops import take_rows

X, INDEX, INVERSE = torch.zeros(3, 2), torch.tensor([2, -1]), torch.tensor([-1, -1, 0])


@pytest.mark.parametrize(
    ("x", "index", "inverse", "message"),
    [
        (X[0], INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (X.long(), INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (None, INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (X, INDEX.int(), INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, INDEX[None], INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, [2, -1], INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, INDEX, INVERSE.double(), r"take_rows: inverse must be int64 \[3\] on cpu, got"),
        (X, INDEX, INVERSE[:2], r"take_rows: inverse must be int64 \[3\] on cpu, got"),
        (X, INDEX.to("meta"), INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
    ],
)
def test_wrong_arguments(x, index, inverse, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_rows(x, index, inverse)


def test_rows_that_do_not_exist(cpu_impl: tuple[str, str]) -> None:
    for row in (3, -2) if cpu_impl[0] == "cpp" else (3,):
        with pytest.raises((RuntimeError, IndexError), match=r"range|bounds|-1"):
            take_rows(X, torch.tensor([row, 0]), INVERSE)


def test_orders_are_shared_under_vmap() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(
        ValueError, match="take_rows: index and inverse must be shared by all samples of vmap"
    ):
        torch.func.vmap(lambda index: take_rows(x, index, INVERSE))(INDEX.expand(2, 2))
