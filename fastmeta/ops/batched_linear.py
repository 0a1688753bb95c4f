"""The task-batched affine map ``y_t = x_t W_t^T + b_t`` with few passes over memory in any order.

torch's own graph of a batched product leaves weight gradients transposed, copies them, and adds
the three terms of its second derivative one by one. Here every product is written in the layout it
is needed in, and the terms accumulate inside the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import Function, autocast, fold, needs_autograd, transformed, unfold
from fastmeta._library import define, dispatched
from fastmeta.reference import batched_linear as reference

_MM = define(
    "batched_mm(Tensor a, Tensor b, Tensor? base, bool bf16=False) -> Tensor", reference.batched_mm
)
_MMS_ = define(
    "batched_mms_(Tensor(a!)[] to, Tensor[] a, Tensor[] b, Tensor[] bases, int[] which, "
    "int[] bf16) -> ()",
    reference.batched_mms_,
)
NOTHING, ITSELF = -2, -1  # in `which` of batched_mms_
_ROWS = torch.contiguous_format
_KERNEL_DEVICE = "cpu" if dispatched(_MM.name, "cpu") else None


def batched_linear(
    x: Tensor, weight: Tensor, base: Tensor | None = None, *, nt: bool = True
) -> Tensor:
    """A linear layer whose weight differs from task to task: ``y_t = x_t W_t^T + base_t``.

    Args:
        x: ``[T, M, K]``.
        weight: ``[T, N, K]``, or ``[T, K, N]`` without `nt`; of any strides.
        base: ``[T, 1, N]`` (a bias) or ``[T, M, N]``, or None.
        nt: Whether the weight is stored ``[out, in]``, as in `nn.Linear`. Default True.

    Returns:
        ``[T, M, N]``. Under autocast the products are in its dtype; on a CPU in bfloat16 that is:
        x and weight are rounded to it, sums and results are float32.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.

    Differentiable to any order in x, weight and base. Sums are in the order of K on the CPU
    (float32 and float64), whatever the number of tasks and threads.
    """
    _check(x, weight, base, nt)
    return affine(x, weight, base, nt=nt)


def _check(x: Tensor, weight: Tensor, base: Tensor | None, nt: bool) -> None:
    """Raise one sentence for shapes, dtypes or devices that do not fit."""

    def expect(name: str, t: object, *shapes: tuple[int | str, ...]) -> None:
        like = isinstance(t, Tensor) and (t.dtype, t.device) == (x.dtype, x.device)
        if like and any(
            t.dim() == len(shape)
            and all(isinstance(n, str) or n == m for n, m in zip(shape, t.shape, strict=True))
            for shape in shapes
        ):
            return
        forms = " or ".join(str(list(shape)).replace("'", "") for shape in shapes)
        raise ValueError(
            f"batched_linear: {name} must be {forms}, {x.dtype} on {x.device} like x, "
            f"got {_checks.describe(t)}"
        )

    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in _checks.FLOATING:
        raise ValueError(
            "batched_linear: x must be a floating-point tensor [T, M, K], "
            f"got {_checks.describe(x)}"
        )
    tasks, rows, inner = x.shape
    expect("weight", weight, (tasks, "N", inner) if nt else (tasks, inner, "N"))
    if base is not None:
        outer = weight.shape[1 if nt else 2]
        expect("base", base, (tasks, 1, outer), (tasks, rows, outer))


class Landing(Protocol):
    """Memory that gradients of a weight ``[T, N, K]`` are written to where they are computed."""

    def place(self, differentiable: bool) -> tuple[Tensor, bool] | None:
        """The memory, and whether it already holds a gradient that this one adds to; None where
        there is none to write to now. What is not `differentiable` reaches the weight from there,
        without autograd."""
        ...


def rounds(x: Tensor) -> bool:
    """Whether layers round their factors to bfloat16 and sum in float32, as the kernels do in an
    autocast region of it: with results in float32 everything between the products is exact."""
    device = x.device.type
    return (
        device == _KERNEL_DEVICE
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.bfloat16
        and x.dtype != torch.float64
    )


def as_computed(x: Tensor, *others: Tensor | None) -> tuple[tuple[Tensor | None, ...], bool]:
    """All in the dtype that autocast asks for, and whether products are to round their factors."""
    if rounds(x):
        return tuple(None if t is None else t.float() for t in (x, *others)), True
    return autocast(x, *others), False


def product(a: Tensor, b: Tensor, base: Tensor | None = None, bf16: bool = False) -> Tensor:
    """``a b + base`` for ``[T, M, K]`` and ``[T, K, N]``, factors rounded where `bf16`; no
    derivative."""
    if has_kernel(a):
        return _backend.kernel(_MM, _KERNEL_DEVICE)(a, b, base, bf16)
    return reference.batched_mm(a, b, base, bf16)


Product = tuple[Tensor, Tensor, Tensor, Tensor | None, bool]
"""``(to, a, b, base, bf16)``: ``a b + base`` is written to `to`, which may be the base itself."""


def together(products: Sequence[Product]) -> None:
    """Products of the same tasks, all of one task before the next one's: what several read comes
    from memory once. One may read what another before it wrote. No derivative."""
    if not products:
        return
    to, a, b, bases, bf16 = (list(each) for each in zip(*products, strict=True))
    others: list[Tensor] = []
    which = []
    for out, base in zip(to, bases, strict=True):
        if base is None:
            which.append(NOTHING)
        elif base is out:
            which.append(ITSELF)
        else:
            which.append(len(others))
            others.append(base)
    _backend.kernel(_MMS_, to[0].device.type)(to, a, b, others, which, bf16)


def over_tasks(a: Tensor, b: Tensor, bf16: bool = False) -> Tensor:
    """The sum of ``a_t b_t`` over tasks, ``[1, M, N]``; no derivative."""
    if a.shape[1] > b.shape[2]:  # the kernel is faster where the second factor is the wider one
        return over_tasks(b.mT, a.mT, bf16).mT.contiguous()
    to = a.new_empty(1, a.shape[1], b.shape[2])
    together([(to, a, b, None, bf16)])
    return to


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel of its own serves products with `x`."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.device.type == _KERNEL_DEVICE
        and not _backend.use_reference()
    )


def affine(
    x: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    *,
    nt: bool = True,
    landing: Landing | None = None,
    exact: bool = False,
) -> Tensor:
    """:func:`batched_linear` without its checks.

    `landing` is where gradients of the weight may be written; those that are reach it without
    passing through autograd, unless they are differentiated themselves. What is `exact` is not
    rounded under autocast.
    """
    bf16 = False
    if not exact:
        (x, weight, base), bf16 = as_computed(x, weight, base)
    return _affine(x, weight, base, nt, landing, bf16)


def _affine(
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    nt: bool,
    landing: Landing | None,
    bf16: bool,
) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.batched_mm(x, weight.mT if nt else weight, base, bf16)
    args = (x, weight, base, nt, landing, bf16)
    return _Affine.call(*args) if needs_autograd(x, weight, base) else _Affine.forward(*args)


class Now:
    """How a derivative multiplies: ``mm(a, b, base, to)`` is ``a b + base``, where `to`, which may
    be the base itself, is memory that may be written; :meth:`run` ends it. Here one at once. Where
    `bf16`, factors are rounded to it."""

    lands = False
    """Whether results can be written to a :class:`Landing`."""

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16

    def __call__(
        self, a: Tensor, b: Tensor, base: Tensor | None = None, to: Tensor | None = None
    ) -> Tensor:
        return product(a, b, base, self.bf16)

    def alone(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        """What runs by itself, such as a product with a matrix that all tasks share."""
        return self(a, b, base)

    def sum_of_rows(self, x: Tensor) -> Tensor:
        """``[T, M, N] -> [T, 1, N]``."""
        return x.sum(1, keepdim=True, dtype=x.dtype)  # autocast on a GPU would widen it

    def run(self) -> None:
        pass


class Recorded(Now):
    """Products that autograd records, whose own derivatives may be asked for."""

    def __call__(
        self, a: Tensor, b: Tensor, base: Tensor | None = None, to: Tensor | None = None
    ) -> Tensor:
        return _affine(a, b, base, False, None, self.bf16)


class Together(Now):
    """Products that run in one call at the end, see :func:`together`; results are there then."""

    lands = True

    def __init__(self, bf16: bool = False) -> None:
        super().__init__(bf16)
        self.products: list[Product] = []

    def __call__(
        self, a: Tensor, b: Tensor, base: Tensor | None = None, to: Tensor | None = None
    ) -> Tensor:
        to = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if to is None else to
        self.products.append((to, a, b, base, self.bf16))
        return to

    def alone(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        return product(a, b, base, self.bf16)

    def sum_of_rows(self, x: Tensor) -> Tensor:
        # as a product: others read these rows too
        ones = x.new_ones(1, 1, 1).expand(x.shape[0], 1, x.shape[1])
        to = x.new_empty(x.shape[0], 1, x.shape[2])
        self.products.append((to, ones, x, None, False))
        return to

    def run(self) -> None:
        together(self.products)


def multiplier(differentiable: bool, like: Tensor, bf16: bool = False) -> Now:
    """How a pass over tensors such as `like` multiplies."""
    if differentiable:
        return Recorded(bf16)
    return Together(bf16) if has_kernel(like) else Now(bf16)


def weight_gradient(
    mm: Now, d_y: Tensor, x: Tensor, nt: bool, landing: Landing | None, differentiable: bool
) -> Tensor | None:
    """The gradient ``[T, N, K]`` (``[T, K, N]`` without `nt`) of the weight of ``y = x W^T``; None
    where it reaches the weight by its landing."""
    place = landing.place(differentiable) if landing is not None and mm.lands else None
    to, more = (None, False) if place is None else place
    left, right = (d_y, x) if nt else (x, d_y)
    d_weight = mm(left.mT, right, to if more else None, to)
    return d_weight if to is None or differentiable else None


class _Affine(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, base: Tensor | None, nt: bool, landing, bf16: bool
    ) -> Tensor:
        return product(x, weight.mT if nt else weight, base, bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, base, ctx.nt, ctx.landing, ctx.bf16 = inputs
        ctx.save_for_backward(x, weight)
        ctx.base_rows = 0 if base is None else base.shape[1]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], ctx.base_rows if ctx.needs_input_grad[2] else 0)
        if torch.is_grad_enabled() or transformed():
            found = _AffineGrad.call(d_y, x, weight, ctx.nt, needs, ctx.landing, ctx.bf16)
        else:
            found = _affine_grad(d_y, x, weight, ctx.nt, needs, ctx.landing, ctx.bf16, False)
        return (*found, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        x, weight, base = fold(info.batch_size, args[:3], in_dims[:3])
        y = _affine(x, weight, base, args[3], None, args[5])
        return unfold(y, info.batch_size), 0


def _affine_grad(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    nt: bool,
    needs: tuple[bool, bool, int],
    landing: Landing | None,
    bf16: bool,
    differentiable: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mm = Now(bf16) if transformed(d_y, x) else multiplier(False, d_y, bf16)
    d_x = mm(d_y, weight if nt else weight.mT) if needs[0] else None
    d_weight = weight_gradient(mm, d_y, x, nt, landing, differentiable) if needs[1] else None
    d_base = d_y if needs[2] else None
    if needs[2] == 1:
        d_base = mm.sum_of_rows(d_y)
    mm.run()
    return d_x, d_weight, d_base


def second_gradients(
    mm: Now,
    g_x: Tensor | None,
    g_weight: Tensor | None,
    g_base: Tensor | None,
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    nt: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to d_y and x of ``(dy, x, W) -> (dx, dW, dbase)``; that to the weight is
    ``weight_gradient(mm, d_y, g_x, ...)``.

    `g_x`, `g_weight` and `g_base` are those of the results, None where nothing came.
    """
    d_dy = d_x = mine = None
    if needs[0]:
        d_dy = g_base if g_base is None else g_base.expand_as(d_y)
        for left, right in ((g_x, weight), (x, g_weight)):
            if left is not None and right is not None:
                d_dy = mine = mm(left, right.mT if nt else right, d_dy, mine)
    if needs[1] and g_weight is not None:
        d_x = mm(d_y, g_weight if nt else g_weight.mT)
    return d_dy, d_x


class _AffineGrad(Function):
    """``(dy, x, W) -> (dx, dW, dbase)``; its own derivative is made of differentiable products."""

    @staticmethod
    def forward(
        d_y: Tensor, x: Tensor, weight: Tensor, nt: bool, needs: tuple, landing, bf16: bool
    ) -> tuple:
        d_x, d_weight, d_base = _affine_grad(d_y, x, weight, nt, needs, landing, bf16, True)
        # An output may not be an input as it is.
        return d_x, d_weight, d_base.view_as(d_base) if d_base is d_y else d_base

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        d_y, x, weight, ctx.nt, _, ctx.landing, ctx.bf16 = inputs
        ctx.save_for_backward(d_y, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_base: Tensor | None
    ) -> tuple:
        d_y, x, weight = ctx.saved_tensors
        nt, needs, d_weight = ctx.nt, ctx.needs_input_grad, None
        differentiable = torch.is_grad_enabled() or transformed(g_x, g_weight, g_base)
        mm = multiplier(differentiable, x, ctx.bf16)
        d_dy, d_x = second_gradients(mm, g_x, g_weight, g_base, d_y, x, weight, nt, needs)
        if needs[2] and g_x is not None:
            d_weight = weight_gradient(mm, d_y, g_x, nt, ctx.landing, False)
        mm.run()
        return d_dy, d_x, d_weight, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
        batch, (nt, needs, _, bf16) = info.batch_size, args[3:]
        found = _AffineGrad.call(*fold(batch, args[:3], in_dims[:3]), nt, needs, None, bf16)
        found = tuple(g if g is None else unfold(g, batch) for g in found)
        return found, tuple(None if g is None else 0 for g in found)
