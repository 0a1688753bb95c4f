"""Argument checks shared by the operators: one sentence, what was expected and what came."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta._settings import is_integer

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A tensor as ``float32 [2, 3] on cpu``, anything else by its type."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"{dtype} {list(value.shape)} on {value.device}{layout}"
    return f"{type(value).__name__} {value!r}"


def params_and_grads(op: str, params: Tensor, grads: Tensor) -> None:
    """Require packed ``[T, P]`` parameters and gradients that fit together."""
    if not isinstance(params, Tensor) or params.dim() != 2 or params.dtype not in FLOATING:
        raise ValueError(
            f"{op}: params must be a floating-point tensor [T, P], got {describe(params)}"
        )
    if not isinstance(grads, Tensor) or grads.shape != params.shape:
        raise ValueError(
            f"{op}: grads must have the shape of params {list(params.shape)}, got {describe(grads)}"
        )
    for name, tensor in (("params", params), ("grads", grads)):
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be dense, got {describe(tensor)}")
    if grads.device != params.device:
        raise ValueError(f"{op}: grads must be on {params.device}, got {describe(grads)}")
    if grads.dtype != params.dtype and not (
        params.dtype == torch.float32 and grads.dtype in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"{op}: grads must have the dtype of params, or be bfloat16 or float16 with float32 "
            f"params, got {describe(grads)} with {describe(params)}"
        )


def active_tasks(op: str, active: Tensor, params: Tensor) -> Tensor:
    """Require a bool mask ``[T]`` beside the parameters."""
    num_tasks = params.shape[0]
    if not isinstance(active, Tensor) or active.dtype != torch.bool or active.dim() != 1:
        raise ValueError(f"{op}: active must be a bool tensor [T], got {describe(active)}")
    if active.shape[0] != num_tasks or active.device != params.device:
        raise ValueError(
            f"{op}: active must be bool [{num_tasks}] on {params.device}, got {describe(active)}"
        )
    return active.contiguous()


def segment_offsets(op: str, segments: object, params: Tensor) -> Tensor:
    """The int64 ``[S + 1]`` starts of the segments of a row, from a tensor or a layout.

    A layout (anything with ``segment_offsets(device)``) is trusted; the entries of a tensor are
    checked on the CPU. On another device they are not read back: kernels stay within bounds.
    """
    if hasattr(segments, "segment_offsets"):
        return segments.segment_offsets(params.device)
    if not isinstance(segments, Tensor) or segments.dtype != torch.int64 or segments.dim() != 1:
        raise ValueError(
            f"{op}: segments must be a layout or an int64 tensor [S + 1], got {describe(segments)}"
        )
    if segments.device != params.device or segments.shape[0] < 2:
        raise ValueError(
            f"{op}: segments must be int64 [S + 1] with S >= 1 on {params.device}, "
            f"got {describe(segments)}"
        )
    if segments.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        starts = segments.tolist()
        if starts[0] != 0 or starts[-1] != params.shape[1] or starts != sorted(starts):
            raise ValueError(
                f"{op}: segments must rise from 0 to P = {params.shape[1]}, got {starts}"
            )
    return segments.contiguous()


def learning_rate(
    op: str, lr: float | Tensor, params: Tensor, offsets: Tensor | None
) -> tuple[float, Tensor | None]:
    """Bring a learning rate into the form kernels take: ``(value, None)`` or ``(0, [1|T, 1|C])``.

    C is S where segments are given, else P. The dtype becomes float64 for float64 parameters and
    float32 for all others; gradients flow back through the views and the cast.
    """
    if not isinstance(lr, Tensor):
        if not isinstance(lr, (float, int)) or not math.isfinite(lr):
            raise ValueError(f"{op}: lr must be a finite number or a tensor, got {describe(lr)}")
        return float(lr), None
    if not lr.is_floating_point():
        raise ValueError(f"{op}: lr must be floating point, got {describe(lr)}")
    if lr.device != params.device:
        if lr.dim() > 0:
            raise ValueError(f"{op}: lr must be on {params.device}, got {describe(lr)}")
        lr = lr.to(params.device)
    dtype = wide_dtype(params.dtype)
    if lr.dtype != dtype:
        lr = lr.to(dtype)
    return 0.0, _rate_view(op, lr, *params.shape, offsets)


def _rate_view(op: str, lr: Tensor, tasks: int, params: int, offsets: Tensor | None) -> Tensor:
    columns = params if offsets is None else offsets.shape[0] - 1
    shape = tuple(lr.shape)
    if len(shape) == 2 and shape[0] in (1, tasks) and shape[1] in (1, columns):
        return lr
    if shape in ((), (1,)):
        return lr.reshape(1, 1)
    if len(shape) == 1:
        if offsets is not None and shape[0] == columns:
            return lr.unsqueeze(0)
        if offsets is None and tasks == params == shape[0]:
            raise ValueError(
                f"{op}: lr of shape [{tasks}] could mean per task or per parameter because "
                f"T = P = {tasks}; pass lr[:, None] for per task, lr[None, :] for per parameter"
            )
        if offsets is None and shape[0] == tasks:
            return lr.unsqueeze(1)
        if offsets is None and shape[0] == params:
            return lr.unsqueeze(0)
    forms = f"[T], [P], [T, P], [T, 1] or [1, P] with T = {tasks}, P = {params}"
    if offsets is not None:
        forms = f"[S], [T, S], [T, 1] or [1, S] with T = {tasks}, S = {columns}"
    raise ValueError(f"{op}: lr must be a number, a scalar tensor, {forms}, got {describe(lr)}")


def rows(op: str, name: str, tensor: Tensor) -> None:
    """Require a floating-point ``[T, P]``."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.dtype not in FLOATING:
        raise ValueError(
            f"{op}: {name} must be a floating-point tensor [T, P], got {describe(tensor)}"
        )


def state(op: str, name: str, tensor: Tensor, params: Tensor) -> None:
    """Require a state tensor of the layout of ``params``."""
    fits = (
        isinstance(tensor, Tensor)
        and tensor.shape == params.shape
        and tensor.dtype == params.dtype
        and tensor.device == params.device
        and tensor.layout == torch.strided
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must be like params, {describe(params)}, got {describe(tensor)}"
        )


def written_rows(op: str, named: dict[str, Tensor], read: dict[str, Tensor | None]) -> None:
    """Require that no two elements of the tensors ``[T, P]`` to be written share memory, and that
    what is read meanwhile does not lie across them."""
    for name, t in named.items():
        if not t.is_contiguous() and _elements_meet(*t.shape, *t.stride()):
            raise ValueError(
                f"{op}: {name} must not be an expanded view or share memory between its elements, "
                f"got {describe(t)} with strides {t.stride()}"
            )
    every = (*named.values(), *read.values())
    spans = sorted(_extent(t) for t in every if t is not None and _has_memory(t))
    if all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)):
        return
    known = {n: t for n, t in named.items() if t.numel() and _has_memory(t)}
    others = {n: t for n, t in read.items() if t is not None and t.numel() and _has_memory(t)}
    for one, other in [*itertools.combinations(known, 2), *itertools.product(known, others)]:
        a, b = known[one], known.get(other, others.get(other))
        same = a.data_ptr() == b.data_ptr() and (a.shape, a.stride()) == (b.shape, b.stride())
        if (same and other in named) or (not same and _meet(a, b)):
            raise ValueError(
                f"{op}: {one} and {other} must not share memory, got overlapping tensors"
            )


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie across each other, unless they are the same columns of a buffer moved
    aside, as its even and its odd ones are."""
    (start, end), (other, other_end) = map(_extent, (a, b))
    if end <= other or other_end <= start:
        return False
    if (a.stride(), a.dtype, a.shape) != (b.stride(), b.dtype, b.shape):
        return True
    step, left = divmod(abs(other - start), a.element_size())
    rows, columns, down, across = *a.shape, *a.stride()
    if left or not across:
        return True
    steps = (step - i * down for i in range(1 - rows, rows))
    return any(n % across == 0 and abs(n // across) < columns for n in steps)


def _extent(t: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    if t.is_contiguous():
        return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _elements_meet(rows: int, columns: int, down: int, across: int) -> bool:
    """Whether ``i down + j across`` is 0 for other steps than (0, 0) between two elements."""
    if rows <= 1 or columns <= 1:
        return (rows > 1 and down == 0) or (columns > 1 and across == 0)
    common = math.gcd(down, across)
    return common == 0 or (across // common < rows and down // common < columns)


def tensor_lists(op: str, lists: dict[str, object]) -> None:
    """Require lists of equal length of contiguous tensors: those of one list of one dtype, those
    at one place of one shape, all on one device."""
    params = lists["params"]
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)) or len(tensors) != len(params):
            came = f"{len(tensors)}" if isinstance(tensors, (list, tuple)) else describe(tensors)
            raise ValueError(f"{op}: {name} must be a list of {len(params)} tensors, got {came}")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
                raise ValueError(
                    f"{op}: {name}[{i}] must be a floating-point tensor, got {describe(tensor)}"
                )
            dtype = tensors[0].dtype if name in ("params", "grads") else params[0].dtype
            if (tensor.shape, tensor.device, tensor.dtype) != (
                param.shape,
                params[0].device,
                dtype,
            ):
                raise ValueError(
                    f"{op}: {name}[{i}] must be {str(dtype).removeprefix('torch.')} "
                    f"{list(param.shape)} on {params[0].device}, got {describe(tensor)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{op}: {name}[{i}] must be contiguous, got strides {tensor.stride()}"
                )
    if params:
        params_and_grads(op, params[0].view(1, -1), lists["grads"][0].view(1, -1))


def seed(op: str, value: int | Tensor | None, device: torch.device) -> Tensor:
    """What dropout drops is a function of: an int64 scalar on the device."""
    if is_integer(value) and -(2**63) <= value < 2**63:
        return torch.tensor(value, dtype=torch.int64, device=device)
    if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0:
        return value.to(device)
    raise ValueError(
        f"{op}: dropout needs a seed, an integer of 64 bits or an int64 scalar tensor, "
        f"got {describe(value)}"
    )


def in_range(
    op: str,
    name: str,
    value: float | Tensor,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Require a finite number within bounds, or a floating-point (for counts: any) tensor of such,
    which is looked at on the CPU outside transforms."""
    limits = (
        (at_least, ">=", lambda x, b: x >= b),
        (above, ">", lambda x, b: x > b),
        (below, "<", lambda x, b: x < b),
        (at_most, "<=", lambda x, b: x <= b),
    )
    limits = [limit for limit in limits if limit[0] is not None]
    if isinstance(value, Tensor):
        if not readable(value):
            return
        low_high = [value.min().item(), value.max().item()] if value.numel() else []
        if value.numel() and bool(torch.isnan(value).any()):
            low_high = [math.nan]
    elif isinstance(value, (int, float)):
        low_high = [value]
    else:
        raise ValueError(f"{op}: {name} must be a number or a tensor, got {describe(value)}")
    for x in low_high:
        if not math.isfinite(x) or not all(holds(x, bound) for bound, _, holds in limits):
            expected = " and ".join(["finite", *(f"{sign} {bound:g}" for bound, sign, _ in limits)])
            raise ValueError(f"{op}: {name} must be {expected}, got {x}")


def readable(value: Tensor) -> bool:
    """Whether looking at the values costs nothing and is possible."""
    return value.device.type == "cpu" and _has_memory(value)


def _has_memory(value: Tensor) -> bool:
    """Whether it is a plain tensor, and not one that stands for another in a transform."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return value.device.type != "meta" and type(value) in (Tensor, torch.nn.Parameter)


def finite_rate(op: str, rate: Tensor, active: Tensor | None) -> None:
    """Require finite learning rates ``[1 or T, C]`` in active rows; one pass over them."""
    if not readable(rate):
        return
    sums = rate.detach().sum(1)
    if active is not None and rate.shape[0] > 1:
        sums = sums[active]
    if bool(torch.isfinite(sums).all()):
        return
    rows = rate if active is None or rate.shape[0] == 1 else rate[active]
    if not bool(torch.isfinite(rows).all()):  # finite rates may have an infinite sum
        raise ValueError(f"{op}: lr must be finite, got a tensor with NaN or Inf")


def hyperparameters(op: str, values: list, params: Tensor) -> tuple[list[float], Tensor | None]:
    """Hyperparameters as kernels take them: six numbers, or one tensor ``[1 or T, 6]`` in float64.

    Gradients flow back through the stacking.
    """
    values = values + [0.0] * (6 - len(values))
    if not any(isinstance(v, Tensor) for v in values):
        return [float(v) for v in values], None
    tasks = params.shape[0]
    columns = []
    for value in values:
        if not isinstance(value, Tensor):
            value = torch.full((1, 1), float(value), dtype=torch.float64, device=params.device)
        elif value.dim() == 0 or tuple(value.shape) in ((1,), (1, 1)):
            value = value.reshape(1, 1)
        elif tuple(value.shape) in ((tasks,), (tasks, 1)):
            value = value.reshape(tasks, 1)
        else:
            raise ValueError(
                f"{op}: a hyperparameter must be a number, a scalar tensor, [T] or [T, 1] with "
                f"T = {tasks}, got {describe(value)}"
            )
        columns.append(value.to(params.device, torch.float64))
    height = tasks if any(c.shape[0] != 1 for c in columns) else 1
    return [0.0] * 6, torch.cat([c.expand(height, 1) for c in columns], dim=1)
