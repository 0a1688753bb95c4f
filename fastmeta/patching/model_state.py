"""How the user's model was when it was patched: its modes, its dtype and its device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmeta.patching.bind import resting


class ModelState:
    """Notes what a patched model relies on, and tells where it has changed.

    Attributes:
        rest: Modules that stay in evaluation mode while the model trains.
        batch_norms: Whether others normalise over the rows of a batch then.
        always: Whether some do so in evaluation, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rest = resting(model, model.training)
        norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self.batch_norms = any(name not in self.rest for name in norms)
        self.always = any(norm.running_mean is None for norm in norms.values())
        self._mode = model.training
        self._parameters = dict(model.named_parameters())
        self._buffers = [  # not those that are computed anew, such as angles of positions
            (f"{prefix}.{name}".lstrip("."), module._buffers, name, buffer)
            for prefix, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        self._settings = settings_of(model)
        self._like = next((p for p in model.parameters() if p.is_floating_point()), None)
        self._was = None if self._like is None else (self._like.dtype, self._like.device)

    def warn_of_mode(self, training: bool) -> None:
        """Warn, once, where the model's mode was switched to another than the patched model's."""
        if self.model.training == self._mode:
            return
        self._mode = self.model.training
        if self._mode != training:
            modes = {True: "training", False: "evaluation"}
            warnings.warn(
                f"the model was switched to {modes[self._mode]} mode after it was patched; "
                f"the patched model has one of its own, and stays in {modes[training]} mode: "
                "switch it with train() and eval() of the learner or of the patched model",
                UserWarning,
                stacklevel=4,
            )

    def warn_of_changes(self) -> None:
        """Warn, once, where a module is another, or has other hooks or settings, than when the
        model was patched."""
        now = settings_of(self.model)
        if now == self._settings:
            return
        was, self._settings = self._settings, now
        changed = [
            f"{name}.{key}".lstrip(".")
            for name in {**was, **now}
            for key in {**was.get(name, {}), **now.get(name, {})}
            if was.get(name, {}).get(key) != now.get(name, {}).get(key)
        ]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        warnings.warn(
            f"{changed[0]}{more} of the model changed after it was patched, which may have no "
            "effect: patch the model again",
            UserWarning,
            stacklevel=4,
        )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's, by name; RuntimeError where one is another than when it was patched: the
        patched model computes with that one still."""
        for name, parameter in self.model.named_parameters():
            if self._parameters.get(name, parameter) is not parameter:
                raise RuntimeError(
                    f"parameter {name!r} of the model was replaced after it was patched (as by "
                    "load_state_dict(assign=True) or a new module): patch the model again"
                )
            yield name, parameter

    def check_unconverted(self) -> None:
        """Raise RuntimeError where the model was moved or converted, or a buffer replaced."""
        if self._like is not None and (self._like.dtype, self._like.device) != self._was:
            raise RuntimeError(
                f"the model was converted from {self._was[0]} on {self._was[1]} to "
                f"{self._like.dtype} on {self._like.device} after it was patched: patch it again"
            )
        for name, held, own, buffer in self._buffers:
            if held.get(own) is not buffer:
                raise RuntimeError(
                    f"buffer {name!r} of the model was replaced after it was patched (as by "
                    "load_state_dict(assign=True) or a conversion): patch the model again"
                )


def settings_of(model: nn.Module) -> dict[str, dict[str, object]]:
    """Of every module, by name: its class, its number of hooks, and its public attributes that are
    numbers or texts, without those that modes, memory or the last texts change."""
    return {
        name: {
            "__class__": type(module),
            "hooks": sum(map(_is_the_users, _hooks_of(module))),
            **{k: v for k, v in vars(module).items() if type(v) in _PLAIN and _is_setting(k)},
        }
        for name, module in model.named_modules()
    }


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    return chain.from_iterable(getattr(module, hooks).values() for hooks in _HOOKS)


def _is_the_users(hook: Any) -> bool:
    """Not one of transformers', which a model has from when it first shows hidden states."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str)


def _is_setting(attribute: str) -> bool:
    kept = attribute[0] == "_" or "cached" in attribute  # as the longest text of rotary angles
    return not kept and attribute not in ("training", "gradient_checkpointing")
