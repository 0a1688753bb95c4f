"""Attention as raw operators, and the Functions that differentiate them.

Shapes: ``q, d_out [B, H, Lq, .]``, ``k, v [B, Hk, Lk, .]``, ``stats [B, H, Lq, 2]``; a mask (bool,
or additive in the dtype of computation) with four axes of size 1 or the full one; seed an int64
scalar. With places ``[B, L]`` texts lie one after another in ``[T, H, M, .]`` (see `Setting`).
Nothing of the size Lq x Lk is kept: kernels rebuild the weights from ``stats`` (see
`reference.attention.forward`), in the gradient and in its derivative. What comes after that, and
every derivative with respect to a mask, differentiates the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
    bits,
    chosen,
    dense,
    each,
    needs_autograd,
    placed,
    unfold,
)
from fastmeta._backend import by_reference
from fastmeta._dtypes import wide_dtype
from fastmeta._library import define
from fastmeta.reference import attention as reference
from fastmeta.reference.attention import Setting, empty_like

_SETTING = "Tensor? places, float scale, int lower, int upper, float dropout_p, int period"


def _forward(q, k, v, mask, seed, places, *numbers):
    return reference.forward(q, k, v, mask, seed, Setting(*numbers, places=places))


def _wanted(needs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors like those whose bit is set, without elements for the others."""
    return tuple(
        empty_like(t, t.shape[3]) if needs >> i & 1 else t.new_empty(0)
        for i, t in enumerate(tensors)
    )


_ATTENTION = define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, {_SETTING}) "
    "-> (Tensor, Tensor)",
    _forward,
)
# bits of `needs`: the results in their order
_BACKWARD = define(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor stats, Tensor? mask, "
    f"Tensor? seed, {_SETTING}, int needs) -> (Tensor, Tensor, Tensor)",
    fake=lambda d_out, q, k, v, *rest: _wanted(rest[-1], q, k, v),
)
_DOUBLE_BACKWARD = define(
    "attention_double_backward(Tensor? a, Tensor? b, Tensor? c, Tensor d_out, Tensor q, Tensor k, "
    f"Tensor v, Tensor stats, Tensor? mask, Tensor? seed, {_SETTING}, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda a, b, c, d_out, q, k, v, *rest: _wanted(rest[-1], d_out, q, k, v),
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, setting: Setting
) -> Tensor:
    """`fm.ops.attention` of checked arguments; the result is laid out as q is."""
    learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    plain = by_reference(_ATTENTION, q.device) or setting.softcap or learned
    if plain or _too_wide(q, v):
        return reference.attention(q, k, v, mask, seed, setting)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(wide_dtype(q.dtype))
    if needs_autograd(q, k, v, mask):
        return _Attend.call(q, k, v, mask, seed, setting)[0]
    return _Attend.forward(q, k, v, mask, seed, setting)[0]


def _too_wide(q: Tensor, v: Tensor) -> bool:
    """Whether heads are wider than a GPU's shared memory holds them, to second order."""
    widest = max(q.shape[3], v.shape[3])
    if q.device.type != "cuda" or widest <= 64 or _backend.requested() != "auto":
        return False
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    most = 256 if shared >= 227 * 1024 else 128
    return widest > (most // 2 if q.dtype == torch.float64 else most)


def takes_places(q: Tensor) -> bool:
    """Whether a kernel serves texts that lie one after another."""
    return q.device.type == "cpu" and not by_reference(_ATTENTION, q.device)


def _arguments(s: Setting) -> tuple:
    return s.places, s.scale, s.lower, s.upper, s.dropout_p, s.period


def _fold(batch: int, dims: tuple, mask_at: int, args: tuple) -> list[Tensor | None]:
    """A vmapped axis of every tensor as more rows of its first axis. The mask is at `mask_at`, the
    seed behind it; a mask that all samples and rows share stays so."""
    if dims[mask_at + 1] is not None:
        raise ValueError("attention: seed must be shared by all samples of vmap, got one for each")
    q, q_dim = args[mask_at - 1], dims[mask_at - 1]  # stats or v, which has all rows
    rows = q.shape[0 if q_dim is None else int(q_dim == 0)]
    folded: list[Tensor | None] = []
    for i, (t, dim) in enumerate(zip(args[: mask_at + 1], dims, strict=False)):
        if t is None or (i == mask_at and dim is None and t.shape[0] == 1):
            folded.append(t)
            continue
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        folded.append(t.expand(batch, rows, *t.shape[2:]).flatten(0, 1))
    return [*folded, args[mask_at + 1]]


class _Attend(Function):
    """``(q, k, v, mask, seed, setting)`` -> ``(out, stats)`` by the kernel."""

    @staticmethod
    def forward(q, k, v, mask, seed, setting):
        kernel = _backend.kernel(_ATTENTION, q.device.type)
        return kernel(*map(dense, (q, k, v)), mask, seed, *_arguments(setting))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.setting = inputs[5]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_out, _):
        q, k, v, mask, seed, stats = ctx.saved_tensors
        if d_out is None:
            return (None,) * 6
        if ctx.needs_input_grad[3]:
            found = reference.gradients(d_out, q, k, v, mask, seed, ctx.setting)
            return *_only(ctx.needs_input_grad[:4], found), None, None
        needs = bits(ctx.needs_input_grad[:3])
        args = (d_out, q, k, v, stats, mask, seed, ctx.setting, needs)
        function = _Gradients.call if needs_autograd(d_out, q, k, v, mask) else _Gradients.forward
        return tuple(placed(function(*args), needs, range(3), 6))

    @staticmethod
    def vmap(info, in_dims, *args):
        if args[5].places is not None:
            return each(_Attend, info.batch_size, in_dims, args)
        folded = _fold(info.batch_size, in_dims, 3, args)
        results = _Attend.call(*folded, args[5])
        return tuple(unfold(r, info.batch_size) for r in results), (0, 0)


def _only(wanted: tuple[bool, ...], found) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


class _Gradients(Function):
    """``(d_out, q, k, v, stats, mask, seed, setting, needs)`` -> the wanted ones of dq, dk, dv."""

    @staticmethod
    def forward(d_out, q, k, v, stats, mask, seed, setting, needs):
        kernel = _backend.kernel(_BACKWARD, q.device.type)
        given = map(dense, (d_out, q, k, v))
        results = kernel(*given, stats.contiguous(), mask, seed, *_arguments(setting), needs)
        return chosen(results, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.setting, ctx.needs = inputs[7:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        d_out, q, k, v, stats, mask, seed = ctx.saved_tensors
        found: list[Tensor | None] = [None] * 9
        if all(c is None for c in cotangents):
            return tuple(found)
        a, b, c = placed(cotangents, ctx.needs, range(3), 3)
        wanted = ctx.needs_input_grad
        if wanted[5]:
            *found[:4], found[5] = reference.second(
                a, b, c, d_out, q, k, v, mask, seed, ctx.setting
            )
            return _only(wanted, found)
        needs = bits(wanted[:4])
        args = (a, b, c, d_out, q, k, v, stats, mask, seed, ctx.setting, needs)
        tensors = (a, b, c, d_out, q, k, v, mask)
        function = _Second.call if needs_autograd(*tensors) else _Second.forward
        return tuple(placed(function(*args), needs, range(4), 9))

    @staticmethod
    def vmap(info, in_dims, *args):
        if args[7].places is not None:
            return each(_Gradients, info.batch_size, in_dims, args)
        folded = _fold(info.batch_size, in_dims, 5, args)
        results = _Gradients.call(*folded, *args[7:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)


class _Second(Function):
    """``(a, b, c, d_out, q, k, v, stats, mask, seed, setting, needs)``: the wanted derivatives of
    ``a dq + b dk + c dv`` with respect to d_out, q, k and v."""

    @staticmethod
    def forward(a, b, c, d_out, q, k, v, stats, mask, seed, setting, needs):
        kernel = _backend.kernel(_DOUBLE_BACKWARD, q.device.type)
        given = map(dense, (a, b, c, d_out, q, k, v))
        results = kernel(*given, stats.contiguous(), mask, seed, *_arguments(setting), needs)
        return chosen(results, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:10])
        ctx.setting, ctx.needs = inputs[10:]

    @staticmethod
    def backward(ctx, *cotangents):
        *primals, _, mask, seed = ctx.saved_tensors
        results = [i for i in range(4) if ctx.needs >> i & 1]
        pulled = reference.third(cotangents, results, primals, mask, seed, ctx.setting)
        return _only(ctx.needs_input_grad, [*pulled[:7], None, pulled[7], None, None, None])

    @staticmethod
    def vmap(info, in_dims, *args):
        if args[10].places is not None:
            return each(_Second, info.batch_size, in_dims, args)
        folded = _fold(info.batch_size, in_dims, 8, args)
        results = _Second.call(*folded, *args[10:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)
