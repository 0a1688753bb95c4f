"""The dispatcher library ``fastmeta``: schemas, references, compiled kernels.

Every operator is forward-only here (derivatives live in ``fastmeta.ops``). Its reference is
registered as CompositeExplicitAutograd, so it runs on any device and doubles as the fake kernel;
a compiled extension holds kernels for one device each and overrides it there. There is exactly one
kernel per operator and device: whoever adds a Python (Triton) one calls :func:`register_kernel`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

NAMESPACE = "fastmeta"
_DEF = torch.library.Library(NAMESPACE, "DEF")


@dataclass
class Op:
    """One raw operator: its schema, reference, and kernels by implementation name."""

    name: str
    schema: str
    reference: Callable | None  # None: a derivative, which only kernels have
    overload: Callable  # the dispatcher's entry: the winner for the tensors' device
    kernels: dict[str, tuple[str, Callable]] = field(default_factory=dict)  # name -> (device, call)


@dataclass(frozen=True)
class Extension:
    """A compiled library: the implementation it holds, and whether it is there."""

    module: str
    impl: str
    device: str
    state: str  # "loaded", "not built", "not loaded" or "failed"
    detail: str  # path, or the reason


def _load(module: str, impl: str, device: str, needs: str) -> Extension:
    full = f"{NAMESPACE}.{module}"
    spec = importlib.util.find_spec(full)
    if spec is None:
        return Extension(full, impl, device, "not built", f"needs {needs} at installation")
    try:
        importlib.import_module(full)
    except (ImportError, OSError) as error:
        warnings.warn(
            f"{full} is installed but could not be loaded ({error}); the references in plain torch "
            "serve its operators. Rebuild with `pip install --no-build-isolation --no-deps .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return Extension(full, impl, device, "failed", str(error))
    return Extension(full, impl, device, "loaded", getattr(sys.modules[full], "__file__", "") or "")


EXTENSIONS = (
    _load("_C", "cpp", "cpu", "a C++ compiler and --no-build-isolation"),
    _load("_C_cuda", "cuda", "cuda", "nvcc and a CUDA build of torch"),
)
TRITON: Extension | None = None  # the kernels of fastmeta._triton, once the operators are declared
OPS: dict[str, Op] = {}


def define(schema: str, reference: Callable | None = None, *, fake: Callable | None = None) -> Op:
    """Declare ``name(arguments) -> results`` and register its reference for every device.

    A derivative need not have a reference (autograd differentiates that of the operator itself) but
    has a ``fake``, which returns empty results of the right shapes.
    """
    name = schema.split("(", 1)[0]
    _DEF.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if reference is not None:
        _DEF.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        _DEF.impl(name, fake, "Meta")
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    op = Op(name, schema, reference, overload)
    for extension in EXTENSIONS:
        if extension.state == "loaded" and dispatched(name, extension.device):
            op.kernels[extension.impl] = (extension.device, overload)
    OPS[name] = op
    return op


def declare(schema: str, function: Callable | None = None) -> Callable:
    """The overload of an operator without a table: of a function, or of the compiled extension."""
    _DEF.define(schema)
    name = schema.split("(", 1)[0]
    if function is not None:
        _DEF.impl(name, function, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def has_extension(device: str) -> bool:
    """Whether the compiled library for a device is loaded."""
    return any(e.device == device and e.state == "loaded" for e in EXTENSIONS)


def register_kernel(name: str, impl: str, device: str, kernel: Callable, *, winner: bool) -> None:
    """Add a Python kernel (a Triton launcher); the winner serves the device by default.

    A loser stays reachable through ``use_impl``. Raises ValueError where the device has a kernel
    already and this one should win: a second registration would silently replace the first.
    """
    if name not in OPS:
        raise ValueError(f"unknown operator {name!r}, expected one of {', '.join(OPS)}")
    op = OPS[name]
    if winner:
        if dispatched(name, device):
            raise ValueError(f"{NAMESPACE}::{name} already has a kernel for {device}")
        _DEF.impl(name, kernel, torch._C._dispatch_key_for_device(device))
        kernel = op.overload
    op.kernels[impl] = (device, kernel)


def parts() -> tuple[Extension, ...]:
    """Everything that holds kernels: the compiled libraries and, if declared, those in Triton."""
    return EXTENSIONS if TRITON is None else (*EXTENSIONS, TRITON)


def dispatched(name: str, device: str) -> bool:
    """Whether a kernel of its own (not the reference) serves ``name`` on ``device``."""
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
