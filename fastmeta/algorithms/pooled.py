"""A linear head over an embedding, as a model that `fm.patch` takes."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fastmeta._settings import integer
from fastmeta.algorithms.embedding import Embedding


class PooledClassifier(nn.Module):
    """``logits = W f(x) + b`` with f the embedding.

    Args:
        embedding: f, of a model that is not patched.
        ways: Number of logits C, at least 2.
    """

    base_model_prefix = "embedding"

    def __init__(self, embedding: Embedding, ways: int) -> None:
        super().__init__()
        integer("ways", ways, 2)
        self.embedding = embedding
        self.classifier = nn.Linear(
            embedding.width, ways, device=embedding.device, dtype=embedding.dtype
        )
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.train(embedding.training)

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits ``[B, C]`` as ``output.logits``."""
        return SequenceClassifierOutput(logits=self.classifier(self.embedding.rows(inputs)))
