"""Embeddings of examples by a transformer: pooled token states, all rows of all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta._dtypes import wide_dtype
from fastmeta._settings import integer
from fastmeta.algorithms.norms_by_task import (
    batch_norms,
    kept_apart,
    normalises,
    rows_of,
    tasks_of_rows,
)
from fastmeta.models import pooled
from fastmeta.patching import Patched
from fastmeta.patching.bind import resting, set_mode
from fastmeta.patching.task_axes import is_input

POOLINGS = ("mean", "cls", "last")

_TEXT = {"input_ids", "attention_mask", "token_type_ids"}
"""Inputs ``[B, L]`` whose columns may be cut where no row has a token."""

_GROUPS = 4  # of rows of similar length
_FEWEST = 32  # rows that are worth sorting


class Embedding(nn.Module):
    """``[T, N, ...]`` inputs to features ``[T, N, D]``: encoder, pooling, projection, unit length.

    The encoder is the user's model without its task head; its weights are shared, not copied, and
    its mode (dropout) is this module's own. Modules that are in evaluation mode while the model
    trains stay so. BatchNorm normalises each task's rows by themselves, and no running statistics
    of the user's move.

    Args:
        model: A transformers model, a module whose output has ``last_hidden_state`` ``[B, L, D]``
            or is itself features ``[B, D]``, or a patched model.
        pooling: ``"mean"`` of the token states under the attention mask, ``"cls"``: the first
            token's, ``"last"``: the last token's that is not padding.
        projection: Outputs of a new linear layer without bias, a module ``[..., D] -> [..., E]``,
            or None.
        normalize: Whether features are divided by their length.
        by_length: Whether, on a CPU, rows of similar length may run together without the padding
            of longer ones.

    Raises:
        TypeError: `model` is no module.
        ValueError: An unknown pooling, a projection below 1.
    """

    def __init__(
        self,
        model: nn.Module | Patched,
        *,
        pooling: str = "mean",
        projection: int | nn.Module | None = None,
        normalize: bool = False,
        by_length: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected a transformers model or a patched one, got {type(model).__name__}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.normalize = normalize
        self.by_length = by_length
        self.patched = model if isinstance(model, Patched) else None
        whole = model.model if isinstance(model, Patched) else model
        lead, source = _encoder(whole)
        # Bypass module registration: the user's model keeps its own mode and its own names.
        object.__setattr__(self, "model", whole)
        object.__setattr__(self, "source", source)
        self.lead = lead
        self.encoder = None
        if self.patched is None:
            self.encoder = kept_apart(source)
            for module in self.encoder.modules():
                if getattr(getattr(module, "config", None), "use_cache", False):
                    module.config.use_cache = False  # only held memory
        like = next(source.parameters(), None)
        if like is None:
            raise ValueError(f"{type(whole).__name__} has no parameters")
        self.device = like.device
        self.dtype = wide_dtype(like.dtype)
        self.projection = self._projection(projection)
        own = batch_norms(source if self.encoder is None else self.encoder)
        if self.encoder is None:  # the patched model's own have its mode in copies alone
            own = [m for m in own if m.running_mean is None]
        self.norms = own + batch_norms(self.projection)
        self.rest = resting(source, whole.training)
        self.train(model.training)

    def _projection(self, projection: int | nn.Module | None) -> nn.Module | None:
        if projection is None:
            return None
        if isinstance(projection, nn.Module):
            return kept_apart(projection) if normalises(projection) else projection
        integer("projection", projection, or_else=", a module or None")
        # drawn on the CPU, whose generator has the seed
        return nn.Linear(self.inputs, projection, bias=False, dtype=self.dtype).to(self.device)

    def train(self, mode: bool = True) -> Embedding:
        super().train(mode)
        if self.encoder is not None:
            set_mode(self.encoder, mode, self.rest)
        return self

    @property
    def inputs(self) -> int:
        """Width of the token states."""
        config = getattr(self.source, "config", getattr(self.model, "config", None))
        for name in ("hidden_size", "d_model", "dim", "n_embd"):
            width = getattr(config, name, None)
            if isinstance(width, int):
                return width
        raise ValueError(
            f"{type(self.model).__name__} has no configuration that tells its hidden size, which "
            "new layers on its features need; give such a layer as a module, or none"
        )

    @property
    def width(self) -> int:
        """D, the length of a feature vector."""
        if isinstance(self.projection, nn.Linear):
            return self.projection.out_features
        if self.projection is not None:
            with torch.no_grad():
                rows = torch.zeros(2, self.inputs, device=self.device, dtype=self.dtype)
                return self.projection(rows).shape[-1]  # of one, BatchNorm knows no variance
        return self.inputs

    @property
    def rows_meet(self) -> bool:
        """Whether BatchNorm now normalises over all rows of a task."""
        theirs = self.patched is not None and self.patched.rows_meet
        return theirs or any(m.training or m.running_mean is None for m in self.norms)

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What of the model learns, by its name there."""
        if self.patched is not None:
            return dict(self.patched.named_parameters())
        own = self.source.named_parameters()
        return {self.lead + n: p for n, p in own if p.requires_grad}

    def names(self) -> dict[int, str]:
        """Identity of a parameter -> its name: the model's own, or below ``metric.projection``."""
        found = {id(p): self.lead + n for n, p in self.source.named_parameters()}
        if self.projection is not None:
            own = self.projection.named_parameters()
            found |= {id(p): f"metric.projection.{n}" for n, p in own}
        return found

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features ``[T, N, D]``, float64 for a float64 model, else float32.

        Args:
            inputs: Model inputs ``[T, N, ...]``; of text without a task axis, ``[N, L]``, the
                features are ``[N, D]``.
        """
        given = {k: v for k, v in inputs.items() if is_input(k)}
        ids = given.get("input_ids")
        flat = ids is not None and ids.dim() == 2
        if flat:
            given = {k: v.unsqueeze(0) for k, v in given.items()}
        tasks, rows = next(iter(given.values())).shape[:2]
        with rows_of(tasks):
            features = self.rows({k: v.flatten(0, 1) for k, v in given.items()})
        features = features.unflatten(0, (tasks, rows))
        return features[0] if flat else features

    def rows(self, flat: Mapping[str, Tensor]) -> Tensor:
        """Features ``[B, D]`` of inputs ``[B, ...]``."""
        found = self._pooled(dict(flat))
        features = found.to(torch.promote_types(found.dtype, torch.float32))
        if self.projection is not None:
            features = self.projection(features.to(self.dtype))
        return F.normalize(features, dim=-1) if self.normalize else features

    def _pooled(self, flat: dict[str, Tensor]) -> Tensor:
        """``[B, ...]`` inputs to ``[B, D]``; short texts do not wait for long ones' padding."""
        # in groups, the rows of a task would not stay together
        groups = _by_length(flat) if self.by_length and not self.rows_meet else None
        if groups is None:
            return self._pool(self._states(flat), flat.get("attention_mask"))
        found = []
        for rows, length in groups:
            some = {k: v[rows, :length] for k, v in flat.items()}
            found.append(self._pool(self._states(some), some["attention_mask"]))
        order = torch.cat([rows for rows, _ in groups])
        return torch.cat(found)[order.argsort()]

    def _states(self, flat: dict[str, Tensor]) -> Tensor:
        if self.patched is None:
            out = self.encoder(**flat)
        else:
            # All tasks share the initial values: one task of all rows, unless rows meet.
            tasks = tasks_of_rows() if self.rows_meet else 1
            given = {k: v.unflatten(0, (tasks, -1)) for k, v in flat.items()}
            more = {} if self.lead == "" else {"output_hidden_states": True}
            out = self.patched.run(self.patched.initial(tasks), given | more)
        states = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", None)
        if states is None and getattr(out, "hidden_states", None):
            states = out.hidden_states[-1]
        if states is None:
            raise ValueError(
                "expected a model whose output has last_hidden_state, got "
                f"{type(out).__name__} from {type(self.model).__name__}"
            )
        return states if self.patched is None else states.flatten(0, 1)

    def _pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, L, D]`` to ``[B, D]``; features ``[B, D]`` stay."""
        if states.dim() == 2:
            return states
        if states.dim() != 3:
            raise ValueError(
                "expected token states [B, L, D] or features [B, D] from the model, "
                f"got {list(states.shape)}"
            )
        if mask is None or mask.shape != states.shape[:2]:
            mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        if self.pooling == "mean":
            return pooled(states, mask, "mean")
        real = (mask != 0).to(torch.int64)
        if self.pooling == "cls":
            at = real.argmax(1)  # the first: texts may be padded on the left
        else:
            at = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        return states[torch.arange(len(at), device=at.device), at]


def _encoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model below its head, and what its parameters' names start with."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inner = model.get_encoder()
    else:
        inner = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if inner is model or not isinstance(inner, nn.Module):
        return "", model
    name = next(n for n, m in model.named_modules() if m is inner)
    return name + ".", inner


def _by_length(flat: dict[str, Any]) -> list[tuple[Tensor, int]] | None:
    """Row numbers and longest text of groups of similar length, or None where nothing is gained.

    On a CPU only: on a GPU the lengths would have to be read back.
    """
    mask = flat.get("attention_mask")
    if mask is None or mask.device.type != "cpu" or not flat.keys() <= _TEXT:
        return None
    if any(v.shape != mask.shape for v in flat.values()) or mask.shape[0] < _FEWEST:
        return None
    lengths = mask.sum(1)
    if bool((mask[:, 1:] > mask[:, :-1]).any()) or bool((lengths == 0).any()):
        return None  # padded on the left, or masked inside
    order = lengths.argsort(stable=True)
    groups = [(rows, int(lengths[rows[-1]])) for rows in order.tensor_split(_GROUPS)]
    tokens = sum(len(rows) * length for rows, length in groups)
    return groups if tokens < 0.9 * mask.numel() else None
