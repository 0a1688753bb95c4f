"""The operator table: one row per operator, from which tests and benchmarks are generated.

A row says how to call the operator and which inputs are worth trying. The reference of an operator
is the operator itself under ``use_impl("reference")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta import ops
from fastmeta._dtypes import wide_dtype
from fastmeta.testing import (
    attention,
    batched_linear,
    coordinate_lstm,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    pairwise,
    rows,
)
from fastmeta.testing.table import OpRow, Sample

UPDATE_DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)

# forms of the learning rate: its shape from T, P, S (None: a number), and whether it is by segment
RATE_FORMS: dict[str, Callable[[int, int, int], tuple[int, ...] | None]] = {
    "number": lambda t, p, s: None,
    "scalar": lambda t, p, s: (),
    "T": lambda t, p, s: (t,),
    "P": lambda t, p, s: (p,),
    "TP": lambda t, p, s: (t, p),
    "T1": lambda t, p, s: (t, 1),
    "1P": lambda t, p, s: (1, p),
    "S": lambda t, p, s: (s,),
    "TS": lambda t, p, s: (t, s),
}


@dataclass(frozen=True)
class Update:
    """An inner update as the table calls it.

    Attributes:
        name: ``<name>_update``.
        states: which state tensors it takes; ``"square"`` for one that is never negative.
        step: whether it takes the number of the step.
        variants: keyword arguments worth trying. A list ``[low, high]`` stands for a learned number
            in that range (a scalar tensor, or one per task for ``[low, high, "T"]``).
    """

    name: str
    states: tuple[str, ...]
    step: bool
    variants: dict[str, dict[str, Any]]


def _variants(**own: list) -> dict[str, dict[str, Any]]:
    """The variants of every rule; `own` are its own hyperparameters as ranges."""
    middle = {name: (low + high) / 2 for name, (low, high, *_) in own.items()}
    small = {"eps": 0.05} if "eps" in own else {}
    return {
        "plain": dict(small),
        "decay": {"weight_decay": 0.3, **middle},
        "max": {"maximize": True, "weight_decay": 0.1, "grad_scale": 0.7, **small},
        "learned": {"weight_decay": [0.1, 0.5, "T"], "grad_scale": [0.5, 1.0, "T"], **own},
    }


_BETAS = {"beta1": [0.5, 0.9], "beta2": [0.6, 0.95, "T"], "eps": [0.05, 0.2]}
UPDATES = {
    update.name: update
    for update in (
        Update("sgd", (), False, _variants()),
        Update(
            "momentum",
            ("any",),
            False,
            {
                **_variants(momentum=[0.5, 0.9], dampening=[0.1, 0.4, "T"]),
                "nesterov": {"nesterov": True, "weight_decay": [0.1, 0.5], "momentum": [0.5, 0.9]},
                "first": {"first": True, "dampening": 0.3, "momentum": [0.5, 0.9]},
                "first-nesterov": {"first": True, "nesterov": True, "momentum": [0.5, 0.9]},
            },
        ),
        Update("adam", ("any", "square"), True, _variants(**_BETAS)),
        Update("adamw", ("any", "square"), True, _variants(**_BETAS)),
        Update("rmsprop", ("square",), False, _variants(alpha=[0.5, 0.9], eps=[0.05, 0.2, "T"])),
        Update("adagrad", ("square",), True, _variants(lr_decay=[0.1, 0.5], eps=[0.05, 0.2, "T"])),
    )
}


def segments_of(size: int, generator: torch.Generator, count: int = 5) -> Tensor:
    """int64 ``[count + 1]`` rising from 0 to ``size``; one segment is empty."""
    cuts = torch.randint(0, size + 1, (count - 2,), generator=generator).tolist()
    middle = sorted([*cuts, cuts[0]])
    return torch.tensor([0, *middle, size])


def strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` [T, P] in another memory layout."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "offset":  # rows that start one element off a 16-byte boundary
        wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if layout == "strided":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x


def update_sample(
    name: str,
    form: str,
    tasks: int,
    size: int,
    *,
    variant: str = "plain",
    dtypes: tuple[torch.dtype, torch.dtype] = UPDATE_DTYPES[1],
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    frozen: str = "",
    seed: int = 0,
) -> Sample:
    """A call of ``<name>_update``. ``layout`` is a name of :func:`strided`, or ``expanded`` for one
    row of parameters shared by all tasks; ``frozen`` freezes every second task, with ``"nan"`` as
    gradients that must reach nothing."""
    update = UPDATES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = dict(update.variants[variant])
    first = options.pop("first", False)
    params, grads = random(tasks, size), random(tasks, size)
    state = [random(tasks, size) for _ in update.states]
    state = [s.square() + 0.1 if k == "square" else s for s, k in zip(state, update.states)]  # noqa: B905
    if frozen:
        options["active"] = torch.arange(tasks, device=device) % 2 == 0
    if frozen == "nan":
        grads[1::2, ::2], grads[1::2, 1::2] = float("nan"), float("inf")
    if layout == "expanded":
        params = params[:1].expand(tasks, size)
        grads, state = strided(grads, "transposed"), [strided(s, "offset") for s in state]
    else:
        params, grads, *state = (strided(x, layout) for x in (params, grads, *state))
    number_dtype = wide_dtype(dtypes[0])
    tensors = [params.to(device, dtypes[0]), grads.to(device, dtypes[1])]
    states = 0 if first else len(state)
    tensors += [s.to(device, dtypes[0]) for s in state[:states]]
    shape = RATE_FORMS[form](tasks, size, 5)
    if "S" in form:
        options["segments"] = segments_of(size, generator).to(device)
    if shape is not None:
        tensors.append(random(*shape).abs().to(device, number_dtype))
    learned = [key for key, value in options.items() if isinstance(value, list)]
    for key in learned:
        low, high, *per_task = options.pop(key)
        shape_of = (tasks,) if per_task else ()
        uniform = torch.rand(shape_of, generator=generator, dtype=torch.float64)
        tensors.append((low + (high - low) * uniform).to(device, number_dtype))

    def call(*given: Tensor, op: Callable[..., Any] | None = None, **more: Any) -> Any:
        given = list(given)
        arguments = [*given[: 2 + states], *[None] * (len(update.states) - states)]
        rest = given[2 + states :]
        if update.step:
            arguments.append(3)
        arguments.append(0.05 if RATE_FORMS[form](tasks, size, 5) is None else rest.pop(0))
        keywords = {**options, **dict(zip(learned, rest, strict=True)), **more}
        if "beta1" in keywords:
            keywords["betas"] = (keywords.pop("beta1"), keywords.pop("beta2"))
        return (op or getattr(ops, f"{name}_update"))(*arguments, **keywords)

    label = "-".join(filter(None, [form, f"{tasks}x{size}", variant, layout, frozen]))
    return Sample(label, tuple(tensors), call)


def update_samples(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], device: str | torch.device = "cpu"
) -> Iterator[Sample]:
    """Every rate form on every kind of shape, memory layout and variant, each at least once."""
    common = {"dtypes": dtypes, "device": device}
    variants = list(UPDATES[name].variants)
    layouts = ["contiguous", "expanded", "transposed", "offset", "strided"]
    for i, form in enumerate(RATE_FORMS):
        for j, (tasks, size) in enumerate([(1, 1), (3, 7), (5, 64), (0, 4), (4, 0), (40, 3)]):
            if form in ("T", "P") and tasks == size > 1:
                continue
            chosen = {"variant": variants[(i + j) % len(variants)], "layout": layouts[(i + j) % 5]}
            yield update_sample(name, form, tasks, size, **chosen, **common)
        # several tiles of every kernel, of a width that packs of 16 bytes divide or not
        large = ((3, 17008, "contiguous", "mask"), (2, 17001, "expanded", ""))[i % 2]
        for k, (tasks, size, layout, frozen) in enumerate((large, (4, 9, "", "nan"))):
            chosen = {"variant": variants[(i + k) % len(variants)], "layout": layout}
            yield update_sample(name, form, tasks, size, frozen=frozen, **chosen, **common)


def update_small(name: str, device: str | torch.device = "cpu") -> Iterator[Sample]:
    """A few elements in float64, for finite differences: every rate form, every variant."""
    variants = list(UPDATES[name].variants)
    for i, form in enumerate(RATE_FORMS):
        frozen = "mask" if i % 2 else ""
        variant = variants[i % len(variants)]
        yield update_sample(name, form, 3, 4, variant=variant, frozen=frozen, device=device)


UPDATE_TABLE = tuple(
    OpRow(
        name=f"{name}_update",
        raw=tuple(f"{name}_update{end}" for end in ("", "_", "_backward", "_double_backward")),
        dtypes=UPDATE_DTYPES,
        samples=partial(update_samples, name),
        small=partial(update_small, name),
    )
    for name in UPDATES
)
TABLE = (
    *UPDATE_TABLE,
    *pairwise.TABLE,
    *lora_linear.TABLE,
    *attention.TABLE,
    *batched_linear.TABLE,
    *coordinate_lstm.TABLE,
    *cross_entropy.TABLE,
    *layer_norm.TABLE,
    *linear_cross_entropy.TABLE,
    *rows.TABLE,
)
