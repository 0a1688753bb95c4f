"""Writes a graph of operators as a tape (`fastmeta.engine.tape`).

A graph fixes all shapes, so whatever only looks at memory in another way (views, transposes,
slices) is written as sizes, strides and an offset, new memory likewise, and what depends on no
input is computed once. Operators that C++ cannot call, for a number among their arguments, become
calls of Python. What a tape cannot hold at all :func:`written` leaves to Python by returning None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastmeta._library import has_extension
from fastmeta.engine.graph_memory import PARTS, SAME, VIEWS, arguments, memory_of, written_by
from fastmeta.engine.tape import PYTHON_CALL, PythonCall, Tape

aten = torch.ops.aten

_EMPTY = {
    aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default,
    aten.new_empty_strided.default, aten.empty_strided.default,
}  # fmt: skip
_ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
_COPIES = {aten.clone.default, aten._to_copy.default}
# looks at shapes and types of what it is given only
_OF_SHAPES = {
    *_ZEROS, aten.new_ones.default, aten.ones_like.default, aten.new_full.default,
    aten.full_like.default,
}  # fmt: skip
# with a number among the arguments: lines of their own
_NUMBERS = {
    aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.add.Scalar: "add_number",
    aten.mul.Scalar: "mul_number", aten.pow.Tensor_Scalar: "pow_number",
    aten.add_.Tensor: "add", aten.sub_.Tensor: "sub",
}  # fmt: skip


_LARGEST = 1 << 20
"""Elements of a constant that is kept."""


class _Slot(int):
    """Where a tape keeps a tensor."""


class _CannotHold(Exception):
    """A tape cannot hold the graph."""


def written(
    graph: fx.Graph,
    frame: Sequence[bool] | None = None,
    saved: Sequence[bool] | None = None,
) -> Tape | None:
    """The graph as a tape, or None where a tape cannot hold it.

    Args:
        frame: For each of the graph's inputs: whether it comes by a frame. None: no one does.
        saved: For each of its results: whether it goes into one. None: no one does.
    """
    if not has_extension("cpu"):
        return None
    try:
        return _Writer(graph).write(frame, saved)
    except _CannotHold:
        return None


class _Writer:
    """Writes the lines of a tape, node by node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        # text, slots read, slots written
        self.lines: list[tuple[str, list[_Slot], list[_Slot]]] = []
        self.slots = 0
        self.slot: dict[Any, _Slot] = {}  # of a node, or of (node, place among its results)
        self.values: dict[int, Tensor] = {}  # constants by slot
        self.calls: list[PythonCall] = []
        self.constant: dict[fx.Node, Tensor] = {}
        self.meta: dict[fx.Node, Any] = {}  # tensors without data, for offsets of views
        self.base: dict[fx.Node, fx.Node] = {}  # of what looks at another node's memory
        self.changed = {memory_of(n) for node in self.nodes for n in written_by(node)}

    def write(self, frame: Sequence[bool] | None, saved: Sequence[bool] | None) -> Tape:
        places = [n for n in self.nodes if n.op == "placeholder"]
        (results,) = self.nodes[-1].args
        if any(n.meta["val"].device.type != "cpu" for n in places):
            raise _CannotHold("another device")
        frame, saved = frame or [False] * len(places), saved or [False] * len(results)
        for node in places:
            self.slot[node] = self._new_slot()
        for node in self.nodes:
            if node.op == "call_function":
                self._node(node)
            elif node.op not in ("placeholder", "output"):
                raise _CannotHold(node.op)
        slots = [None if n is None else self._slot_of(n) for n in results]
        kept = [s for s, save in zip(slots, saved, strict=True) if s is not None and save]
        outputs = [
            self._output(node, slot, slot in kept)
            for node, slot, save in zip(results, slots, saved, strict=True)
            if slot is not None and not save
        ]
        program = [
            f"slots {self.slots}",
            _numbers("inputs", (self.slot[n] for n, f in zip(places, frame, strict=True) if not f)),
            _numbers("frame", (self.slot[n] for n, f in zip(places, frame, strict=True) if f)),
            _numbers("constants", self.values),
            _numbers("outputs", outputs),
            _numbers("saved", kept),
            *self._body({*outputs, *kept}),
        ]
        places = iter(range(len(outputs)))
        order = [
            None if slot is None else next(places)
            for slot, save in zip(slots, saved, strict=True)
            if not save
        ]
        return Tape("\n".join(program), list(self.values.values()), order, self.calls)

    def _output(self, node: fx.Node, slot: _Slot, kept: bool) -> _Slot:
        """A result that leaves the tape: others may write to it, or give it a graph, which what is
        saved for that graph must not hold."""
        if node in self.constant:
            meta = self._meta_of(node)
            if 0 in meta.stride():
                self.meta[node] = torch.empty_like(meta, memory_format=torch.contiguous_format)
            self._call(aten.copy_.default, [self._empty(node), slot, False])
            return self.slot[node]
        return self._look(slot, self._meta_of(node), 0) if kept else slot

    def _body(self, wanted: set[int]) -> Iterable[str]:
        """The lines, each followed by the slots that nobody reads after it."""
        last: dict[int, int] = {}
        for i, (_, read, written) in enumerate(self.lines):
            for slot in (*read, *written):
                last[slot] = i
        for i, (text, read, written) in enumerate(self.lines):
            yield text
            ended = {s for s in (*read, *written) if last[s] == i} - wanted
            if ended:
                yield _numbers("last", sorted(ended))

    def _new_slot(self) -> _Slot:
        self.slots += 1
        return _Slot(self.slots - 1)

    def _node(self, node: fx.Node) -> None:
        target = node.target
        if target in SAME:
            self._same(node, node.args[0])
        elif target in VIEWS | PARTS:
            self._view(node, lambda meta: target(meta, *node.args[1:], **node.kwargs))
        elif not hasattr(target, "_schema"):  # an item of several results
            source, place = node.args
            if source.target in PARTS:
                self._view(node, lambda metas: metas[place])
            else:
                self.slot[node] = self.slot[source, place]
        elif not self._fold(node):
            try:
                self._operator(node)
            except _CannotHold:
                self._by_python(node)

    def _same(self, node: fx.Node, source: fx.Node) -> None:
        for known in (self.slot, self.constant, self.meta, self.base):
            if source in known:
                known[node] = known[source]
        self.base.setdefault(node, source)

    def _view(self, node: fx.Node, look: Callable[[Any], Any]) -> None:
        """Another look at the memory of a node, written where it is read."""
        source = node.args[0]
        self.base[node] = self.base.get(source, source)
        self.meta[node] = look(self._meta_of(source))
        if source in self.constant and isinstance(self.meta[node], Tensor):
            self.constant[node] = look(self.constant[source])

    def _meta_of(self, node: fx.Node) -> Any:
        if node not in self.meta:
            self.meta[node] = node.meta["val"].empty("meta")
        return self.meta[node]

    def _slot_of(self, node: fx.Node) -> _Slot:
        if node in self.slot:
            return self.slot[node]
        if node in self.constant:
            self.slot[node] = self._constant(self.constant[node])
        else:
            source, meta = self._slot_of(self.base[node]), self.meta[node]
            self.slot[node] = self._look(source, meta, meta.storage_offset())
        return self.slot[node]

    def _look(self, source: _Slot, meta: Tensor, offset: int) -> _Slot:
        """The memory of a slot with other sizes and strides."""
        slot = self._new_slot()
        sizes, strides = _numbers("", meta.shape), _strides(meta)
        text = f"view 1 {source} 1 {slot}{sizes}{strides} {offset}"
        self.lines.append((text, [source], [slot]))
        return slot

    def _constant(self, value: Tensor) -> _Slot:
        slot = self._new_slot()
        self.values[slot] = value
        return slot

    def _fold(self, node: fx.Node) -> bool:
        """Compute now what depends on no input and nobody writes to."""
        target = node.target
        fixed = target in _OF_SHAPES or all(n in self.constant for n in node.all_input_nodes)
        seeded = torch.Tag.nondeterministic_seeded in target.tags
        value = node.meta.get("val")
        if not fixed or seeded or target in _EMPTY or node in self.changed:
            return False
        if value is None or value.shape.numel() > _LARGEST or any(written_by(node)):
            return False

        def real(n: fx.Node) -> Tensor:
            if n in self.constant:
                return self.constant[n]
            return n.meta["val"].empty()

        with torch.no_grad():
            self.constant[node] = target(
                *fx.map_arg(node.args, real), **fx.map_arg(node.kwargs, real)
            )
        return True

    def _operator(self, node: fx.Node) -> None:
        target = node.target
        if target in _EMPTY | _ZEROS | _COPIES:
            slot = self._empty(node)
            if target in _ZEROS:
                self._call(aten.zero_.default, [slot])
            elif target in _COPIES:
                self._call(aten.copy_.default, [slot, self._slot_of(node.args[0]), False])
        elif target in (aten.add_.Tensor, aten.sub_.Tensor):
            values = [self._slot_of(node.args[0]), self._with_number(node), False]
            (self.slot[node],) = self._call(aten.copy_.default, values)
        elif target in _NUMBERS:
            self.slot[node] = self._with_number(node)
        elif target is aten.addmm.default and not node.kwargs:
            base, a, b = node.args
            weight = self._look(self._slot_of(b), self._meta_of(b).t(), 0)
            (self.slot[node],) = self._call(
                aten.linear.default, [self._slot_of(a), weight, self._slot_of(base)]
            )
        else:
            values = fx.map_arg([value for _, value in arguments(node)], self._slot_of)
            slots = self._call(*self._without_numbers(node, values))
            if len(slots) == 1:
                (self.slot[node],) = slots
            else:
                self.slot |= {(node, place): slot for place, slot in enumerate(slots)}

    def _by_python(self, node: fx.Node) -> None:
        """An operator that C++ cannot call."""
        returns = node.target._schema.returns
        if len(returns) != 1 or str(returns[0].type) != "Tensor":
            raise _CannotHold(str(node.target._schema))
        tensors = dict.fromkeys(node.all_input_nodes)
        places = {n: i for i, n in enumerate(tensors)}
        self.calls.append(PythonCall.of(node.target, places, node.args, node.kwargs))
        (self.slot[node],) = self._call(
            PYTHON_CALL, [self.calls[-1].name, [self._slot_of(n) for n in tensors]]
        )

    def _empty(self, node: fx.Node) -> _Slot:
        """New memory for the result of a node."""
        meta, slot = self._meta_of(node), self._new_slot()
        sizes, strides = _numbers("", meta.shape), _strides(meta)
        text = f"empty 1 {slot}{sizes}{strides} {_dtype(meta.dtype)}"
        self.lines.append((text, [], [slot]))
        self.slot[node] = slot
        return slot

    def _with_number(self, node: fx.Node) -> _Slot:
        """``a + number * b``, or what else of :data:`_NUMBERS`."""
        name, (a, b, *_) = _NUMBERS[node.target], node.args
        if not node.meta["val"].dtype.is_floating_point:
            raise _CannotHold("integers and numbers")
        number = node.kwargs.get("alpha", 1)
        read = [self._slot_of(a)]
        if isinstance(b, fx.Node):
            read.append(self._slot_of(b))
        elif name in ("add", "sub"):
            name, number = "add_number", b * number * (1 if name == "add" else -1)
        else:
            number = b
        slot = self._new_slot()
        text = f"scalar {name} {float(number).hex()}{_numbers('', read)} 1 {slot}"
        self.lines.append((text, read, [slot]))
        return slot

    def _without_numbers(self, node: fx.Node, values: list) -> tuple[Any, list]:
        """An operator on a number as that on a tensor, where there is one."""
        target, result = node.target, node.meta.get("val")
        types = [str(a.real_type) for a in target._schema.arguments]
        values = [
            self._constant(_tensor(value, None if result is None else result.dtype))
            if (kind == "Tensor" or "number" in kind) and _is_number(value)
            else value
            for value, kind in zip(values, types, strict=True)
        ]
        if any("number" in kind for kind in types):
            if "Tensor" not in target.overloadpacket.overloads():
                raise _CannotHold(str(target))
            target = target.overloadpacket.Tensor
        return target, values

    def _call(self, target: Any, values: list) -> list[_Slot]:
        """Slots of the results of an operator, on slots where its schema has tensors."""
        schema, read = target._schema, []
        if any(str(r.type) != "Tensor" for r in schema.returns):
            raise _CannotHold(str(schema))
        if len(values) != len(schema.arguments):
            raise _CannotHold(str(schema))
        arguments = [
            _encoded(a.real_type, v, read) for a, v in zip(schema.arguments, values, strict=True)
        ]
        slots = [self._new_slot() for _ in schema.returns]
        text = " ".join(
            ["call", schema.name, schema.overload_name or ".", str(len(arguments)), *arguments]
        )
        self.lines.append((text + _numbers("", slots), read, slots))
        return slots


def _tensor(number: float, result: torch.dtype | None) -> Tensor:
    """Without axes: other floating-point tensors with axes keep their dtype beside it, and the rest
    become what they became beside the number. (Narrow dtypes take the number as it is.)"""
    if not isinstance(number, float):
        return torch.tensor(number)
    return torch.tensor(number, dtype=torch.float32 if result == torch.float32 else torch.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, _Slot)


def _encoded(kind: Any, value: Any, read: list[_Slot]) -> str:
    """A value as its type's text; slots of tensors are noted."""
    name = kind.kind()
    if name == "OptionalType":
        if value is None or value == torch.device("cpu"):  # the only one there is
            return "n"
        return "? " + _encoded(kind.getElementType(), value, read)
    if name == "ListType":
        items = [_encoded(kind.getElementType(), v, read) for v in value]
        return " ".join([f"[{len(items)}", *items])
    if isinstance(value, _Slot) != (name == "TensorType"):
        raise _CannotHold(f"{kind}: {value}")
    if name == "TensorType":
        read.append(value)
        return f"t{value}"
    if name in ("IntType", "SymIntType") and isinstance(value, int):
        return f"i{int(value)}"
    if name == "FloatType":
        return f"f{float(value).hex()}"
    if name == "StringType" and value and not any(map(str.isspace, value)):
        return f"s{value}"
    if name == "BoolType":
        return f"b{int(value)}"
    if name == "ScalarTypeType":
        return f"d{_dtype(torch.int64 if value == _INT64 else value)}"
    raise _CannotHold(f"{kind}: {value}")


_NAMES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "bool")
_DTYPES = {getattr(torch, name): name for name in _NAMES}
_INT64 = 4
"""How schemas write that dtype, the only one that is a default."""


def _dtype(dtype: Any) -> str:
    if dtype not in _DTYPES:
        raise _CannotHold(str(dtype))
    return _DTYPES[dtype]


def _strides(t: Tensor) -> str:
    """As numbers, or where these follow from the sizes as a negative count of axes and these from
    the outermost to the innermost: products of sizes depend on numbers of tokens in other ways."""
    order = sorted(range(t.dim()), key=lambda axis: (-t.stride(axis), axis))
    expected = 1
    for axis in reversed(order):
        if t.shape[axis] != 1 and t.stride(axis) != expected:
            return _numbers("", t.stride())
        expected *= t.shape[axis]
    return " ".join(["", f"-{t.dim()}", *map(str, order)]) if order else " 0"


def _numbers(name: str, numbers: Iterable[int]) -> str:
    numbers = [*numbers]
    return " ".join([name, str(len(numbers)), *map(str, numbers)])
