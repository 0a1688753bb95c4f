"""What a candidate costs to serve: arithmetic, parameters, and time from a measured table."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from fastmeta.search.anatomy import Layer, matrices
from fastmeta.search.gates import Sizes
from fastmeta.search.proposal import Proposal
from fastmeta.search.pruning import narrow
from fastmeta.search.space import Space

COSTS = ("flops", "parameters", "latency")


class CostModel:
    """Cost of a candidate's architecture on texts of one length.

    ``flops``: of the layers' matrix products, per text. ``parameters``: all that are left.
    ``latency``: seconds for one batch of texts: the time of the model around its layers plus, for
    every layer that is left, the time of a layer of its sizes, from a table that is measured once
    for each combination of sizes. LoRA terms cost nothing: they are added to the weights for
    serving. Each number is also given over that of the whole model, as ``relative_flops`` etc.

    Args:
        space: Whose candidates are priced.
        tokens: Tokens of a text.
        rows: Texts of a batch.
        latency: Whether to measure; without, ``latency`` is left out.
        rounds: Measurements of each entry, of which the median counts.

    Attributes:
        table: (heads, width) -> seconds of one layer; filled as sizes are asked for.
    """

    def __init__(
        self,
        space: Space,
        *,
        tokens: int = 16,
        rows: int = 8,
        latency: bool = True,
        rounds: int = 7,
    ) -> None:
        if tokens < 1 or rows < 1 or rounds < 1:
            raise ValueError(
                f"tokens, rows and rounds must be at least 1, got {tokens}, {rows} and {rounds}"
            )
        self.space, self.tokens, self.rows, self.rounds = space, tokens, rows, rounds
        model, layers = space.model, space.anatomy.layers
        self._layer_parameters = [
            sum(p.numel() for p in model.get_submodule(x.name).parameters()) for x in layers
        ]
        total = sum(p.numel() for p in model.parameters())
        self._around = total - sum(self._layer_parameters)
        self._device = next(model.parameters()).device
        self.table: dict[Sizes, float] = {}
        self._measures = latency
        self._call: tuple[tuple, dict] | None = None
        self._outside = 0.0
        whole = [(x.heads, x.width) for x in layers]
        if latency:
            self._call, self._outside = self._measure_model(whole)
        self.whole = self._costs(whole)

    def __call__(self, proposal: Proposal) -> dict[str, float]:
        """The costs of a candidate by name."""
        found = self._costs(list(proposal.shape))
        return found | {f"relative_{k}": v / self.whole[k] for k, v in found.items()}

    def names(self) -> tuple[str, ...]:
        """The costs that are known."""
        kinds = COSTS if self._measures else COSTS[:2]
        return (*kinds, *(f"relative_{k}" for k in kinds))

    def _costs(self, shape: list[Sizes | None]) -> dict[str, float]:
        flops, parameters, seconds = 0.0, float(self._around), self._outside
        for number, sizes in enumerate(shape):
            if sizes is None:
                continue
            layer = self.space.anatomy.layers[number]
            flops += self._flops(layer, sizes)
            parameters += self._layer_parameters[number] - self._gone(layer, sizes)
            if self._measures:
                seconds += self._seconds(sizes)
        found = {"flops": flops, "parameters": parameters}
        return found | ({"latency": seconds} if self._measures else {})

    def _flops(self, layer: Layer, sizes: Sizes) -> float:
        cuts = layer.sizes(*sizes)
        products = 0
        for name, whole in matrices(self.space.model.get_submodule(layer.name)).items():
            rows, columns = cuts.get(name, (None, None))
            products += (rows or whole[0]) * (columns or whole[1])
        attention = 2 * self.tokens * sizes[0] * layer.head_size
        return 2.0 * self.tokens * (products + attention)

    def _gone(self, layer: Layer, sizes: Sizes) -> int:
        gone = 0
        module = self.space.model.get_submodule(layer.name)
        for name, (rows, columns) in layer.sizes(*sizes).items():
            linear = module.get_submodule(name)
            left = (rows or linear.out_features) * (columns or linear.in_features)
            gone += linear.weight.numel() - left
            if rows is not None and linear.bias is not None:
                gone += linear.out_features - rows
        return gone

    # -- measuring ---------------------------------------------------------------------------

    def _seconds(self, sizes: Sizes) -> float:
        if sizes not in self.table:
            layers = self.space.anatomy.layers
            layer = next(x for x in layers if x.heads >= sizes[0] and x.width >= sizes[1])
            module = copy.deepcopy(self.space.model.get_submodule(layer.name)).eval()
            narrow(module, layer, *sizes)
            args, kwargs = self._call
            self.table[sizes] = self._timed(lambda: module(*args, **kwargs))
        return self.table[sizes]

    def _measure_model(self, whole: list[Sizes]) -> tuple[tuple[tuple, dict], float]:
        """How the lowest layer is called, and the seconds of everything around the layers."""
        model = copy.deepcopy(self.space.model).eval()
        for module in model.modules():  # a cache would grow with every call that is timed
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        like = next(model.parameters())
        ids = torch.ones(self.rows, self.tokens, dtype=torch.int64, device=like.device)
        calls: list[Any] = []
        layer = model.get_submodule(self.space.anatomy.layers[0].name)
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        self._call = calls[0]
        total = self._timed(lambda: model(**inputs))
        inside = sum(self._seconds(sizes) for sizes in whole)
        return calls[0], max(0.0, total - inside)

    def _timed(self, run: Callable[[], Any]) -> float:
        times = []
        with torch.no_grad():
            for _ in range(self.rounds + 2):
                start = time.perf_counter()
                run()
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                times.append(time.perf_counter() - start)
        return median(times[2:])

    def state_dict(self) -> dict[str, Any]:
        """The measurements, so that a search that goes on prices as before."""
        return {"table": dict(self.table), "outside": self._outside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table, self._outside = dict(state["table"]), state["outside"]
        self.whole = self._costs([(x.heads, x.width) for x in self.space.anatomy.layers])
