"""What all inner updates share: raw operators, and the Functions that differentiate them.

Three Functions, each the derivative of the one before: an update, its vector-Jacobian product, and
the vector-Jacobian product of that. All three are one kernel launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta import _backend
from fastmeta._autograd import Function, batch_rows, bits, needs_autograd, placed, tasks_of
from fastmeta._library import Op, define
from fastmeta.reference import inner_update as reference

_RATES = "Tensor? lr, Tensor? offsets, Tensor? active, Tensor? hypers"
_NUMBERS = "float lr_value, float[] values, int flags"
_X = "Tensor? params, Tensor? grads, Tensor? s1, Tensor? s2"
_V = "Tensor v0, Tensor? v1, Tensor? v2"
_C = "Tensor? c0, Tensor? c1, Tensor? c2, Tensor? c3, Tensor? c_lr, Tensor? c_hypers"
# results of the derivatives: cotangents of params, grads, s1, s2, of the outputs, of lr and hypers;
# a bit of `needs` says that one is wanted
_P, _G, _V0, _LR, _HYPERS = 0, 1, 4, 7, 8


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: as in ``<name>_update``.
        states: names of its state tensors.
        linear: in parameters, gradients and state, so that their derivatives need none of them.
        reference: the rule in plain torch.
    """

    name: str
    states: tuple[str, ...]
    linear: bool
    reference: Callable
    update: Op
    update_: Op
    update_list_: Op
    backward: Op
    double_backward: Op

    @classmethod
    def define(cls, name: str, states: tuple[str, ...], *, linear: bool) -> Rule:
        """Declare the rule's raw operators."""
        rule = getattr(reference, name)
        functional, in_place, lists = reference.raw_update(rule, len(states))
        own = f"{_RATES}, {_NUMBERS}, bool check_finite"
        derivative = f"{_RATES}, {_NUMBERS}, ScalarType grads_dtype, int needs"
        return cls(
            name,
            states,
            linear,
            rule,
            define(
                f"{name}_update(Tensor params, Tensor grads, Tensor? s1, Tensor? s2, {own}) "
                "-> (Tensor, Tensor, Tensor, Tensor)",
                functional,
            ),
            define(
                f"{name}_update_(Tensor(a!) params, Tensor grads, Tensor(b!)? s1, Tensor(c!)? s2, "
                f"{own}) -> Tensor",
                in_place,
            ),
            define(
                f"{name}_update_list_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] s1, "
                "Tensor(c!)[] s2, float lr, float[] values, int flags) -> ()",
                lists,
            ),
            define(
                f"{name}_update_backward({_V}, {_X}, {derivative}) -> ({_tensors(6)})",
                fake=lambda v0, *rest: _like_results(4, v0, rest),
            ),
            define(
                f"{name}_update_double_backward({_V}, {_X}, {_C}, {derivative}) -> ({_tensors(9)})",
                fake=lambda v0, *rest: _like_results(7, v0, rest),
            ),
        )

    @property
    def outputs(self) -> int:
        """Parameters and states."""
        return 1 + len(self.states)


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _like_results(count: int, v0: Tensor, rest: tuple) -> tuple[Tensor, ...]:
    """Empty results of a derivative; rest ends with lr, offsets, active, hypers, three numbers,
    the dtype of the gradients, needs."""
    lr, hypers, grads_dtype, needs = rest[-9], rest[-6], rest[-2], rest[-1]

    def result(bit: int, like: Tensor | None, dtype: torch.dtype) -> Tensor:
        return v0.new_empty(tuple(like.shape) if needs >> bit & 1 else (0,), dtype=dtype)

    rows = [
        result(i, v0, grads_dtype if i == _G and needs >> i & 1 else v0.dtype) for i in range(count)
    ]
    for bit, like in ((_LR, lr), (_HYPERS, hypers)):
        rows.append(result(bit, like, like.dtype if needs >> bit & 1 else v0.dtype))
    return tuple(rows)


def run(rule: Rule, params, grads, state, rates, numbers, check_finite):
    """The update: ``((params, *state), finite or None)``, differentiable twice.

    ``rates`` are lr, offsets, active, hypers and ``numbers`` lr_value, values, flags, as the raw
    operators take them.
    """
    if by_reference(rule, params):
        return reference.update(
            rule.reference, params, grads, state, *rates, *numbers, check_finite
        )
    padded = [*state, None, None][:2]
    args = (params, grads, *padded, *rates, *numbers, check_finite)
    lr, _, _, hypers = rates
    if needs_autograd(params, grads, *state, lr, hypers):
        results = _Update.call(rule, *args)
    else:
        results = _trim(rule, _backend.kernel(rule.update, params.device.type)(*args), check_finite)
    return results[: rule.outputs], results[-1] if check_finite else None


def run_(rule: Rule, params, grads, state, rates, numbers, check_finite) -> Tensor | None:
    """The update written over params and state; which rows are finite, or None."""
    padded = [*state, None, None][:2]
    args = (params, grads, *padded, *rates, *numbers, check_finite)
    if by_reference(rule, params):
        finite = rule.update_.reference(*args)
    else:
        finite = _backend.kernel(rule.update_, params.device.type)(*args)
    return finite if check_finite else None


def run_list_(rule: Rule, params, grads, state, lr: float, values, flags: int) -> None:
    """The update written over lists of tensors."""
    args = (params, grads, *[*state, [], []][:2], lr, values, flags)
    if by_reference(rule, params[0]):
        rule.update_list_.reference(*args)
    else:
        _backend.kernel(rule.update_list_, params[0].device.type)(*args)


def by_reference(rule: Rule, params: object) -> bool:
    """Whether plain torch serves: it was asked for, or the device has no kernel."""
    if not isinstance(params, Tensor):
        return _backend.use_reference()
    return _backend.by_reference(rule.update, params.device)


def _trim(rule: Rule, results, check_finite: bool) -> tuple[Tensor, ...]:
    """Without the empty results of states that the rule has not."""
    return (*results[: rule.outputs], *([results[3]] if check_finite else []))


class _Update(Function):
    @staticmethod
    def forward(rule, params, *rest):
        results = _backend.kernel(rule.update, params.device.type)(params, *rest)
        return _trim(rule, results, rest[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        rule, params, grads, s1, s2, lr, offsets, active, hypers, *numbers, check_finite = inputs
        needs = ctx.needs_input_grad
        if check_finite:
            finite = output[-1]
            ctx.mark_non_differentiable(finite)
            active = finite if active is None else finite & active
        decays = hypers is not None or numbers[1][0] != 0.0
        values_matter = not rule.linear or needs[5] or needs[8]
        ctx.rule, ctx.decays = rule, decays
        ctx.constants = (*numbers, grads.dtype)
        ctx.save_for_backward(
            params if values_matter and decays else None,
            *((grads, s1, s2) if values_matter else (None, None, None)),
            *(lr, offsets, active, hypers),
        )
        ctx.like, ctx.has_state = (params.shape, params.dtype, params.device), s1 is not None
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        rule: Rule = ctx.rule
        v = [*cotangents[: rule.outputs], None, None][:3]
        if all(c is None for c in v):
            return (None,) * 13
        need = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 13
        straight = need[1] and not ctx.decays  # then the Jacobian in params is the identity
        wanted = (need[1] and ctx.decays, *need[2:5], False, False, False, need[5], need[8])
        needs = bits(wanted)
        if straight:
            found[1] = v[0]
        if v[0] is None:
            shape, dtype, device = ctx.like
            v[0] = torch.zeros(shape, dtype=dtype, device=device)
        if needs:
            results = iter(_backward(rule, *v, *ctx.saved_tensors, *ctx.constants, needs))
            for i, flag in zip((1, 2, 3, 4, 0, 0, 0, 5, 8), wanted, strict=True):
                if flag:
                    found[i] = next(results)
        return tuple(found)

    @staticmethod
    def vmap(info, in_dims, rule, params, *rest):
        tasks = tasks_of(params, in_dims[1])
        tensors, constants = (params, *rest[:7]), rest[7:]
        folded = _fold(info.batch_size, tasks, tensors, in_dims[1:9], expand_rates=False)
        results = _Update.call(rule, *folded, *constants)
        return tuple(r.unflatten(0, (info.batch_size, tasks)) for r in results), (0,) * len(results)


def _chosen(results, needs: int, count: int) -> tuple[Tensor, ...]:
    """The wanted ones of `count` streams and the two sums."""
    bits = [*range(count), _LR, _HYPERS]
    return tuple(r for r, bit in zip(results, bits, strict=True) if needs >> bit & 1)


def _backward(rule: Rule, *args) -> tuple[Tensor, ...]:
    """The wanted cotangents; args are those of the raw operator."""
    if needs_autograd(*(a for a in args if isinstance(a, Tensor))):
        return _Backward.call(rule, *args)
    return _Backward.forward(rule, *args)


class _Backward(Function):
    @staticmethod
    def forward(rule, v0, *rest):
        results = _backend.kernel(rule.backward, v0.device.type)(v0, *rest)
        return _chosen(results, rest[-1], 4)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule = inputs[0]
        ctx.save_for_backward(*inputs[1:12])  # v0..v2, x, lr, offsets, active, hypers
        ctx.constants = inputs[12:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        *numbers, grads_dtype, needed = ctx.constants
        given = iter(cotangents)
        c = [next(given) if needed >> bit & 1 else None for bit in (0, 1, 2, 3, _LR, _HYPERS)]
        need = ctx.needs_input_grad
        # argument positions of: params, grads, s1, s2, v0, v1, v2, lr, hypers
        positions = (4, 5, 6, 7, 1, 2, 3, 8, 11)
        needs = bits(need[position] for position in positions)
        if needs and any(x is not None for x in c):
            args = (*tensors[:7], *c, *tensors[7:], *numbers, grads_dtype, needs)
            return tuple(placed(_double_backward(ctx.rule, *args), needs, positions, 17))
        return (None,) * 17

    @staticmethod
    def vmap(info, in_dims, rule, *args):
        return _vmap_derivative(_Backward, 7, info, in_dims, rule, args)


def _double_backward(rule: Rule, *args) -> tuple[Tensor, ...]:
    if needs_autograd(*(a for a in args if isinstance(a, Tensor))):
        return _DoubleBackward.call(rule, *args)
    return _DoubleBackward.forward(rule, *args)


class _DoubleBackward(Function):
    @staticmethod
    def forward(rule, v0, *rest):
        results = _backend.kernel(rule.double_backward, v0.device.type)(v0, *rest)
        return _chosen(results, rest[-1], 7)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule = inputs[0]

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(
            f"{ctx.rule.name}_update is differentiable twice, got a third derivative; "
            'fm.ops.use_impl("reference") differentiates to any order'
        )

    @staticmethod
    def vmap(info, in_dims, rule, *args):
        return _vmap_derivative(_DoubleBackward, 11, info, in_dims, rule, args)


def _vmap_derivative(function: type[Function], streams: int, info, in_dims, rule: Rule, args):
    """A vmapped axis as more tasks. args: the streams ``[T, P]`` (for the double backward then
    c_lr and c_hypers), lr, offsets, active, hypers, constants."""
    batch, tasks = info.batch_size, tasks_of(args[0], in_dims[1])
    end = len(args) - 5  # lr_value, values, flags, grads_dtype, needs
    lr, hypers, needs = args[end - 4], args[end - 1], args[-1]
    sums = (needs >> _LR & 3) != 0
    shared = {  # one row for all tasks: its gradients are summed again below
        _LR: lr is not None and tasks_of(lr, in_dims[1 + end - 4]) == 1,
        _HYPERS: hypers is not None and tasks_of(hypers, in_dims[1 + end - 1]) == 1,
    }
    folded = _fold(
        batch,
        tasks,
        args[:end],
        in_dims[1 : 1 + end],
        expand_rates=sums or streams == 11,
        streams=streams,
    )
    results = list(function.call(rule, *folded, *args[end:]))
    results = [r.unflatten(0, (batch, tasks)) for r in results]
    wanted = [bit for bit in (*range(7), _LR, _HYPERS) if needs >> bit & 1]
    for i, bit in enumerate(wanted):
        if shared.get(bit):
            results[i] = results[i].sum(1, keepdim=True)
    return tuple(results), (0,) * len(results)


def _fold(batch: int, tasks: int, tensors, dims, *, expand_rates: bool, streams: int = 4) -> tuple:
    """Turn a vmapped axis into more tasks. After the streams come rates ``[1 or T, C]``, except
    offsets (third from last) and active (bool ``[T]``, second from last)."""
    if dims[-3] is not None:
        raise ValueError("segments must be the same for the whole vmapped axis")
    folded = []
    for i, (t, dim) in enumerate(zip(tensors, dims, strict=True)):
        rate = streams <= i < len(tensors) - 3 or i == len(tensors) - 1
        untouched = rate and t is not None and dim is None and tasks_of(t, dim) == 1
        if i == len(tensors) - 3 or (untouched and not expand_rates):
            folded.append(t)
        else:
            folded.append(batch_rows(t, dim, batch, tasks))
    return tuple(folded)
