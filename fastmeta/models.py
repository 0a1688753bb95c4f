"""Sentence encoders as few-shot classifiers: pooled token states under a linear head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

_HEAD_FILE = "head.safetensors"
SCALE, POOLING = 30.0, "mean"
"""Defaults of :class:`SentenceClassifier`."""


class SentenceClassifier(nn.Module):
    """Pooled, normalised token states of an encoder under a linear head.

    ``logits = W s e / |e| + b`` with e the mean of the token states under the attention mask, or
    the first token's state. The head starts at zero, so that label permutations of a task are
    equivalent to it, and the first inner step sets each class's weights from its examples.

    Args:
        encoder: A transformers model whose output has ``last_hidden_state``.
        num_labels: Number of logits C.
        scale: s, the norm of the pooled features. With SGD and rate ``lr`` one step on a balanced
            C-way task yields logits ``lr s^2 / C`` times a difference of cosines.
        pooling: ``"mean"`` or ``"cls"``.

    Attributes:
        base_model_prefix: ``"encoder"``, so that ``fm.Head()`` is the classifier.
    """

    base_model_prefix = "encoder"

    def __init__(
        self,
        encoder: nn.Module,
        num_labels: int = 5,
        scale: float = SCALE,
        pooling: str = POOLING,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        if num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, got {num_labels}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.encoder = encoder
        self.encoder.config.num_labels = num_labels
        self.scale = float(scale)
        self.pooling = pooling
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        num_labels: int = 5,
        scale: float = SCALE,
        pooling: str = POOLING,
        **settings: Any,
    ) -> SentenceClassifier:
        """Load the encoder from a folder or hub name, and the head where one was saved with it.

        Args:
            path: Whatever `transformers.AutoModel` takes.
            num_labels, scale, pooling: As for the class; a saved head keeps its own scale and
                pooling.
            **settings: Passed to `AutoModel.from_pretrained`; those that say where files are
                (`revision`, `subfolder`, `token`, `cache_dir`, ...) hold for the head, too.
        """
        encoder = load_encoder(path, **settings)
        model = cls(encoder, num_labels, scale, pooling)
        tensors = _saved_head(path, settings)
        if tensors:
            model.scale, model.pooling = _settings_of(tensors)
            if not bool(tensors["weight"].any() or tensors["bias"].any()):
                return model  # untrained: as good for any number of classes
            if tensors["weight"].shape != model.classifier.weight.shape:
                raise ValueError(
                    f"the head saved in {path} has {tensors['weight'].shape[0]} classes, "
                    f"expected num_labels={num_labels}"
                )
            model.classifier.load_state_dict({n: tensors[n] for n in ("weight", "bias")})
        return model

    @staticmethod
    def saved_settings(path: str | Path) -> tuple[float, str]:
        """Scale and pooling as ``from_pretrained(path)`` gives them: a saved head's, or the
        defaults."""
        tensors = _saved_head(path, {})
        return _settings_of(tensors) if tensors else (SCALE, POOLING)

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's table of words."""
        return self.encoder.get_input_embeddings()

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return self.encoder.dummy_inputs

    def save_pretrained(self, path: str | Path) -> None:
        """Write the encoder as transformers does, and the head beside it."""
        self.encoder.save_pretrained(path)
        head = {n: p.detach().contiguous() for n, p in self.classifier.named_parameters()}
        head |= {"scale": torch.tensor(self.scale), "cls": torch.tensor(self.pooling == "cls")}
        save_file(head, Path(path, _HEAD_FILE))

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Features ``[B, D]`` of norm `scale`."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **inputs
        ).last_hidden_state
        return F.normalize(self.pool(states, attention_mask), dim=-1) * self.scale

    def pool(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Token states ``[B, L, D]`` as one vector of each text, ``[B, D]``."""
        return pooled(states, attention_mask, self.pooling)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Logits ``[B, C]`` as ``output.logits``."""
        features = self.embed(input_ids, attention_mask, **inputs)
        return SequenceClassifierOutput(logits=self.classifier(features))


_WHERE = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder",
)  # fmt: skip


def _saved_head(path: str | Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The head that lies beside an encoder; empty where there is none."""
    where = {k: settings[k] for k in _WHERE if k in settings}
    quiet = {"_raise_exceptions_for_missing_entries": False}
    quiet["_raise_exceptions_for_connection_errors"] = False  # the encoder came without any
    file = cached_file(path, _HEAD_FILE, **where, **quiet)
    return {} if file is None else load_file(file)


def _settings_of(head: dict[str, Tensor]) -> tuple[float, str]:
    """Scale and pooling; a head of an older version has no pooling but the mean."""
    return float(head["scale"]), "cls" if bool(head.get("cls", False)) else "mean"


def pooled(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Token states ``[B, L, D]`` as ``[B, D]``: their mean under the mask, or the first one."""
    if pooling == "cls":
        return states[:, 0]
    if attention_mask is None:
        return states.mean(1)
    weight = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


def load_encoder(path: str | Path, **settings: Any) -> nn.Module:
    """`transformers.AutoModel` without a pooler, where it has one to leave out."""
    settings.setdefault("add_pooling_layer", False)
    try:
        return AutoModel.from_pretrained(path, **settings)
    except TypeError:
        settings.pop("add_pooling_layer")
        return AutoModel.from_pretrained(path, **settings)
