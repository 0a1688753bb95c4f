"""Full-context embeddings: features that depend on the whole support set."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FullContext(nn.Module):
    """The two LSTMs of matching networks, for T ragged support sets at once.

    Support: ``g(x_i) = h_forward(i) + h_backward(i) + g'(x_i)``, a bidirectional LSTM over the
    support rows in their order. Query: K steps of ``h_k, c_k = LSTM([f'(x), r_{k-1}], h_{k-1},
    c_{k-1})``, ``h_k += f'(x)``, ``r_k = sum_i softmax_i(h_k g(x_i)) g(x_i)``, from ``h = c = 0``;
    the result is ``h_K``.

    Args:
        width: D, of features, hidden states and results.
        steps: K.

    Source: Vinyals et al. 2016, appendix A, https://arxiv.org/abs/1606.04080
    """

    def __init__(
        self,
        width: int,
        steps: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.forwards = nn.LSTMCell(width, width, dtype=dtype)
        self.backwards = nn.LSTMCell(width, width, dtype=dtype)
        self.attending = nn.LSTMCell(2 * width, width, dtype=dtype)

    def support(self, features: Tensor, counts: Tensor) -> Tensor:
        """``[T, N, D]``; rows where bool ``counts [T, N]`` is False are passed over."""
        rows = range(features.shape[1])
        return (
            features
            + _pass(self.forwards, features, counts, rows)
            + _pass(self.backwards, features, counts, rows[::-1])
        )

    def query(self, features: Tensor, support: Tensor, counts: Tensor) -> Tensor:
        """``[T, Q, D]`` queries that have attended to ``support [T, N, D]``."""
        x = features.flatten(0, 1)
        h = c = torch.zeros_like(x)
        for _ in range(self.steps):
            scores = h.view_as(features) @ support.mT
            attention = scores.masked_fill(~counts.unsqueeze(1), float("-inf")).softmax(-1)
            read = (attention @ support).flatten(0, 1)
            h, c = self.attending(torch.cat([x, read], -1), (h, c))
            h = h + x
        return h.view_as(features)


def _pass(cell: nn.LSTMCell, features: Tensor, counts: Tensor, rows: range) -> Tensor:
    """Hidden states ``[T, N, D]`` of one direction; rows that do not count leave the state."""
    h = c = torch.zeros_like(features[:, 0])
    found: dict[int, Tensor] = {}
    for i in rows:
        here = counts[:, i].unsqueeze(1)
        after = cell(features[:, i], (h, c))
        h, c = (torch.where(here, new, old) for new, old in zip(after, (h, c), strict=True))
        found[i] = h
    return torch.stack([found[i] for i in sorted(found)], 1)
