"""Slots: the segments of the packed buffer, where their initial values live, who reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastmeta.patching.discover import self_attentions
from fastmeta.patching.layout import ParamLayout
from fastmeta.patching.rules import Adapted
from fastmeta.patching.spec import AdaptParameter, AddLoRA, AddPrefix, Spec


@dataclass
class Slots:
    """Everything adapted, in layout order.

    Attributes:
        layout: Names and shapes; a tied parameter has one segment, under its first name.
        initial: Initial values: the model's own parameters, or new ones (LoRA, prefix).
        owners: Module name -> what of it is adapted.
        prefixes: Attention module name -> key and value slots.
    """

    layout: ParamLayout
    initial: list[nn.Parameter]
    owners: dict[str, Adapted]
    prefixes: dict[str, tuple[int, int]]

    def leaves(self) -> list[Tensor]:
        """Initial values that lead gradients back to `initial`, frozen parameters included."""
        return [_leaf(p) for p in self.initial]


def _leaf(parameter: nn.Parameter) -> Tensor:
    """The parameter, or for a frozen one an alias whose gradient lands in ``parameter.grad``.

    Everything adapted is a meta-parameter, also in a model frozen by ``requires_grad_(False)``;
    the user's flag is left alone.
    """
    if parameter.requires_grad or not torch.is_grad_enabled():
        return parameter
    alias = parameter.detach().requires_grad_()

    def hand_over(alias: Tensor) -> None:
        grad, alias.grad = alias.grad, None
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    alias.register_post_accumulate_grad_hook(hand_over)
    return alias


def make_slots(model: nn.Module, spec: Spec, seed: int) -> Slots:
    """Resolve `spec` against `model`."""
    for name, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False):
            raise ValueError(
                f"{name!r} counts words over a whole batch, of all its tasks: expected an "
                "embedding without scale_grad_by_freq"
            )
    # One generator for all new parameters: explicit, and independent of the global one.
    generator = torch.Generator().manual_seed(seed)
    names: list[str] = []
    initial: list[nn.Parameter] = []
    owners: dict[str, Adapted] = {}
    prefixes: dict[str, tuple[int, int]] = {}
    by_tensor: dict[int, int] = {}

    def add(name: str, parameter: nn.Parameter) -> int:
        names.append(name)
        initial.append(parameter)
        return len(names) - 1

    def owner(module_name: str) -> Adapted:
        return owners.setdefault(module_name, Adapted(module_name))

    parameters = dict(model.named_parameters(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        places.setdefault(id(parameter), []).append(name)
    for request in spec.resolve(model):
        if isinstance(request, AdaptParameter):
            parameter = parameters[request.name]
            if id(parameter) in by_tensor:
                continue
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{request.name!r} holds {parameter.dtype}; only floating-point parameters "
                    "can be adapted: use LoRA on top of quantised weights"
                )
            slot = by_tensor[id(parameter)] = add(request.name, parameter)
            # A tied parameter is read in several places: all of them read the one slot.
            for place in places[id(parameter)]:
                module_name, _, attribute = place.rpartition(".")
                owner(module_name).slots[attribute] = slot
        elif isinstance(request, AddLoRA):
            module = model.get_submodule(request.module)
            adapted = owner(request.module)
            if "lora_A" in adapted.slots:
                raise ValueError(f"two LoRA specifications name the same module {request.module!r}")
            adapted.lora_scale = request.alpha / request.rank
            for attribute, parameter in _lora_parameters(module, request.rank, generator).items():
                name = f"{request.module}.{attribute}"
                adapted.slots[attribute] = add(name, parameter)
        elif isinstance(request, AddPrefix):
            for module_name, heads, dim in self_attentions(model):
                key_value = []
                for which in ("prefix_key", "prefix_value"):
                    data = torch.randn(heads, request.length, dim, generator=generator) * 0.02
                    like = next(model.parameters())
                    parameter = nn.Parameter(data.to(like.device, like.dtype))
                    key_value.append(add(f"{module_name}.{which}", parameter))
                prefixes[module_name] = (key_value[0], key_value[1])
    for kind, values in (
        ("dtype", {p.dtype for p in initial}),
        ("device", {p.device for p in initial}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"all adapted parameters must share one {kind}, got {sorted(map(str, values))}"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or type(parameter.data).__name__ == "DTensor":
            where = "on the meta device" if parameter.is_meta else "sharded (a DTensor)"
            raise ValueError(
                f"expected a model whose weights are whole and loaded, but {name!r} is {where}"
            )
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    for own in names_of.values():
        if len(own) > 1 and any("lora_A" in owners[n].slots for n in own if n in owners):
            raise ValueError(
                f"{own[0]!r} and {own[1]!r} are one module, which LoRA would extend under one of "
                "its names only: give the model a module for each"
            )
    scales = {n: a.lora_scale for n, a in owners.items() if "lora_A" in a.slots}
    layout = ParamLayout(names, [p.shape for p in initial], scales)
    return Slots(layout, initial, owners, prefixes)


def _lora_parameters(
    module: nn.Module, rank: int, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    weight = module.weight
    out_features, in_features = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # Kaiming-uniform with a = sqrt(5), as in the paper's code and peft: bound 1 / sqrt(in).
    bound = 1 / math.sqrt(in_features)
    a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(out_features, rank)
    return {
        "lora_A": nn.Parameter(a.to(weight.device, dtype)),
        "lora_B": nn.Parameter(b.to(weight.device, dtype)),
    }
