"""What every differentiable operator needs around ``torch.autograd.Function``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call must be recorded: a gradient is wanted, or a functorch transform is active.

    Under forward-mode differentiation the answer is yes as well: the Function then raises, where
    the raw operator would return a tangent of zero without a word.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transformed(*tensors: Tensor | None) -> bool:
    """Whether tensors may carry axes or levels that only functional operators know: under a
    functorch transform, or in a backward pass that ``is_grads_batched`` runs for many cotangents.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in the dtype of the autocast region, if in one and not float64: before a Function, whose
    backward runs outside of the region on what it saved."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def outside_autocast(function: Callable) -> Callable:
    """The function with autocast off: products within are in the dtype of what it is given."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return run


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with :meth:`call`, a cheaper ``apply``. Its passes run outside of
    autocast: a kernel reads one dtype, and one product in another would be read as garbage."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward", "backward"):
            if name in vars(cls):
                setattr(cls, name, staticmethod(outside_autocast(getattr(cls, name))))

    @classmethod
    def call(cls, *args: Any) -> Any:
        """``apply`` for positional arguments.

        torch's ``apply`` binds the arguments to the signature of ``forward`` on every call, which
        costs more than the rest of the call and is needed only under functorch transforms.
        """
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # tensors that outlived their transform, as torch's own `apply` unwraps them
        args = [unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args]
        return super(torch.autograd.Function, cls).apply(*args)


def dense(t: Tensor | None) -> Tensor | None:
    """The same values with adjacent entries in the last axis, as kernels take them."""
    return t if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def bits(flags: Iterable[object]) -> int:
    """An integer whose bit i says whether the i-th flag is set: what a derivative is asked for."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def chosen(results: Iterable[Tensor], needs: int) -> tuple[Tensor, ...]:
    """The results whose bit is set."""
    return tuple(r for i, r in enumerate(results) if needs >> i & 1)


def placed(
    found: Iterable[Tensor | None], needs: int, places: Sequence[int], size: int
) -> list[Tensor | None]:
    """What :func:`chosen` left, each at the place of its bit among `size`; None elsewhere."""
    all_places: list[Tensor | None] = [None] * size
    left = iter(found)
    for bit, at in enumerate(places):
        if needs >> bit & 1:
            all_places[at] = next(left)
    return all_places


def tasks_of(tensor: Tensor, dim: int | None) -> int:
    """T of a tensor ``[T, ...]`` that carries a vmapped axis at `dim`."""
    return tensor.shape[1 if dim == 0 else 0]


def pull_back(
    function: Callable, given: Sequence[Tensor | None], cotangents: tuple, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Vector-Jacobian product of ``function(*given)``, of which some may be None: one gradient for
    each of them, None where it is missing or not `wanted`. Recorded by autograd."""
    places = [i for i, t in enumerate(given) if t is not None]

    def of_those(*there: Tensor):
        full = list(given)
        for i, t in zip(places, there, strict=True):
            full[i] = t
        return function(*full)

    with torch.enable_grad():
        _, pull = torch.func.vjp(of_those, *(given[i] for i in places))
        pulled = pull(cotangents)
    found: list[Tensor | None] = [None] * len(given)
    for i, gradient in zip(places, pulled, strict=True):
        found[i] = gradient if wanted[i] else None
    return found


def second_derivative(function: Callable, v: Tensor, g: Tensor, x: Tensor) -> tuple:
    """Cotangents of g and x for v, that of ``g^T d function(x) / dx``."""

    def gradient(g: Tensor, x: Tensor) -> Tensor:
        _, pull = torch.func.vjp(function, x)
        return pull(g)[0]

    _, pull = torch.func.vjp(gradient, g, x)
    return pull(v)


def batch_rows(tensor: Tensor | None, dim: int | None, batch: int, rows: int) -> Tensor | None:
    """Fold a vmapped axis into the rows: ``[R, C]`` (R = rows or 1) with an axis of ``batch`` at
    ``dim`` becomes ``[batch * rows, C]``; a tensor ``[R]`` becomes ``[batch * rows]``."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    tail = tensor.shape[2:]
    # a copy: kernels read what is one row for all samples as rows that follow one another
    return tensor.expand(batch, rows, *tail).reshape(batch * rows, *tail).contiguous()


def fold(batch: int, tensors, dims) -> list[Tensor | None]:
    """A vmapped axis of each tensor (at its place in ``dims``) as more rows of its first axis."""
    folded = []
    for t, dim in zip(tensors, dims, strict=False):
        rows = 0 if t is None else tasks_of(t, dim)
        folded.append(batch_rows(t, dim, batch, rows))
    return folded


def unfold(result: Tensor, batch: int) -> Tensor:
    """The first axis as the vmapped one and its rows."""
    return result.unflatten(0, (batch, result.shape[0] // max(batch, 1)))


def each(function: type[Function], size: int, in_dims, args):
    """One call for each place of the vmapped axis: for what they do not share."""
    calls = []
    for i in range(size):
        own = (t if dim is None else t.select(dim, i) for t, dim in zip(args, in_dims, strict=True))
        calls.append(function.call(*own))
    results = tuple(torch.stack(found) for found in zip(*calls, strict=True))
    return results, (0,) * len(results)
