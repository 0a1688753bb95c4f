"""Activations, normalisations and dropout of a copied structure through `fm.ops`.

torch differentiates the exact GELU and its normalisation twice through a dozen full-size
temporaries each; in a second-order step of a small transformer that was a quarter of the time. Its
dropout draws a mask number by number on a CPU, and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations as hf

from fastmeta.ops import activations
from fastmeta.ops.dropout import drop_randomly
from fastmeta.ops.layer_norm import has_kernel, norm_rows
from fastmeta.patching.bind import install


def use_in(structure: nn.Module) -> None:
    """Run every GELU, SiLU, LayerNorm and Dropout module of a copied structure through `fm.ops`."""
    for module in structure.modules():
        found = _kind(module)
        if found is not None:
            module.forward = partial(_activation, *found)
        elif type(module).forward is nn.Dropout.forward:
            install(module, "forward", partial(_dropout, module))
        elif type(module).forward is nn.LayerNorm.forward and module.weight is not None:
            if len(module.normalized_shape) == 1:
                install(module, "forward", partial(_layer_norm, module))


def _kind(module: nn.Module) -> tuple[int, Callable[[Tensor], Tensor]] | None:
    """Which activation a module is, and torch's own."""
    if isinstance(module, nn.GELU):
        tanh = module.approximate == "tanh"
    elif type(module) is hf.GELUActivation and module.act is F.gelu:
        tanh = False
    elif type(module) is hf.NewGELUActivation:
        tanh = True
    elif type(module) is hf.GELUTanh and isinstance(module.act, partial):
        tanh = True
    elif type(module) in (nn.SiLU, hf.SiLUActivation):
        return activations.SILU, F.silu
    else:
        return None
    if tanh:
        return activations.GELU_TANH, partial(F.gelu, approximate="tanh")
    return activations.GELU, F.gelu


def _activation(kind: int, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return activations.activation(x, kind) if activations.has_kernel(x) else plain(x)


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    if module.training and 0 < module.p < 1:
        return drop_randomly(x, module.p)
    return F.dropout(x, module.p, module.training)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    y = normalised(x, module.weight.unsqueeze(0), module.bias, module.eps)
    if y is None:
        y = F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    return y


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor | None:
    """The normalisation by the operator's kernel, or None where there is none.

    Args:
        x: Task-major ``[T * N, ..., D]``.
        weight: ``[1 or T, D]``.
        bias: ``[D]``, ``[1 or T, D]`` or None.
    """
    lowered = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
    if not has_kernel(x) or lowered or x.dtype != weight.dtype:
        return None
    if bias is not None:
        if bias.dim() == 1:
            bias = bias.unsqueeze(0)
        tasks = max(len(weight), len(bias))
        weight, bias = (v.expand(tasks, -1) for v in (weight, bias))
    return norm_rows(x.reshape(-1, x.shape[-1]), weight, bias, eps, rms).view(x.shape)
