"""Functional parameter patching: task-batched fast weights for any transformers model."""

from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.patched import Patched, patch
from fastmeta.patching.probe import PatchError, PerformanceWarning
from fastmeta.patching.spec import Bias, Head, LoRA, Norm, Params, Prefix, Spec
from fastmeta.patching.task_params import TaskParams

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
    "TaskParams",
    "patch",
]
