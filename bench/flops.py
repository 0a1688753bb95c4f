"""What torch's FlopCounterMode cannot see: the matrix products inside operators of fastmeta."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

import fastmeta  # noqa: F401  (declares the operators)

_A, _B, _X, _DY, _BIAS = 8, 16, 1, 4, 4  # bits of `needs`


def _size(x, weight, a) -> tuple[int, int, int, int]:
    return x[0], x[1], weight[0], a[1]


@register_flop_formula(torch.ops.fastmeta.lora_linear)
def forward(x, weight, scale, bias, a, b, offsets, factor, out_shape=None, **_) -> int:
    m, k, n, r = _size(x, weight, a)
    return 2 * m * (k * n + r * (k + n))


@register_flop_formula(torch.ops.fastmeta.lora_linear_backward)
def backward(dy, x, weight, scale, a, b, s, offsets, factor, needs, out_shape=None, **_) -> int:
    m, k, n, r = _size(x, weight, a)
    columns = n * bool(needs & (_X | _A)) + k * bool(needs & _X)
    columns += k * bool(needs & _A) + n * bool(needs & _B)
    return 2 * m * (k * n * bool(needs & _X) + r * columns)


@register_flop_formula(torch.ops.fastmeta.lora_linear_double_backward)
def double_backward(
    gx, gbias, ga, gb, dy, x, weight, scale, a, b, s, offsets, factor, needs, out_shape=None, **_
) -> int:
    m, k, n, r = _size(x, weight, a)
    of_x, of_a, of_b = gx is not None, ga is not None, gb is not None
    columns = k * (of_x + of_a) * bool(needs & (_DY | _B)) + n * (of_x or of_a) * bool(needs & _B)
    columns += n * ((of_x or of_a) + of_b) * (bool(needs & _DY) + bool(needs & (_X | _A)))
    columns += k * (of_a + of_b) * bool(needs & _X) + k * (of_x + of_b) * bool(needs & _A)
    return 2 * m * (k * n * (of_x and bool(needs & _DY)) + r * columns)


@register_flop_formula(torch.ops.fastmeta.batched_mm)
def batched_mm(a, b, *_, **__) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


@register_flop_formula(torch.ops.fastmeta.batched_mms_)
def batched_mms(to, a, b, *_, **__) -> int:
    return sum(batched_mm(left, right) for left, right in zip(a, b, strict=True))


def _scores(q, k, v, places) -> tuple[int, int, int]:
    """Entries of all scores, as if texts were padded, and the head sizes that a product sums over
    or returns."""
    texts, queries, keys = (q[0], q[2], k[2]) if places is None else (*places, places[1])
    return texts * q[1] * queries * keys, q[3], v[3]


@register_flop_formula(torch.ops.fastmeta.attention)
def attention(q, k, v, mask, seed, places, *_, **__) -> int:
    scores, d, e = _scores(q, k, v, places)
    return 2 * scores * (d + e)


@register_flop_formula(torch.ops.fastmeta.attention_backward)
def attention_backward(d_out, q, k, v, stats, mask, seed, places, *_, **__) -> int:
    scores, d, e = _scores(q, k, v, places)
    return 2 * scores * (3 * d + 2 * e)


@register_flop_formula(torch.ops.fastmeta.attention_double_backward)
def attention_double_backward(a, b, c, d_out, q, k, v, stats, mask, seed, places, *_, **__) -> int:
    scores, d, e = _scores(q, k, v, places)
    return 2 * scores * (7 * d + 5 * e)


counted = (forward, backward, double_backward, batched_mm, batched_mms)
counted += (attention, attention_backward, attention_double_backward)
