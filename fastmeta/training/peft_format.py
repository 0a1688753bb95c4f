"""One task's LoRA weights as PEFT writes them, a configuration and tensors, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.pytorch_utils import Conv1D

from fastmeta.patching import Head, Patched

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

_CLASSIFIERS = ("classifier", "score")
_TASKS: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "SEQ_CLS": (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, _CLASSIFIERS),
    "TOKEN_CLS": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, _CLASSIFIERS),
    "QUESTION_ANS": (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ("qa_outputs",)),
    "SEQ_2_SEQ_LM": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, ()),
    "CAUSAL_LM": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ()),
    "FEATURE_EXTRACTION": (auto.MODEL_MAPPING_NAMES, ()),
}
"""PEFT's kinds of models: their classes, and modules that PEFT copies in every adapter."""

_NO_EFFECT = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_core trainable_token_indices eva_config qalora_group_size lora_bias "
    "target_parameters runtime_config ensure_weight_tying".split()
)
"""Settings that are read here, show in the tensors' names, or matter in training alone."""
_KEEP_THE_MODEL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the model's own weights as they are."""


def to_peft(
    patched: Patched, weights: Mapping[str, Tensor], *, named_base: bool
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """PEFT's configuration and tensors, or None where PEFT has no way to say it.

    Args:
        patched: The model.
        weights: One task's parameters by name.
        named_base: Whether the base is a checkpoint by name, which lacks a new head.
    """
    model, owners = patched.model, patched.slots.owners
    lora = {n: a for n, a in owners.items() if "lora_A" in a.slots}
    mixed = any(len(adapted.slots) > 2 for adapted in lora.values())
    if not lora or mixed or patched.slots.prefixes:
        return None
    kind = _task_type(model, lora)
    saved = _modules_to_save(model, [n for n in owners if n not in lora], kind, named_base)
    if any(_replaced(n, saved) for n in lora):
        return None
    ranks = {n: weights[f"{n}.lora_A"].shape[0] for n in lora}
    alphas = {n: a.lora_scale * ranks[n] for n, a in lora.items()}
    first = next(iter(lora))
    modules = dict(model.named_modules())
    config = {
        "peft_type": "LORA",
        "task_type": kind,
        "auto_mapping": _own_class(model) if kind is None else None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(modules[first], Conv1D),
        "target_modules": list(lora),
        "modules_to_save": saved or None,
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
    }
    # A tied parameter has several places and PEFT a copy of its own in each.
    adapted = {place: weights[name] for place, name in _places(patched).items()}
    tensors = {}
    for name in lora:
        for factor in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = adapted[f"{name}.{factor}"]
    for name in saved:
        for place, value in modules[name].state_dict(prefix=f"{name}.").items():
            tensors[_PREFIX + place] = adapted.get(place, value)
    return config, tensors


def from_peft(
    patched: Patched, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One task's parameters by name, and the scale of every LoRA module, from what PEFT wrote.

    Args:
        patched: The model.
        config: PEFT's configuration.
        tensors: Its tensors. Those of the model itself that no task adapts are left out.

    Returns:
        The parameters, whether they are those of `patched` or not, and the scales.

    Raises:
        ValueError: Something else than LoRA, or a module of the folder's own that the
            specification does not adapt.
    """
    _check_config(config)
    places, own = _places(patched), patched.model.state_dict()
    held: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for key, value in tensors.items():
        place = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        module, _, factor = place.removesuffix(".weight").rpartition(".")
        if factor in ("lora_A", "lora_B"):
            place = f"{module}.{factor}"
        elif place in own and place not in places:
            _check_unchanged(place, value, own[place])
            continue
        if factor == "lora_A":
            scales[module] = _scale(config, module, len(value))
        held[place] = value
    weights = {places.get(place, place): value for place, value in held.items()}
    for place, name in places.items():
        if name in weights and not (place in held and torch.equal(held[place], weights[name])):
            got = "another" if place in held else "none"
            raise ValueError(
                f"expected {name!r} in all places that share it, got {got} in {place!r}"
            )
    return weights, scales


def _places(patched: Patched) -> dict[str, str]:
    """Module and attribute of everything adapted -> its name; a tied parameter has several."""
    names = patched.layout.names
    return {
        f"{module}.{attribute}": names[slot]
        for module, adapted in patched.slots.owners.items()
        for attribute, slot in adapted.slots.items()
    }


def _task_type(model: nn.Module, lora: Iterable[str]) -> str | None:
    """PEFT's kind of model; None where it has none, or would copy a module that LoRA extends."""
    for kind, (classes, copied) in _TASKS.items():
        known = {c for cs in classes.values() for c in ([cs] if isinstance(cs, str) else cs)}
        if type(model).__name__ in known and not any(_replaced(n, copied) for n in lora):
            return kind
    return None


def _own_class(model: nn.Module) -> dict[str, str]:
    """How ``peft.AutoPeftModel`` finds the class of a model that is of none of its kinds."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _modules_to_save(
    model: nn.Module, adapted: Iterable[str], kind: str | None, named_base: bool
) -> list[str]:
    """Modules that an adapter holds whole: those of adapted parameters (of the head all), those
    that PEFT looks for in every adapter of this kind, and a head that the base cannot supply."""
    try:
        head = {r.name.split(".")[0] for r in Head().resolve(model)}
    except ValueError:  # a model without a head
        head = set()
    found = {n.split(".")[0] if n.split(".")[0] in head else n for n in adapted}
    if kind is not None:
        found |= {n for n, _ in model.named_modules() if n.endswith(_TASKS[kind][1])}
    # Only a language model's head comes with the pretrained weights.
    pretrained = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if named_base and not pretrained:
        found |= head
    return sorted(n for n in found if not any(n.startswith(f"{m}.") for m in found))


def _replaced(module: str, saved: Iterable[str]) -> bool:
    """Whether PEFT replaces a module or one above it by a copy, which it does by endings."""
    parts = module.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(name.endswith(ending) for name in above for ending in saved)


def _check_config(config: object) -> None:
    if not isinstance(config, Mapping):
        raise ValueError(f"expected settings by name in {CONFIG}, got {config!r}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"expected PEFT's LORA, got {config.get('peft_type')!r}")
    for key, value in config.items():
        if value and key not in _NO_EFFECT:
            raise ValueError(f"expected plain LoRA, got {key}={value!r}")
    start = config.get("init_lora_weights")
    if start not in _KEEP_THE_MODEL:
        raise ValueError(
            f"expected LoRA on the model's own weights, got init_lora_weights={start!r}, "
            "which changes them"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise ValueError(f"alpha_pattern holds {pattern!r}, no pattern ({error})") from None
        if matches:
            alpha = other
            break
    if not isinstance(alpha, int | float):
        raise ValueError(f"expected a number as alpha of {module}, got {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_unchanged(place: str, value: Tensor, own: Tensor) -> None:
    same = value.shape == own.shape and torch.equal(value.to(own.device, own.dtype), own)
    if not same:
        raise ValueError(
            f"it holds another {place!r} than the model, which the specification does not adapt"
        )
