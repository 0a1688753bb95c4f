"""The head's inner loop as raw operators, and the Functions that differentiate it.

The operator and its vector-Jacobian product are one kernel each. The derivative of the latter is
taken of the reference, in plain torch, and so are all further ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import (
    Function,
    batch_rows,
    bits,
    chosen,
    needs_autograd,
    placed,
    pull_back,
    tasks_of,
)
from fastmeta._backend import by_reference
from fastmeta._library import define
from fastmeta.reference import head_inner_loop as reference

_ROWS = "Tensor features, Tensor labels, Tensor weight, Tensor? bias, Tensor? lr"
_NUMBERS = "float lr_value, float momentum, float weight_decay, int steps, bool gram"

_FORWARD = define(
    f"head_inner_loop({_ROWS}, Tensor? ways, Tensor? active, {_NUMBERS}, bool freeze, "
    "bool keep_steps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.raw_head_inner_loop,
)


def _like_results(v_weight, v_bias, features, labels, weight, bias, lr, *rest):
    needs = rest[-1]
    found = (features, weight, bias, lr)
    return tuple(
        weight.new_empty(tuple(t.shape), dtype=t.dtype)
        if needs >> i & 1
        else weight.new_empty(0, dtype=features.dtype if i == 0 else weight.dtype)
        for i, t in enumerate(found)
    )


_BACKWARD = define(
    f"head_inner_loop_backward(Tensor v_weight, Tensor? v_bias, {_ROWS}, Tensor taken, "
    f"Tensor probabilities, Tensor products, {_NUMBERS}, int exact, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_like_results,
)


def prefers_gram(rows: int, width: int, classes: int, steps: int) -> bool:
    """Whether products of rows with each other cost less than products with the weights.

    In multiplications of forward and backward pass, per task: 3/2 N^2 D for G and for dX,
    4 N^2 C for each step, 6 N C D once; against 7 N C D for each step.
    """
    return rows * (1.5 * width + 4 * classes * steps) < (7 * steps - 6) * classes * width


def run(tensors: tuple, numbers: tuple) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """New weight ``[T, C, D]``, bias, losses ``[T, K]`` and the steps taken ``[T]``.

    ``tensors`` are features, labels, weight ``[T, C, D]``, bias ``[T, C]``, lr ``[T, K]``, ways and
    active, ``numbers`` lr_value, momentum, weight_decay, steps, exact, freeze, as the reference
    takes them.
    """
    features, _, weight, bias, lr, _, _ = tensors
    if by_reference(_FORWARD, features.device):
        return reference.head_inner_loop(*tensors, *numbers)[:4]
    if needs_autograd(features, weight, bias, lr):
        found = _HeadInnerLoop.call(*tensors, *numbers)
    else:
        found = _raw(*tensors, *numbers, keep_steps=False)
    return found[0], found[1] if bias is not None else None, found[2], found[3]


def _raw(features, labels, weight, *rest, keep_steps: bool):
    *tensors, lr_value, momentum, weight_decay, steps, _, freeze = rest
    gram = prefers_gram(*features.shape[1:], weight.shape[1], steps)
    return _backend.kernel(_FORWARD, features.device.type)(
        *(features, labels, weight, *tensors),
        *(lr_value, momentum, weight_decay, steps, gram, freeze, keep_steps),
    )


class _HeadInnerLoop(Function):
    """``(features, labels, weight, bias, lr, ways, active, *numbers)`` -> the raw results."""

    @staticmethod
    def forward(*args):
        return _raw(*args, keep_steps=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, numbers = inputs[:7], inputs[7:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output[3:])
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v_weight, v_bias, *_):
        saved = ctx.saved_tensors  # read once, as checkpoints ask for it
        tensors, kept = saved[:7], saved[7:]
        weight, bias = tensors[2:4]
        if v_weight is None and v_bias is None:
            return (None,) * 13
        if v_weight is None:
            v_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if bias is None:
            v_bias = None
        elif v_bias is None:
            v_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
        places = (0, 2, 3, 4)
        needs = bits(ctx.needs_input_grad[at] for at in places)
        results = _backward(v_weight, v_bias, *tensors, *kept, *ctx.numbers, needs)
        return tuple(placed(results, needs, places, 13))

    @staticmethod
    def vmap(info, in_dims, *args):
        tasks = tasks_of(args[0], in_dims[0])
        folded = _fold(info.batch_size, tasks, args[:7], in_dims[:7])
        results = _HeadInnerLoop.call(*folded, *args[7:])
        return _unfold(results, info.batch_size, tasks)


def _backward(*args) -> tuple[Tensor, ...]:
    """The wanted cotangents."""
    if needs_autograd(*(a for a in args if isinstance(a, Tensor))):
        return _HeadBackward.call(*args)
    return _HeadBackward.forward(*args)


class _HeadBackward(Function):
    """``(v_weight, v_bias, *tensors, taken, probabilities, products, *numbers, needs)``."""

    @staticmethod
    def forward(v_weight, v_bias, features, labels, weight, bias, lr, ways, active, *rest):
        *kept, lr_value, momentum, weight_decay, steps, exact, _, needs = rest
        gram = kept[2].dim() == 3
        results = _backend.kernel(_BACKWARD, v_weight.device.type)(
            *(v_weight, v_bias, features, labels, weight, bias, lr, *kept),
            *(lr_value, momentum, weight_decay, steps, gram, exact, needs),
        )
        return chosen(results, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9])
        ctx.numbers, ctx.needs = inputs[12:-1], inputs[-1]

    @staticmethod
    def backward(ctx, *cotangents):
        v_weight, v_bias, features, labels, weight, bias, lr, ways, active = ctx.saved_tensors
        given = (v_weight, v_bias, features, weight, bias, lr)
        slots = chosen((2, 3, 4, 5), ctx.needs)

        def product(*full):
            """The vector-Jacobian product of the reference: what forward computes."""

            def loop(*inputs):
                now = list(full)
                for i, t in zip(slots, inputs, strict=True):
                    now[i] = t
                found = reference.head_inner_loop(
                    now[2], labels, now[3], now[4], now[5], ways, active, *ctx.numbers
                )
                return found.weight if bias is None else (found.weight, found.bias)

            _, pull = torch.func.vjp(loop, *(full[i] for i in slots))
            return pull(full[0] if bias is None else (full[0], full[1]))

        places = (0, 1, 2, 4, 5, 6)  # of `given` among the arguments
        wanted = [ctx.needs_input_grad[at] for at in places]
        return tuple(placed(pull_back(product, given, cotangents, wanted), 0b111111, places, 19))

    @staticmethod
    def vmap(info, in_dims, *args):
        tasks = tasks_of(args[0], in_dims[0])
        folded = _fold(info.batch_size, tasks, args[:12], in_dims[:12])
        results = _HeadBackward.call(*folded, *args[12:])
        return _unfold(results, info.batch_size, tasks)


def _fold(batch: int, tasks: int, tensors, dims) -> list[Tensor | None]:
    """A vmapped axis as more tasks; what is kept of the steps may be empty (``[0]``)."""
    folded = []
    for t, dim in zip(tensors, dims, strict=True):
        kept_empty = t is not None and t.numel() == 0 and t.dim() == (1 if dim is None else 2)
        if kept_empty and tasks > 0:
            folded.append(t.reshape(0))
        else:
            folded.append(batch_rows(t, dim, batch, tasks))
    return folded


def _unfold(results, batch: int, tasks: int) -> tuple[tuple[Tensor, ...], tuple]:
    """More tasks as a vmapped axis again; results that are not there stay empty."""
    unfolded = [
        r.new_empty(batch, 0)
        if r.dim() == 1 and r.shape[0] != batch * tasks
        else r.unflatten(0, (batch, tasks))
        for r in results
    ]
    return tuple(unfolded), (0,) * len(unfolded)
