"""The operator table: one row per operator, from which tests and benchmarks are generated.

A row says how to call the operator and which inputs are worth trying. The reference of an operator
is the operator itself under ``use_impl("reference")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta import ops


@dataclass(frozen=True)
class Sample:
    """Inputs of one call.

    Attributes:
        id: readable name.
        tensors: the differentiable inputs.
        call: ``call(*tensors)`` runs the operator with everything else bound.
    """

    id: str
    tensors: tuple[Tensor, ...]
    call: Callable[..., Tensor]


@dataclass(frozen=True)
class OpRow:
    """One operator.

    Attributes:
        name: public name, ``fm.ops.<name>``.
        raw: the dispatcher's operators behind it.
        dtypes: (parameters, gradients) pairs it accepts.
        samples: ``samples(dtypes, device)``: odd, empty, large, strided and expanded inputs.
        small: float64 inputs of a few elements, for finite differences.
    """

    name: str
    raw: tuple[str, ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    samples: Callable[..., Iterator[Sample]]
    small: Callable[[], Iterator[Sample]]


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
RULES = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "max": {"maximize": True, "weight_decay": 0.1},
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


def sgd_sample(
    form: str,
    tasks: int,
    size: int,
    *,
    rule: str = "plain",
    dtypes: tuple[torch.dtype, torch.dtype] = UPDATE_DTYPES[1],
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    frozen: str = "",
    seed: int = 0,
) -> Sample:
    """A call of ``sgd_update``. ``layout`` is a name of :func:`strided`, or ``expanded`` for one
    row of parameters shared by all tasks; ``frozen`` freezes every second task, with ``"nan"`` as
    gradients that must reach nothing."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params, grads = random(tasks, size), random(tasks, size)
    kwargs = dict(RULES[rule])
    if frozen:
        kwargs["active"] = torch.arange(tasks, device=device) % 2 == 0
    if frozen == "nan":
        grads[1::2, ::2], grads[1::2, 1::2] = float("nan"), float("inf")
    params, grads = params.to(device, dtypes[0]), grads.to(device, dtypes[1])
    if layout == "expanded":
        params = params[:1].expand(tasks, size)
        grads = strided(grads, "transposed")
    else:
        params, grads = strided(params, layout), strided(grads, layout)
    tensors = [params, grads]
    shape = RATE_FORMS[form](tasks, size, 5)
    if "S" in form:
        kwargs["segments"] = segments_of(size, generator).to(device)
    if shape is None:
        kwargs["lr"] = 0.05
    else:
        rate_dtype = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        rate = random(*shape).abs().to(device, rate_dtype)
        tensors.append(rate)
    name = "-".join(filter(None, [form, f"{tasks}x{size}", rule, layout, frozen]))

    def call(*given: Tensor, op: Callable[..., Tensor] = ops.sgd_update) -> Tensor:
        return op(*given, **kwargs)

    return Sample(name, tuple(tensors), call)


def sgd_samples(
    dtypes: tuple[torch.dtype, torch.dtype], device: str | torch.device = "cpu"
) -> Iterator[Sample]:
    """Every rate form on every kind of shape, memory layout and rule, each at least once."""
    common = {"dtypes": dtypes, "device": device}
    rules, layouts = list(RULES), ["contiguous", "expanded", "transposed", "offset", "strided"]
    for i, form in enumerate(RATE_FORMS):
        for j, (tasks, size) in enumerate([(1, 1), (3, 7), (5, 64), (0, 4), (4, 0), (40, 3)]):
            if form in ("T", "P") and tasks == size > 1:
                continue
            rule, layout = rules[(i + j) % 3], layouts[(i + j) % 5]
            yield sgd_sample(form, tasks, size, rule=rule, layout=layout, **common)
        # several tiles of every kernel, of a width that packs of 16 bytes divide or not
        yield sgd_sample(form, 3, 17008, rule=rules[i % 3], frozen="mask", **common)
        yield sgd_sample(form, 2, 17001, rule=rules[(i + 1) % 3], layout="expanded", **common)
        yield sgd_sample(form, 4, 9, rule=rules[(i + 2) % 3], frozen="nan", **common)


def sgd_small() -> Iterator[Sample]:
    """A few elements in float64, for finite differences."""
    for i, form in enumerate(RATE_FORMS):
        for j, rule in enumerate(RULES):
            yield sgd_sample(form, 3, 5, rule=rule, frozen="mask" if (i + j) % 2 else "")


TABLE = (
    OpRow(
        name="sgd_update",
        raw=("sgd_update", "sgd_update_", "sgd_update_backward"),
        dtypes=UPDATE_DTYPES,
        samples=sgd_samples,
        small=sgd_small,
    ),
)
