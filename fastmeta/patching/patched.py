"""`fm.patch`: the user's model, running T tasks with their own fast weights in one batch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.meta_module import MetaModule
from fastmeta.patching import prefix, probe
from fastmeta.patching.context import Call, running
from fastmeta.patching.generation import generate
from fastmeta.patching.initial_params import InitialParams, with_zeros
from fastmeta.patching.inputs import check_inputs
from fastmeta.patching.known_tokens import KnownTokens
from fastmeta.patching.model_state import ModelState
from fastmeta.patching.plan import Plan
from fastmeta.patching.search import make_plan
from fastmeta.patching.slots import Slots, make_slots
from fastmeta.patching.spec import Spec
from fastmeta.patching.task_axes import (
    few,
    flat_inputs,
    has_choices,
    leading_axes,
    unflatten_output,
    warn_of_unknown,
)
from fastmeta.patching.task_params import TaskParams
from fastmeta.patching.unpadded import IDS, MASK, Tokens, Unpadded, is_traced


def patch(model: nn.Module, spec: Spec, *, seed: int = 0) -> Patched:
    """Prepare `model` so that each of T tasks can change the parameters that `spec` names.

    The model is never modified and its weights are shared, not copied: what the outer loop learns
    is found in the model itself.

    Args:
        model: A transformers model (any `nn.Module` whose inputs have a leading batch axis works);
            of one that `torch.compile` returned, the model that it wraps.
        spec: What each task may change, e.g. ``fm.LoRA(r=8) + fm.Params("classifier.*")``.
        seed: Seed of newly created parameters (LoRA, prefix).

    Returns:
        The patched model: ``patched(params, input_ids=[T, N, L], ...)``.

    Raises:
        TypeError: `model` is no module, or patched already; `spec` is no specification.
        ValueError: The specification names nothing in this model, or parameters of mixed dtype
            or device.
    """
    return Patched(model, spec, seed=seed)


class Patched(MetaModule):
    """A model whose calls take the fast weights of T tasks; see :func:`patch`.

    ``parameters()`` yields the meta-parameters: initial values of everything adapted, and every
    other weight of the model that requires grad. Several threads may call it at once, as far as the
    model allows that: rotary angles that grow with the text (`rope_type` ``"dynamic"`` and
    ``"longrope"``) are the module's own in transformers.

    It has a mode of its own, at first the model's: ``train()`` and ``eval()`` set it, and leave the
    user's model in its own. Modules that are in evaluation mode while the model trains when it is
    patched stay so.
    """

    boundaries: frozenset[str] = frozenset()
    """Modules at which the frozen prefix ends, adapted or not."""

    def __init__(self, model: nn.Module, spec: Spec, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module to patch, got {model!r}")
        if isinstance(model, Patched):
            raise TypeError(
                "expected a model, got one that is patched already: combine specifications with +"
            )
        # Of torch.compile's wrapper what it wraps: it would compile the code of another structure.
        model = getattr(model, "_orig_mod", model)
        if not isinstance(spec, Spec):
            raise TypeError(
                f"expected a specification such as fm.LoRA() or fm.Params('*'), got {spec!r}"
            )
        self.model = model
        self.spec = spec
        self.slots: Slots = make_slots(model, spec, seed)
        self.layout = self.slots.layout
        self._plans: dict[tuple[tuple[str, bool | str | None], ...], Plan] = {}
        self._lock = threading.RLock()
        self._tokens = KnownTokens()
        self.captures: dict[Any, Any] = {}  # what the engine has captured of this model
        self._state = ModelState(model)
        self.train(model.training)

    # -- meta-parameters ---------------------------------------------------------------------

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """Adapted initial values first, then shared weights that require grad, by name."""
        found = dict(zip(self.layout.names, self.slots.initial, strict=True))
        adapted = {id(p) for p in self.slots.initial}
        for name, parameter in self._state.parameters():
            if parameter.requires_grad and id(parameter) not in adapted:
                found[name] = parameter
        return found

    def shared_parameters(self) -> list[nn.Parameter]:
        """Meta-parameters that no task adapts: shared weights that require grad."""
        return list(self.meta_parameters().values())[len(self.slots.initial) :]

    @property
    def device(self) -> torch.device:
        return self.slots.initial[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.slots.initial[0].dtype

    @property
    def rows_meet(self) -> bool:
        """Whether BatchNorm now normalises over all rows of a task."""
        return self._state.always or (self.training and self._state.batch_norms)

    def init(self, num_tasks: int) -> TaskParams:
        """Fast weights at their initial values, differentiable to the meta-parameters.

        Args:
            num_tasks: T, at least 1.

        Returns:
            Parameters over one ``[T, P]`` buffer; all rows share memory until the first update.
        """
        return TaskParams(self.layout, self.initial(num_tasks).packed)

    def initial(self, num_tasks: int) -> InitialParams:
        """As :meth:`init`, without the packed buffer: the weights themselves, for passes and loops
        that end before those change.

        Args:
            num_tasks: T, at least 1.
        """
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self._state.warn_of_changes()
        return InitialParams(self.layout, with_zeros(self.slots.leaves()), num_tasks)

    # -- running -----------------------------------------------------------------------------

    def _set_mode(self, mode: bool) -> None:  # the user's model keeps a mode of its own
        with self._lock if "_lock" in vars(self) else nullcontext():
            for plan in vars(self).get("_plans", {}).values():
                plan.train(mode, self._state.rest)

    def plan(self, inputs: Mapping[str, Any]) -> Plan:
        """How each adapted module runs for inputs of these names and flags; found on their first
        use."""
        self._state.warn_of_mode(self.training)
        # a model may return more, or go another way, for another flag
        flags = bool | str
        key = tuple((k, v if isinstance(v := inputs[k], flags) else None) for k in sorted(inputs))
        plan = self._plans.get(key)
        if plan is None:
            with self._lock:
                plan = self._plans.get(key)
                if plan is None:
                    # What passes show must not depend on who comes first: exact, and gradients may
                    # follow an evaluation in inference mode.
                    exact = torch.autocast(self.device.type, enabled=False)
                    with exact, torch.inference_mode(False):
                        small, large = (
                            flat_inputs(self.model, few(inputs, probe.TASKS, rows))
                            for rows in (probe.ROWS, probe.ROWS + 1)
                        )
                        plan = make_plan(self.model, self.slots, small, large, self.boundaries)
                    plan.train(self.training, self._state.rest)
                    warn_of_unknown(self.model, inputs)
                    self._plans[key] = plan
        return plan

    def __reduce_ex__(self, protocol: int) -> Any:
        """Copied and pickled with the model that it shares weights with."""
        own = self.model, self.spec, self.slots.initial, self._state.rest, self.training
        return _patched_again, own

    def record_prefix(
        self,
        params: TaskParams,
        inputs: Mapping[str, Any],
        *,
        padded: bool = False,
        widths: int = 0,
    ) -> prefix.PrefixCache | None:
        """Run once and keep the frozen prefix's outputs, or None where there is none to reuse.

        Args:
            padded: Keep those of padding too, as passes under ``torch.func`` read them.
            widths: Unless 0: without padding, round the number of tokens up to one of so many. What
                is returned then says which tokens there are, also where there is no prefix.
        """
        flat, _, _ = self.flatten(params, inputs)
        plan = self.plan(inputs)
        reused = plan.prefix and not plan.prefix_is_random()
        if not (reused or widths):
            return None
        call = self.call(params.bound(plan), inputs, padded=padded, widths=widths)
        cache = prefix.PrefixCache(call.unpadded and call.unpadded.tokens)
        if not reused:
            cache.recording = False
            return None if cache.tokens is None else cache
        call.prefix = cache.replay()
        try:
            with running(call):
                plan.run_prefix(flat)
        finally:
            cache.recording = False
        return cache

    def forward(
        self, params: TaskParams, *, prefix_cache: prefix.PrefixCache | None = None, **inputs: Any
    ) -> Any:
        """Run T tasks, each with its own fast weights.

        Args:
            params: Fast weights of T tasks, from :meth:`init` or an adaptation.
            prefix_cache: From :meth:`record_prefix` on the same inputs.
            inputs: The model's inputs with a task axis, ``[T, N, ...]``. ``labels`` are not passed
                to the model (its own loss would mix tasks); an encoder-decoder model derives its
                decoder inputs from them. Labels ``[T, N, L]`` that ignore all padding (-100) say
                that nobody reads the outputs there, which then need not be computed. The model
                runs as with ``use_cache=False``: without a mask, ``position_ids`` that start again
                begin another text in a row.

        Returns:
            The model's output with ``[T, N, ...]`` in place of ``[B, ...]``.

        Raises:
            ValueError: Inputs and params disagree on T, or a mask and its words on their shape;
                a word that the model does not know, or a text that is too long; a cache of keys
                and values.
        """
        check_inputs(inputs, "given", self.device, self.model)
        if inputs.get("past_key_values") is not None:
            raise ValueError(
                "a pass takes whole texts, got past_key_values: generate(...) goes on with a cache"
            )
        return self.run(params, inputs, prefix_cache)

    def generate(self, params: TaskParams, **given: Any) -> Any:
        """Continue the texts of T tasks in one batch, each with its own fast weights.

        Args:
            params: Fast weights of T tasks.
            given: The model's inputs ``[T, N, L]``, padded on the left where one is not an
                encoder-decoder, and settings of transformers' ``generate``, such as
                ``max_new_tokens``, ``do_sample`` or ``generation_config``; one continuation of
                each text. Keys and values of earlier words are kept (``use_cache=False``: are not).

        Returns:
            What ``generate`` returns, with ``[T, N, ...]`` in place of ``[B, ...]``: words
            ``[T, N, L']``. Without sampling, those of each task alone.

        Raises:
            TypeError: The model does not generate.
            RuntimeError: It is in training mode and has dropout.
            ValueError: Inputs and params disagree, texts are padded on the right, or several
                continuations were asked for.
            PatchError: The model generates, but not with these per-task parameters; asked on the
                first use.
        """
        return generate(self, params, given)

    def run(
        self,
        params: TaskParams,
        inputs: Mapping[str, Any],
        prefix_cache: prefix.PrefixCache | None = None,
        *,
        before_output: bool = False,
    ) -> Any:
        """:meth:`forward` for inputs that were checked.

        Args:
            before_output: What the :meth:`output_layer` reads comes in place of logits.
        """
        flat, tasks, rows = self.flatten(params, inputs)
        plan = self.plan(inputs)
        call = self.call(params.bound(plan), inputs, prefix_cache=prefix_cache)
        call.before_output = before_output
        with running(call):
            out = plan.run(flat)
        return unflatten_output(out, tasks, rows)

    def call(
        self,
        views: list,
        inputs: Mapping[str, Any],
        *,
        prefix_cache: prefix.PrefixCache | None = None,
        padded: bool = False,
        widths: int = 0,
    ) -> Call:
        """A pass over inputs ``[T, N, ...]``: without their padding where layers can do without,
        unless `padded`; with a stored prefix, as that was recorded. See :meth:`record_prefix`."""
        _, tasks, rows = leading_axes(inputs)
        call = Call(views, tasks, rows)
        plan, mask = self.plan(inputs), inputs.get(MASK)
        if prefix_cache is not None:
            call.prefix = prefix_cache.replay()
            if prefix_cache.tokens is not None:
                if is_traced(mask) and not prefix_cache.tokens.are_operands:
                    raise RuntimeError(
                        "a pass that is traced or transformed needs a prefix of padded texts: "
                        "record_prefix(..., padded=True)"
                    )
                call.unpadded = Unpadded(prefix_cache.tokens)
        elif plan.unpadded and not padded:
            tokens = self._tokens.of(plan, inputs, widths)
            call.unpadded = None if tokens is None else Unpadded(tokens)
        return call

    def output_layer(self, inputs: Mapping[str, Any]) -> nn.Linear | None:
        """The linear layer, shared by all tasks, whose result is the logits for such inputs."""
        return self.plan(inputs).output_layer

    def tokens(self, inputs: Mapping[str, Any], widths: int = 0) -> Tokens | None:
        """Which positions of inputs ``[T, N, ...]`` layers compute; None where those are all."""
        plan = self.plan(inputs)
        return self._tokens.of(plan, inputs, widths) if plan.unpadded else None

    def computed_tokens(self, inputs: Mapping[str, Any], widths: int = 0) -> int | None:
        """Positions of each task that layers compute for inputs ``[T, N, ...]``; None where those
        are all, whatever the mask."""
        mask = inputs.get(MASK)
        if not self.plan(inputs).unpadded or not isinstance(mask, Tensor):
            return None
        tokens = self.tokens(inputs, widths)
        return mask[0].numel() if tokens is None else tokens.width

    def check_params(self, params: TaskParams) -> None:
        """Raise unless `params` are fast weights of this model and specification.

        Raises:
            TypeError: They are something else.
            ValueError: They are of another model or specification.
        """
        if not isinstance(params, TaskParams):
            raise TypeError(
                "expected fast weights (fm.TaskParams), such as fm.adapt(...).params, "
                f"got {type(params).__name__}"
            )
        difference = self.layout.difference(params.layout)
        if difference is not None:
            raise ValueError(f"params are of another model or specification: {difference}")
        if params.dtype != self.dtype:
            raise ValueError(f"params are in {params.dtype}, but what adapts is in {self.dtype}")
        self._state.check_unconverted()

    def flatten(
        self, params: TaskParams, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], int, int]:
        """``[T, N, ...]`` inputs -> the model's ``[T * N, ...]`` inputs, T, N."""
        self.check_params(params)
        ids, choices = inputs.get(IDS), has_choices(self.model)
        if isinstance(ids, Tensor) and ids.dim() != 3 + choices:
            axes = "[T, N, choices, L]" if choices else "[T, N, L]"
            raise ValueError(f"{IDS} must have shape {axes}, got {list(ids.shape)}")
        name, tasks, rows = leading_axes(inputs)
        if tasks != params.num_tasks:
            raise ValueError(
                f"params hold {params.num_tasks} tasks, but {name} has {tasks} "
                f"(shape {list(inputs[name].shape)})"
            )
        if rows == 0:
            raise ValueError(f"{name} holds no examples (shape {list(inputs[name].shape)})")
        if params.device != self.device:
            raise ValueError(f"params are on {params.device}, but the model is on {self.device}")
        return flat_inputs(self.model, inputs), tasks, rows

    def extra_repr(self) -> str:
        return (
            f"{type(self.model).__name__}, {self.spec!r}, "
            f"{self.layout.num_elements} adapted parameters per task"
        )


def _patched_again(
    model: nn.Module,
    spec: Spec,
    initial: list[nn.Parameter],
    rest: frozenset[str],
    training: bool,
) -> Patched:
    """The patched model of a copy of the model and of the initial values."""
    patched = Patched(model, spec)
    patched.slots.initial[:] = initial
    patched._state.rest = rest
    return patched.train(training)
