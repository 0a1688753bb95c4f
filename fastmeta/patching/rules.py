"""Task-batched forwards of leaf modules, one rule per module type.

A rule computes what T per-task copies of the module would, on inputs whose leading rows are
task-major ``[T * N, ...]`` (or flattened further, ``[T * N * L, D]``). It reads the task's
tensors ``[T, *shape]`` for adapted parameters and the module's own tensors for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call


@dataclass
class Adapted:
    """Which slots adapt one module.

    Attributes:
        name: The module's name in the model.
        slots: Parameter name (``weight``, ``lora_A``, ...) -> slot index.
        lora_scale: ``alpha / r`` where the module has a LoRA term.
        single: The module is called with one leading row shared by all tasks (position tables).
    """

    name: str
    slots: dict[str, int] = field(default_factory=dict)
    lora_scale: float = 1.0
    single: bool = False

    def tensor(self, call: Call, name: str) -> Tensor | None:
        slot = self.slots.get(name)
        return None if slot is None else call.views[slot]


Rule = Callable[[nn.Module, Adapted, Call, Tensor], Tensor]


def linear(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.Linear: frozen parts are one GEMM over all tasks, adapted parts a batched GEMM."""
    return _affine(module, adapted, call, x, transposed=False)


def conv1d_gpt2(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """transformers' Conv1D: a linear layer whose weight is stored ``[in, out]``."""
    return _affine(module, adapted, call, x, transposed=True)


def _affine(module: nn.Module, adapted: Adapted, call: Call, x: Tensor, transposed: bool) -> Tensor:
    tasks = call.tasks
    weight = adapted.tensor(call, "weight")
    bias = adapted.tensor(call, "bias")
    lora_a = adapted.tensor(call, "lora_A")
    rows = x.reshape(tasks, -1, x.shape[-1])  # [T, M, in]
    if weight is not None:
        weight = weight if transposed else weight.transpose(1, 2)  # [T, in, out]
        if bias is not None:
            y = torch.baddbmm(bias.unsqueeze(1), rows, weight)
        else:
            y = torch.bmm(rows, weight)
            if module.bias is not None:
                y = y + module.bias
    else:
        shared = module.weight.t() if transposed else module.weight
        if bias is not None:
            y = F.linear(rows, shared) + bias.unsqueeze(1)
        else:
            y = F.linear(rows, shared, module.bias)
    if lora_a is not None:
        lora_b = adapted.tensor(call, "lora_B")
        low = torch.bmm(rows, lora_a.transpose(1, 2))  # [T, M, r]
        y = torch.baddbmm(y, low, lora_b.transpose(1, 2), alpha=adapted.lora_scale)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def embedding(module: nn.Embedding, adapted: Adapted, call: Call, ids: Tensor) -> Tensor:
    """nn.Embedding: one gather from the stacked tables, ids offset by task."""
    table = adapted.tensor(call, "weight")  # [T, V, D]
    tasks, vocab, dim = table.shape
    offset = torch.arange(tasks, device=ids.device).mul_(vocab)
    flat = ids.reshape(tasks, -1) + offset.unsqueeze(1)
    y = F.embedding(flat, table.reshape(tasks * vocab, dim)).view(*ids.shape, dim)
    if module.padding_idx is not None:
        # torch gives the padding row no gradient; the stacked tables have one such row per task.
        y = torch.where((ids == module.padding_idx).unsqueeze(-1), y.detach(), y)
    return y


def layer_norm(module: nn.LayerNorm, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.LayerNorm: shared normalisation, per-task gain and bias."""
    y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    y = y.reshape(call.tasks, -1, *module.normalized_shape)
    weight = adapted.tensor(call, "weight")
    bias = adapted.tensor(call, "bias")
    weight = module.weight if weight is None else weight.unsqueeze(1)
    bias = module.bias if bias is None else bias.unsqueeze(1)
    if weight is not None:
        y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    return y.reshape(x.shape)


def last_axis(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """Modules that normalise or scale the last axis (every RMSNorm): the class's own code.

    Its vectors are bound as ``[T, 1, D]`` and its input as ``[T, M, D]``, so broadcasting applies
    each task's vector to its rows whatever the class computes around it.
    """
    vectors = {name: call.views[slot].unsqueeze(1) for name, slot in adapted.slots.items()}
    y = bind(module, vectors)(x.reshape(call.tasks, -1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def convolution(module: nn.Conv1d | nn.Conv2d, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.Conv1d and nn.Conv2d: one grouped convolution whose groups are the tasks."""
    tasks, rows = call.tasks, x.shape[0] // call.tasks
    weight = adapted.tensor(call, "weight")
    bias = adapted.tensor(call, "bias")
    space = (1,) * (x.dim() - 2)
    if weight is None:
        y = module._conv_forward(x, module.weight, None)
    else:
        # [T * N, C, *S] -> [N, T * C, *S]: channels grouped by task.
        stacked = x.view(tasks, rows, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        fn = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
        y = fn(
            stacked,
            weight.flatten(0, 1),
            None,
            module.stride,
            module.padding,
            module.dilation,
            module.groups * tasks,
        )
        y = y.view(rows, tasks, -1, *y.shape[2:]).transpose(0, 1).flatten(0, 1)
    if bias is not None:
        y = y.view(tasks, rows, *y.shape[1:]) + bias.view(tasks, 1, -1, *space)
        y = y.flatten(0, 1)
    elif module.bias is not None:
        y = y + module.bias.view(1, -1, *space)
    return y


def rule_for(module: nn.Module, adapted: Adapted) -> Rule | None:
    """The rule that serves `module`, or None where only the generic ways are left.

    A subclass with a forward of its own is not served by its base class's rule.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return linear
    if forward is Conv1D.forward:
        return conv1d_gpt2
    if forward is nn.Embedding.forward and module.max_norm is None:
        return embedding
    if forward is nn.LayerNorm.forward:
        return layer_norm
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward) and module.padding_mode == "zeros":
        return convolution
    if "norm" in type(module).__name__.lower() and not list(module.children()):
        if all(module._parameters[name].dim() == 1 for name in adapted.slots):
            return last_axis
    return None
