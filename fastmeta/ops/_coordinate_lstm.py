"""The shared LSTM cell as raw operators, and the Functions that differentiate them.

Shapes: ``x [M, F]``, states and their cotangents ``[M, H]``, ``w_ih [4H, F]``, ``w_hh [4H, H]``,
``bias [4H]``. Nothing but the arguments is kept: the backward passes compute the gates again. The
derivative of the gradient is one operator as well; what comes after differentiates the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import Function, each, fold, needs_autograd, pull_back, unfold
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta.reference import coordinate_lstm as reference

_X, _H, _C, _W, _G = 1, 2, 4, 8, 16  # bits of `needs`: inputs, states, weights, cotangents
_BITS = (_X, _H, _C, _W, _W, _W)  # of x, h, c, w_ih, w_hh, bias
_SECOND_BITS = (_G, _G, *_BITS)

_FORWARD = define(
    "coordinate_lstm(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor bias) "
    "-> (Tensor, Tensor)",
    reference.coordinate_lstm,
)


def _with_zeros(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if given is None else given


def _gradient_of_reference(gh, gc, *given: Tensor) -> tuple[Tensor, ...]:
    (h, c), pull = torch.func.vjp(reference.coordinate_lstm, *given)
    return pull((_with_zeros(gh, h), _with_zeros(gc, c)))


def _second_of_reference(directions, gh, gc, *given: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of ``<directions, gradient>`` to gh, gc and what is given."""
    gh, gc = _with_zeros(gh, given[1]), _with_zeros(gc, given[1])
    gradients, pull = torch.func.vjp(_gradient_of_reference, gh, gc, *given)
    return pull(tuple(map(_with_zeros, directions, gradients)))


def _wanted(results, bits, needs: int) -> tuple[Tensor, ...]:
    """The results as raw operators return them: without elements where not wanted."""
    return tuple(
        r.contiguous() if needs & bit else r.new_empty(0)
        for r, bit in zip(results, bits, strict=True)
    )


def _backward(gh, gc, x, h, c, w_ih, w_hh, bias, needs):
    results = _gradient_of_reference(gh, gc, x, h, c, w_ih, w_hh, bias)
    return _wanted(results, _BITS, needs)


def _double_backward(ux, uh, uc, uw_ih, uw_hh, ub, gh, gc, x, h, c, w_ih, w_hh, bias, needs):
    given = (x, h, c, w_ih, w_hh, bias)
    results = _second_of_reference((ux, uh, uc, uw_ih, uw_hh, ub), gh, gc, *given)
    return _wanted(results, _SECOND_BITS, needs)


def _empty(bits, needs: int, *likes: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape if needs & bit else 0) for t, bit in zip(likes, bits, strict=True)
    )


_GIVEN = "Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor bias, int needs"
_BACKWARD = define(
    f"coordinate_lstm_backward(Tensor? gh, Tensor? gc, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda gh, gc, *args: _empty(_BITS, args[-1], *args[:-1]),
)
_DOUBLE_BACKWARD = define(
    "coordinate_lstm_double_backward(Tensor? ux, Tensor? uh, Tensor? uc, Tensor? uw_ih, "
    f"Tensor? uw_hh, Tensor? ub, Tensor? gh, Tensor? gc, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    fake=lambda *args: _empty(_SECOND_BITS, args[-1], args[9], args[9], *args[8:-1]),
)


def cell(x, h, c, w_ih, w_hh, bias) -> tuple[Tensor, Tensor]:
    """``h'`` and ``c'`` of arguments that fit."""
    given = (x, h, c, w_ih, w_hh, bias)
    if by_reference(_FORWARD, x.device):
        return reference.coordinate_lstm(*given)
    return (_Cell.call if needs_autograd(*given) else _Cell.forward)(*given)


def _adjacent(tensors) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


class _Cell(Function):
    """``(x, h, c, w_ih, w_hh, bias)``: h' and c'."""

    @staticmethod
    def forward(*given):
        return _backend.kernel(_FORWARD, given[0].device.type)(*_adjacent(given))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gh, gc):
        needs = _needs(ctx.needs_input_grad, _BITS)
        if (gh is None and gc is None) or not needs:
            return (None,) * 6
        given = (gh, gc, *ctx.saved_tensors)
        run = _Gradient.call if needs_autograd(*given) else _Gradient.forward
        return _places(run(*given, needs), _BITS, needs)

    @staticmethod
    def vmap(info, in_dims, *given):
        size = info.batch_size
        if any(dim is not None for dim in in_dims[3:]):
            return each(_Cell, size, in_dims, given)
        rows = fold(size, given[:3], in_dims)
        return tuple(unfold(r, size) for r in _Cell.call(*rows, *given[3:])), (0, 0)


class _Gradient(Function):
    """``(gh, gc, x, h, c, w_ih, w_hh, bias, needs)``: the wanted gradients."""

    @staticmethod
    def forward(*args):
        *given, needs = args
        run = _backend.kernel(_BACKWARD, given[2].device.type)
        results = run(*_adjacent(given), needs)
        return tuple(r for r, bit in zip(results, _BITS, strict=True) if needs & bit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *given, ctx.needs = inputs
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        nothing = (None,) * 9
        needs = _needs(ctx.needs_input_grad, _SECOND_BITS)
        if all(c is None for c in cotangents) or not needs:
            return nothing
        directions = _places(cotangents, _BITS, ctx.needs)
        given = (*directions, *ctx.saved_tensors)
        run = _Second.call if needs_autograd(*given) else _Second.forward
        found = _places(run(*given, needs), _SECOND_BITS, needs)
        there = (*(t is not None for t in given[6:8]), *(True,) * 6)
        return (*(f if t else None for f, t in zip(found, there, strict=True)), None)

    @staticmethod
    def vmap(info, in_dims, *args):
        *given, needs = args
        size = info.batch_size
        if any(dim is not None for dim in in_dims[5:8]) or needs & _W:
            return each(_Gradient, size, in_dims, args)
        rows = fold(size, given[:5], in_dims)
        results = _Gradient.call(*rows, *given[5:], needs)
        return tuple(unfold(r, size) for r in results), (0,) * len(results)


class _Second(Function):
    """``(ux, uh, uc, uw_ih, uw_hh, ub, gh, gc, x, h, c, w_ih, w_hh, bias, needs)``: the wanted
    derivatives of ``<u, gradient>`` to gh, gc, x, h, c and the weights."""

    @staticmethod
    def forward(*args):
        *given, needs = args
        run = _backend.kernel(_DOUBLE_BACKWARD, given[8].device.type)
        results = run(*_adjacent(given), needs)
        return tuple(r for r, bit in zip(results, _SECOND_BITS, strict=True) if needs & bit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *given, ctx.needs = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = [i for i, bit in enumerate(_SECOND_BITS) if ctx.needs & bit]

        def second(*given: Tensor | None) -> tuple[Tensor, ...]:
            results = _second_of_reference(given[:6], *given[6:])
            return tuple(results[i] for i in wanted)

        return *pull_back(second, ctx.saved_tensors, cotangents, ctx.needs_input_grad), None

    @staticmethod
    def vmap(info, in_dims, *args):
        *given, needs = args
        size = info.batch_size
        shared = (*in_dims[3:6], *in_dims[11:14])
        if any(dim is not None for dim in shared) or needs & _W:
            return each(_Second, size, in_dims, args)
        rows = fold(size, (*given[:3], *given[6:11]), (*in_dims[:3], *in_dims[6:11]))
        results = _Second.call(*rows[:3], *given[3:6], *rows[3:], *given[11:], needs)
        return tuple(unfold(r, size) for r in results), (0,) * len(results)


def _needs(asked, bits) -> int:
    needs = 0
    for wanted, bit in zip(asked, bits, strict=False):
        needs |= bit if wanted else 0
    return needs


def _places(results, bits, needs: int) -> tuple[Tensor | None, ...]:
    """The wanted results where they belong, None elsewhere."""
    found = iter(results)
    return tuple(next(found) if needs & bit else None for bit in bits)
