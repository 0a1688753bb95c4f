"""Triton kernels of activations and their first two derivatives, ``fastmeta.ops.activations``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from fastmeta.kernels._common import (
    INTERPRETED,
    accumulator,
    ceil_div,
    empty_like,
    exp,
    launch,
    sigmoid,
)

_BLOCK = 1024
_GELU, _SILU = tl.constexpr(0), tl.constexpr(2)  # 1: GELU with tanh


@triton.jit
def normal(x):
    """The normal distribution; its tail keeps its digits."""
    if INTERPRETED:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * libdevice.erfc(x * -0.7071067811865476)


@triton.jit
def derivatives(x, KIND: tl.constexpr):
    """f, f' and f'' at x; see csrc/math/activations.h."""
    if KIND == _GELU:
        below, density = normal(x), 0.3989422804014327 * exp(-0.5 * (x * x))
        return x * below, below + x * density, density * (2 - x * x)
    else:
        if KIND == _SILU:
            v, v1, v2 = x, x * 0 + 1, x * 0
        else:
            v = 1.5957691216057308 * (x + 0.044715 * (x * x * x))
            v1 = 1.5957691216057308 + 0.2140644488178598 * (x * x)
            v2 = 0.4281288976357196 * x
        s = sigmoid(tl.maximum(v, -87))
        s1 = s * (1 - s)
        s2 = s1 * (1 - 2 * s)
        return x * s, s + x * (v1 * s1), 2 * (v1 * s1) + x * (v1 * v1 * s2 + v2 * s1)


@triton.jit
def activation_kernel(
    x, d, g, to, to_x, N,
    KIND: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f; or ``d f'``; or ``g f'`` and ``g d f''``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    f, first, second = derivatives(tl.load(x + at, mask=inside, other=0).to(ACC), KIND)
    if ORDER == 0:
        tl.store(to + at, f, mask=inside)
    else:
        times = tl.load(d + at, mask=inside, other=0).to(ACC)
        if ORDER == 1:
            tl.store(to + at, times * first, mask=inside)
        else:
            given = tl.load(g + at, mask=inside, other=0).to(ACC)
            tl.store(to + at, given * first, mask=inside)
            tl.store(to_x + at, given * times * second, mask=inside)


def _run(x: Tensor, d: Tensor | None, g: Tensor | None, kind: int, order: int) -> list[Tensor]:
    out = [empty_like(x) for _ in range(1 + (order == 2))]
    launch(
        activation_kernel, ceil_div(x.numel(), _BLOCK),
        x, d, g, out[0], out[-1], x.numel(),
        KIND=kind, ORDER=order, ACC=accumulator(x), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def activation(x: Tensor, kind: int) -> Tensor:
    return _run(x, None, None, kind, 0)[0]


def activation_backward(d: Tensor, x: Tensor, kind: int) -> Tensor:
    return _run(x, d, None, kind, 1)[0]


def activation_double_backward(g: Tensor, d: Tensor, x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    first, second = _run(x, d, g, kind, 2)
    return first, second
