"""A GPU that is not there: tensors that say they are on one, computed on the CPU.

What the library does on a GPU that it does not do on a CPU (which operators it picks, where it asks
the device for a value, that no tensor of the other device slips in, backward passes in a thread of
their own) runs and can be compared. Triton kernels are stood in for by those for the CPU; the
kernels themselves have tests of their own. Time and memory are not modelled.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fastmeta import _library, _triton

aten = torch.ops.aten
REAL = torch.cuda.is_available()
"""Whether there is a GPU, which then takes the stand-in's place."""
DEVICE = torch.device("cuda", 0)

_ASKS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


def set_up() -> None:
    """Once per process, before there are tensors."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.mem_get_info = lambda device=None: (64 << 30, 80 << 30)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda device=None: 0
    torch.cuda.memory_snapshot = list
    torch.cuda.Stream = torch.cuda.current_stream = _Stream
    torch.cuda.stream = torch.cuda.device = lambda of: nullcontext()
    torch.cuda.get_sync_debug_mode = lambda: 0
    torch.cuda.set_sync_debug_mode = _set_sync_debug_mode
    torch.cuda.graph_pool_handle = object
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args: True
    torch.cuda.is_current_stream_capturing = _recording
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, _recorded
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device) is seen here
    _triton.register("cuda", winner=True)  # the kernels that are picked; never launched


class OnGpu(Tensor):
    """A tensor that says it is on :data:`DEVICE`.

    Attributes:
        values: What it holds, on the CPU.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        t = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        t.values = values
        return t

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> list:
        return on_cpu(self).tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        there = OnGpu(self.values.detach().clone())
        if isinstance(self, nn.Parameter):
            there = nn.Parameter(there, self.requires_grad)
        memo[id(self)] = there
        return there

    def __repr__(self) -> str:
        return f"OnGpu({self.values})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _run(func, args, kwargs, _tensors((args, kwargs)))


class StandIn(TorchDispatchMode):
    """Within, there is a GPU.

    Attributes:
        waits: Where the host waited for a value, or for a copy from one device to the other.
        launches: How many operators ran, without views.
        graph: The one that is recorded, or None.
        warns: Whether waiting is worth a warning.
    """

    graph: Graph | None = None
    warns = False

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        why = _waits(func, args, kwargs, given)
        if why is not None:
            if self.graph is not None:
                raise RuntimeError(f"{why} while a CUDA graph is recorded: {_place()}")
            if self.warns:
                warnings.warn(f"called a synchronizing CUDA operation: {why}", stacklevel=1)
            self.waits.append(f"{why}: {_place()}")
        found = _run(func, args, kwargs, given, self.graph)
        if not func.is_view and any(isinstance(t, OnGpu) for t in tree_leaves(found)):
            self.launches += 1
        return found


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _run(func, args: tuple, kwargs: dict, given: list[Tensor], graph: Graph | None = None):
    ours = [t for t in given if isinstance(t, OnGpu)]
    device = kwargs.get("device")
    made_there = device is not None and torch.device(device).type == "cuda"
    if not ours and not made_there:
        return func(*args, **kwargs)
    _refuse(func, given, ours)
    args, kwargs = tree_map(lambda t: t.values if isinstance(t, OnGpu) else t, (args, kwargs))
    if made_there:
        kwargs["device"] = torch.device("cpu")
    if func.namespace == _library.NAMESPACE:
        func = _wide(func)
    found = func(*args, **kwargs)
    if graph is not None:
        graph.calls.append((func, args, kwargs, found))
    if func is aten._to_copy.default and device is not None and not made_there:
        return found
    known = {id(t.values): t for t in ours}

    def wrapped(t):
        if not isinstance(t, Tensor):
            return t
        return known[id(t)] if id(t) in known else OnGpu(t)

    return tree_map(wrapped, found)


def _wide(func):
    """One of our operators for any dtype: kernels for the CPU take float32 and float64."""

    def call(*args, **kwargs):
        if not any(t.dtype in (torch.bfloat16, torch.float16) for t in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        like = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **kwargs)
        wide = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, args)
        found = func(*wide, **kwargs)
        return tree_map(lambda t, m: t.to(m.dtype) if isinstance(t, Tensor) else t, found, like)

    call.is_view = False
    return call


def _refuse(func, given: list[Tensor], ours: list[Tensor]) -> None:
    """Raise where a GPU would."""
    across = func in (aten._to_copy.default, aten.copy_.default) or func in _INDEXING
    if ours and not across and any(t.dim() for t in given if not isinstance(t, OnGpu)):
        places = ", ".join(f"{list(t.shape)} on {t.device}" for t in given)
        raise RuntimeError(f"{func}: expected all tensors on one device, got {places}")
    if func.namespace == _library.NAMESPACE:
        op = _library.OPS.get(func._schema.name.split("::")[1])
        if op is None or not (op.reference or _library.dispatched(op.name, "cuda")):
            raise NotImplementedError(f"{func} has no kernel for CUDA and no reference")


def _waits(func, args: tuple, kwargs: dict, given: list[Tensor]) -> str | None:
    """Why a host has to wait for this operator, or None."""
    ours = any(isinstance(t, OnGpu) for t in given)
    if func in (aten._to_copy.default, aten.copy_.default):
        device = kwargs.get("device")
        to_host = ours and device is not None and torch.device(device).type == "cpu"
        from_host = any(not isinstance(t, OnGpu) for t in given) and (
            ours or (device is not None and torch.device(device).type == "cuda")
        )
        return "a copy to the host" if to_host else "a copy from the host" if from_host else None
    if not ours:
        return None
    if func in _ASKS:
        return str(func)
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return str(func)
    if func in _INDEXING:
        indices = [t for t in args[1] if t is not None]
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            return f"{func} by a mask"
        if not all(isinstance(t, OnGpu) for t in indices):
            return f"{func} by an index on the host"
    return None


def _place() -> str:
    """The innermost line of code that is not torch's or this file's."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Graph:
    """A CUDA graph: operators that run again on the memory they ran on, without Python between
    them. Until then that memory holds nothing.

    Attributes:
        calls: Operator, arguments, and what it returned.
    """

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def _written(self) -> Iterator[tuple]:
        """Every call with its results in memory of their own."""
        for func, args, kwargs, found in self.calls:
            if func.is_view:
                continue
            given = {id(t) for t in _tensors((args, kwargs))}
            yield func, args, kwargs, [None if id(t) in given else t for t in _tensors(found)]

    def forget(self) -> None:
        for *_, made in self._written():
            for t in made:
                if t is not None and t.is_floating_point():
                    t.fill_(float("nan"))

    def replay(self) -> None:
        for func, args, kwargs, made in self._written():
            for to, t in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if to is not None:
                    to.copy_(t)


def _set_sync_debug_mode(mode: str | int) -> None:
    _get_current_dispatch_mode().warns = mode == "warn"


@contextmanager
def _recorded(
    graph: Graph,
    pool: object = None,
    stream: object = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    mode = _get_current_dispatch_mode()
    mode.graph = graph
    with patch.object(torch.autograd, "grad", _fresh_leaves_only(torch.autograd.grad)):
        try:
            yield
        finally:
            mode.graph = None
    graph.forget()


def _fresh_leaves_only(grad):
    """`torch.autograd.grad` as a recording allows it: weights of a graph that was there before have
    nodes on its stream."""
    for t in gc.get_objects():
        if issubclass(type(t), Tensor) and t.requires_grad and t.is_leaf:
            _node(t).metadata["before"] = True  # forgotten with a node that nobody holds

    def checked(outputs, inputs, *args, **kwargs):
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        if any("before" in _node(t).metadata for t in inputs if t.is_leaf):
            raise RuntimeError("a gradient of a leaf whose node is on another stream")
        return grad(outputs, inputs, *args, **kwargs)

    return checked


def _node(leaf: Tensor) -> torch.autograd.graph.Node:
    return torch.autograd.graph.get_gradient_edge(leaf).node


def _recording() -> bool:
    return getattr(_get_current_dispatch_mode(), "graph", None) is not None


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


def on_gpu(model: nn.Module) -> nn.Module:
    """The model, in place, with its tensors on the GPU."""
    if REAL:
        return model.to(DEVICE)
    moved: dict[int, Tensor] = {}

    def move(t: Tensor) -> Tensor:
        if id(t) not in moved:
            there = OnGpu(t.detach().clone())
            is_parameter = isinstance(t, nn.Parameter)
            moved[id(t)] = nn.Parameter(there, t.requires_grad) if is_parameter else there
        return moved[id(t)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = move(t)
    return model


def on_cpu(tensors):
    """A structure of tensors, in the host's memory; not among what :class:`StandIn` counts."""

    def read(t):
        return t.values if isinstance(t, OnGpu) else t.cpu() if isinstance(t, Tensor) else t

    return tree_map(read, tensors)


@contextmanager
def gpu() -> Iterator[StandIn]:
    """There is a GPU within; a real one counts nothing."""
    if REAL:
        yield StandIn()
    else:
        with StandIn() as mode:
            yield mode
