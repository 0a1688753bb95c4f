"""Find a model's self-attentions by running it once on a dummy input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastmeta.patching import attention
from fastmeta.patching.bind import copy_structure
from fastmeta.patching.inputs import vocabulary

_SPY = "fastmeta_discover"


def self_attentions(model: nn.Module) -> list[tuple[str, int, int]]:
    """(module name, key/value heads, head size) of every self-attention, in the order they run.

    Raises:
        ValueError: The model does not run its attention through transformers' interface.
    """
    structure = copy_structure(model).eval()
    attention.use_in(structure, every=True)
    names = {id(m): n for n, m in structure.named_modules()}
    found: dict[str, tuple[str, int, int]] = {}
    widths: dict[str, tuple[int, int]] = {}

    def spy(module, query, key, value, attention_mask, **kwargs):
        # The decoder's input is shorter than the encoder's: equal lengths mean self-attention.
        if query.shape[2] == key.shape[2]:
            name = names[id(module)]
            widths[name] = key.shape[-1], value.shape[-1]
            found.setdefault(name, (name, key.shape[1], key.shape[-1]))
        return attention.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_SPY, spy)
    AttentionMaskInterface.register(_SPY, sdpa_mask)
    for module in structure.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == attention.NAME:
            config._attn_implementation_internal = _SPY
    inputs = _dummy_inputs(model)
    if inputs is not None:
        try:
            with torch.no_grad():
                structure(**inputs)
        except Exception as e:
            raise ValueError(
                f"Prefix runs {type(model).__name__} once to find its attention, on the inputs "
                f"{sorted(inputs)} of one row, which failed ({type(e).__name__}: {e})"
            ) from e
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not run its attention through transformers' "
            "attention interface, which Prefix needs; use LoRA or Params instead"
        )
    for name, (wide, narrow) in widths.items():
        if wide != narrow:
            raise ValueError(
                f"Prefix needs keys and values of one width, but {name!r} of "
                f"{type(model).__name__} has keys of {wide} and values of {narrow} numbers; use "
                "LoRA or Params instead"
            )
    return list(found.values())


def _dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """One row of whatever the model takes, or None for a model that is not transformers'."""
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name not in ("input_ids", "pixel_values"):
        return None
    like = next(model.parameters())
    if name == "pixel_values":
        size = getattr(config, "image_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, config.num_channels, height, width)
        return {name: torch.zeros(shape, dtype=like.dtype, device=like.device)}
    ids = torch.ones(1, 4, dtype=torch.int64, device=like.device)
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < (vocabulary(model) or 0):
        ids[:, -1] = eos  # BART's classifier reads the last such token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :3]
    return inputs
