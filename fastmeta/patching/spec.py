"""What each task may change: specifications that `fm.patch` resolves against a model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastmeta._names import refuse_unknown
from fastmeta._settings import integer

HEAD_NAMES = (
    "classifier",
    "score",
    "classification_head",
    "lm_head",
    "qa_outputs",
    "cls",
    "head",
    "pre_classifier",
)
"""Top-level modules that transformers' models use as task heads."""


@dataclass(frozen=True)
class AdaptParameter:
    """The module's own parameter, replaced whole by each task's copy."""

    name: str


@dataclass(frozen=True)
class AddLoRA:
    """A low-rank term added to one linear module."""

    module: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class AddPrefix:
    """Learned key and value vectors in front of every self-attention."""

    length: int


Request = AdaptParameter | AddLoRA | AddPrefix


class Spec:
    """Base of all specifications; combine them with ``+``."""

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        """The requests this specification makes of `model`, in the model's order."""
        raise NotImplementedError

    def __add__(self, other: Spec) -> Spec:
        if not isinstance(other, Spec):
            return NotImplemented
        left = self.specs if isinstance(self, Sum) else (self,)
        right = other.specs if isinstance(other, Sum) else (other,)
        return Sum((*left, *right))


@dataclass(frozen=True)
class Sum(Spec):
    """Several specifications together; what two of them name is adapted once."""

    specs: tuple[Spec, ...]

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        seen: set[Request] = set()
        for spec in self.specs:
            for request in spec.resolve(model):
                if request not in seen:
                    seen.add(request)
                    yield request

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.specs))


class Params(Spec):
    """Named parameters, by shell-style patterns.

    Args:
        patterns: Globs over ``model.named_parameters()`` names. A module's name stands for all
            parameters below it: ``"classifier"`` is ``"classifier.*"``. What they match adapts and
            is meta-learned, frozen or not.

    Raises:
        ValueError: A pattern matches no parameter (raised by `fm.patch`).
    """

    def __init__(self, *patterns: str) -> None:
        if not patterns:
            raise ValueError('Params expects at least one pattern, for example Params("*")')
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"a parameter pattern must be a string, got {pattern!r}")
        self.patterns = patterns

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        names = _parameter_names(model)
        chosen = set()
        for pattern in self.patterns:
            matches = {
                n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")
            }
            if not matches:
                raise ValueError(
                    f"pattern {pattern!r} matches no parameter of {type(model).__name__}"
                    + _near(pattern, names)
                )
            chosen |= matches
        yield from (AdaptParameter(n) for n in names if n in chosen)

    def __repr__(self) -> str:
        return f"Params({', '.join(map(repr, self.patterns))})"


class Bias(Spec):
    """Every bias of the model (BitFit; Ben Zaken et al. 2022)."""

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        names = [n for n in _parameter_names(model) if n.rsplit(".", 1)[-1].endswith("bias")]
        if not names:
            raise ValueError(f"{type(model).__name__} has no bias parameters for Bias() to adapt")
        yield from map(AdaptParameter, names)

    def __repr__(self) -> str:
        return "Bias()"


class Norm(Spec):
    """Gains and biases of every normalisation layer (LayerNorm, RMSNorm variants, GroupNorm)."""

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        owners = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
        names = [
            n
            for n in _parameter_names(model)
            if n.rpartition(".")[0] in owners and "embedding" not in n.rpartition(".")[2]
        ]
        if not names:
            raise ValueError(f"{type(model).__name__} has no normalisation parameters to adapt")
        yield from map(AdaptParameter, names)

    def __repr__(self) -> str:
        return "Norm()"


class Head(Spec):
    """The task head: every parameter outside the model's backbone."""

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        found = _in_head(model, _parameter_names(model))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no head to adapt; load it with one (for example "
                "AutoModelForSequenceClassification), or name the layer, as "
                'fm.Params("classifier")'
            )
        yield from map(AdaptParameter, found)

    def __repr__(self) -> str:
        return "Head()"


class LoRA(Spec):
    """Low-rank adaptation: ``y = x W^T + (alpha / r) (x A^T) B^T`` with per-task A and B.

    A starts uniform as in the paper's code, B at zero, so an unadapted task is the model itself.

    Args:
        r: Rank, at least 1. Default 8.
        alpha: Numerator of the scale, positive. Default 16.
        targets: Module names to extend: the last part of the name (``"query"``), a dotted ending
            or a glob over whole names; ``"all-linear"``, the default, takes every linear layer but
            those of the head, as `fm.Head` finds it.

    Raises:
        TypeError: A setting of another name.
        ValueError: `r` or `alpha` out of range; a target that names no linear layer (raised by
            `fm.patch`).

    Source: Hu et al. 2022, https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] = "all-linear",
        **unknown: object,
    ) -> None:
        refuse_unknown(type(self), unknown)
        self.r = integer("the LoRA rank r", r)
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise ValueError(f"LoRA's alpha must be positive, got {alpha!r}")
        self.alpha = float(alpha)
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        chosen: set[str] = set()
        for target in self.targets:
            if target == "all-linear":
                matches = set(linears) - set(_in_head(model, linears))
            else:
                matches = {
                    n
                    for n in linears
                    if n == target or n.endswith("." + target) or fnmatch.fnmatchcase(n, target)
                }
            if not matches:
                others = [
                    n
                    for n, _ in model.named_modules()
                    if n == target or n.endswith("." + target) or fnmatch.fnmatchcase(n, target)
                ]
                if others:
                    kind = type(model.get_submodule(others[0])).__name__
                    raise ValueError(
                        f"LoRA extends linear layers, but target {target!r} names a {kind}"
                    )
                endings = sorted({n.rsplit(".", 1)[-1] for n in linears})
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of {type(model).__name__}"
                    + _near(target, endings)
                )
            chosen |= matches
        yield from (AddLoRA(n, self.r, self.alpha) for n in linears if n in chosen)

    def __repr__(self) -> str:
        return f"LoRA(r={self.r}, alpha={self.alpha:g}, targets={self.targets})"


class Prefix(Spec):
    """Soft prefix: per-task key and value vectors in front of every self-attention.

    Args:
        length: Number of prefix positions, at least 1. Default 16.

    Source: Li and Liang 2021, https://arxiv.org/abs/2101.00190 (keys and values directly, as in
    P-tuning v2, https://arxiv.org/abs/2110.07602).
    """

    def __init__(self, length: int = 16) -> None:
        self.length = integer("the prefix length", length)

    def resolve(self, model: nn.Module) -> Iterator[Request]:
        yield AddPrefix(self.length)

    def __repr__(self) -> str:
        return f"Prefix(length={self.length})"


def _in_head(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of these names that lie outside the model's backbone."""
    backbone = getattr(model, "base_model_prefix", "")
    if backbone and isinstance(getattr(model, backbone, None), nn.Module):
        return [n for n in names if not n.startswith(backbone + ".")]
    return [n for n in names if n.split(".")[0] in HEAD_NAMES]


def _parameter_names(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters(remove_duplicate=False)]


def _near(word: str, names: Sequence[str]) -> str:
    """A closing clause with the nearest names, or with a few examples."""
    core = word.strip("*.")
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    close += [n for n in names if core and core.lower() in n.lower() and n not in close][:3]
    if close:
        return f"; near matches: {', '.join(close[:4])}"
    return f"; it has, for example: {', '.join(names[:4])}" if names else "; it has none"
