"""A candidate as a model of its own, whose layers, heads and units are really gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmeta.models import SentenceClassifier
from fastmeta.search.anatomy import Anatomy, Layer
from fastmeta.search.proposal import Proposal


def prune(ordered: nn.Module, anatomy: Anatomy, proposal: Proposal) -> nn.Module:
    """A copy of a model with what a candidate keeps of it.

    Args:
        ordered: The model with heads and units by importance (`Evaluator.net.model`); unchanged.
        anatomy: Of the model.
        proposal: The candidate.

    Returns:
        A model of the same class, its configuration with it wherever that can say what is left, in
        evaluation mode. Its weights do not require grad.
    """
    model = copy.deepcopy(ordered)
    stack = model.get_submodule(anatomy.stack)
    for layer in anatomy.layers:
        heads, width = (
            s[int(layer.name.rpartition(".")[2])] for s in (proposal.heads, proposal.widths)
        )
        narrow(model.get_submodule(layer.name), layer, heads, width)
    kept = [module for module, k in zip(stack, proposal.kept, strict=True) if k]
    for number, module in enumerate(kept):
        for part in module.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    parent, _, name = anatomy.stack.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    if isinstance(model, SentenceClassifier):
        model.pooling = proposal.pooling
    _configure(model, anatomy, proposal, len(kept))
    return model


def why_not_stock(model: nn.Module, anatomy: Anatomy, shapes: Sequence[tuple | None]) -> str | None:
    """Why the model's own configuration cannot describe a candidate, or None where it can.

    transformers describes all layers by one number of heads and one width, and most encoders derive
    the size of a head from the number of heads, so that heads cannot be removed.

    Args:
        model, anatomy: The unpruned model.
        shapes: `Proposal.shape`.
    """
    kept = [s for s in shapes if s is not None]
    config = model.config
    key = _width_key(config)
    # Not the model's own sizes: it may have been pruned before.
    if any(h and h != config.num_attention_heads for h, _ in kept):
        if getattr(config, "head_dim", None) is None:
            return "derives the size of a head from the number of heads"
        if len({h for h, _ in kept}) > 1:
            return "has one number of heads for all layers"
    if key is None and any(w != anatomy.layers[0].width for _, w in kept):
        return "does not name the feed-forward width"
    if key is not None and any(w and w != getattr(config, key) for _, w in kept):
        if len({w for _, w in kept}) > 1:
            return "has one feed-forward width for all layers"
    return None


def _configure(model: nn.Module, anatomy: Anatomy, proposal: Proposal, count: int) -> None:
    config, first = model.config, anatomy.layers[0]
    # Some families list a kind of attention for every layer.
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = count
    if types is not None:
        config.layer_types = [t for t, k in zip(types, proposal.kept, strict=True) if k]
    heads, width = next(s for s in proposal.shape if s is not None)
    key = _width_key(config)
    if width and width != (first.width if key is None else getattr(config, key)):
        setattr(config, key or "intermediate_size", width)
    named = getattr(config, "head_dim", None) is not None
    if named and heads and heads != config.num_attention_heads:
        config.num_attention_heads = heads
        config.num_key_value_heads = heads


def _width_key(config) -> str | None:
    return next(
        (k for k in ("intermediate_size", "hidden_dim", "ffn_dim") if hasattr(config, k)), None
    )


def narrow(module: nn.Module, layer: Layer, heads: int, width: int) -> None:
    """Cut the linear modules of one layer to their first rows and columns."""
    for name, (rows, columns) in layer.sizes(heads, width).items():
        linear = module.get_submodule(name)
        linear.weight = _parameter(linear.weight[:rows, :columns])
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias[:rows])
        linear.out_features, linear.in_features = linear.weight.shape
    if heads < layer.heads:
        for part in module.modules():
            for key in ("num_attention_heads", "num_heads", "n_heads"):
                if getattr(part, key, None) == layer.heads:
                    setattr(part, key, heads)
            if hasattr(part, "all_head_size"):
                part.all_head_size = heads * layer.head_size


def _parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(
        t.detach().clone(memory_format=torch.contiguous_format), requires_grad=False
    )
