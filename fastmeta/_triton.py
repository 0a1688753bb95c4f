"""Loads the Triton kernels, ``fastmeta.kernels``, and registers them for CUDA where there is one.

Triton is imported only then: without it, or without a GPU, everything else works as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from fastmeta import _library

PACKAGE = f"{_library.NAMESPACE}.kernels"
KERNELS = {  # raw operators by file of kernels/; the launcher of each has its name
    "pairwise": (
        "pairwise_sums",
        "pairwise_sums_backward",
        "pairwise_sums_double_backward",
    ),
    "attention": ("attention", "attention_backward"),
    "attention_second": ("attention_double_backward",),
    "squares": ("pairwise_squares_",),
    "classes": ("class_sums", "class_gather", "take_rows"),
    "prototypical": ("prototypical", "prototypical_backward", "prototypical_rows_"),
    "nearest": ("nearest_select_",),
    "coordinate_lstm": (
        "coordinate_lstm",
        "coordinate_lstm_backward",
        "coordinate_lstm_double_backward",
    ),
    "activations": ("activation", "activation_backward", "activation_double_backward"),
    "cross_entropy": (
        "cross_entropy",
        "cross_entropy_backward",
        "cross_entropy_double_backward",
    ),
    "dropout": ("dropout",),
    "layer_norm": ("layer_norm", "layer_norm_backward", "layer_norm_double_backward"),
    "linear_cross_entropy": ("linear_cross_entropy", "linear_cross_entropy_double_backward"),
    "lora_linear": (
        "lora_linear",
        "lora_linear_backward",
        "lora_linear_double_backward",
    ),
}
OPERATORS = frozenset(name for names in KERNELS.values() for name in names)


def package() -> ModuleType:
    """``fastmeta.kernels``; of a checkout that was not installed, the folder beside the package."""
    here = Path(__file__).resolve().parent
    beside = here.parent / "kernels"
    if (
        PACKAGE in sys.modules
        or (here / "kernels").is_dir()
        or not (beside / "pairwise.py").exists()
    ):
        return importlib.import_module(PACKAGE)
    spec = importlib.util.spec_from_file_location(
        PACKAGE, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


def launchers() -> Iterator[tuple[str, Callable]]:
    """Every raw operator with a Triton kernel, and its launcher."""
    package()
    for file, names in KERNELS.items():
        module = importlib.import_module(f"{PACKAGE}.{file}")
        for name in names:
            yield name, getattr(module, name)


def register(device: str, *, winner: bool) -> None:
    """Make the kernels available as implementation ``"triton"`` on a device."""
    for name, launcher in launchers():
        _library.register_kernel(name, "triton", device, launcher, winner=winner)


def load() -> _library.Extension:
    """Register the kernels where they can run; else say why not."""

    def state(name: str, detail: str) -> _library.Extension:
        return _library.Extension(PACKAGE, "triton", "cuda", name, detail)

    if importlib.util.find_spec("triton") is None:
        return state("not loaded", "triton is not installed (`pip install fastmeta[triton]`)")
    if not torch.cuda.is_available():
        return state("not loaded", "this torch sees no CUDA device")
    try:
        register("cuda", winner=True)
    except (ImportError, OSError, AttributeError) as error:
        warnings.warn(
            f"{PACKAGE} could not be loaded ({error}); the references in plain torch serve its "
            "operators. It needs triton >= 3.5.",
            RuntimeWarning,
            stacklevel=2,
        )
        return state("failed", str(error))
    return state("loaded", package().__file__ or "")
