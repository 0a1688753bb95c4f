"""Compute of the last encoder layer only what the head reads.

Heads of BERT-like models read the first token's state. The last layer's other tokens then serve
as keys and values only: their queries, attention outputs and feed-forward passes are never read,
and neither are their gradients. For a classifier of two layers that is two fifths of the whole
second-order step. Results are the same; whether a model's head really reads nothing else is
checked on real inputs before this is used (see `search`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmeta.patching import attention
from fastmeta.patching.bind import install

_LAYER_PARTS = ("attention.self", "attention.output", "intermediate", "output")
_ATTENTION_PARTS = ("query", "key", "value", "attention_head_size", "dropout")


def last_layer(structure: nn.Module, order: list[str]) -> str | None:
    """The BERT-like layer that runs last, once, or None.

    Args:
        order: Module names in the order in which they were entered.
    """
    found = None
    for name in order:
        if _is_layer(structure.get_submodule(name)):
            found = name
    return found if found is not None and order.count(found) == 1 else None


def shorten(layer: nn.Module) -> None:
    """Make a layer of a copied structure return its first token's state, ``[B, 1, D]``."""
    own, output = layer.attention.self, layer.attention.output
    after = output.forward

    def first_token_output(context: Tensor, residual: Tensor) -> Tensor:
        return after(context, residual[:, :1])

    install(own, "forward", lambda *args, **kwargs: _attend(own, *args, **kwargs))
    install(output, "forward", first_token_output)


def _attend(
    module: nn.Module, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The first token's attention over all tokens of ``[B, L, D]``: ``[B, 1, D]``."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    if attention_mask is not None and attention_mask.shape[-2] > 1:
        attention_mask = attention_mask[..., :1, :]
    out, _ = attention.attention(
        module,
        heads(module.query(states[:, :1])),
        heads(module.key(states)),
        heads(module.value(states)),
        attention_mask,
        dropout=module.dropout.p if module.training else 0.0,
        scaling=getattr(module, "scaling", None),
        is_causal=False,
    )
    return out.flatten(2), None


def _is_layer(module: nn.Module) -> bool:
    try:
        own = module.get_submodule("attention.self")
        for part in _LAYER_PARTS:
            module.get_submodule(part)
    except AttributeError:
        return False
    return all(hasattr(own, part) for part in _ATTENTION_PARTS) and not getattr(
        module, "is_decoder", False
    )
