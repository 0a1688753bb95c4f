"""Attention with closed first and second derivatives that keep nothing of the size Lq x Lk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._checks import describe
from fastmeta._settings import is_integer
from fastmeta.ops import _attention
from fastmeta.reference.attention import Setting


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    offset: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """``dropout(softmax(cap(scale q k^T) + mask)) v``; a row that attends no key is zero.

    Args:
        q: ``[B, H, Lq, D]``, float32, float64, bfloat16 or float16 (computed in float32), D >= 1.
        k: ``[B, Hk, Lk, D]`` of the same dtype and device, H a multiple of Hk (grouped heads).
        v: ``[B, Hk, Lk, E]``; E is D in most models.
        mask: bool (True attends) or floating point (added to the scores; -inf excludes), whose axes
            broadcast to ``[B, H, Lq, Lk]``. It is read as it is: ``[B, 1, 1, Lk]`` needs no copy.
        causal: Query i attends keys ``j <= i + offset`` only. Default False.
        scale: Factor of the scores. Default ``D ** -0.5``.
        dropout_p: Probability in [0, 1) that a weight is dropped; the others are divided by ``1 -
            dropout_p``. Default 0.
        seed: Integer, or int64 scalar tensor; required with dropout. What is dropped is a function
            of the seed and the weight's four indices alone, the same on every device, so that a
            repeated call and all derivatives see the same.
        window: Query i attends keys ``i + offset - left <= j <= i + offset + right`` only; a tuple
            (left, right), or one number >= 0 for both. Default None: all.
        offset: Place of the first query among the keys, for `causal` and `window`: the length of
            what was cached, or of a prefix. Default 0, as in torch's ``is_causal``.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` before the mask, > 0. Default
            None. It runs as plain torch operations on every device.

    Returns:
        ``[B, H, Lq, E]`` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, head counts that are not multiples, a
            number out of its range, dropout without a seed.

    Note:
        Differentiable in reverse mode to any order in q, k, v and an additive mask, also under
        ``torch.func.grad`` and ``vmap``; forward mode raises. First and second derivatives in q, k
        and v are one kernel each; the derivative of a mask, and third derivatives, are compositions
        that do build Lq x Lk tensors. Samples of a ``vmap`` see the same dropout. Two runs give
        equal bits, whatever the number of threads.
    """
    check_operands(q, k, v)
    mask = check_mask(mask, (*q.shape[:3], k.shape[2]), q.device)
    setting, seed = check_setting(q, k, causal, scale, dropout_p, seed, window, offset, softcap)
    return _attention.attend(q, k, v, mask, seed, setting).contiguous()


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Require tensors of four axes that fit together."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        fits = isinstance(t, Tensor) and t.dtype in _checks.FLOATING and t.dim() == 4
        if not fits:
            raise ValueError(
                f"attention: {name} must be a floating-point tensor [B, H, L, D], got {describe(t)}"
            )
        if (t.dtype, t.device) != (q.dtype, q.device):
            raise ValueError(
                f"attention: {name} must have the dtype and device of q, {describe(q)}, "
                f"got {describe(t)}"
            )
    batch, heads, _, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if width < 1:
        raise ValueError(f"attention: head size D must be at least 1, got {describe(q)}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"attention: k must be [{batch}, Hk, Lk, {width}] as q is {list(q.shape)}, "
            f"got {describe(k)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: v must be [{batch}, {groups}, {keys}, E] as k is {list(k.shape)}, "
            f"got {describe(v)}"
        )
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(
            f"attention: the heads of q must be a multiple of those of k, got H = {heads} and "
            f"Hk = {groups}"
        )


def check_mask(mask: Tensor | None, full: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The mask with four axes, that broadcasts to the `full` ones."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention: mask must be a bool or floating-point tensor that broadcasts to "
            f"[B, H, Lq, Lk] = {list(full)}, got {describe(mask)}"
        )
    fits = mask.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"attention: mask must broadcast to [B, H, Lq, Lk] = {list(full)}, got {describe(mask)}"
        )
    if mask.device != device:
        raise ValueError(f"attention: mask must be on {device}, got {describe(mask)}")
    return mask[(None,) * (4 - mask.dim())]


def check_setting(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    window: int | tuple[int, int] | None,
    offset: int,
    softcap: float | None,
) -> tuple[Setting, Tensor | None]:
    """The numbers of a call in the form of kernels, and the seed as an int64 scalar."""
    queries, keys, width = q.shape[2], k.shape[2], q.shape[3]
    scale = width**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"attention: scale must be a finite number, got {describe(scale)}")
    _checks.in_range("attention", "dropout_p", dropout_p, at_least=0, below=1)
    if softcap is not None:
        _checks.in_range("attention", "softcap", softcap, above=0)
    if not is_integer(offset):
        raise ValueError(f"attention: offset must be an integer, got {describe(offset)}")
    lower, upper = -queries, keys
    if window is not None:
        left, right = (
            window
            if isinstance(window, (tuple, list)) and len(window) == 2
            else (
                window,
                window,
            )
        )
        for side in (left, right):
            if not is_integer(side) or side < 0:
                raise ValueError(
                    "attention: window must be an integer >= 0 or two of them (left, right), "
                    f"got {window!r}"
                )
        lower, upper = max(lower, offset - left), min(upper, offset + right)
    if causal:
        upper = min(upper, offset)
    setting = Setting(
        float(scale),
        min(lower, keys),
        max(upper, -queries),
        float(dropout_p),
        q.shape[0],
        float(softcap or 0.0),
    )
    return setting, _checks.seed("attention", seed, q.device) if dropout_p else None
