"""A plan: one copied structure whose adapted modules run task-batched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmeta.patching import attention, prefix
from fastmeta.patching.bind import bind, install, set_mode
from fastmeta.patching.context import Call, current_call
from fastmeta.patching.methods import split_key
from fastmeta.patching.prepared import prepared_copy, shows_hidden_states
from fastmeta.patching.probe import CallKind, PatchError
from fastmeta.patching.rules import Adapted, gathering, isolating_rule, lora_delta, rule_for
from fastmeta.patching.slots import Slots
from fastmeta.patching.units import Unit, by_loop, by_vmap

if TYPE_CHECKING:
    from fastmeta.patching.leaf_params import LeafSlot

Tensors = Callable[[Call], dict[str, Tensor]]

MODES = ("rule", "single", "lift", "gather", "expand", "skip", "vmap", "loop")
"""How an adapted module can run.

``rule``: its type's task-batched rule. ``single``: the rule, on one leading row that all tasks
share (position tables). ``lift``: the rule, on an input without batch axis (``[L]`` positions).
``gather``: its own code, its lookups in each task's table (embeddings that scale or shift).
``expand``: its own code, its own parameters ``[1, ...]`` expanded to one per row (class tokens).
``skip``: as it is; its parameters are not read, or only where they are tied to. ``vmap``: its own
code under vmap. ``loop``: its own code, one task after another.
"""

WHOLE = ("vmap", "loop")
"""Modes under which a module runs with everything inside it, from its pristine copy."""


class Plan:
    """How the model runs for one set of input names.

    Attributes:
        structure: The copy that runs; its adapted modules are task-batched.
        pristine: A copy without rules, for modules that run as they are, per task.
        owners: Module name -> what of it is adapted.
        leaf_slots: Weights that can be kept by leaf, once asked for.
        read_by_units: Slots whose tensors ``[T, *shape]`` a module that runs per task reads.
        modes: Adapted module, or shared method, -> one of :data:`MODES`.
        units: What runs per task.
        prefix: Modules whose outputs do not depend on the fast weights, in the order they run.
        fused_attention: Whether the model calls torch's fused attention past the registries.
        tolerance: Relative difference of results that a check allows.
        generates: Whether texts were continued by it as by each task alone.
        word_table: The embedding that is called once, on the model's ``input_ids``, or None.
        shortened: The layer that returns its first token alone, or None.
        unpadded: Layers that can leave out padding.
        padding_word: Id that this padding must hold, or None where any may.
        shows_padding: Whether the output is another at padding without them; then padding is left
            out where labels say that nobody reads it.
        output_layer: The linear layer, shared by all tasks, whose result is the logits of texts, or
            None.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        modes: Mapping[str, str],
        kinds: Mapping[str, CallKind],
        own_attention: bool = False,
    ) -> None:
        self.owners = slots.owners
        self.read_by_units: set[int] = set()
        self.leaf_slots: dict[int, LeafSlot] | None = None
        self.modes = dict(modes)
        self.units: list[Unit] = []
        self.structure = prepared_copy(model, slots, own_attention)
        self.pristine = shows_hidden_states(prepared_copy(model, slots, own_attention))
        self.prefix: list[str] = []
        self.fused_attention = False
        self.tolerance = 0.0
        self.generates = False
        self.word_table: str | None = None
        self.shortened: str | None = None
        self.unpadded: list[str] = []
        self.padding_word: int | None = None
        self.shows_padding = False
        self.output_layer: nn.Linear | None = None
        whole = [n for n, mode in modes.items() if mode in WHOLE]
        for name, module in list(self.structure.named_modules()):
            if name in slots.owners or inside_any(name, whole):
                continue
            rule = isolating_rule(module)
            if rule is not None:
                install(module, "forward", _by_rule(module, Adapted(name), rule, "isolate"))
            elif isinstance(module, _BatchNorm):
                install(module, "forward", _evaluated_only(module, name))
        for name, mode in modes.items():
            if mode != "skip":
                self._install(slots, name, mode, kinds)

    def _install(self, slots: Slots, name: str, mode: str, kinds: Mapping[str, CallKind]) -> None:
        module_name, method = split_key(name)
        module = self.structure.get_submodule(module_name)
        if mode in WHOLE:
            pristine = self.pristine.get_submodule(module_name)
            rows = kinds[name].rows if name in kinds else {}
            tensors, reads = unit_tensors(slots, module_name, pristine)
            self.read_by_units |= reads
            unit = Unit(pristine, tensors, reads, method, rows, name)
            self.units.append(unit)
            install(module, method, _by_unit(unit, by_vmap if mode == "vmap" else by_loop))
        elif mode == "expand":
            install(module, method, _by_expansion(module, slots.owners[name]))
        elif mode == "gather":
            install(module, method, _by_gathering(module, slots.owners[name]))
        else:
            adapted = slots.owners[name]
            rule = rule_for(module, adapted)
            assert rule is not None
            install(module, method, _by_rule(module, adapted, rule, mode))

    def settle(self) -> None:
        """From now on, modules that cannot run under vmap loop instead of failing."""
        for unit in self.units:
            unit.falls_back = True

    def refuse(self, names: Iterable[str]) -> None:
        """Raise where modules run that did not when this plan was made: nothing is known of how."""
        for name in names:
            if self.modes.get(name) == "skip":
                install(self.structure.get_submodule(name), "forward", _refusal(name))

    def train(self, mode: bool, rest: frozenset[str] = frozenset()) -> None:
        set_mode(self.structure, mode, rest)
        set_mode(self.pristine, mode, rest)

    def prefix_is_random(self) -> bool:
        return any(prefix.is_random(self.structure.get_submodule(n)) for n in self.prefix)

    def run(self, flat: Mapping[str, Any]) -> Any:
        """The model's output for inputs ``[T * N, ...]``, in the current call."""
        with self.attention():
            return self.structure(**flat)

    def attention(self) -> AbstractContextManager:
        """Within, torch's own attention is replaced where the model calls it."""
        return attention.twice_differentiable() if self.fused_attention else nullcontext()

    def run_prefix(self, flat: Mapping[str, Any]) -> None:
        """Run until the first adapted module; the current call's cache records."""
        call = current_call()
        call.only_prefix = True
        try:
            self.run(flat)
        except _PrefixDone:
            pass
        finally:
            call.only_prefix = False


class _PrefixDone(Exception):
    """The first adapted module was reached while only the prefix was wanted."""


def inside_any(name: str, units: list[str]) -> bool:
    """Whether a module lies inside one of `units`, itself excluded."""
    return any(u != name and (u == "" or name.startswith(u + ".")) for u in units)


def _by_rule(module: nn.Module, adapted: Adapted, rule: Callable, mode: str) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call = current_call()
        if call.only_prefix and adapted.slots:
            raise _PrefixDone
        x, *others = (*args, *kwargs.values())
        if any(isinstance(o, Tensor) for o in others):
            raise TypeError(f"the rule of {type(module).__name__} takes one tensor")
        single = mode == "single" and x.shape[0] == 1
        if single:
            x = x.expand(call.tasks, *x.shape[1:])
        elif mode == "lift":
            x = x.expand(call.tasks, *x.shape)
        y = rule(module, adapted, call, x)
        if single or mode == "lift":
            # Every task computes its own [T, ...]; each of its rows reads it.
            y = y.unsqueeze(1).expand(-1, call.rows, *y.shape[1:]).flatten(0, 1)
        if call.tap is not None and adapted.slots:
            call.tap.record(adapted.name, x, y)
        return y

    return forward


def _evaluated_only(module: _BatchNorm, name: str) -> Callable:
    """Its own forward, which would take the statistics of all tasks' rows in training."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if module.training and current_call().tasks > 1:
            raise RuntimeError(
                f"{name!r} ({type(module).__name__}) would normalise over the rows of all tasks: "
                "keep it in evaluation mode when the model is patched, or adapt its gain"
            )
        return forward(*args, **kwargs)

    return run


def _refusal(name: str) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise PatchError(
            f"module {name!r} adapts, but did not run on the inputs that this patched model saw "
            "first (in evaluation mode), so that how it runs is not known: adapt parameters "
            "outside of it, or patch again and begin with inputs that it runs on"
        )

    return forward


def _by_unit(unit: Unit, run: Callable) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call.only_prefix:
            raise _PrefixDone
        return run(unit, call, args, kwargs)

    return forward


def _by_expansion(module: nn.Module, adapted: Adapted) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call.only_prefix:
            raise _PrefixDone
        expanded = {
            name: call.views[slot].expand(-1, call.rows, *call.views[slot].shape[2:]).flatten(0, 1)
            for name, slot in adapted.slots.items()
        }
        return bind(module, expanded).forward(*args, **kwargs)

    return forward


def _by_gathering(module: nn.Embedding, adapted: Adapted) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call = current_call()
        if call.only_prefix:
            raise _PrefixDone
        table = adapted.view(call, "weight")
        with gathering(table, call.rows):
            return bind(module, {"weight": table}).forward(*args, **kwargs)

    return forward


def unit_tensors(slots: Slots, unit: str, structure: nn.Module) -> tuple[Tensors, frozenset[int]]:
    """What a unit binds: name below the unit -> ``[T, *shape]`` of a call, LoRA terms merged in.

    Args:
        unit: The module's name.
        structure: The unit's own module, for the frozen weights under LoRA terms.

    Returns:
        The function of a call, and every slot that the unit reads.
    """
    lead = unit + "." if unit else ""
    owners = {n: a for n, a in slots.owners.items() if n == unit or n.startswith(lead)}
    prefixes = {n: p for n, p in slots.prefixes.items() if n == unit or n.startswith(lead)}

    def tensors(call: Call) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, adapted in owners.items():
            relative = name[len(lead) :] if name != unit else ""
            dotted = relative + "." if relative else ""
            for attribute, slot in adapted.slots.items():
                if not attribute.startswith("lora_"):
                    found[dotted + attribute] = call.views[slot]
            if "lora_A" in adapted.slots:
                module = structure.get_submodule(relative)
                weight = found.get(dotted + "weight", module.weight)
                found[dotted + "weight"] = weight + lora_delta(module, adapted, call)
        return found

    reads = {slot for adapted in owners.values() for slot in adapted.slots.values()}
    reads |= {slot for pair in prefixes.values() for slot in pair}
    return tensors, frozenset(reads)


def different_tasks(slots: Slots, tasks: int) -> list[Tensor]:
    """Fast weights of `tasks` tasks, different from each other and from the initial values."""
    views = []
    for i, p in enumerate(slots.initial):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randn(tasks, *p.shape, generator=generator).to(p.device, p.dtype)
        scale = float(p.detach().float().std()) if p.numel() > 1 else 0.0
        views.append(p.detach() + noise * (0.2 * scale if scale > 0 else 0.1))
    return views
