"""Attention that can be differentiated twice, plugged in through transformers' registries.

No fused attention of torch has a double backward; a patched model therefore runs this one in
place of ``sdpa`` and the flash and flex variants, with the same masks and the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastmeta.patching.context import current_call

NAME = "fastmeta"
"""Name under which transformers knows this attention (``config._attn_implementation``)."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """``softmax(scale Q K^T + mask) V`` with transformers' attention-function signature.

    Args:
        query: ``[B, H, Lq, D]``. key, value: ``[B, Hk, Lk, D]`` with ``H`` a multiple of ``Hk``.
        attention_mask: Boolean (true attends) or additive, broadcastable to ``[B, H, Lq, Lk]``.
        position_bias: Additive, as T5 uses it.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2).

    Returns:
        ``[B, Lq, H, D]`` and None. Rows whose keys are all masked are zero, as in torch's sdpa.

    Differentiable to any order.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads = key.shape[1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and q_len > 1 and attention_mask is None
    mask = additive(attention_mask, position_bias, is_causal, query, key)
    prefix = getattr(module, "fastmeta_prefix", None)
    if prefix is not None:
        key, value, mask = _with_prefix(prefix, key, value, mask)
    scale = dim**-0.5 if scaling is None else scaling
    if heads != kv_heads:
        # Grouped heads share keys: fold the group into the query rows, no repeated keys.
        query = query.reshape(batch, kv_heads, heads // kv_heads * q_len, dim)
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if heads != kv_heads:
        scores = scores.view(batch, heads, q_len, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    probs = torch._safe_softmax(scores, -1)
    if dropout:
        probs = nn.functional.dropout(probs, p=dropout, training=True)
    if heads != kv_heads:
        probs = probs.reshape(batch, kv_heads, heads // kv_heads * q_len, -1)
    out = torch.matmul(probs, value)
    if heads != kv_heads:
        out = out.view(batch, heads, q_len, -1)
    return out.transpose(1, 2).contiguous(), None


def additive(
    mask: Tensor | None, position_bias: Tensor | None, causal: bool, query: Tensor, key: Tensor
) -> Tensor | None:
    """The mask as one additive tensor with -inf where attention is excluded, or None."""
    if causal:
        q_len, k_len = query.shape[2], key.shape[2]
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zeros, float("-inf"))
    if position_bias is not None:
        mask = position_bias if mask is None else mask + position_bias
    return mask


def _with_prefix(
    slots: tuple[int, int], key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each task's prefix ``[T, Hk, length, D]`` in front of its rows' keys and values."""
    call = current_call()
    rows = key.shape[0] // call.tasks

    def expand(slot: int) -> Tensor:
        t = call.views[slot]
        return t.unsqueeze(1).expand(-1, rows, -1, -1, -1).flatten(0, 1)

    prefix_key, prefix_value = expand(slots[0]), expand(slots[1])
    if mask is not None:
        mask = nn.functional.pad(mask, (prefix_key.shape[2], 0))
    return (
        torch.cat([prefix_key.to(key.dtype), key], dim=2),
        torch.cat([prefix_value.to(value.dtype), value], dim=2),
        mask,
    )


def register() -> None:
    """Make the attention known to transformers; idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_in(structure: nn.Module, every: bool = False) -> None:
    """Select this attention in a copied structure, in every (sub)configuration it holds.

    Args:
        structure: Its configurations are its own copies.
        every: Also replace ``eager`` (needed for a prefix); by default eager attention, which
            differentiates twice already, stays as it is.
    """
    register()
    seen: set[int] = set()
    for module in structure.modules():
        config = getattr(module, "config", None)
        stack = [config] if config is not None else []
        while stack:
            config = stack.pop()
            if id(config) in seen:
                continue
            seen.add(id(config))
            chosen = getattr(config, "_attn_implementation", None)
            if chosen is not None and (every or chosen != "eager"):
                config._attn_implementation_internal = NAME
            stack += [
                sub
                for key in getattr(config, "sub_configs", {})
                if (sub := getattr(config, key, None)) is not None
            ]


class watch_fused(TorchFunctionMode):
    """Notes whether code run within calls torch's fused attention itself, past the registries."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.seen = True
        return func(*args, **(kwargs or {}))


class plain_attention(TorchFunctionMode):
    """Within, torch's own attention runs by plain operations, which differentiate twice.

    For models that call it themselves; also keeps torch's transformer layers off the fused kernels
    that read their children's weights past the children.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _plain(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Asked for its weights, it computes them and leaves the fused kernels alone.
            out, weights = func(*args, **{**kwargs, "need_weights": True})
            return out, weights if kwargs.get("need_weights", True) else None
        return func(*args, **kwargs)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]
