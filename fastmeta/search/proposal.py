"""A candidate of a search: an architecture and the recipe that adapts it to a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Proposal:
    """One candidate; made by a `Space`, which knows what its decisions mean.

    Attributes:
        decisions: Name -> value, all that the space decides.
        kept: Which layers are left, from the bottom.
        heads, widths: Attention heads and feed-forward units of every layer, kept or not.
        pooling: ``"mean"``, ``"cls"``, or ``"model"``: whatever the model does.
        ranks: LoRA target -> rank, 0 for none.
        adapted_layers: How many of the kept layers, from the top, have LoRA terms.
        lr, optimizer, weight_decay, steps: Of the inner loop.
        batch_size: Support rows per step, drawn anew for every step; None for all of them.
    """

    decisions: Mapping[str, Any]
    kept: tuple[bool, ...]
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    pooling: str
    ranks: Mapping[str, int]
    adapted_layers: int
    lr: float
    optimizer: str
    weight_decay: float
    steps: int
    batch_size: int | None

    @property
    def key(self) -> tuple:
        """Equal for equal candidates."""
        return tuple(sorted(self.decisions.items()))

    @property
    def shape(self) -> tuple:
        """What decides the cost of serving: kept layers, their heads and widths."""
        layers = zip(self.kept, self.heads, self.widths, strict=True)
        return tuple((h, w) if kept else None for kept, h, w in layers)

    @property
    def adapted(self) -> tuple[int, ...]:
        """The layers that have LoRA terms, from the bottom."""
        if not any(self.ranks.values()):
            return ()
        kept = [i for i, k in enumerate(self.kept) if k]
        return tuple(kept[len(kept) - self.adapted_layers :])

    @property
    def first_adapted(self) -> int:
        """The lowest layer with a LoRA term, or the number of layers."""
        return self.adapted[0] if self.adapted else len(self.kept)

    def __str__(self) -> str:
        layers = " ".join(
            "-" if s is None else f"{s[0]}h" * bool(s[0]) + f"{s[1]}w" * bool(s[1]) or "+"
            for s in self.shape
        )
        ranks = ", ".join(f"{t}:{r}" for t, r in self.ranks.items() if r) or "none"
        batch = "all" if self.batch_size is None else self.batch_size
        return (
            f"layers [{layers}], pooling {self.pooling}, LoRA {ranks} in {len(self.adapted)} "
            f"layers, {self.optimizer} lr {self.lr:.3g}, decay {self.weight_decay:.3g}, "
            f"{self.steps} steps, batch {batch}"
        )
