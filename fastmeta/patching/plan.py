"""A plan: one copied structure whose adapted modules run task-batched, checked on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fastmeta.patching import attention, prefix, probe, units
from fastmeta.patching.bind import bind, copy_structure
from fastmeta.patching.context import Call, current_call, running
from fastmeta.patching.rules import Adapted, rule_for
from fastmeta.patching.slots import Slots

if TYPE_CHECKING:
    from fastmeta.patching.patched import Patched

Tensors = Callable[[Call], dict[str, Tensor]]

# Relative difference that the first-use check allows, far above rounding and far below the
# effect of a task reading another task's weights.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_LOW_PRECISION_TOLERANCE = 0.1


class Plan:
    """How one set of input names runs.

    Attributes:
        structure: The copy that runs; its adapted modules are task-batched.
        pristine: A copy without rules, for modules that run as they are, per task.
        modes: Adapted module -> ``"rule"``, ``"vmap"`` or ``"loop"``.
        prefix: Modules whose outputs do not depend on the fast weights, in the order they run.
    """

    def __init__(
        self, model: nn.Module, slots: Slots, modes: dict[str, str], single: set[str]
    ) -> None:
        self.slots = slots
        self.modes = modes
        self.structure = _copy(model, slots)
        self.pristine = _copy(model, slots)
        self.prefix: list[str] = []
        for name, mode in modes.items():
            module = self.structure.get_submodule(name)
            if mode == "rule":
                run = _by_rule(module, slots.owners[name], name in single)
            else:
                ways = {"vmap": units.by_vmap, "loop": units.by_loop}[mode]
                run = _by_unit(
                    self.pristine.get_submodule(name),
                    unit_tensors(slots, name, self.pristine),
                    ways,
                )
            module.forward = run

    def train(self, mode: bool) -> None:
        self.structure.train(mode)
        self.pristine.train(mode)

    def prefix_is_random(self) -> bool:
        return any(prefix.is_random(self.structure.get_submodule(n)) for n in self.prefix)

    def run_prefix(self, flat: Mapping[str, Any]) -> None:
        """Run until the first adapted module; the current call's cache records."""
        call = current_call()
        call.only_prefix = True
        try:
            self.structure(**flat)
        except _PrefixDone:
            pass
        finally:
            call.only_prefix = False


class _PrefixDone(Exception):
    """The first adapted module was reached while only the prefix was wanted."""


def _copy(model: nn.Module, slots: Slots) -> nn.Module:
    structure = copy_structure(model)
    attention.use_in(structure, every=bool(slots.prefixes))
    for module in structure.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            # Key-value caches serve generation; here they would only hold memory.
            config.use_cache = False
    for name, pair in slots.prefixes.items():
        structure.get_submodule(name).fastmeta_prefix = pair
    return structure


def _by_rule(module: nn.Module, adapted: Adapted, single: bool) -> Callable:
    rule = rule_for(module, adapted)
    assert rule is not None

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        call = current_call()
        if call.only_prefix:
            raise _PrefixDone
        if not single:
            return rule(module, adapted, call, x)
        # One shared row [1, ...]: every task computes its own, each of its rows reads it.
        y = rule(module, adapted, call, x.expand(call.tasks, *x.shape[1:]))
        return y.unsqueeze(1).expand(-1, call.rows, *y.shape[1:]).flatten(0, 1)

    return forward


def _by_unit(pristine: nn.Module, tensors: Tensors, run: Callable) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call.only_prefix:
            raise _PrefixDone
        return run(pristine, call, tensors, (args, kwargs))

    return forward


def unit_tensors(slots: Slots, unit: str, structure: nn.Module) -> Tensors:
    """What a unit binds: name below the unit -> ``[T, *shape]`` of a call, LoRA terms merged in."""
    lead = unit + "." if unit else ""
    owners = {n: a for n, a in slots.owners.items() if n == unit or n.startswith(lead)}

    def tensors(call: Call) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, adapted in owners.items():
            relative = name[len(lead) :] + "." if name != unit else ""
            for attribute, slot in adapted.slots.items():
                if not attribute.startswith("lora_"):
                    found[relative + attribute] = call.views[slot]
            if "lora_A" in adapted.slots:
                module = structure.get_submodule(name)
                delta = torch.bmm(adapted.tensor(call, "lora_B"), adapted.tensor(call, "lora_A"))
                if delta.shape[1:] != module.weight.shape:
                    delta = delta.transpose(1, 2)  # Conv1D stores [in, out]
                weight = found.get(relative + "weight", module.weight)
                found[relative + "weight"] = weight + adapted.lora_scale * delta
        return found

    return tensors


def make_plan(patched: Patched, inputs: Mapping[str, Any]) -> Plan:
    """Find a plan under which two tasks in one batch compute what two separate models compute."""
    model, slots = patched.model, patched.slots
    small = _probe_inputs(patched, inputs, probe.TASKS, probe.ROWS)
    large = _probe_inputs(patched, inputs, probe.TASKS, probe.ROWS + 1)
    reference = _copy(model, slots).eval()
    views = _different_tasks(slots)
    with torch.no_grad():
        traces = []
        for flat in (small, large):
            rows = _num_rows(flat)
            trace = probe.Trace()
            # One task of all rows: the model as it is, only recorded.
            one = Call([v[:1] for v in views], 1, rows)
            with running(one), trace.record(reference):
                reference(**flat)
            traces.append((trace, rows))
    kinds = {
        name: probe.batch_kind(
            traces[0][0].lead.get(name, []),
            traces[1][0].lead.get(name, []),
            (traces[0][1], traces[1][1]),
        )
        for name, _ in reference.named_modules()
    }
    modes, single = _first_modes(model, slots, kinds, traces[0][0])
    expected = _per_task_outputs(reference, slots, views, small)
    called = set(traces[0][0].lead)
    while True:
        plan = Plan(model, slots, dict(modes), single)
        plan.train(False)
        error: Exception | None = None
        try:
            with torch.no_grad(), running(Call(views, probe.TASKS, probe.ROWS)):
                actual = plan.structure(**small)
            if _agrees(actual, expected, patched.dtype):
                break
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as e:
            error = e
        if "" in modes:
            raise probe.PatchError(
                f"{type(model).__name__} cannot run with per-task parameters"
                + (f" ({type(error).__name__}: {error})" if error else "")
                + "; adapt fewer parameters or use LoRA on its linear layers"
            ) from error
        _escalate(model, slots, modes, called, kinds)
    for name, mode in modes.items():
        if mode == "loop":
            probe.warn_loop(name, model.get_submodule(name))
    plan.prefix = probe.prefix_modules(traces[0][0], _entered_units(slots, modes))
    prefix.install(plan.structure, plan.prefix)
    return plan


def _entered_units(slots: Slots, modes: dict[str, str]) -> set[str]:
    return {*modes, *slots.prefixes}


def _first_modes(
    model: nn.Module, slots: Slots, kinds: dict[str, str], trace: probe.Trace
) -> tuple[dict[str, str], set[str]]:
    """The best mode of every adapted module by its type and by how it is called."""
    modes: dict[str, str] = {}
    single: set[str] = set()
    for name, adapted in slots.owners.items():
        module = model.get_submodule(name)
        if name not in trace.lead:
            modes[name] = (
                "rule" if rule_for(module, adapted) else "vmap"
            )  # unused, or read directly
        elif kinds[name] == "shared":
            modes[_batched_ancestor(name, kinds)] = "loop"
        elif rule_for(module, adapted) is not None:
            modes[name] = "rule"
            if kinds[name] == "single":
                single.add(name)
        else:
            modes[name] = "vmap"
    return _outermost(modes), single


def _batched_ancestor(name: str, kinds: dict[str, str]) -> str:
    while name:
        name = name.rpartition(".")[0]
        if kinds.get(name) == "batched":
            return name
    return ""


def _outermost(modes: dict[str, str]) -> dict[str, str]:
    """Drop modules that lie inside another unit, which runs them."""
    whole = {n for n, m in modes.items() if m != "rule"}
    return {
        n: m
        for n, m in modes.items()
        if not any(u != n and (u == "" or n.startswith(u + ".")) for u in whole)
    }


def _escalate(
    model: nn.Module, slots: Slots, modes: dict[str, str], called: set[str], kinds: dict[str, str]
) -> None:
    """Move the most suspicious unit one rung down the ladder, in place."""
    vmapped = [n for n, m in modes.items() if m == "vmap"]
    uncalled = [n for n in modes if n not in called and n]
    if uncalled:
        # Read by the module around it instead of being called.
        for name in uncalled:
            modes.pop(name)
            modes[_batched_ancestor(name, kinds)] = "loop"
    elif vmapped:
        for name in vmapped:
            modes[name] = "loop"
    else:
        modes.clear()
        modes[""] = "loop"
    kept = _outermost(modes)
    modes.clear()
    modes.update(kept)


def _different_tasks(slots: Slots) -> list[Tensor]:
    """Two tasks' fast weights, different from each other and from the initial values."""
    views = []
    for i, p in enumerate(slots.initial):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randn(probe.TASKS, *p.shape, generator=generator).to(p.device, p.dtype)
        scale = float(p.detach().float().std()) if p.numel() > 1 else 0.0
        views.append(p.detach() + noise * (0.2 * scale if scale > 0 else 0.1))
    return views


def _probe_inputs(
    patched: Patched, inputs: Mapping[str, Any], tasks: int, rows: int
) -> dict[str, Any]:
    """A few rows of the real inputs, repeated as needed: ``[tasks * rows, ...]``."""
    lead = (
        inputs["input_ids"]
        if "input_ids" in inputs
        else next(v for v in inputs.values() if isinstance(v, Tensor) and v.dim() >= 2)
    )
    size = tuple(lead.shape[:2])
    index = torch.arange(tasks * rows, device=lead.device) % (size[0] * size[1])
    small = {
        k: v.flatten(0, 1)[index].unflatten(0, (tasks, rows))
        if isinstance(v, Tensor) and v.dim() >= 2 and tuple(v.shape[:2]) == size
        else v
        for k, v in inputs.items()
    }
    fake = type("Fake", (), {"num_tasks": tasks, "packed": lead})
    return patched._flatten(fake, small)[0]


def _num_rows(flat: Mapping[str, Any]) -> int:
    lead = flat.get("input_ids")
    if lead is None:
        lead = next(v for v in flat.values() if isinstance(v, Tensor))
    return lead.shape[0]


def _per_task_outputs(
    reference: nn.Module, slots: Slots, views: list[Tensor], flat: Mapping[str, Any]
) -> list[Any]:
    """The oracle: each task's rows through the model with that task's tensors bound."""
    tensors = unit_tensors(slots, "", reference)
    outputs = []
    with torch.no_grad():
        for t in range(probe.TASKS):
            one = Call([v[t : t + 1] for v in views], 1, probe.ROWS)
            rows = slice(t * probe.ROWS, (t + 1) * probe.ROWS)
            mine = {
                k: v[rows]
                if isinstance(v, Tensor) and v.shape[:1] == (probe.TASKS * probe.ROWS,)
                else v
                for k, v in flat.items()
            }
            with running(one):
                bound = bind(reference, {n: v[0] for n, v in tensors(one).items()})
                outputs.append(bound(**mine))
    return outputs


def _agrees(actual: Any, expected: list[Any], dtype: torch.dtype) -> bool:
    total = probe.TASKS * probe.ROWS
    tolerance = _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)
    for t, want in enumerate(expected):
        rows = slice(t * probe.ROWS, (t + 1) * probe.ROWS)
        got = tree_map(
            lambda x, rows=rows: (
                x[rows] if isinstance(x, Tensor) and x.shape[:1] == (total,) else x
            ),
            actual,
        )
        if len(tree_flatten(got)[0]) != len(tree_flatten(want)[0]):
            return False
        if probe.max_difference(got, want) > tolerance:
            return False
    return True
