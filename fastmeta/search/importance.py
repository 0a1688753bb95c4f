"""Order heads and feed-forward units by importance, so that a narrower layer is a prefix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastmeta.search.anatomy import Anatomy, Layer


@torch.no_grad()
def ordered_copy(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """A copy that computes the same, whose heads and units come most important first.

    The importance of a unit is ``|w_in| |w_out|``, the norms of its rows in the layers before it and
    of its column in the layer after it; that of a head ``|W_v| |W_o|``, over its rows and columns.

    Args:
        model: Left unchanged.
        anatomy: Of the model.

    Returns:
        The copy, in evaluation mode, its weights frozen.
    """
    ordered = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in anatomy.layers:
        module = ordered.get_submodule(layer.name)
        if layer.width:
            score = _norm(module.get_submodule(layer.narrowing).weight, 0)
            for name in layer.widening:
                score = score * _norm(module.get_submodule(name).weight, 1)
            _permute(module, layer.widening, layer.narrowing, _descending(score))
        if layer.heads:
            _permute(module, layer.projections, layer.output, _head_order(module, layer))
    return ordered


def _head_order(module: nn.Module, layer: Layer) -> Tensor:
    """Columns of the heads, most important head first."""
    value = module.get_submodule(layer.projections[-1]).weight  # [H D, hidden]
    output = module.get_submodule(layer.output).weight  # [hidden, H D]
    rows, columns = (_norm(w, d).view(layer.heads, -1) for w, d in ((value, 1), (output, 0)))
    score = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(columns, dim=1)
    heads = _descending(score)
    columns = torch.arange(layer.head_size, device=heads.device)
    return (heads.unsqueeze(1) * layer.head_size + columns).flatten()


def _permute(module: nn.Module, before: tuple[str, ...], after: str, order: Tensor) -> None:
    for name in before:
        linear = module.get_submodule(name)
        linear.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])
    linear = module.get_submodule(after)
    linear.weight.copy_(linear.weight[:, order])


def _norm(weight: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=dim)


def _descending(score: Tensor) -> Tensor:
    return torch.argsort(score, descending=True, stable=True)
