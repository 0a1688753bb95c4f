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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fastmeta._recorder import recording
from fastmeta.ops._lora_linear import has_kernel, lora_rows
from fastmeta.ops.batched_linear import affine, as_computed
from fastmeta.patching.activations import normalised
from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call
from fastmeta.patching.fast_weights import FastMatrix
from fastmeta.patching.packing import landing_of


@dataclass
class Adapted:
    """Which slots adapt one module.

    Attributes:
        name: The module's name in the model.
        slots: Parameter name (``weight``, ``lora_A``, ...) -> slot index.
        lora_scale: ``alpha / r`` where the module has a LoRA term.
    """

    name: str
    slots: dict[str, int] = field(default_factory=dict)
    lora_scale: float = 1.0

    def tensor(self, call: Call, name: str) -> Tensor | None:
        slot = self.slots.get(name)
        return None if slot is None else call.views[slot]

    def view(self, call: Call, name: str) -> Tensor:
        """The same for a parameter that is known to be adapted."""
        return call.views[self.slots[name]]


Rule = Callable[[nn.Module, Adapted, Call, Tensor], Tensor]


def linear(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.Linear: frozen parts are one GEMM over all tasks, adapted parts a batched GEMM."""
    return _affine(module, adapted, call, x, transposed=False)


def conv1d_gpt2(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """transformers' Conv1D: a linear layer whose weight is stored ``[in, out]``."""
    return _affine(module, adapted, call, x, transposed=True)


def _affine(module: nn.Module, adapted: Adapted, call: Call, x: Tensor, transposed: bool) -> Tensor:
    weight, bias = adapted.tensor(call, "weight"), adapted.tensor(call, "bias")
    if weight is None and "lora_A" in adapted.slots and has_kernel(x.device):
        y = _lora(module, adapted, call, x, bias, transposed)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    by_task = x.dim() == 3 and x.shape[0] == call.tasks
    rows = x if by_task else x.reshape(call.tasks, -1, x.shape[-1])  # [T, M, in]
    if weight is not None:
        base = bias.unsqueeze(1) if bias is not None else module.bias
        if bias is None and base is not None:
            base = base.expand(call.tasks, 1, -1)
        if isinstance(weight, FastMatrix):
            y = weight(rows, base, nt=not transposed)
        else:
            y = affine(rows, weight, base, nt=not transposed, landing=landing_of(weight))
    else:
        shared = module.weight.t() if transposed else module.weight
        y = F.linear(rows, shared, None if bias is not None else module.bias)
        if bias is not None:
            y = y + bias.unsqueeze(1)
    if "lora_A" in adapted.slots:
        low = _factor(adapted, call, rows, "lora_A") * adapted.lora_scale  # [T, M, r]
        y = _factor(adapted, call, low, "lora_B", y)
    return y if by_task else y.reshape(*x.shape[:-1], y.shape[-1])


def _lora(
    module: nn.Module,
    adapted: Adapted,
    call: Call,
    x: Tensor,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """The shared layer and each task's low-rank term in one operator."""
    if bias is None and module.bias is not None:
        bias = module.bias.unsqueeze(0)
    weight = module.weight.t() if transposed else module.weight
    a, b = adapted.view(call, "lora_A"), adapted.view(call, "lora_B")
    rows = x.reshape(-1, x.shape[-1])
    (rows, weight, bias, a, b), bf16 = as_computed(rows, weight, bias, a, b)
    return lora_rows(rows, weight, None, bias, a, b, None, adapted.lora_scale, bf16)


def lora_around(module: nn.Linear, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """A linear layer with a forward of its own (quantised ones): that, plus the LoRA term."""
    y = type(module).forward(module, x)
    low = _factor(adapted, call, x.reshape(call.tasks, -1, x.shape[-1]), "lora_A")
    delta = _factor(adapted, call, low * adapted.lora_scale, "lora_B")
    return y + delta.reshape(y.shape)


def _factor(
    adapted: Adapted, call: Call, x: Tensor, name: str, base: Tensor | None = None
) -> Tensor:
    """One factor of a LoRA term applied to ``[T, M, in]``, plus `base`."""
    weight = adapted.view(call, name)
    return affine(x, weight, base, landing=landing_of(weight))


def lora_delta(module: nn.Module, adapted: Adapted, call: Call) -> Tensor:
    """What a LoRA term adds to the module's weight, ``[T, *weight.shape]``."""
    a, b = adapted.view(call, "lora_A"), adapted.view(call, "lora_B")
    if isinstance(module, Conv1D):
        delta = torch.bmm(a.transpose(1, 2), b.transpose(1, 2))  # [T, in, out]
    else:
        delta = torch.bmm(b, a)  # [T, out, in]
    return adapted.lora_scale * delta


def embedding(module: nn.Embedding, adapted: Adapted, call: Call, ids: Tensor) -> Tensor:
    """nn.Embedding: one gather from the stacked tables, ids offset by task."""
    table = adapted.view(call, "weight")
    return _gather(table, ids, module.padding_idx) if isinstance(table, Tensor) else table(ids)


FEW_WORDS = 64
"""Tables up to this size are read by a product with ones and zeros, whose gradient is one too:
scattering rows takes longer."""


def _gather(table: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Rows of ``[T, V, D]`` tables for task-major ids ``[T * N, ...]``."""
    few = padding_idx is None and table.shape[1] <= FEW_WORDS
    if few and not torch.is_autocast_enabled(ids.device.type):
        chosen = _one_hot(ids.reshape(len(table), -1), table.shape[1]).to(table.dtype)
        y = affine(chosen, table, nt=False, landing=landing_of(table))
        return y.view(*ids.shape, -1)
    task = torch.arange(len(table), device=ids.device)
    # Indexed as it lies in the packed buffer: the tables are large and never copied.
    y = table[task.unsqueeze(1), ids.reshape(len(table), -1)].view(*ids.shape, -1)
    if padding_idx is not None:
        # torch gives the padding row no gradient; the stacked tables have one such row per task.
        y = torch.where((ids == padding_idx).unsqueeze(-1), y.detach(), y)
    return y


def _one_hot(ids: Tensor, words: int) -> Tensor:
    """Refuses words out of range."""
    if not recording():
        return F.one_hot(ids, words)
    # a graph being traced cannot ask for values, but its lookups can refuse them
    known = torch.arange(words, device=ids.device)
    return known[ids].unsqueeze(-1) == known


class gathering(TorchFunctionMode):
    """Within, lookups in a stacked table ``[T, V, D]`` read each task's own.

    For embeddings whose own forward shifts positions or scales what ``super().forward`` returns.
    """

    def __init__(self, table: Tensor, rows: int) -> None:
        super().__init__()
        self.table, self.rows = table, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.embedding or args[1] is not self.table:
            return func(*args, **(kwargs or {}))
        ids, padding_idx = args[0], (kwargs or {}).get("padding_idx")
        if ids.shape[0] != 1:
            return _gather(self.table, ids, padding_idx)
        # One row of positions shared by all: each task's own, for each of its rows.
        own = _gather(self.table, ids.expand(len(self.table), *ids.shape[1:]), padding_idx)
        return own.unsqueeze(1).expand(-1, self.rows, *own.shape[1:]).flatten(0, 1)


def layer_norm(module: nn.LayerNorm, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.LayerNorm: shared normalisation, per-task gain and bias."""
    if len(module.normalized_shape) == 1 and module.weight is not None:
        gain, shift = adapted.tensor(call, "weight"), adapted.tensor(call, "bias")
        gain = module.weight.unsqueeze(0) if gain is None else gain
        y = normalised(x, gain, module.bias if shift is None else shift, module.eps)
        if y is not None:
            return y
    y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    y = y.reshape(call.tasks, -1, *module.normalized_shape)
    weight = adapted.tensor(call, "weight")
    bias = adapted.tensor(call, "bias")
    weight = module.weight if weight is None else weight.unsqueeze(1)
    bias = module.bias if bias is None else bias.unsqueeze(1)
    if weight is not None:
        y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    return y.reshape(x.shape)


def rms_norm(module: nn.RMSNorm, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.RMSNorm: shared normalisation, per-task gain."""
    if len(module.normalized_shape) == 1 and module.eps is not None:
        y = normalised(x, adapted.view(call, "weight"), None, module.eps, rms=True)
        if y is not None:
            return y
    y = F.rms_norm(x, module.normalized_shape, None, module.eps)
    y = y.reshape(call.tasks, -1, *module.normalized_shape)
    return (y * adapted.view(call, "weight").unsqueeze(1)).reshape(x.shape)


def last_axis(module: nn.Module, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """Modules that normalise or scale the last axis (RMSNorm variants): the class's own code.

    Its vectors are bound as ``[T, 1, D]`` and its input as ``[T, M, D]``, so broadcasting applies
    each task's vector to its rows whatever the class computes around it.
    """
    vectors = {name: call.views[slot].unsqueeze(1) for name, slot in adapted.slots.items()}
    y = bind(module, vectors).forward(x.reshape(call.tasks, -1, x.shape[-1]))
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


def group_norm(module: nn.GroupNorm, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.GroupNorm: shared normalisation, per-task gain and bias of each channel."""
    y = F.group_norm(x, module.num_groups, None, None, module.eps)
    return _scale_channels(module, adapted, call, y)


def batch_norm(module: _BatchNorm, adapted: Adapted, call: Call, x: Tensor) -> Tensor:
    """nn.BatchNorm: each task by its own rows' statistics when training, else the running ones.

    Running statistics are read and never changed: they are the user's model's.
    """
    if module.training or module.running_mean is None:
        rows = x.unflatten(0, (call.tasks, -1))  # [T, N, C, *S]
        over = [1, *range(3, rows.dim())]
        var, mean = torch.var_mean(rows, over, correction=0, keepdim=True)
        y = ((rows - mean) * torch.rsqrt(var + module.eps)).flatten(0, 1)
    else:
        y = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return _scale_channels(module, adapted, call, y)


def _scale_channels(module: nn.Module, adapted: Adapted, call: Call, y: Tensor) -> Tensor:
    """Gain and bias per channel of ``[T * N, C, *S]``, each task's where adapted."""
    y = y.unflatten(0, (call.tasks, -1))
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        vector = adapted.tensor(call, name)
        if vector is None:
            vector = module._parameters[name]
        if vector is not None:  # [T, C] or [C]
            lead = call.tasks if vector.dim() == 2 else 1
            y = combine(y, vector.reshape(lead, 1, -1, *(1,) * (y.dim() - 3)))
    return y.flatten(0, 1)


def isolating_rule(module: nn.Module) -> Rule | None:
    """The rule of a module that would mix the rows of several tasks, adapted or not."""
    own = type(module).forward
    if isinstance(module, _BatchNorm) and own in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return batch_norm
    return None


def rule_for(module: nn.Module, adapted: Adapted) -> Rule | None:
    """The rule that serves `module`, or None where only the generic ways are left.

    A subclass with a forward of its own is not served by its base class's rule.
    """
    forward = type(module).forward
    rule = _BY_FORWARD.get(forward) or isolating_rule(module)
    if rule is embedding and module.max_norm is not None:
        return None
    if rule is convolution and module.padding_mode != "zeros":
        return None
    if rule is not None:
        return rule
    if isinstance(module, nn.Linear) and all(name.startswith("lora_") for name in adapted.slots):
        return lora_around
    if "norm" in type(module).__name__.lower() and not list(module.children()):
        if all(module._parameters[name].dim() == 1 for name in adapted.slots):
            return last_axis
    return None


_BY_FORWARD: dict[Callable, Rule] = {
    nn.Linear.forward: linear,
    Conv1D.forward: conv1d_gpt2,
    nn.Embedding.forward: embedding,
    nn.LayerNorm.forward: layer_norm,
    nn.RMSNorm.forward: rms_norm,
    nn.GroupNorm.forward: group_norm,
    nn.Conv1d.forward: convolution,
    nn.Conv2d.forward: convolution,
}
