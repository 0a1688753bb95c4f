"""Tolerances derived from what the arithmetic itself loses, not tuned by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, low: Tensor, shaken: list[Tensor]
) -> None:
    """Require ``actual`` to be as good as the reference is in the same precision.

    The budget is four times (two bits) the sum of two measured errors: that of the reference in low
    precision, and the largest change of the exact result when every input moves by one rounding;
    and one rounding of the largest result, which the reference can miss by chance. So an
    implementation may order its operations differently, but not lose a digit.

    Args:
        name: what is compared, for the message.
        actual: result under test.
        exact: the reference evaluated in float64.
        low: the reference evaluated in the dtype of ``actual``, float32 where that is float64 (the
            budget is then scaled by the ratio of the two precisions).
        shaken: the reference in float64 for inputs :func:`shake` moved by roundings of that dtype.

    Raises:
        AssertionError: another shape, a value that is not finite where ``exact`` is, or an error
            over the budget.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite where it should be"
    assert torch.equal(actual[~finite].double().nan_to_num(), exact[~finite].nan_to_num()), (
        f"{name}: another infinity than expected"
    )
    if not bool(finite.any()):
        return
    exact = exact[finite]

    def error(x: Tensor) -> float:
        return (x.detach().double()[finite] - exact).abs().max().item()

    scale = torch.finfo(actual.dtype).eps / torch.finfo(low.dtype).eps
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = 4 * scale * (error(low) + max(error(x) for x in shaken)) + rounding
    assert error(actual) <= budget, f"{name}: error {error(actual):.3e} over budget {budget:.3e}"


def shake(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """``x * (1 +- eps)`` in float64, the sign random for every element."""
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return x.double() * (1 + eps * signs)
