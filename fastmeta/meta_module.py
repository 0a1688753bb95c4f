"""Modules whose parameters are meta-parameters: found when asked for, many the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LoadedKeys(NamedTuple):
    """What `nn.Module.load_state_dict` returns: names of the module, and of the state, alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Found(dict):
    """Parameters by name, which live elsewhere."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(
            f"{name!r} is not replaced: meta-parameters live in the user's model and in what a "
            "learner holds; copy into them, or override meta_parameters() to add some"
        )

    def __delitem__(self, name: str) -> None:
        self[name] = None


class MetaModule(nn.Module):
    """A module whose parameters are :meth:`meta_parameters`, wherever these live.

    To torch it is a leaf: a module around it (`DistributedDataParallel`, a Lightning module, one of
    the user's) finds them in it, and saves and loads them, under their names and no others. What it
    holds, the user's model above all, is no submodule of it; ``train()`` and ``eval()`` reach it.
    Copies and pickles take the model with them. A shared weight counts while it requires grad: a
    frozen copy has fewer. A subclass that learns more overrides :meth:`meta_parameters`.
    """

    model: nn.Module
    """The user's model."""

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """The meta-parameters by name, as they are now: who is frozen may change."""
        raise NotImplementedError

    def shared_tensors(self) -> list[Tensor]:
        """Weights and buffers of the user's that this module computes with."""
        return [*self.model.parameters(), *self.model.buffers()]

    # What torch reads of every module of a tree; it has no public name for it.
    @property
    def _parameters(self) -> dict[str, nn.Parameter]:  # type: ignore[override]
        try:
            return _Found(self.meta_parameters())
        except AttributeError as error:  # which torch would take for a missing attribute
            raise RuntimeError(f"{type(self).__name__}.meta_parameters failed: {error}") from error

    @_parameters.setter
    def _parameters(self, _: Any) -> None:
        """`nn.Module.__init__` sets an empty one."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refused: override :meth:`meta_parameters`."""
        self._parameters[name] = param

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            object.__setattr__(self, name, value)  # held, not registered
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MetaModule:
        with torch.no_grad():
            if any(fn(t) is not t for t in [*self.shared_tensors(), *self.parameters()]):
                raise RuntimeError(
                    f"{type(self).__name__} shares its weights with the user's model: move or "
                    "convert the model, then patch it and build what learns anew"
                )
        return self

    @torch.compiler.disable  # torch.compile of code around it leaves it alone: it captures steps
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, as `torch.compile` of code around it; learners take ``compile=True``."""

    # A property, since some training loops set the attribute of every module of a tree.
    @property
    def training(self) -> bool:  # type: ignore[override]
        """The mode, which ``train()`` and ``eval()`` set here and in what this module holds."""
        return self._training

    @training.setter
    def training(self, mode: bool) -> None:
        object.__setattr__(self, "_training", mode)
        self._set_mode(mode)

    def _set_mode(self, mode: bool) -> None:
        for value in list(vars(self).values()):
            if isinstance(value, nn.Module):
                value.train(mode)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> LoadedKeys:
        """Copy meta-parameters in place, into the user's model where they are its own.

        Args:
            state_dict: Tensors by name.
            strict: Whether all must be there, and no others.
            assign: Must be False: weights that are shared stay where they are.

        Returns:
            Names that are missing and names that are unknown: none where `strict`.

        Raises:
            ValueError: Names missing or unknown, other shapes; nothing is changed then.
        """
        if assign:
            raise ValueError("expected assign=False: weights shared with a model are copied into")
        own = self.state_dict(keep_vars=True)
        missing, unexpected, wrong = _compare(own, state_dict)
        if strict and (missing or unexpected):
            raise ValueError(
                "the state is of another model or learner: "
                f"missing {missing[:4]}, unexpected {unexpected[:4]}"
            )
        if wrong:
            raise ValueError(wrong[0])
        _copy(own, state_dict)
        return LoadedKeys(missing, unexpected)

    def _load_from_state_dict(  # what a module around this one calls, in its load_state_dict
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.state_dict(keep_vars=True)
        given = {n[len(prefix) :]: t for n, t in state_dict.items() if n.startswith(prefix)}
        missing, unexpected, wrong = _compare(own, given)
        if strict:
            missing_keys += [prefix + n for n in missing]
            unexpected_keys += [prefix + n for n in unexpected]
        error_msgs += wrong
        if not wrong:
            _copy(own, given)


def _compare(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, names that are unknown, and a sentence for each other shape."""
    wrong = [
        f"expected shape {list(own[n].shape)} for {n!r}, got {list(given[n].shape)}"
        for n in own
        if n in given and own[n].shape != given[n].shape
    ]
    return sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys()), wrong


@torch.no_grad()
def _copy(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name, parameter in own.items():
        if name in given:
            parameter.copy_(given[name])
