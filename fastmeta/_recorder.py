"""Records what a function does to tensors as a graph of operators, while it runs on real ones.

``make_fx`` does more (symbolic shapes, fake tensors, transforms of graphs) and takes several
times as long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
_local = threading.local()


def recording() -> bool:
    """Whether code in this thread is recorded as a graph, which holds for other values too."""
    return getattr(_local, "depth", 0) > 0 or get_proxy_mode() is not None


@dataclass(frozen=True)
class Shape:
    """What a graph knows of a tensor; in the ``meta["val"]`` of its node."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Shape:
        return cls(t.shape, t.stride(), t.dtype, t.device)

    def empty(self, device: str | torch.device | None = None) -> Tensor:
        return torch.empty_strided(
            self.shape, self.strides, dtype=self.dtype, device=device or self.device
        )


def record(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor]
) -> tuple[fx.Graph, list[Tensor]]:
    """The graph of ``function(*inputs)``, and the tensors that it reads besides.

    Returns:
        A graph whose inputs are `inputs`, then those tensors; its results are the function's.

    Raises:
        RuntimeError: The function asked for the value of a tensor that depends on its inputs, or
            called an operator whose result has a shape that does.
    """
    # one tensor in two places may be two another time
    first = {id(t): i for i, t in reversed([*enumerate(inputs)])}
    inputs = [t if first[id(t)] == i else aten.alias(t) for i, t in enumerate(inputs)]
    recorder = _Recorder(inputs)
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        with _ReadsRaise(recorder.nodes), recorder:
            results = function(*inputs)
    finally:
        _local.depth -= 1
    recorder.graph.output([None if t is None else recorder.node_of(t) for t in results])
    return recorder.graph, recorder.constants


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes = WeakTensorKeyDictionary()
        self.constants: list[Tensor] = []
        self.inputs, self.last = 0, None  # of the graph: how many, and the last one
        for t in inputs:
            self._input(t)

    def _input(self, t: Tensor) -> fx.Node:
        name, self.inputs = f"input_{self.inputs}", self.inputs + 1
        if self.last is None:
            node = self.graph.placeholder(name)
        else:
            with self.graph.inserting_after(self.last):
                node = self.graph.placeholder(name)
        node.meta["val"] = Shape.of(t)
        self.nodes[t] = self.last = node
        return node

    def node_of(self, t: Tensor) -> fx.Node:
        node = self.nodes.get(t)
        if node is None:
            self.constants.append(t)
            node = self._input(t)
        return node

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _asks_for_values(func, args):
            if any(t in self.nodes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
                raise RuntimeError(f"{func} asks for values, which a graph cannot know")
            return func(*args, **kwargs)
        given, named = tree_map_only(Tensor, self.node_of, (args, kwargs))
        found = func(*args, **kwargs)
        node = self.graph.call_function(func, given, named)
        if isinstance(found, Tensor):
            self._note(found, node)
        elif isinstance(found, list | tuple):
            for i, t in enumerate(found):
                if isinstance(t, Tensor):
                    self._note(t, self.graph.call_function(getitem, (node, i)))
        return found

    def _note(self, t: Tensor, node: fx.Node) -> None:
        node.meta["val"] = Shape.of(t)
        if t not in self.nodes:  # else an operand that was written to
            self.nodes[t] = node


class _ReadsRaise(TorchFunctionMode):
    """Raises where values are read past all operators."""

    def __init__(self, nodes: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self.nodes = nodes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", None)
        if name in _READS and args[0] in self.nodes:
            raise RuntimeError(f"Tensor.{name} asks for values, which a graph cannot know")
        return func(*args, **(kwargs or {}))


_READS = ("tolist", "numpy", "__array__", "__dlpack__")
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _asks_for_values(func, args: tuple) -> bool:
    if func is aten.index.Tensor:  # the shape is known but of masks
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool(_VALUES & {*func.tags})
