"""What the kernels share: how they are launched, and maths that is as exact as torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# The interpreter has no libdevice; numpy's functions are exact where the GPU's own are not.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def launch(kernel, programs: int, *args, num_warps: int, **constants) -> None:
    """Run ``programs`` of a kernel on the device and current stream of its arguments.

    The grid has one axis (up to 2^31 - 1; the others end at 65535). Multiply-adds are fused: the
    default differs between versions of Triton, and results must not.
    """
    if programs == 0:
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants, **options)
    else:
        kernel[(programs,)](*args, **constants, **options)


# A reduction is split among programs until there are this many (four per multiprocessor of the
# largest devices), each with at least so many terms. Constants, not the device's own numbers: a
# result must not depend on the device it is computed on.
PROGRAMS, TERMS = 528, 256


def multiplies_64_rows(device: torch.device) -> bool:
    """Whether 4 warps multiply 64 rows as one, as Hopper's do: it wants larger tiles than others,
    which would spill."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def accumulator(*tensors: Tensor) -> tl.dtype:
    """The type of computation: float64 for float64, float32 for all that is narrower."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def empty_like(t: Tensor, wanted: int = 1) -> Tensor:
    """A contiguous result in the shape of ``t``, without elements where it is not wanted."""
    return t.new_empty(t.shape if wanted else 0)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, most: int) -> int:
    """The smallest power of 2 that is at least ``n``, up to ``most``."""
    return min(triton.next_power_of_2(max(n, 1)), most)


def dropped_words(p: float) -> int:
    """How many of the words from 0 mean that an element is dropped."""
    return min(int(p * 2**32), 2**32 - 1)


@triton.jit
def mixed(x):
    """A hash of 32 bits (lowbias32), as in the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def square_root(a):
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)  # tl.sqrt is approximate in float32
    else:
        return tl.sqrt(a)


@triton.jit
def exp(a):
    if INTERPRETED:
        return tl.exp(a)
    else:
        return libdevice.exp(a)  # tl.exp loses a digit in float32 where |a| is large


@triton.jit
def tanh(a):
    if INTERPRETED:
        e = tl.exp(-2 * tl.abs(a))
        return tl.where(a < 0, e - 1, 1 - e) / (1 + e)
    else:
        return libdevice.tanh(a)


@triton.jit
def sigmoid(a):
    return 1 / (1 + exp(-a))


@triton.jit
def log(a):
    if INTERPRETED:
        return tl.log(a)
    else:
        return libdevice.log(a)  # tl.log loses relative accuracy near 1, where losses are small


@triton.jit
def power(a, E: tl.constexpr):
    """``a ** E`` for ``a > 0``; common exponents without the general function."""
    if E == 0:
        return a * 0 + 1
    elif E == 1:
        return a
    elif E == 2:
        return a * a
    elif E == 3:
        return a * a * a
    elif E == 0.5:
        return square_root(a)
    elif E == 1.5:
        return a * square_root(a)
    elif E == -0.5:
        return 1 / square_root(a)
    elif E == -1:
        return 1 / a
    elif INTERPRETED:
        return tl.exp2(E * tl.log2(a.to(tl.float64))).to(a.dtype)
    else:
        return libdevice.pow(a, tl.full((), E, a.dtype))


@triton.jit
def zero_safe_power(a, E: tl.constexpr):
    """``a ** E`` for ``a >= 0``, 0 at 0; NaN stays."""
    if E == 1:
        return a
    else:
        zero = a == 0
        return tl.where(zero, 0, power(tl.where(zero, 1, a), E))


@triton.jit
def max_with_nan(a, axis: tl.constexpr):
    """The maximum over an axis of ``a >= 0``, NaN where there is one."""
    bad = a != a
    most = tl.max(tl.where(bad, 0, a), axis)
    return tl.where(tl.max(bad.to(tl.int32), axis) > 0, float("nan"), most)
