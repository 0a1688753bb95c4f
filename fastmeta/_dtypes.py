"""In which dtype sums, rates and statistics are kept."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 of float64, and float32 of all that is narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
