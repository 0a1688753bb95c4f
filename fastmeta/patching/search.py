"""Find a plan under which tasks in one batch compute what separate models compute.

Every adapted module starts on the first rung that its type and its calls allow: its rule, its own
code under vmap, a loop over tasks. Two different tasks then run through the plan on a few rows
of the real inputs and, one by one, through the pristine model. Where they differ, the first
module that differs moves down a rung; after its last rung, the module around it runs as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._memory_errors import is_out_of_memory
from fastmeta.patching import attention, first_token, output_layer, prefix, probe, unpadded
from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call, running
from fastmeta.patching.inputs import check_names
from fastmeta.patching.methods import SHARED_METHODS, key, shared_methods, split_key
from fastmeta.patching.plan import (
    WHOLE,
    Plan,
    different_tasks,
    inside_any,
    unit_tensors,
)
from fastmeta.patching.prepared import needs_own_attention, prepared_copy
from fastmeta.patching.probe import PatchError, Trace
from fastmeta.patching.rules import rule_for
from fastmeta.patching.slots import Slots

# Relative difference that the check allows, far above rounding and far below the effect of a task
# reading another task's weights.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_LOW_PRECISION_TOLERANCE = 0.1

# A unit of more leaf modules than this loops at once: vmap over a large part of a transformer
# takes several times the loop's time and memory on a CPU.
_VMAP_LEAVES = 8


def make_plan(
    model: nn.Module,
    slots: Slots,
    small: Mapping,
    large: Mapping,
    boundaries: frozenset[str] = frozenset(),
) -> Plan:
    """The plan for inputs like `small` and `large`.

    Args:
        small: ``TASKS * ROWS`` rows of real model inputs.
        large: ``TASKS * (ROWS + 1)`` rows of them.
        boundaries: Modules at which the frozen prefix ends, adapted or not; none is shortened.

    Raises:
        ValueError: The model itself does not run on these inputs.
        PatchError: The model runs, but not with per-task parameters.
    """
    check_names(model, small)
    search = _Search(model, slots, small, large)
    while True:
        plan = search.try_modes()
        if plan is not None:
            break
    if not boundaries:
        plan = search.try_first_token(plan)
    plan.word_table = search.word_table
    whole = [split_key(n)[0] for n, mode in plan.modes.items() if mode in WHOLE]
    name = search.find_output_layer()
    if output_layer.usable(name, slots.owners, whole):
        plan.output_layer = output_layer.install_in(plan.structure, name)
    search.leave_out_padding(plan)
    for name, mode in plan.modes.items():
        if mode == "loop":
            module = model.get_submodule(split_key(name)[0])
            probe.warn_loop(name, module)
    ran = {n for n in slots.owners if n in search.kinds or n in search.trace.inside}
    known = {id(search.modules[n]) for n in ran}  # a module may run under one of several names
    plan.refuse(n for n in slots.owners if id(search.modules[n]) not in known)
    entered = {n for n, mode in plan.modes.items() if mode != "skip"} | slots.prefixes.keys()
    plan.prefix = probe.prefix_modules(search.trace, entered | boundaries)
    prefix.install_in(plan.structure, plan.prefix)
    if plan.unpadded:
        unpadded.install_in(plan.structure, plan.unpadded)
    plan.settle()
    return plan


class _Search:
    def __init__(self, model: nn.Module, slots: Slots, small: Mapping, large: Mapping) -> None:
        self.model, self.slots, self.small = model, slots, small
        self.views = different_tasks(slots, probe.TASKS)
        self.tolerance = _TOLERANCE.get(slots.initial[0].dtype, _LOW_PRECISION_TOLERANCE)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.own_attention = needs_own_attention(model, slots, small, self.tolerance)
        self.reference = prepared_copy(model, slots, self.own_attention).eval()
        self.trace, other = self._trace(small, large)
        rows = probe.TASKS * probe.ROWS, probe.TASKS * (probe.ROWS + 1)
        self.kinds = probe.call_kinds(self.trace, other, rows)
        self.expected = self._per_task(self.small)
        self.rungs: dict[str, list[str]] = {}
        self.blamed: str | None = None
        for name in slots.owners:
            self._add(name)
        self._add_methods()

    # -- the reference -----------------------------------------------------------------------

    def _trace(self, small: Mapping, large: Mapping) -> list[Trace]:
        """How the model calls its modules, as one task of all rows."""
        traces: list[Trace] = []
        self.output_layers: list[str | None] = []
        probe.watch_methods(self.reference, traces)
        for flat in (small, large):
            traces.append(Trace())
            one = Call([v[:1] for v in self.views], 1, 1)
            watch = attention.watch_fused()
            with (
                torch.no_grad(),
                running(one),
                output_layer.watching(self.reference) as results,
                probe.record(self.reference, traces[-1]),
                probe.word_tables(self.reference, flat.get(unpadded.IDS)) as tables,
                watch,
            ):
                try:
                    out = self.reference(**flat)
                except Exception as e:
                    if is_out_of_memory(e):
                        raise
                    raise ValueError(
                        f"{type(self.model).__name__} does not run on the inputs "
                        f"{sorted(flat)} ({type(e).__name__}: {e})"
                    ) from e
            self.fused_attention = watch.seen
            self.word_table = tables[0] if len(tables) == 1 else None
            self.output_layers.append(results.source_of(out))
        return traces

    def _per_task(self, inputs: Mapping, record: list[Trace] | None = None) -> list[Any]:
        """The oracle: each task's rows through the model with that task's tensors bound."""
        tensors, _ = unit_tensors(self.slots, "", self.reference)
        outputs = []
        for t in range(probe.TASKS):
            one = Call([v[t : t + 1] for v in self.views], 1, probe.ROWS)
            rows = slice(t * probe.ROWS, (t + 1) * probe.ROWS)
            mine = {
                k: v[rows]
                if isinstance(v, Tensor) and v.shape[:1] == (probe.TASKS * probe.ROWS,)
                else v
                for k, v in inputs.items()
            }
            trace = Trace()
            with torch.no_grad(), running(one):
                bound = bind(self.reference, {n: v[0] for n, v in tensors(one).items()})
                if record is None:
                    outputs.append(bound(**mine))
                else:
                    with probe.record(self.reference, trace, keep_outputs=True):
                        outputs.append(bound(**mine))
                    record.append(trace)
        return outputs

    # -- rungs -------------------------------------------------------------------------------

    def _add(self, name: str) -> None:
        """Start an adapted module on its first rung; where it has none, the module around it."""
        rungs = self._rungs(name)
        if rungs:
            self.rungs[name] = rungs
        else:
            self._add_around(name)

    def _rungs(self, name: str) -> list[str]:
        adapted, module = self.slots.owners[name], self.modules[name]
        if name not in self.kinds:
            return ["skip"]  # never called; the module around it may read its parameters
        kind = self.kinds[name].kind
        rungs: list[str] = []
        if rule_for(module, adapted) is not None:
            if kind in ("batched", "single"):
                rungs.append({"batched": "rule", "single": "single"}[kind])
            elif kind == "shared":
                rungs.append("lift")
        elif isinstance(module, nn.Embedding) and kind == "batched":
            rungs.append("gather")
        elif self._is_alias(name) and self.tolerance < _LOW_PRECISION_TOLERANCE:
            rungs.append("skip")
        if adapted.slots and all(
            p is not None and p.dim() >= 2 and p.shape[0] == 1
            for p in (module._parameters.get(a) for a in adapted.slots)
        ):
            rungs.append("expand")
        if kind in ("batched", "single"):
            rungs += self._whole(name)
        return rungs

    def _whole(self, name: str) -> list[str]:
        modules = list(self.modules[name].modules())
        leaves = sum(1 for m in modules if not m._modules)
        # torch's vmap gives the padding row of every table but the first a gradient.
        padded = any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in modules)
        return ["loop"] if padded or leaves > _VMAP_LEAVES or not name else ["vmap", "loop"]

    def _is_alias(self, name: str) -> bool:
        """Whether everything adapted in a module is also read elsewhere, under a tied name."""
        elsewhere = {
            slot for n, a in self.slots.owners.items() if n != name for slot in a.slots.values()
        }
        return set(self.slots.owners[name].slots.values()) <= elsewhere

    def _add_around(self, name: str) -> None:
        """Run the nearest module around `name` that has the batch axis as a whole."""
        for around in reversed(probe.ancestors(name)):
            if around == "" or self.kinds.get(around, _NEVER).kind == "batched":
                self._make_unit(around)
                return

    def _make_unit(self, name: str) -> None:
        self.rungs = {
            n: r for n, r in self.rungs.items() if n != name and not inside_any(n, [name])
        }
        self.rungs[name] = self._whole(name)

    def _add_methods(self) -> None:
        """Shared methods that read something adapted run per task, their callers as they are."""
        ran = {name for _, name in self.trace.order}
        stacks = False
        for module_name, method in shared_methods(self.reference):
            unit, shared = key(module_name, method), SHARED_METHODS[method]
            if unit not in ran or inside_any(unit, self._units()):
                continue
            lead = module_name + "." if module_name else ""
            reads = {n for n in self.trace.inside if n.startswith(lead)}
            reads |= {lead + child for child in shared.reads}
            if reads & self.slots.owners.keys() or (stacks and shared.stacked):
                self.rungs[unit] = ["vmap", "loop"]
                stacks |= shared.returns == "stacked"

    def _units(self) -> list[str]:
        return [n for n, rungs in self.rungs.items() if rungs[0] in WHOLE]

    # -- trying ------------------------------------------------------------------------------

    def try_modes(self) -> Plan | None:
        """The plan of the present rungs if it computes the right results; else move down."""
        modes = {name: rungs[0] for name, rungs in self.rungs.items()}
        plan = self._plan(modes)
        error: Exception | None = None
        try:
            with torch.no_grad(), running(Call(self.views, probe.TASKS, probe.ROWS)):
                actual = plan.run(self.small)
            if probe.agrees(actual, self.expected, self.tolerance):
                return plan
        except Exception as e:
            if is_out_of_memory(e):
                raise
            error = e
        place = self._locate(plan)
        self.blamed = self.blamed or place
        if modes.get("") in WHOLE:
            raise self._error(error) from error
        self._move_down(place, modes)
        return None

    def _plan(self, modes: Mapping[str, str]) -> Plan:
        plan = Plan(self.model, self.slots, modes, self.kinds, self.own_attention)
        plan.train(False)
        plan.fused_attention, plan.tolerance = self.fused_attention, self.tolerance
        return plan

    def try_first_token(self, plan: Plan) -> Plan:
        """The plan with its last layer shortened, where the model's output does not change."""
        order = [name for kind, name in self.trace.order if kind == "enter"]
        name = first_token.last_layer(self.reference, [n for n in order if n in self.modules])
        lengths = [v.shape[1] for v in self.small.values() if isinstance(v, Tensor) and v.dim() > 1]
        if name is None or not lengths or min(lengths) < 2:
            return plan
        shorter = self._plan(plan.modes)
        first_token.shorten(shorter.structure, name, self.slots.owners, shorter.modes)
        shorter.shortened = name
        texts = [(self.small, self.expected)]
        mask = self.small.get(unpadded.MASK)
        if isinstance(mask, Tensor):
            # of texts of one word a mean is that of the first
            whole = {**self.small, unpadded.MASK: torch.ones_like(mask)}
            texts.append((whole, self._per_task(whole)))
        for inputs, expected in texts:
            try:
                with torch.no_grad(), running(Call(self.views, probe.TASKS, probe.ROWS)):
                    actual = shorter.run(inputs)
            except Exception as e:
                if is_out_of_memory(e):
                    raise
                return plan  # something reads the other tokens
            if not probe.agrees(actual, expected, self.tolerance):
                return plan
        return shorter

    def find_output_layer(self) -> str | None:
        """The layer whose result is the logits on all inputs, in training too."""
        name, other = self.output_layers
        if name is None or other != name:
            return None
        one = Call([v[:1] for v in self.views], 1, 1)
        with running(one):
            return name if output_layer.in_training(self.reference, self.small) == name else None

    def leave_out_padding(self, plan: Plan) -> None:
        """Find a run of the plan's layers that can leave out padding without a change of the
        model's output; else one that changes it at padding alone."""
        padded = unpadded.with_padding(self.small)
        if padded is None:
            return
        order = [name for kind, name in self.trace.order if kind == "enter"]
        runs = [
            [n for n in layers if n != plan.shortened]
            for layers in unpadded.runs_of_layers(self.reference, order)
        ]
        config = getattr(self.model, "config", None)
        filled = unpadded.with_words(padded, config)
        trials = [(*f, False) for f in filled]
        if not getattr(config, "is_encoder_decoder", False):  # whose labels are of other texts
            trials.append((*filled[0], True))
        for small, word, shown in trials:
            layers = self._without_padding(plan, runs, small, shown)
            if layers:
                plan.unpadded, plan.padding_word, plan.shows_padding = layers, word, shown
                return

    def _without_padding(
        self, plan: Plan, runs: list[list[str]], small: Mapping[str, Any], shown: bool
    ) -> list[str]:
        """The first run of layers that can leave out the padding of these inputs.

        Args:
            shown: Whether the output may change at padding.
        """
        expected: list[Any] = []
        for layers in filter(None, runs):
            trial = self._plan(plan.modes)
            if plan.shortened is not None:
                first_token.shorten(trial.structure, plan.shortened, self.slots.owners, trial.modes)
            unpadded.install_in(trial.structure, layers)
            tokens = unpadded.Tokens(small[unpadded.MASK], probe.TASKS)
            call = Call(self.views, probe.TASKS, probe.ROWS, unpadded=unpadded.Unpadded(tokens))
            try:
                if not expected:
                    expected = self._per_task(small)
                    if shown:
                        masks = small[unpadded.MASK].split(probe.ROWS)
                        expected = list(map(unpadded.at_tokens, expected, masks))
                with torch.no_grad(), running(call):
                    actual = trial.run(small)
            except Exception as e:
                if is_out_of_memory(e):
                    raise
                continue  # something needs to know which text a token is of
            if shown:
                actual = unpadded.at_tokens(actual, small[unpadded.MASK])
            if probe.agrees(actual, expected, self.tolerance):
                return layers
        return []

    def _locate(self, plan: Plan) -> str:
        """The first module of the plan that computes something else, or fails."""
        per_task: list[Trace] = []
        self._per_task(self.small, per_task)
        actual = Trace()
        with torch.no_grad(), running(Call(self.views, probe.TASKS, probe.ROWS)):
            try:
                with probe.record(plan.structure, actual, keep_outputs=True):
                    plan.run(self.small)
            except Exception as e:
                if is_out_of_memory(e):
                    raise
                # `actual.open` tells where
        differs = probe.first_difference(actual, per_task, self.trace.inside, self.tolerance)
        if differs is not None:
            return differs
        return actual.open[-1] if actual.open else ""

    def _move_down(self, place: str, modes: Mapping[str, str]) -> None:
        """The next rung for the module at `place`, or for what it contains and relies on."""
        guesses = [n for n in self.rungs if inside_any(n, [place]) and _is_guess(n, modes[n])]
        if place in self.rungs and modes[place] not in ("skip", "expand"):
            guesses = [place]
        elif place in self.rungs and len(self.rungs[place]) > 1:
            guesses.append(place)
        for name in guesses:
            if name not in self.rungs:
                continue  # swallowed by a unit made in this round
            self.rungs[name] = self.rungs[name][1:]
            if not self.rungs[name]:
                del self.rungs[name]
                self._add_around(name)
        if not guesses:
            if place == "" or self.kinds.get(place, _NEVER).kind == "batched":
                self._make_unit(place)
            else:
                self._add_around(place)

    def _error(self, error: Exception | None) -> PatchError:
        again = zip(self._per_task(self.small), self.expected, strict=True)
        if not all(probe.agrees(out, [before], self.tolerance) for out, before in again):
            return PatchError(
                f"{type(self.model).__name__} draws random numbers in evaluation mode too: no pass "
                "shows whether it computes the right results with per-task parameters"
            )
        name = self.blamed or ""
        where = f"module {name!r} of {type(self.model).__name__}" if name else "the model"
        kind = type(self.modules[name]).__name__
        reason = f" ({type(error).__name__}: {error})" if error else ""
        return PatchError(
            f"{where} ({kind}) cannot run with per-task parameters, not even task by task{reason}; "
            "adapt parameters outside of it, for example with LoRA on named linear layers"
        )


_NEVER = probe.CallKind("never", {})


def _is_guess(name: str, mode: str) -> bool:
    """Modes that are right only where the code around the module uses its result in one way."""
    return mode in ("single", "lift", "gather", "expand") or name.endswith("()")
