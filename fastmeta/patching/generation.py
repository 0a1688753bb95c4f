"""Texts of T tasks continued in one batch, by transformers' own ``generate`` and its caches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmeta.patching import probe
from fastmeta.patching.bind import bind
from fastmeta.patching.context import Call, running
from fastmeta.patching.inputs import check_inputs
from fastmeta.patching.plan import Plan, different_tasks, unit_tensors
from fastmeta.patching.prefix import is_random
from fastmeta.patching.task_axes import few, flat_inputs, leading_axes, unflatten_output
from fastmeta.patching.task_params import TaskParams
from fastmeta.patching.unpadded import MASK

if TYPE_CHECKING:
    from fastmeta.patching.patched import Patched

_ONE = ("num_beams", "num_return_sequences")
_CHECKED_WORDS = 3
"""So many words of a few rows are compared with those of each task alone."""


def generate(patched: Patched, params: TaskParams, given: Mapping[str, Any]) -> Any:
    """See :meth:`Patched.generate`."""
    model = patched.model
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(
            f"{type(model).__name__} does not generate texts; expected a model such as "
            "AutoModelForCausalLM loads"
        )
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.dim() > 1}
    settings = {"use_cache": True} | {k: v for k, v in given.items() if k not in inputs}
    # The model's own as it is now: the plan's structure has a copy of an earlier one.
    config = settings.pop("generation_config", None) or model.generation_config
    for name in _ONE:
        count = settings.get(name, getattr(config, name, None))
        if count not in (None, 1):
            raise ValueError(
                f"{name} must be 1, got {count}: give a text several times to continue it in "
                "several ways"
            )
    check_inputs(inputs, "given", patched.device, model)
    flat, tasks, rows = patched.flatten(params, inputs)
    told, mask = _with_decoder(model, inputs), inputs.get(MASK)
    goes_on = mask is not None and not model.config.is_encoder_decoder
    if goes_on and bool((mask[..., -1] == 0).any()):
        raise ValueError("texts to be continued must be padded on the left")
    plan = patched.plan(told)
    if is_random(plan.structure):
        raise RuntimeError(
            "texts are continued in evaluation mode: call eval() of the patched model, or of the "
            "learner, first"
        )
    if not plan.generates:
        with torch.autocast(patched.device.type, enabled=False):
            _check(patched, plan, inputs)
        plan.generates = True
    config = copy.deepcopy(config)
    others = config.update(**settings)
    with running(Call(params.bound(plan), tasks, rows)), plan.attention():
        out = plan.structure.generate(**flat, generation_config=config, **others)
    return unflatten_output(out, tasks, rows)


def _with_decoder(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs that the model runs on: those of an encoder-decoder with some answer."""
    if not model.config.is_encoder_decoder or "decoder_input_ids" in inputs:
        return inputs
    name, tasks, rows = leading_axes(inputs)
    ids = torch.zeros(tasks, rows, 2, dtype=torch.int64, device=inputs[name].device)
    return {**inputs, "decoder_input_ids": ids}


def _check(patched: Patched, plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Raise unless two different tasks go on in one batch as they do alone.

    Passes that read a cache call modules in ways that the plan was not tried on.
    """
    small = flat_inputs(patched.model, few(inputs, probe.TASKS, probe.ROWS))
    views = different_tasks(patched.slots, probe.TASKS)
    settings = copy.deepcopy(patched.model.generation_config)
    settings.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_length=None,
        min_new_tokens=_CHECKED_WORDS,
        max_new_tokens=_CHECKED_WORDS,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
    )
    tensors, _ = unit_tensors(patched.slots, "", plan.pristine)
    alone = []
    for t in range(probe.TASKS):
        one = Call([v[t : t + 1] for v in views], 1, probe.ROWS)
        mine = {k: v[t * probe.ROWS : (t + 1) * probe.ROWS] for k, v in small.items()}
        with running(one), plan.attention():
            bound = bind(plan.pristine, {n: v[0] for n, v in tensors(one).items()})
            alone.append(bound.generate(**mine, generation_config=settings))
    try:
        with running(Call(views, probe.TASKS, probe.ROWS)), plan.attention():
            found = plan.structure.generate(**small, generation_config=settings)
    except Exception as e:
        raise _error(patched, f" ({type(e).__name__}: {e})") from e
    for step, logits in enumerate(found.logits):
        if not probe.agrees(logits, [a.logits[step] for a in alone], plan.tolerance):
            raise _error(patched, "")
        words = [a.sequences.shape[1] - len(a.logits) + step for a in alone]
        own = torch.cat([a.sequences[:, w] for a, w in zip(alone, words, strict=True)])
        if not torch.equal(own, found.sequences[:, words[0]]):
            return  # two words as likely as each other; what follows is of other texts


def _error(patched: Patched, reason: str) -> probe.PatchError:
    return probe.PatchError(
        f"{type(patched.model).__name__} does not continue texts with per-task parameters of "
        f"{patched.spec!r}{reason}; adapt other parameters, for example with LoRA, or call the "
        "patched model on whole texts"
    )
