"""`fm.ops.attention` in patched models, plugged in through transformers' registries.

No fused attention of torch has a double backward; a patched model therefore runs the operator in
place of ``sdpa`` and the flash and flex variants, with the same masks and the same results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastmeta.ops._attention import attend, takes_places
from fastmeta.ops.attention import check_mask
from fastmeta.ops.dropout import drawn_seed
from fastmeta.patching.context import active_tokens, current_call
from fastmeta.reference.attention import Setting

NAME = "fastmeta"
"""Name under which transformers knows this attention (``config._attn_implementation``)."""


def attention(
    module: nn.Module | None,
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
    settings = (attention_mask, dropout, scaling, is_causal, position_bias, softcap)
    tokens = active_tokens()
    if tokens is None:
        return _attention(module, query, key, value, None, *settings), None
    if takes_places(query) and not softcap and not hasattr(module, "fastmeta_prefix"):
        return _attention(
            module, query, key, value, tokens.place.view(tokens.shape), *settings
        ), None
    padded = (tokens.padded(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
    return tokens.packed(_attention(module, *padded, None, *settings)), None


def _attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor | None,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """:func:`attention` on padded texts, or on rows of texts at `places`: ``[B, Lq, H, D]`` or
    ``[T, M, H, D]``."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and query.shape[2] > 1 and attention_mask is None
    mask, offset = with_bias(attention_mask, position_bias, query.dtype), 0
    prefix = getattr(module, "fastmeta_prefix", None)
    if prefix is not None:
        offset, key, value, mask = _with_prefix(prefix, key, value, mask)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if places is not None:
        batch, queries = places.shape
        keys = queries
    mask = check_mask(mask, (batch, query.shape[1], queries, keys), query.device)
    setting = Setting(
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        lower=-queries,
        upper=offset if causal else keys,
        dropout_p=dropout,
        period=batch,
        softcap=softcap or 0.0,
        places=places,
    )
    out = attend(query, key, value, mask, drawn_seed(query) if dropout else None, setting)
    return out.transpose(1, 2).contiguous()


def with_bias(
    mask: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask and bias as one, which broadcasts to ``[B, H, Lq, Lk]``."""
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return position_bias + additive(mask, dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a tensor to add, with -inf where attention is excluded."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, float("-inf"))


def _with_prefix(
    slots: tuple[int, int], key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """Each task's prefix ``[T, Hk, length, D]`` in front of its rows' keys and values, which every
    query attends. The first result is its length."""
    call = current_call()
    rows = key.shape[0] // call.tasks

    def expand(slot: int) -> Tensor:
        t = call.views[slot]
        return t.unsqueeze(1).expand(-1, rows, -1, -1, -1).flatten(0, 1)

    prefix_key, prefix_value = expand(slots[0]), expand(slots[1])
    if mask is not None:
        attended = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (prefix_key.shape[2], 0), value=attended)
    return (
        prefix_key.shape[2],
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
    kept = () if every else ("eager",)
    _select(structure, lambda chosen: chosen if chosen in kept else NAME)


def leave_in(structure: nn.Module) -> None:
    """Leave a copied structure the name of the attention that it chose, except flash and flex:
    what it asks of torch runs by the operator all the same, see :class:`twice_differentiable`."""
    _select(structure, lambda chosen: chosen if chosen == "eager" else "sdpa")


def _select(structure: nn.Module, choose: Callable[[str], str]) -> None:
    """Choose anew in every (sub)configuration that names an attention."""
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
            if chosen is not None:
                config._attn_implementation_internal = choose(chosen)
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


class twice_differentiable(TorchFunctionMode):
    """Within, torch's own attention runs by the operator, or by plain operations where that has no
    such form.

    For models that call it themselves; also keeps torch's transformer layers off the fused kernels
    that read their children's weights past the children.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _in_place_of_torch(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Asked for its weights, it computes them and leaves the fused kernels alone.
            out, weights = func(*args, **{**kwargs, "need_weights": True})
            return out, weights if kwargs.get("need_weights", True) else None
        return func(*args, **kwargs)


def _in_place_of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    shapes = query.shape, key.shape
    if query.dim() == 4 and key.shape == value.shape and shapes[0][::3] == shapes[1][::3]:
        heads, shared = shapes[0][1], shapes[1][1]
        grouped = heads == shared or ((enable_gqa or shared == 1) and heads % shared == 0)
        first = is_causal and query.shape[2] == 1  # which attends the first key alone
        if grouped and not first:
            out, _ = attention(None, query, key, value, attn_mask, dropout_p, scale, is_causal)
            return out.transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        None if attn_mask is None else additive(attn_mask, query.dtype),
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]
