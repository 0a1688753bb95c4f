"""Which keys of a configuration have an effect, with which method or value of another key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmeta.cli.config import GRADIENT, METRIC, Config, make_config
from fastmeta.cli.errors import UserError

_WITH_SPEC = "protomaml with a spec"  # reads the model's own head, not pooled features
_STEPS = (*GRADIENT, "protomaml", _WITH_SPEC)
_ADAPTING = (*_STEPS, "hypernet")
_RULED = tuple(m for m in _ADAPTING if m != "lstmmeta")  # which is its own update rule
_PATHS = tuple(m for m in _ADAPTING if m != "imaml")  # whose meta-gradient knows no path
_COMPARING = ("protonet", "matchingnet")
_FEATURES = (*METRIC, "protomaml")

EFFECTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "inner_steps": {"method": _STEPS},
    "inner_lr": {"method": _ADAPTING},
    "learn_lr": {"method": _ADAPTING},
    "inner_optimizer": {"method": _RULED},
    "inner_weight_decay": {"method": _RULED},
    "inner_clip": {"method": _ADAPTING},
    "order": {"method": _PATHS},
    "memory": {"method": _ADAPTING},
    "task_chunk": {"method": _ADAPTING},
    "memory_budget": {"method": _ADAPTING},
    "compile": {"method": _ADAPTING},
    "truncate": {"method": _PATHS, "order": (2,)},
    "lam": {"method": ("imaml",)},
    "cg_steps": {"method": ("imaml",)},
    "learned_kind": {"inner_optimizer": ("learned",)},
    "learned_hidden": {"method": _STEPS},
    "learned_layers": {"inner_optimizer": ("learned",)},
    "horizon": {"unroll": ("truncated", "pes")},
    "truncation": {"unroll": ("truncated", "pes")},
    "pes_pairs": {"unroll": ("pes",)},
    "pes_std": {"unroll": ("pes",)},
    "refine_steps": {"method": ("hypernet",)},
    "hyper_latent": {"method": ("hypernet",)},
    "hyper_hidden": {"method": ("hypernet",)},
    "train_encoder": {"method": ("hypernet",)},
    "metric": {"method": _COMPARING},
    "metric_p": {"method": _COMPARING, "metric": ("minkowski",)},
    "precision": {"method": _COMPARING, "metric": ("mahalanobis",)},
    "temperature": {"method": (*_COMPARING, "protomaml", _WITH_SPEC)},
    "learn_temperature": {"method": (*_COMPARING, "protomaml", _WITH_SPEC)},
    "normalize": {"method": _FEATURES},
    "projection": {"method": _FEATURES},
    "full_context": {"method": ("matchingnet",)},
    "fce_steps": {"method": ("matchingnet",), "full_context": (True,)},
    "relation_hidden": {"method": ("relationnet",)},
    "relation_loss": {"method": ("relationnet",)},
    "momentum": {"outer": ("sgd",)},
}
"""Key -> other keys and the values of each with which it has an effect; all others always have."""


def why_not(config: Config, key: str) -> str | None:
    """Why a key has no effect in a configuration, as a sentence, or None."""
    mixed = config.method == "protomaml" and config.spec is not None
    method = _WITH_SPEC if mixed else config.method
    needed = EFFECTS.get(key, {})
    if key == "pooling" and mixed and config.pooling in ("cls", "last"):
        needed = {"method": _FEATURES}
    for other, allowed in needed.items():
        value = method if other == "method" else getattr(config, other)
        if value not in allowed:
            few = ", ".join(map(str, allowed))
            return f"{key} has no effect with {other}: {value}, only with {other}: {few}"
    return None


def check_given(
    config: Config, flags: Mapping[str, Any], file: Mapping[str, Any] | None = None
) -> None:
    """Raise a UserError for a key that was given and has no effect.

    Args:
        config: What was made of it.
        flags: Keys that flags gave.
        file: Those of a file, which may have all keys, as a run's own has: there a key without an
            effect must have the value that it has anyway.
    """
    for key, value in flags.items():
        if value is not None and (why := why_not(config, key)):
            raise UserError(why)
    idle = {k: why for k in file or {} if (why := why_not(config, k))}
    if not idle:
        return
    plain = make_config({k: v for k, v in {**file, **flags}.items() if k not in idle})
    for key, why in idle.items():
        if getattr(plain, key) != getattr(config, key):
            raise UserError(why)
