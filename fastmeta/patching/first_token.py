"""Compute of the last encoder layer only what the head reads.

Heads of BERT-like models read the first token's state. The last layer's other tokens then serve
as keys and values only: their queries, attention outputs and feed-forward passes are never read,
and neither are their gradients. Nor are keys and values needed one by one: with a single query
per row, ``q . (W_k x_j) = (W_k^T q) . x_j`` and ``sum_j p_j W_v x_j = W_v sum_j p_j x_j``, so both
projections act on one vector per head and row instead of on every token. For a classifier of two
layers that is half of the whole second-order step. Results are the same; whether a model's head
really reads nothing else is checked on real inputs before this is used (see `search`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.ops.batched_linear import affine
from fastmeta.patching import attention
from fastmeta.patching.bind import install
from fastmeta.patching.context import Call, current_call
from fastmeta.patching.fast_weights import FastMatrix
from fastmeta.patching.rules import Adapted

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


def shorten(
    structure: nn.Module, name: str, owners: Mapping[str, Adapted], modes: Mapping[str, str]
) -> None:
    """Make a layer of a copied structure return its first token's state, ``[B, 1, D]``.

    Args:
        name: The layer.
        owners: Every adapted module.
        modes: How it runs.
    """
    layer = structure.get_submodule(name)
    own, output = layer.attention.self, layer.attention.output
    after = output.forward

    def first_token_output(context: Tensor, residual: Tensor) -> Tensor:
        return after(context, residual[:, :1])

    key, value = (
        _by_heads(getattr(own, part), f"{name}.attention.self.{part}", owners, modes)
        for part in ("key", "value")
    )

    def attend(states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any):
        if attention_mask is not None and attention_mask.shape[-2] > 1:
            attention_mask = attention_mask[..., :1, :]
        if key is None or value is None or hasattr(own, "fastmeta_prefix"):
            return _attend(own, states, attention_mask), None
        return _attend_to_states(own, key, value, states, attention_mask), None

    install(own, "forward", attend)
    install(output, "forward", first_token_output)


@dataclass
class _ByHeads:
    """A linear layer ``[H * D, in]`` that is applied head by head, to a vector for each head."""

    module: nn.Module
    adapted: Adapted

    def _product(self, call: Call, x: Tensor, nt: bool) -> Tensor:
        """``x_h W_h^T``, or ``x_h W_h`` without `nt`, for ``[T, H, N, .]``; no LoRA term."""
        tasks, heads = x.shape[:2]
        weight = self.adapted.tensor(call, "weight")
        if isinstance(weight, FastMatrix):
            return weight(x.flatten(0, 1), None, nt=nt, heads=heads).unflatten(0, (tasks, heads))
        weight = self.module.weight.unsqueeze(0) if weight is None else weight
        weight = weight.unflatten(1, (heads, -1))  # [T or 1, H, D, in]
        return _matmul(x, weight.mT if nt else weight)

    def lora(self, call: Call, heads: int) -> tuple[Tensor, Tensor] | None:
        """``[T, 1, r, in]``, scaled, and ``[T, H, D, r]``."""
        if "lora_A" not in self.adapted.slots:
            return None
        a, b = self.adapted.view(call, "lora_A"), self.adapted.view(call, "lora_B")
        return a.unsqueeze(1) * self.adapted.lora_scale, b.unflatten(1, (heads, -1))

    def bias(self, call: Call, heads: int) -> Tensor | None:
        """``[T or 1, H, 1, D]``."""
        bias = self.adapted.tensor(call, "bias")
        if bias is None and self.module.bias is not None:
            bias = self.module.bias.unsqueeze(0)
        return None if bias is None else bias.unflatten(1, (heads, 1, -1))

    def transposed(self, call: Call, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[T, H, N, D]`` -> ``W_h^T y_h``, ``[T, H, N, in]``, and ``b_h . y_h``."""
        x = self._product(call, y, nt=False)
        low, bias = self.lora(call, y.shape[1]), self.bias(call, y.shape[1])
        x = x if low is None else x + y @ low[1] @ low[0]
        return x, None if bias is None else (y * bias).sum(-1, keepdim=True)

    def __call__(self, call: Call, x: Tensor, share: Tensor) -> Tensor:
        """``W_h x_h + share b_h``: ``[T, H, N, in]`` and ``[T, H, N, 1]`` -> ``[T, H, N, D]``."""
        y = self._product(call, x, nt=True)
        low, bias = self.lora(call, x.shape[1]), self.bias(call, x.shape[1])
        y = y if low is None else y + x @ low[0].mT @ low[1].mT
        return y if bias is None else y + share * bias


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``[T, H, N, a]`` by ``[T or 1, H, a, b]``; a shared weight is not copied for every task."""
    if weight.shape[0] == x.shape[0]:
        return x @ weight
    y = x.transpose(0, 1).flatten(1, 2) @ weight[0]  # [H, T * N, b]
    return y.unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def _by_heads(
    module: nn.Module, name: str, owners: Mapping[str, Adapted], modes: Mapping[str, str]
) -> _ByHeads | None:
    """The module by heads, or None where it is more than a linear layer and its rule."""
    plain = type(module).forward is nn.Linear.forward
    hooks = module._forward_hooks or module._forward_pre_hooks
    if not plain or hooks or modes.get(name, "rule") != "rule":
        return None
    return _ByHeads(module, owners.get(name) or Adapted(name))


def _attend_to_states(
    module: nn.Module, key: _ByHeads, value: _ByHeads, states: Tensor, mask: Tensor | None
) -> Tensor:
    """:func:`_attend` with the projections of keys and values moved to the query's side."""
    call = current_call()
    heads, dim = module.query.out_features // module.attention_head_size, module.attention_head_size
    scale = getattr(module, "scaling", None)
    query = module.query(states[:, :1]) * (dim**-0.5 if scale is None else scale)
    query = query.view(call.tasks, -1, heads, dim).transpose(1, 2)  # [T, H, N, D]
    query, offset = key.transposed(call, query)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)  # [T, H, N, .] -> [B, H, .]

    scores = affine(rows(query), states)
    # Softmax does not see the bias; adding it keeps its gradient, of zeros, as anyone expects it.
    scores = (scores if offset is None else scores + rows(offset)).unsqueeze(2)  # [B, H, 1, L]
    if mask is not None:
        scores = scores + attention.additive(mask, scores.dtype)
    probs = module.dropout(torch._safe_softmax(scores, -1).squeeze(2))
    mean = affine(probs, states, nt=False)  # [B, H, in]
    mean, share = (
        t.unflatten(0, (call.tasks, -1)).transpose(1, 2) for t in (mean, probs.sum(-1, True))
    )
    return value(call, mean, share).permute(0, 2, 1, 3).reshape(len(states), 1, -1)


def _attend(module: nn.Module, states: Tensor, mask: Tensor | None) -> Tensor:
    """The first token's attention over all tokens of ``[B, L, D]``: ``[B, 1, D]``."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    out, _ = attention.attention(
        module,
        heads(module.query(states[:, :1])),
        heads(module.key(states)),
        heads(module.value(states)),
        mask,
        dropout=module.dropout.p if module.training else 0.0,
        scaling=getattr(module, "scaling", None),
        is_causal=False,
    )
    return out.flatten(2)


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
