"""An update rule whose optimizer and weight decay differ from row to row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.engine.optimizers import RULES
from fastmeta.engine.update_rule import State, UpdateRule


class RowRules(UpdateRule):
    """Each row its own optimizer; rows of one optimizer take their steps in one call.

    Args:
        optimizers: Names, one for each row.
        weight_decay: ``[T]``, float32 or float64.
    """

    def __init__(self, optimizers: Sequence[str], weight_decay: Tensor) -> None:
        self.optimizers, self.weight_decay = list(optimizers), weight_decay
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.optimizers):
            rows.setdefault(name, []).append(row)
        self.groups: list[tuple[Tensor | None, UpdateRule]] = []
        self._counts: list[int] = []  # tensors in the state of each group
        for name, members in rows.items():
            index = torch.tensor(members, device=weight_decay.device)
            decay = weight_decay[index]
            setting = decay if bool(decay.any()) else 0.0
            rule = RULES[name](weight_decay=setting)  # type: ignore[call-arg]
            self.groups.append((None if len(rows) == 1 else index, rule))
            self._counts.append(len(rule.init(torch.empty(1, 1))))
        self._rows = rows

    def init(self, params: Tensor) -> State:
        state: list[Tensor] = []
        for index, rule in self.groups:
            state += rule.init(params if index is None else params[index])
        return tuple(state)

    def select(self, rows: Sequence[int], state: State) -> tuple[RowRules, State]:
        """The rule and the state of some rows, in this order."""
        rule = RowRules([self.optimizers[r] for r in rows], self.weight_decay[list(rows)])
        mine = dict(zip(self._rows, self._states(state), strict=True))
        chosen: list[Tensor] = []
        for name, places in rule._rows.items():
            at = {row: i for i, row in enumerate(self._rows[name])}
            kept = [at[rows[p]] for p in places]
            chosen += [t[kept] for t in mine[name]]
        return rule, tuple(chosen)

    def checked_update(
        self, params, grads, state, lr, step, *, active, segments, clip_norm, in_place, losses
    ):
        if len(self.groups) == 1:
            return self.groups[0][1].checked_update(
                *(params, grads, state, lr, step),
                **{"active": active, "segments": segments},
                **{"clip_norm": clip_norm, "in_place": in_place, "losses": losses},
            )
        new = torch.empty_like(params)
        finite = torch.ones(len(params), dtype=torch.bool, device=params.device)
        states: list[Tensor] = []
        for (index, rule), mine in zip(self.groups, self._states(state), strict=True):
            rate = lr[index] if isinstance(lr, Tensor) and lr.shape[0] == len(params) else lr
            part, after, good = rule.checked_update(
                *(params[index], grads[index], mine, rate, step),
                active=None if active is None else active[index],
                segments=segments,
                clip_norm=clip_norm,
                in_place=True,  # indexing made copies
                losses=losses[index],
            )
            new[index], finite[index] = part, good
            states += after
        return new, tuple(states), finite

    def _states(self, state: State) -> list[State]:
        """The state of each group."""
        found, rest = [], list(state)
        for count in self._counts:
            found.append(tuple(rest[:count]))
            rest = rest[count:]
        return found
