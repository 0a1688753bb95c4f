"""The linear layer with low-rank terms as raw operators, and the Functions that differentiate them.

Shapes: rows ``x [M, K]`` and cotangents ``dy [M, N]`` of all tasks; ``weight [N, K]``, or quantised
with its ``weight_scale``; ``bias [1 or T, N]``, ``a [T, r, K]``, ``b [T, N, r]``; None or ``offsets
[T + 1]``. Everything is made of three products, ``x W^T + s B^T``, ``dy W + ds A`` and the products
``ds^T x`` of each task's rows; kernels serve the forward pass, its gradient and the derivative of
that. Gradients of W are plain products over all rows. What comes after differentiates the
reference. Where `bf16`, products with W or gradients of it round both factors to bfloat16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
    batch_rows,
    dense,
    each,
    fold,
    needs_autograd,
    pull_back,
    unfold,
)
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta.ops.batched_linear import product
from fastmeta.reference import lora_linear as reference

_FORWARD = define(
    "lora_linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor a, Tensor b, "
    "Tensor? offsets, float scale, bool bf16=False) -> (Tensor, Tensor)",
    reference.lora_linear,
)
_X, _W, _BIAS, _A, _B = 1, 2, 4, 8, 16  # bits of `needs`
_DY = _BIAS  # of the second derivative, whose first result takes the place of the bias


def _empty(like: Tensor, shape: tuple[int, ...], wanted: int = 1) -> Tensor:
    return like.new_empty(shape if wanted else 0)


# what `needs` does not name has no elements; the gradient of the bias is that of each task
_BACKWARD = define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? weight_scale, Tensor a, "
    "Tensor b, Tensor s, Tensor? offsets, float scale, int needs, bool bf16=False) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, weight_scale, a, b, s, offsets, scale, needs, bf16=False: (
        _empty(x, x.shape, needs & _X),
        _empty(dy, (a.shape[0], dy.shape[1]), needs & _BIAS),
        _empty(a, a.shape, needs & _A),
        _empty(b, b.shape, needs & _B),
    ),
)
_DOUBLE_BACKWARD = define(
    "lora_linear_double_backward(Tensor? gx, Tensor? gbias, Tensor? ga, Tensor? gb, Tensor dy, "
    "Tensor x, Tensor weight, Tensor? weight_scale, Tensor a, Tensor b, Tensor s, "
    "Tensor? offsets, float scale, int needs, bool bf16=False) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda gx, gbias, ga, gb, dy, x, w, w_scale, a, b, s, offsets, scale, needs, bf16=False: (
        _empty(dy, dy.shape, needs & _DY),
        _empty(x, x.shape, needs & _X),
        _empty(a, a.shape, needs & _A),
        _empty(b, b.shape, needs & _B),
    ),
)


def has_kernel(device: torch.device) -> bool:
    """Whether a kernel serves the operator here, rather than its reference."""
    return not by_reference(_FORWARD, device)


def lora_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: Tensor | None,
    scale: float,
    bf16: bool,
) -> Tensor:
    """``x W^T + bias_t + scale (x A_t^T) B_t^T``, ``[M, N]``, of arguments that fit."""
    given = (x, weight, weight_scale, bias, a, b, offsets, scale, bf16)
    if by_reference(_FORWARD, x.device) or _too_wide(a):
        with _as_rounded(bf16):
            return reference.lora_linear(*given)[0]
    if needs_autograd(x, weight, bias, a, b):
        return _Forward.call(*given)[0]
    return _Forward.forward(*given)[0]


def _too_wide(a: Tensor) -> bool:
    """Whether ranks are larger than a GPU's registers hold."""
    return a.device.type == "cuda" and a.shape[1] > 128 and _backend.requested() == "auto"


class _Forward(Function):
    """``(x, weight, weight_scale, bias, a, b, offsets, scale, bf16)``: y, and s."""

    @staticmethod
    def forward(x, weight, weight_scale, bias, a, b, offsets, scale, bf16):
        bias = None if bias is None else dense(bias)
        return _backend.kernel(_FORWARD, x.device.type)(
            x.contiguous(), weight, weight_scale, bias, dense(a), dense(b), offsets, scale, bf16
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, weight_scale, bias, a, b, offsets, ctx.scale, ctx.bf16 = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.bias_rows = 0 if bias is None else bias.shape[0]
        ctx.save_for_backward(x, weight, weight_scale, a, b, output[1], offsets)

    @staticmethod
    def backward(ctx, dy, _):
        nothing = (None,) * 9
        if dy is None:
            return nothing
        x, weight, weight_scale, a, b, s, offsets = ctx.saved_tensors
        wanted = (0, 1, 3, 4, 5)  # places of x, weight, bias, a, b
        bits = (_X, _W, _BIAS, _A, _B)
        needs = sum(bit for i, bit in zip(wanted, bits, strict=True) if ctx.needs_input_grad[i])
        given = (dy, x, weight, weight_scale, a, b, s, offsets, ctx.scale, ctx.bias_rows, needs)
        given = (*given, ctx.bf16)
        run = _Gradient.call if needs_autograd(dy, x, weight, a, b) else _Gradient.forward
        results = iter(run(*given))
        found = list(nothing)
        for i, bit in zip(wanted, bits, strict=True):
            if needs & bit:
                found[i] = next(results)
        return tuple(found)

    @staticmethod
    def vmap(info, in_dims, x, weight, weight_scale, bias, a, b, offsets, scale, bf16):
        size = info.batch_size
        args = (x, weight, weight_scale, bias, a, b, offsets, scale, bf16)
        if in_dims[1] is not None or in_dims[2] is not None:
            return each(_Forward, size, in_dims, args)
        x, a, b = fold(size, (x, a, b), (in_dims[0], *in_dims[4:6]))
        if in_dims[3] is not None:
            bias = batch_rows(bias, in_dims[3], size, a.shape[0] // size)
        elif bias is not None and bias.shape[0] > 1:
            bias = bias.repeat(size, 1)
        offsets = _repeat(offsets, size, x.shape[0])
        y, s = _Forward.call(x, weight, weight_scale, bias, a, b, offsets, scale, bf16)
        return (unfold(y, size), unfold(s, size)), (0, 0)


class _Gradient(Function):
    """``(dy, x, weight, weight_scale, a, b, s, offsets, scale, bias_rows, needs, bf16)``: the
    wanted ones of dx, dW, dbias, da, db."""

    @staticmethod
    def forward(dy, x, weight, weight_scale, a, b, s, offsets, scale, bias_rows, needs, bf16):
        dy, x = dy.contiguous(), x.contiguous()
        d_weight = _product(dy.mT, x, None, bf16) if needs & _W else None
        dx, d_bias, d_a, d_b = _backend.kernel(_BACKWARD, x.device.type)(
            dy, x, weight, weight_scale, dense(a), dense(b), s, offsets, scale, needs & ~_W, bf16
        )
        if needs & _BIAS and bias_rows < d_bias.shape[0]:
            d_bias = d_bias.sum(0, keepdim=True)
        results = ((_X, dx), (_W, d_weight), (_BIAS, d_bias), (_A, d_a), (_B, d_b))
        return tuple(result for bit, result in results if needs & bit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:8])
        ctx.scale, ctx.bias_rows, ctx.needs, ctx.bf16 = inputs[8:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, x, weight, weight_scale, a, b, s, offsets = ctx.saved_tensors
        given = iter(cotangents)
        cotangents = [next(given) if ctx.needs & bit else None for bit in (_X, _W, _BIAS, _A, _B)]
        places = ((0, _DY), (1, _X), (2, _W), (4, _A), (5, _B))
        needs = sum(bit for i, bit in places if ctx.needs_input_grad[i])
        found: list[Tensor | None] = [None] * 12
        if needs and any(c is not None for c in cotangents):
            tensors = (*cotangents, dy, x, weight, weight_scale, a, b)
            function = _Second.call if needs_autograd(*tensors) else _Second.forward
            more = (s, offsets, ctx.scale, ctx.bias_rows, needs, ctx.bf16)
            results = iter(function(*tensors, *more))
            for i, bit in places:
                if needs & bit:
                    found[i] = next(results)
        return tuple(found)

    @staticmethod
    def vmap(info, in_dims, *args):
        dy, x, weight, weight_scale, a, b, s, offsets, scale, bias_rows, needs, bf16 = args
        size = info.batch_size
        if in_dims[2] is not None or in_dims[3] is not None or needs & _W:
            return each(_Gradient, size, in_dims, args)
        dims = (*in_dims[:2], *in_dims[4:7])
        dy, x, a, b, s = fold(size, (dy, x, a, b, s), dims)
        offsets = _repeat(offsets, size, x.shape[0])
        given = (dy, x, weight, weight_scale, a, b, s, offsets, scale, a.shape[0], needs, bf16)
        results = [unfold(r, size) for r in _Gradient.call(*given)]
        if needs & _BIAS and bias_rows == 1:
            at = bool(needs & _X)
            results[at] = results[at].sum(1, keepdim=True)
        return tuple(results), (0,) * len(results)


class _Second(Function):
    """``(gx, gW, gbias, ga, gb, dy, x, weight, weight_scale, a, b, s, offsets, scale, bias_rows,
    needs, bf16)``: the wanted derivatives of ``gx dx + gW dW + gbias dbias + ga da + gb db`` to dy,
    x, W, a and b."""

    @staticmethod
    def forward(
        gx,
        gw,
        gbias,
        ga,
        gb,
        dy,
        x,
        weight,
        weight_scale,
        a,
        b,
        s,
        offsets,
        scale,
        bias_rows,
        needs,
        bf16,
    ):
        dy, x = dy.contiguous(), x.contiguous()
        gx, gbias, ga, gb = (None if t is None else t.contiguous() for t in (gx, gbias, ga, gb))
        d_dy, d_x, d_a, d_b = _backend.kernel(_DOUBLE_BACKWARD, x.device.type)(
            *(gx, gbias, ga, gb, dy, x, weight, weight_scale, dense(a), dense(b), s),
            *(offsets, scale, needs & ~_W, bf16),
        )
        d_weight = None
        if gw is not None:
            if needs & _DY:
                d_dy = _product(x, gw.mT, d_dy, bf16)
            if needs & _X:
                d_x = _product(dy, gw, d_x, bf16)
        if needs & _W:
            d_weight = torch.zeros_like(weight) if gx is None else _product(dy.mT, gx, None, bf16)
        results = ((_DY, d_dy), (_X, d_x), (_W, d_weight), (_A, d_a), (_B, d_b))
        return tuple(result for bit, result in results if needs & bit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:11], inputs[12])
        ctx.scale, ctx.bias_rows, ctx.needs, ctx.bf16 = inputs[13:]

    @staticmethod
    def backward(ctx, *cotangents):
        *given, offsets = ctx.saved_tensors
        weight = slice(7, 9) if given[8] is not None else slice(0)  # of few bits: no derivative
        fixed, given[weight] = given[weight], [None] * len(given[weight])
        wanted = [i for i, bit in enumerate((_DY, _X, _W, _A, _B)) if ctx.needs & bit]

        def second(*full):
            full = list(full)
            full[weight] = fixed
            results = _second_of_reference(*full, offsets, ctx.scale, ctx.bias_rows, ctx.bf16)
            return tuple(results[i] for i in wanted)

        return *pull_back(second, given, cotangents, ctx.needs_input_grad), *[None] * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        gx, gw, gbias, ga, gb, dy, x, weight, weight_scale, a, b, s, offsets = args[:13]
        scale, needs, bf16 = args[13], *args[15:]
        size = info.batch_size
        if any(in_dims[i] is not None for i in (1, 7, 8)) or needs & _W or gw is not None:
            return each(_Second, size, in_dims, args)
        tensors = (gx, ga, gb, dy, x, a, b, s)
        dims = (in_dims[0], *in_dims[3:7], *in_dims[9:12])
        gx, ga, gb, dy, x, a, b, s = fold(size, tensors, dims)
        if gbias is not None:
            gbias = batch_rows(gbias, in_dims[2], size, a.shape[0] // size)
        offsets = _repeat(offsets, size, x.shape[0])
        given = (gx, None, gbias, ga, gb, dy, x, weight, weight_scale, a, b, s, offsets, scale)
        results = _Second.call(*given, 0 if gbias is None else gbias.shape[0], needs, bf16)
        return tuple(unfold(r, size) for r in results), (0,) * len(results)


def _second_of_reference(
    gx, gw, gbias, ga, gb, dy, x, weight, weight_scale, a, b, offsets, scale, bias_rows, bf16
):
    """Derivatives to dy, x, W, a and b; that to a quantised W is None."""
    dense_weight = weight_scale is None

    def gradient(dy, x, a, b, *w):
        bias = dy.new_zeros(bias_rows or 1, dy.shape[1])

        def forward(x, bias, a, b, *w):
            given = (*w,) if dense_weight else (weight,)
            given = (x, *given, weight_scale, bias, a, b, offsets, scale, bf16)
            return reference.lora_linear(*given)[0]

        _, pull = torch.func.vjp(forward, x, bias, a, b, *w)
        return pull(dy)

    w = (weight,) if dense_weight else ()
    (d_x, d_bias, d_a, d_b, *d_w), pull = torch.func.vjp(gradient, dy, x, a, b, *w)
    pairs = ((gx, d_x), (gbias, d_bias), (ga, d_a), (gb, d_b), *((gw, d) for d in d_w))
    cotangents = tuple(torch.zeros_like(d) if g is None else g for g, d in pairs)
    d_dy, d_x, d_a, d_b, *d_w = pull(cotangents)
    return d_dy, d_x, d_w[0] if d_w else None, d_a, d_b


def _as_rounded(bf16: bool) -> AbstractContextManager:
    """Within, autocast leaves the reference's products alone if `bf16` tells which are rounded."""
    return torch.autocast("cpu", enabled=False) if bf16 else nullcontext()


def _product(a: Tensor, b: Tensor, base: Tensor | None, bf16: bool) -> Tensor:
    """``a b + base`` of matrices."""
    if bf16:
        base = None if base is None else base.unsqueeze(0)
        return product(a.unsqueeze(0), b.unsqueeze(0), base, bf16).squeeze(0)
    return a @ b if base is None else torch.addmm(base, a, b)


def _repeat(offsets: Tensor | None, size: int, rows: int) -> Tensor | None:
    """The offsets of `size` times the tasks, in `rows` rows."""
    if offsets is None:
        return None
    first = torch.arange(size, device=offsets.device).unsqueeze(1) * (rows // size)
    return torch.cat([(first + offsets[:-1]).flatten(), offsets.new_full((1,), rows)])
