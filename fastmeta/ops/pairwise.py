"""Pairwise distances: every row of x with every row of y, for all tasks at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import _backend, _checks
from fastmeta._autograd import outside_autocast
from fastmeta._checks import describe
from fastmeta._dtypes import wide_dtype
from fastmeta._settings import is_number
from fastmeta.ops import _pairwise
from fastmeta.reference import pairwise as reference
from fastmeta.reference.pairwise import ABSOLUTE, MAXIMUM, POWER, PRODUCT, SQUARES

METRICS = (
    "sqeuclidean",
    "euclidean",
    "cosine",
    "cityblock",
    "minkowski",
    "chebyshev",
    "mahalanobis",
    "dot",
)


@outside_autocast
def pairwise_distance(
    x: Tensor,
    y: Tensor,
    metric: str = "sqeuclidean",
    *,
    p: float | None = None,
    precision: Tensor | None = None,
) -> Tensor:
    """Distance of every row of x to every row of y.

    ==============  ==================================================================
    ``sqeuclidean``  ``sum_k (x_k - y_k)^2``
    ``euclidean``    ``sqrt(sum_k (x_k - y_k)^2)``
    ``cosine``       ``1 - x y / (|x| |y|)``; 1 where a row is zero
    ``cityblock``    ``sum_k |x_k - y_k|``
    ``minkowski``    ``(sum_k |x_k - y_k|^p)^(1/p)``
    ``chebyshev``    ``max_k |x_k - y_k|``
    ``mahalanobis``  ``sqrt((x - y)^T precision (x - y))``
    ``dot``          ``-sum_k x_k y_k``: like all others, smaller is nearer
    ==============  ==================================================================

    Args:
        x: ``[..., N, D]``, float32, float64, bfloat16 or float16 (computed in float32).
        y: ``[..., M, D]`` of the same dtype and device; leading axes broadcast.
        metric: A name of the table. Default ``"sqeuclidean"``.
        p: Order of ``minkowski``, > 0 (``inf`` is ``chebyshev``); required there, else None.
        precision: For ``mahalanobis``: the inverse covariance, symmetric and positive definite
            ``[D, D]`` (or per task ``[..., D, D]``), or its positive diagonal ``[D]`` (per task
            ``[..., 1, D]``); required there, else None. Its definiteness is checked wherever it is.

    Returns:
        ``[..., N, M]`` in the dtype of x. NaN and Inf reach the distances of their own row only.
        Without coordinates (D = 0) all distances are zero, but 1 for ``cosine``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown metric, an argument of
            another metric, a precision that is not positive definite.

    Note:
        Differentiable in reverse mode to any order in x, y and precision, also under
        ``torch.func.grad`` and ``vmap``; forward mode raises. Where a metric has no derivative (x =
        y for all but squares and ``dot``) it is 0, to all orders; ``chebyshev`` divides its
        gradient evenly among the coordinates that attain the maximum. Squares are evaluated as a
        matrix product of centred rows, and as differences where that would lose digits, so points
        far from the origin and nearly equal ones keep theirs. Two runs give equal bits.
    """
    x, y, batch, dtype = as_pairs("pairwise_distance", x, y)
    metric, p = check_metric("pairwise_distance", metric, p, precision)
    if precision is not None:
        precision = check_precision("pairwise_distance", precision, x, batch)
    return distances(x, y, metric, p, precision).to(dtype).reshape(*batch, *_pair_shape(x, y))


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """``torch.cdist`` with an exact second derivative, and without its N x M x D buffers.

    ``(sum_k |x1_k - x2_k|^p)^(1/p)``; the number of coordinates that differ for p = 0.

    Args:
        x1: ``[..., N, D]``.
        x2: ``[..., M, D]`` of the same dtype and device; leading axes broadcast.
        p: Order, >= 0 or ``inf``. Default 2.
        compute_mode: Accepted for compatibility and not needed: matrix products are used where
            they are faster, and differences wherever those would lose digits.

    Returns:
        ``[..., N, M]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, p out of range.

    Differentiable as `pairwise_distance`; for p = 0 the gradient is zero.
    """
    modes = (
        "use_mm_for_euclid_dist_if_necessary",
        "use_mm_for_euclid_dist",
        "donot_use_mm_for_euclid_dist",
    )
    if compute_mode is not None and compute_mode not in modes:
        raise ValueError(
            f"cdist: compute_mode must be one of {', '.join(modes)}, got {compute_mode!r}"
        )
    if not is_number(p) or not p >= 0:
        raise ValueError(f"cdist: p must be a number >= 0, got {p!r}")
    x, y, batch, dtype = as_pairs("cdist", x1, x2)
    if p == 0:
        found = torch.cdist(x.detach(), y.detach(), 0.0)
        found = found + (x[..., :0].sum() + y[..., :0].sum())  # 0, whose derivatives are 0
    elif p == 2:
        found = distances(x, y, "euclidean", None, None)
    else:
        found = distances(x, y, *check_metric("cdist", "minkowski", float(p), None), None)
    return found.to(dtype).reshape(*batch, *_pair_shape(x, y))


def distances(
    x: Tensor, y: Tensor, metric: str, p: float | None, precision: Tensor | None
) -> Tensor:
    """`pairwise_distance` of checked ``[B, N, D]`` and ``[B, M, D]`` in float32 or float64."""
    if _backend.by_reference(_pairwise._SUMS, x.device):
        return reference.pairwise_distance(x, y, metric, p, precision)
    x, y, kind, order, root = as_sums(x, y, metric, p, precision)
    sums = _pairwise.pairwise_sums(x, y, kind, order)
    if kind == PRODUCT:
        return -sums
    if metric == "cosine":
        return 0.5 * sums + _without_direction(x, y)
    return rooted(sums, root)


def as_sums(
    x: Tensor, y: Tensor, metric: str, p: float | None, precision: Tensor | None
) -> tuple[Tensor, Tensor, int, float, float]:
    """Points and the kind of sum from which a metric follows: ``(x, y, kind, p, root)``.

    The distance is ``sums ** (1 / root)``; its negative for products, half of it for ``cosine``,
    where it is that of directions: ``1 - u v = |u - v|^2 / 2`` keeps the digits of small angles.
    """
    if metric == "dot":
        return x, y, PRODUCT, 0.0, 1.0
    if metric == "cosine":
        return reference.unit_rows(x), reference.unit_rows(y), SQUARES, 2.0, 1.0
    if metric == "cityblock":
        return x, y, ABSOLUTE, 1.0, 1.0
    if metric == "chebyshev":
        return x, y, MAXIMUM, math.inf, 1.0
    if metric == "minkowski":
        return x, y, POWER, p, p
    if metric == "mahalanobis":
        # |L^T (x - y)| for precision = L L^T, on centred points: rounding follows their size
        x, y = _pairwise.centred(x, y)
        if precision.shape[1] == 1:
            factor = precision.sqrt()
            x, y = x * factor, y * factor
        else:
            factor = torch.linalg.cholesky(precision)
            x, y = x @ factor, y @ factor
    return x, y, SQUARES, 2.0, 1.0 if metric == "sqeuclidean" else 2.0


def rooted(sums: Tensor, root: float) -> Tensor:
    """``sums ** (1 / root)``, derivatives 0 at 0; writes over sums where nothing needs them."""
    if root == 1:
        return sums
    if sums.requires_grad or torch._C._are_functorch_transforms_active():
        return reference.zero_safe_power(sums, 1 / root)
    return sums.sqrt_() if root == 2 else sums.pow_(1 / root)


def _without_direction(x: Tensor, y: Tensor) -> Tensor:
    """What half of a unit vector's squared distance to a row of zeros lacks to a distance of 1."""
    x_zero, y_zero = ((t.detach() == 0).all(-1).to(t.dtype) for t in (x, y))
    return 0.5 * (x_zero.unsqueeze(2) + y_zero.unsqueeze(1))


def check_metric(
    op: str, metric: str, p: float | None, precision: Tensor | None
) -> tuple[str, float | None]:
    """A known metric with exactly its own arguments; orders 1, 2 and inf by their names."""
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if (precision is not None) != (metric == "mahalanobis"):
        expected = "needs a precision matrix" if precision is None else "takes no precision"
        raise ValueError(f"{op}: metric {metric!r} {expected}, got precision {_brief(precision)}")
    if metric != "minkowski":
        if p is not None:
            raise ValueError(f"{op}: metric {metric!r} takes no p, got p = {p!r}")
        return metric, None
    if not is_number(p) or not p > 0:
        raise ValueError(f"{op}: metric 'minkowski' needs a number p > 0, got p = {p!r}")
    named = {1.0: "cityblock", 2.0: "euclidean", math.inf: "chebyshev"}.get(float(p))
    return (named, None) if named else (metric, float(p))


def _brief(value: Tensor | None) -> str:
    return "None" if value is None else describe(value)


def check_points(op: str, name: str, t: Tensor, dim: int | None = None) -> None:
    """Require floating-point rows: ``[..., N, D]``, or of exactly ``dim`` axes."""
    axes = "[T, N, D]" if dim == 3 else "[..., N, D]"
    fits = isinstance(t, Tensor) and t.dtype in _checks.FLOATING
    if not fits or (t.dim() < 2 if dim is None else t.dim() != dim):
        raise ValueError(f"{op}: {name} must be a floating-point tensor {axes}, got {describe(t)}")


def check_same_space(op: str, names: tuple[str, str], x: Tensor, y: Tensor) -> None:
    """Require rows of one dtype, device and number of coordinates."""
    if (x.dtype, x.device, x.shape[-1]) != (y.dtype, y.device, y.shape[-1]):
        raise ValueError(
            f"{op}: {names[1]} must have the dtype, device and D of {names[0]}, {describe(x)}, "
            f"got {describe(y)}"
        )


def as_pairs(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], torch.dtype]:
    """Checked rows as ``[B, N, D]`` and ``[B, M, D]`` in the dtype of computation, the batch's
    shape, and the dtype of the result."""
    check_points(op, "x", x)
    check_points(op, "y", y)
    check_same_space(op, ("x", "y"), x, y)
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"{op}: leading axes of x and y must broadcast, got {describe(x)} and {describe(y)}"
        ) from None
    return _flat(x, batch), _flat(y, batch), tuple(batch), x.dtype


def _flat(t: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``[..., N, D]`` as ``[B, N, D]``; a batch axis of one point set stays a view of it."""
    t = t.to(wide_dtype(t.dtype))
    t = t.expand(*batch, *t.shape[-2:])
    return t.unsqueeze(0) if not batch else t if len(batch) == 1 else t.flatten(0, -3)


def _pair_shape(x: Tensor, y: Tensor) -> tuple[int, int]:
    return x.shape[1], y.shape[1]


def check_precision(op: str, precision: Tensor, x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The precision as ``[1 or B, D, D]``, or ``[1 or B, 1, D]`` for a diagonal, in the dtype of
    computation; positive definite."""
    width = x.shape[-1]
    count = math.prod(batch)
    forms = (
        f"[D], [D, D], [..., 1, D] or [..., D, D] with D = {width} and leading axes {list(batch)}"
    )
    if not isinstance(precision, Tensor) or not precision.is_floating_point():
        raise ValueError(
            f"{op}: precision must be a floating-point tensor, got {describe(precision)}"
        )
    if precision.device != x.device:
        raise ValueError(f"{op}: precision must be on {x.device}, got {describe(precision)}")
    shape = tuple(precision.shape)
    diagonal = shape == (width,) or (len(shape) > 1 and shape[-2:] == (1, width) and width != 1)
    leading = shape[:-2] if len(shape) > 1 else ()
    if not (diagonal or shape[-2:] == (width, width)) or leading not in ((), batch):
        raise ValueError(f"{op}: precision must be {forms}, got {describe(precision)}")
    precision = precision.to(wide_dtype(x.dtype))
    precision = precision.expand(*batch, *shape[-2:]) if leading else precision
    if diagonal:
        entries = precision.reshape(count if leading else 1, 1, width)
        require_positive(op, (entries > 0) & entries.isfinite(), precision)
        return entries
    matrices = precision.reshape(count if leading else 1, width, width)
    if width == 0:
        return matrices
    value = matrices.detach()
    tolerance = 16 * torch.finfo(value.dtype).eps * value.abs().amax((1, 2), keepdim=True)
    symmetric = ((value - value.mT).abs() <= tolerance).all()
    if _checks.readable(value) and not bool(symmetric):
        raise ValueError(
            f"{op}: precision must be symmetric, got {describe(precision)} that is not"
        )
    _, failed = torch.linalg.cholesky_ex(value)
    require_positive(op, (failed == 0) & value.isfinite().all((1, 2)), precision)
    return matrices


def require_positive(op: str, good: Tensor, precision: Tensor) -> None:
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return
    if not bool(good.all()):
        raise ValueError(
            f"{op}: precision must be positive definite (a singular covariance has no inverse: add "
            f"a multiple of the identity to it first), got {describe(precision)} that is not"
        )
