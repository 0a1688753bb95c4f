"""One network that holds every candidate of a space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.models import SentenceClassifier
from fastmeta.patching import Patched, TaskParams
from fastmeta.patching.bind import install
from fastmeta.patching.context import Call, current_call, running
from fastmeta.patching.plan import Plan
from fastmeta.patching.task_axes import is_input
from fastmeta.search.gates import Layers
from fastmeta.search.importance import ordered_copy
from fastmeta.search.passes import Pass
from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space


class Supernet(Patched):
    """The model of a space with LoRA terms of the largest ranks; runs many candidates at once.

    Args:
        space: Its model is copied: heads and units are put in order of importance.
        seed: Of the LoRA terms' initial values.
        calibration: Inputs for the measure of importance, ``[T, N, ...]``, or None.
    """

    def __init__(
        self, space: Space, *, seed: int = 0, calibration: Mapping[str, Tensor] | None = None
    ) -> None:
        if calibration is not None:
            rows = {k: v.flatten(0, 1) for k, v in calibration.items() if is_input(k)}
        model = ordered_copy(space.model, space.anatomy, None if calibration is None else rows)
        super().__init__(model, space.spec(), seed=seed)
        self.space = space
        self.anatomy = space.anatomy
        self.boundaries = frozenset(layer.name for layer in space.anatomy.layers)
        self._layers: dict[int, Layers] = {}

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError("a supernet is not copied: make another of its space")

    def layers(self, plan: Plan) -> Layers:
        """The gated layers of a plan."""
        with self._lock:
            if id(plan) not in self._layers:
                self._layers[id(plan)] = Layers(plan, self.anatomy, self.slots.owners)
                if isinstance(plan.structure, SentenceClassifier):
                    _gate_pooling(plan.structure)
            return self._layers[id(plan)]

    def run(self, params: TaskParams, inputs: Mapping[str, Any], prefix_cache: Any = None) -> Any:
        """Run C candidates of T tasks.

        Args:
            params: Fast weights ``[C * T, P]``, candidates on the slow axis.
            inputs: ``[C * T, N, ...]``.
            prefix_cache: A pass of these candidates over the same inputs, or None for the whole
                model with its LoRA terms.
        """
        if not isinstance(prefix_cache, Pass):
            return super().run(params, inputs, prefix_cache)
        flat, tasks, rows = self.flatten(params, inputs)
        plan = self.plan(inputs)
        self.layers(plan)
        call = Call(params.views, tasks, rows, prefix=prefix_cache.stem, gates=prefix_cache)
        with running(call):
            out = plan.run(flat)
        logits = getattr(out, "logits", out)
        return logits.view(tasks, rows, *logits.shape[1:])

    def start(self, candidates: Sequence[Proposal], tasks: int) -> TaskParams:
        """Initial fast weights ``[C * T, P]``: rows of A beyond a candidate's rank are zero.

        B starts at zero, so neither factor's gradient ever reaches what lies beyond the rank.
        """
        row = self.layout.pack([p.detach() for p in self.slots.initial])
        packed = row.expand(len(candidates), -1).contiguous()
        views = TaskParams(self.layout, packed).views
        for target, modules in self.space.targets.items():
            for module in modules:
                owner = self.slots.owners.get(module)
                if owner is None:
                    continue
                view = views[owner.slots["lora_A"]]  # [C, r, in]
                layer = self.space.layer_of(module)
                ranks = [c.ranks[target] if layer in c.adapted else 0 for c in candidates]
                beyond = torch.arange(view.shape[1]) >= torch.tensor(ranks).unsqueeze(1)
                view.masked_fill_(beyond.unsqueeze(2).to(view.device), 0.0)
        return TaskParams(self.layout, packed.repeat_interleave(tasks, 0))


def _gate_pooling(structure: SentenceClassifier) -> None:
    original = structure.pool

    def pool(states: Tensor, attention_mask: Tensor | None) -> Tensor:
        gates = current_call().gates
        if gates is None:
            return original(states, attention_mask)
        return gates.pool(structure, states, attention_mask)

    install(structure, "pool", pool)


def repeated(inputs: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """``[T, ...]`` -> ``[times * T, ...]``."""
    return {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
