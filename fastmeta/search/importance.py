"""Order heads and feed-forward units by importance, so that a narrower layer is a prefix."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.search.anatomy import Anatomy, Layer


@torch.no_grad()
def ordered_copy(
    model: nn.Module, anatomy: Anatomy, calibration: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy that computes the same, whose heads and units come most important first.

    The importance of a unit is ``|w_in| |w_out|``, the norms of its rows in the layers before it
    and of its column in the layer after it; that of a head ``|W_v| |W_o|``, over its rows and
    columns. With calibration inputs the norm before is that of the unit's (the head's) values on
    them: how far the layer's output moves without it.

    Args:
        model: Left unchanged.
        anatomy: Of the model.
        calibration: Inputs ``[B, ...]`` of the model, or None.

    Returns:
        The copy, in evaluation mode, its weights frozen.
    """
    ordered = copy.deepcopy(model).eval().requires_grad_(False)
    values = {} if calibration is None else _values(ordered, anatomy, calibration)
    for layer in anatomy.layers:
        module = ordered.get_submodule(layer.name)
        if layer.width:
            _order(module, layer.widening, layer.narrowing, 1, values.get(_key(layer, False)))
        if layer.heads:
            seen = values.get(_key(layer, True))
            _order(module, layer.projections, layer.output, layer.head_size, seen)
    return ordered


def _values(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a module -> sum of squares of each of its inputs, over all tokens that count."""
    found: dict[str, Tensor] = {}
    mask = inputs.get("attention_mask")
    hooks = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            squares = args[0].square()
            if mask is not None:
                counted = mask.flatten() if squares.dim() == 2 else mask  # OPT's are [B * L, W]
                squares = squares * counted.to(squares.dtype).unsqueeze(-1)
            found[name] = squares.flatten(0, -2).sum(0)

        return hook

    for layer in anatomy.layers:
        for heads in (True, False):
            name = _key(layer, heads)
            if not name.endswith("."):
                hooks.append(model.get_submodule(name).register_forward_pre_hook(watch(name)))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def _key(layer: Layer, heads: bool) -> str:
    return f"{layer.name}.{layer.output if heads else layer.narrowing}"


def _order(
    module: nn.Module, before: tuple[str, ...], after: str, size: int, squares: Tensor | None
) -> None:
    """Permute groups of `size` units between the layers before and after them."""
    out = module.get_submodule(after)
    columns = _grouped(out.weight.square().sum(0), size)
    if squares is not None:
        rows = _grouped(squares, size)
    elif size > 1:  # a head passes on its values
        rows = _grouped(module.get_submodule(before[-1]).weight.square().sum(1), size)
    else:
        rows = torch.ones_like(columns)
        for name in before:
            rows = rows * module.get_submodule(name).weight.square().sum(1)
    groups = torch.argsort(rows * columns, descending=True, stable=True)
    order = (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()
    for name in before:
        linear = module.get_submodule(name)
        linear.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])
    out.weight.copy_(out.weight[:, order])


def _grouped(squares: Tensor, size: int) -> Tensor:
    return squares.view(-1, size).sum(1)
