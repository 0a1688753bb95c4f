"""Task-batched meta-learning over transformers: exact, fused, on the model you already have."""

from fastmeta.batch import TaskBatch
from fastmeta.patching import (
    Bias,
    Head,
    LoRA,
    Norm,
    ParamLayout,
    Params,
    PatchError,
    Patched,
    PerformanceWarning,
    Prefix,
    Spec,
    TaskParams,
    patch,
)

__version__ = "0.1.0"

__all__ = [
    "Bias",
    "Head",
    "LoRA",
    "Norm",
    "ParamLayout",
    "Params",
    "PatchError",
    "Patched",
    "PerformanceWarning",
    "Prefix",
    "Spec",
    "TaskBatch",
    "TaskParams",
    "patch",
]
