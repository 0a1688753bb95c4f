"""A linear layer shared by all tasks, with a low-rank term of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import _checks
from fastmeta._checks import describe
from fastmeta._dtypes import wide_dtype
from fastmeta.ops._lora_linear import lora_rows
from fastmeta.ops.batched_linear import as_computed
from fastmeta.ops.quantized_weight import QuantizedWeight

_OP = "lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    offsets: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """A linear layer shared by all tasks plus the low-rank term of each (LoRA).

    ``y_t = x_t W^T + b_t + scale_t (x_t A_t^T) B_t^T``: one matrix product for all tasks, to which
    a few columns of each task's own are added on the way.

    Args:
        x: ``[T, R, K]``, or ``[M, K]`` with `offsets`; float32, float64, bfloat16 or float16
            (accumulated in float32).
        weight: ``[N, K]`` of the same dtype and any strides, or a `QuantizedWeight`, which has no
            gradient. The gradient of a weight that does not require one is never computed.
        bias: None, ``[N]``, or ``[T, N]`` for one per task.
        A: ``[T, r, K]``, r >= 1.
        B: ``[T, N, r]``.
        scale: A number, or ``[T]`` for one per task (alpha / r). Default 1.
        offsets: int64 ``[T + 1]``, rising from 0 to M, where each task's rows begin; tasks may have
            none. Default None: every task has R rows.
        ranks: int64 ``[T]`` in 0..r: rows of A and columns of B past a task's rank count as zero
            and get a gradient of zero, whatever they hold. Default None: r for all.

    Returns:
        ``[T, R, N]``, or ``[M, N]`` with `offsets`, in the dtype of x. Within autocast all are cast
        as by ``torch.nn.functional.linear``; on a CPU in bfloat16 the product with W rounds its
        factors to it, and sums, low-rank terms and results are float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a rank of 0; on the CPU also offsets
            that do not rise from 0 to M and ranks out of range (elsewhere they are not read back).

    Note:
        Differentiable in reverse mode to any order in x, weight, bias, A, B and a tensor `scale`,
        also under ``torch.func.grad`` and ``vmap``; forward mode raises. Two runs give equal bits.
        LoRA: Hu et al. 2021, arXiv 2106.09685.
    """
    quantised = isinstance(weight, QuantizedWeight)
    dense = None if quantised else weight
    bf16 = False
    if all(t is None or isinstance(t, Tensor) for t in (x, dense, bias, A, B)) and x is not None:
        (x, dense, bias, A, B), bf16 = as_computed(x, dense, bias, A, B)
    weight = weight if quantised else dense
    _check_shapes(x, weight, bias, A, B, offsets)
    offsets = None if offsets is None else offsets.contiguous()
    if ranks is not None:
        A, B = _masked(A, B, ranks)
    if isinstance(scale, Tensor):
        A, scale = _scaled(A, scale), 1.0
    elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(
            f"{_OP}: scale must be a finite number or a tensor [T], got {describe(scale)}"
        )
    values, value_scale = (weight.values, weight.scale) if quantised else (weight, None)
    if value_scale is not None:
        value_scale = value_scale.to(wide_dtype(x.dtype))
    bias = bias.unsqueeze(0) if bias is not None and bias.dim() == 1 else bias
    rows = x if x.dim() == 2 else x.flatten(0, 1)
    y = lora_rows(rows, values, value_scale, bias, A, B, offsets, float(scale), bf16)
    return y if x.dim() == 2 else y.view(*x.shape[:2], y.shape[1])


def _check_shapes(x, weight, bias, a, b, offsets) -> None:
    axes, form = (3, "[T, R, K]") if offsets is None else (2, "[M, K] with offsets")
    if not isinstance(x, Tensor) or x.dim() != axes or x.dtype not in _checks.FLOATING:
        raise ValueError(f"{_OP}: x must be a floating-point tensor {form}, got {describe(x)}")
    width = x.shape[-1]
    if isinstance(weight, QuantizedWeight):
        fits = weight.shape[1] == width and weight.device == x.device
        came = f"{weight.bits}-bit {list(weight.shape)} on {weight.device}"
    else:
        fits = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == width
        fits = fits and _alike(weight, x)
        came = describe(weight)
    if not fits:
        raise ValueError(f"{_OP}: weight must be {_of('[N, K]', x)} with K = {width}, got {came}")
    outputs = weight.shape[0]
    if not isinstance(a, Tensor) or a.dim() != 3 or a.shape[2] != width or not _alike(a, x):
        raise ValueError(
            f"{_OP}: A must be {_of('[T, r, K]', x)} with K = {width}, got {describe(a)}"
        )
    tasks, rank = a.shape[:2]
    if rank == 0:
        raise ValueError(f"{_OP}: A must have a rank r >= 1, got {describe(a)}")
    if offsets is None and x.shape[0] != tasks:
        raise ValueError(
            f"{_OP}: A must be [T, r, K] with T = {x.shape[0]} as x has, got {describe(a)}"
        )
    expected = (tasks, outputs, rank)
    if not isinstance(b, Tensor) or tuple(b.shape) != expected or not _alike(b, x):
        raise ValueError(f"{_OP}: B must be {_of(list(expected), x)}, got {describe(b)}")
    if bias is not None:
        shapes = ((outputs,), (tasks, outputs))
        if not isinstance(bias, Tensor) or tuple(bias.shape) not in shapes or not _alike(bias, x):
            raise ValueError(
                f"{_OP}: bias must be None, {[outputs]} or {_of([tasks, outputs], x)}, "
                f"got {describe(bias)}"
            )
    if offsets is not None:
        _check_offsets(offsets, tasks, x)


def _alike(t: Tensor, x: Tensor) -> bool:
    return t.dtype == x.dtype and t.device == x.device


def _of(shape: object, x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {shape} on {x.device}"


def _check_offsets(offsets: Tensor, tasks: int, x: Tensor) -> None:
    fits = isinstance(offsets, Tensor) and offsets.dtype == torch.int64
    if not fits or tuple(offsets.shape) != (tasks + 1,) or offsets.device != x.device:
        raise ValueError(
            f"{_OP}: offsets must be int64 [T + 1] = [{tasks + 1}] on {x.device}, "
            f"got {describe(offsets)}"
        )
    if not _checks.readable(offsets):
        return
    starts = offsets.tolist()
    if starts[0] != 0 or starts[-1] != x.shape[0] or starts != sorted(starts):
        raise ValueError(
            f"{_OP}: offsets must rise from 0 to the number of rows M = {x.shape[0]}, got {starts}"
        )


def _masked(a: Tensor, b: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with zeros past each task's rank."""
    tasks, rank = a.shape[:2]
    fits = isinstance(ranks, Tensor) and ranks.dtype == torch.int64
    if not fits or tuple(ranks.shape) != (tasks,) or ranks.device != a.device:
        raise ValueError(
            f"{_OP}: ranks must be int64 [T] = [{tasks}] on {a.device}, got {describe(ranks)}"
        )
    if _checks.readable(ranks) and bool(((ranks < 0) | (ranks > rank)).any()):
        raise ValueError(f"{_OP}: ranks must be in 0..r = {rank}, got {ranks.tolist()}")
    counts = torch.arange(rank, device=a.device) < ranks.unsqueeze(1)
    return torch.where(counts.unsqueeze(2), a, 0), torch.where(counts.unsqueeze(1), b, 0)


def _scaled(a: Tensor, scale: Tensor) -> Tensor:
    """A, scaled for each task."""
    fits = scale.is_floating_point() and scale.device == a.device
    if not fits or (scale.dim() > 0 and tuple(scale.shape) != (a.shape[0],)):
        raise ValueError(
            f"{_OP}: scale must be a number or a floating-point [T] = [{a.shape[0]}] on "
            f"{a.device}, got {describe(scale)}"
        )
    return a * scale.to(a.dtype).view(-1, 1, 1)
