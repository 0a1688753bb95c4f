"""Attention in plain torch, differentiable to any order by autograd itself.

Shapes: ``q [B, H, Lq, D]``, ``k [B, Hk, Lk, D]``, ``v [B, Hk, Lk, E]`` with H a multiple of Hk;
masks broadcast to ``[B, H, Lq, Lk]``. float64 is computed in float64, everything else in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta.reference.hashing import WORD, dropped_words, mixed
from fastmeta.reference.rows import take_rows


@dataclass(frozen=True)
class Setting:
    """What a call consists of besides tensors.

    Attributes:
        scale: factor of the scores.
        lower, upper: query i attends keys ``i + lower <= j <= i + upper``; no limit is a number
            beyond ``-Lq`` or ``Lk``.
        dropout_p: probability that an attention weight is dropped.
        period: rows ``b`` and ``b + period`` of the batch share their dropout.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask, unless 0.
        places: int64 ``[B, L]`` where q, k and v are ``[T, H, M, D]`` with the rows of B texts one
            after another: the row ``t M + i`` of every position of a text of width L, -1 for those
            without. A text's rows follow each other and are of one task. Masks, dropout and causal
            order are those of ``[B, H, L, L]``; rows of no text give zeros.
    """

    scale: float
    lower: int
    upper: int
    dropout_p: float = 0.0
    period: int = 1
    softcap: float = 0.0
    places: Tensor | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, setting: Setting
) -> Tensor:
    """``dropout(softmax(cap(scale q k^T) + mask)) v``, ``[B, H, Lq, E]`` in the dtype of q."""
    if setting.places is not None:
        places, setting = setting.places, replace(setting, places=None)
        padded = (as_texts(t, places) for t in (q, k, v))
        mask = at_places(mask, places)
        return as_rows(attention(*padded, mask, seed, setting), places, q)
    scores = masked_scores(q, k, mask, setting)
    # rows without a key are zero, and so are their derivatives
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    if setting.dropout_p:
        weights = weights * kept(seed, scores.shape, setting, weights.dtype)
    return _times(weights, v.to(weights.dtype)).to(q.dtype)


def as_texts(x: Tensor, places: Tensor) -> Tensor:
    """``[T, H, M, D]`` -> ``[B, H, L, D]``, zeros at positions without a row."""
    _, heads, _, width = x.shape
    rows = take_rows(x.transpose(1, 2).reshape(-1, heads * width), places.flatten())
    return rows.view(*places.shape, heads, width).transpose(1, 2)


def at_places(mask: Tensor | None, places: Tensor) -> Tensor:
    """The mask ``[B, H, L, L]``, without keys at positions that have no row."""
    real = (places >= 0)[:, None, None]  # [B, 1, 1, L]
    if mask is None:
        return real
    return mask & real if mask.dtype == torch.bool else mask.masked_fill(~real, float("-inf"))


def as_rows(x: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """``[B, H, L, D]`` -> ``[T, H, M, D]`` for rows like those of ``[T, H, M, .]``."""
    b, j = (places >= 0).nonzero(as_tuple=True)
    taken = x[b, :, j]  # [tokens, H, D]
    tasks, _, each, _ = like.shape
    rows = taken.new_zeros(tasks * each, *taken.shape[1:]).index_copy(0, places[b, j], taken)
    return rows.unflatten(0, (tasks, each)).transpose(1, 2)


def masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """``[B, H, Lq, Lk]``, -inf where a key is not attended."""
    dtype = wide_dtype(q.dtype)
    scores = _times(q.to(dtype) * setting.scale, k.to(dtype).mT)
    if setting.softcap:
        scores = torch.tanh(scores / setting.softcap) * setting.softcap
    allowed = in_band(*scores.shape[-2:], setting, q.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else mask & allowed
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def in_band(queries: int, keys: int, setting: Setting, device: torch.device) -> Tensor | None:
    """bool ``[Lq, Lk]``: which keys lie between lower and upper; None where all do."""
    if setting.lower <= 1 - queries and setting.upper >= keys - 1:
        return None
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(1)
    return (ahead >= setting.lower) & (ahead <= setting.upper)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """``[B, H, m, k]`` by ``[B, Hk, k, n]``; heads of one group are rows of one product."""
    batch, heads, rows, _ = x.shape
    groups = y.shape[1]
    if heads == groups:
        return x @ y
    x = x.reshape(batch, groups, heads // groups * rows, x.shape[3])
    return (x @ y).view(batch, heads, rows, y.shape[3])


def kept(seed: Tensor, shape: torch.Size, setting: Setting, dtype: torch.dtype) -> Tensor:
    """Factors of dropout ``[B, H, Lq, Lk]``: 0 or ``1 / (1 - p)``, a function of the seed and of
    the indices alone."""
    batch, heads, queries, keys = shape
    low, high = seed & WORD, (seed >> 32) & WORD
    b = torch.arange(batch, device=seed.device) % max(setting.period, 1)
    head = torch.arange(heads, device=seed.device)
    word = mixed(mixed(low ^ b) + high)  # of a row of the batch
    word = mixed(word.unsqueeze(1) ^ head)
    word = mixed(word.unsqueeze(2) + torch.arange(queries, device=seed.device))
    steps = torch.arange(keys, device=seed.device) * 0x9E3779B9
    word = mixed(word.unsqueeze(3) + steps)
    keep = word >= dropped_words(setting.dropout_p)
    return keep.to(dtype) * (1 / (1 - setting.dropout_p))


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, setting: Setting
) -> tuple[Tensor, Tensor]:
    """The result, laid out as q is, and of every row two numbers ``[B, H, Lq, 2]``: its largest
    score, and what ``exp(score - it)`` is multiplied with, both 0 for rows without a key."""
    places, rows, own = setting.places, (q, k), mask
    if places is not None:
        rows, own = (as_texts(t, places) for t in (q, k)), at_places(mask, places)
    scores = masked_scores(*rows, own, setting)
    top = F.pad(scores, (0, 1), value=float("-inf")).amax(-1, keepdim=True)
    empty = top == float("-inf")
    top = top.masked_fill(empty, 0)
    share = (1 / (scores - top).exp().sum(-1, keepdim=True)).masked_fill(empty, 0)
    stats = torch.cat([top, share], -1)
    if places is not None:
        stats = as_rows(stats, places, q)
    out = empty_like(q, v.shape[3])
    return out.copy_(attention(q, k, v, mask, seed, setting)), stats


def empty_like(t: Tensor, width: int) -> Tensor:
    """A new ``[B, H, L, width]`` whose heads lie within rows exactly if those of t do."""
    batch, heads, rows, _ = t.shape
    if heads > 1 and rows > 1 and t.stride(1) < t.stride(2):
        return t.new_empty(batch, rows, heads, width).transpose(1, 2)
    return t.new_empty(batch, heads, rows, width)


def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and the gradient of an additive mask."""

    def call(q, k, v, mask=mask):
        return attention(q, k, v, mask, seed, setting)

    _, pull = torch.func.vjp(call, q, k, v, *_additive(mask))
    return pull(d_out)


def second(
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> tuple[Tensor, ...]:
    """Derivatives of ``a dq + b dk + c dv`` in d_out, q, k, v, and an additive mask."""

    def call(d_out, q, k, v, mask=mask):
        return gradients(d_out, q, k, v, mask, seed, setting)[:3]

    _, pull = torch.func.vjp(call, d_out, q, k, v, *_additive(mask))
    cotangents = zip((a, b, c), (q, k, v), strict=True)
    return pull(tuple(torch.zeros_like(t) if given is None else given for given, t in cotangents))


def third(
    cotangents: tuple[Tensor, ...],
    results: list[int],
    primals: list[Tensor | None],
    mask: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> list[Tensor | None]:
    """Derivatives of the `results` of `second`, weighted by their cotangents, with respect to the
    primals ``[a, b, c, d_out, q, k, v]``, those that are there, and to an additive mask."""
    given = [*primals, *(_additive(mask) or (None,))]
    places = [i for i, t in enumerate(given) if t is not None]

    def call(*there):
        full = [*given]
        for i, t in zip(places, there, strict=True):
            full[i] = t
        full[7] = mask if full[7] is None else full[7]
        found = second(*full, seed, setting)
        return tuple(found[i] for i in results)

    _, pull = torch.func.vjp(call, *(given[i] for i in places))
    found: list[Tensor | None] = [None] * 8
    for i, t in zip(places, pull(cotangents), strict=True):
        found[i] = t
    return found


def _additive(mask: Tensor | None) -> tuple[Tensor, ...]:
    return () if mask is None or mask.dtype == torch.bool else (mask,)
