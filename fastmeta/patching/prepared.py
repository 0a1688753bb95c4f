"""A model's structure, made ready to be differentiated twice, and shown to be the model still."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten

try:
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:  # of versions that show them otherwise
    maybe_install_capturing_hooks = None

from fastmeta._memory_errors import is_out_of_memory
from fastmeta.patching import activations, attention, unpadded
from fastmeta.patching.bind import copy_structure
from fastmeta.patching.probe import PatchError, agrees
from fastmeta.patching.slots import Slots


def prepared_copy(model: nn.Module, slots: Slots, own_attention: bool = False) -> nn.Module:
    """A copy of the model's structure, sharing its tensors, ready to be differentiated twice.

    Args:
        own_attention: Keep the name of the attention that the model chose.
    """
    structure = _copy(model, every=bool(slots.prefixes), own_attention=own_attention)
    for name, pair in slots.prefixes.items():
        structure.get_submodule(name).fastmeta_prefix = pair
    return structure


def shows_hidden_states(structure: nn.Module) -> nn.Module:
    """The structure with the hooks that show hidden states, which transformers adds in a model's
    first pass that wants them: clones of a module share them, but each would add its own."""
    if maybe_install_capturing_hooks is not None:
        for module in structure.modules():
            if getattr(module, "_can_record_outputs", None):
                maybe_install_capturing_hooks(module)
    return structure


def needs_own_attention(
    model: nn.Module, slots: Slots, inputs: Mapping[str, Any], tolerance: float
) -> bool:
    """Whether a prepared model computes what the model does only with the attention it chose.

    Code that asks for an attention by its name (Falcon's) takes another path, with other masks,
    where the name is ours.

    Args:
        inputs: The model's inputs ``[B, ...]``; compared as they are and, where there is a mask,
            padded on the right.
        tolerance: Relative to the largest output.

    Raises:
        PatchError: It computes something else with either.
    """
    original = copy_structure(model).eval()
    _keep_no_cache(original)
    expected = [(given, _run(original, given)) for given in _trials(inputs)]
    expected = [(given, out) for given, out in expected if _is_finite(out)]

    def same(structure: nn.Module) -> bool:
        return all(agrees(_run(structure, given), [out], tolerance) for given, out in expected)

    every = bool(slots.prefixes)
    if same(_copy(model, every=every, own_attention=False).eval()) or not same(original):
        return False  # or a model that is random even when it is evaluated: nothing to compare
    kind = type(model).__name__
    if every:
        raise PatchError(
            f"{kind} computes something else when its attention is replaced, which Prefix needs; "
            "use LoRA or Params instead"
        )
    if not same(_copy(model, every=False, own_attention=True).eval()):
        raise PatchError(
            f"{kind} computes something else once it is made ready to be differentiated twice; "
            'load it with attn_implementation="eager", or adapt a part of it that is a module of '
            "its own"
        )
    return True


def _copy(model: nn.Module, *, every: bool, own_attention: bool) -> nn.Module:
    structure = copy_structure(model)
    if own_attention:
        attention.leave_in(structure)
    else:
        attention.use_in(structure, every=every)
    activations.use_in(structure)
    _keep_no_cache(structure)
    for module in structure.modules():
        config = getattr(module, "config", None)
        if getattr(module, "gradient_checkpointing", False):
            # It would run modules again outside of their call; learners have memory modes.
            module.gradient_checkpointing = False
        if getattr(config, "_experts_implementation", None) is not None:
            # Grouped products of routed experts have no double backward; plain ones do.
            config._experts_implementation_internal = "eager"
        if isinstance(module, _BatchNorm):
            # Training must not move the running statistics: they are the user's model's.
            module.track_running_stats = False
        elif isinstance(module, _InstanceNorm):
            module.momentum = 0.0
    return structure


def _keep_no_cache(structure: nn.Module) -> None:
    """Key-value caches serve generation; here they would only hold memory."""
    for module in structure.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _trials(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield dict(inputs)
    mask = inputs.get(unpadded.MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > 1:
        padded = mask.clone()
        padded[1::2, mask.shape[1] - mask.shape[1] // 2 :] = 0
        padded = torch.where(padded.any(1, keepdim=True), padded, mask)  # no text without a token
        yield {**inputs, unpadded.MASK: padded}


def _is_finite(out: Any) -> bool:
    """Whether the model ran, on words that it can compute."""
    tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    return bool(tensors) and all(bool(t.isfinite().all()) for t in tensors)


def _run(structure: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output at the tokens; None where it fails."""
    try:
        with torch.no_grad():
            out = structure(**inputs)
    except Exception as e:
        if is_out_of_memory(e):
            raise
        return None
    mask = inputs.get(unpadded.MASK)
    return unpadded.at_tokens(out, mask) if isinstance(mask, Tensor) else out
