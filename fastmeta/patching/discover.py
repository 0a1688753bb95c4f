"""Find a model's self-attentions by running it once on a dummy input."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from fastmeta.patching import attention
from fastmeta.patching.bind import copy_structure

_PROBE = "fastmeta_discover"


def self_attentions(model: nn.Module) -> list[tuple[str, int, int]]:
    """(module name, key/value heads, head size) of every self-attention, in the order they run."""
    structure = copy_structure(model).eval()
    attention.use_in(structure, every=True)
    names = {id(m): n for n, m in structure.named_modules()}
    found: list[tuple[str, int, int]] = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        entry = (names[id(module)], key.shape[1], key.shape[-1])
        if entry not in found and query.shape[2] == key.shape[2] and _is_self(module):
            found.append(entry)
        return attention.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_PROBE, spy)
    for module in structure.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == attention.NAME:
            config._attn_implementation_internal = _PROBE
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in model.dummy_inputs.items()}
    with torch.no_grad():
        structure(**inputs)
    return found


def _is_self(module: nn.Module) -> bool:
    return not getattr(module, "is_cross_attention", False)
