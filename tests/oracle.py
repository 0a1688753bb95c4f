"""The oracle of the library: the user's own model, one task after another, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from fastmeta.engine.by_leaf import unroll_by_leaf
from fastmeta.engine.inner import InnerLoop, Support
from fastmeta.engine.optimizers import SGD
from fastmeta.engine.rates import Rates
from fastmeta.patching import Patched, TaskParams
from fastmeta.testing.float64 import keep_float64

Loss = Callable[[Tensor], Tensor]


@dataclass
class Result:
    """Outputs, first inner gradients and meta-gradients of one comparison."""

    outputs: list[Tensor]
    inner: list[dict[str, Tensor]]
    meta: dict[str, Tensor]


def scalar_loss(logits: Tensor) -> Tensor:
    """A smooth loss of logits ``[N, ...]`` in which every entry has a weight of its own."""
    flat = logits.flatten(1)
    weight = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return ((flat.sin() * weight).mean(1) * torch.arange(1, len(flat) + 1)).sum()


def by_loop(
    patched: Patched,
    support: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    *,
    steps: int = 2,
    lr: float = 0.1,
    order: int = 2,
) -> Result:
    """Adapt each task on its own with `functional_call`, differentiating through the steps."""
    initial = dict(zip(patched.layout.names, patched.slots.initial, strict=True))
    outputs, inner, losses = [], [], []
    with keep_float64(), sdpa_kernel(SDPBackend.MATH):
        for t in range(next(iter(support.values())).shape[0]):
            fast: dict[str, Tensor] = {n: p.clone() for n, p in initial.items()}
            for k in range(steps):
                loss = scalar_loss(_logits(patched, fast, {n: v[t] for n, v in support.items()}))
                names = list(fast)
                grads = torch.autograd.grad(
                    loss, [fast[n] for n in names], create_graph=order == 2, allow_unused=True
                )
                found = {
                    n: torch.zeros_like(fast[n]) if g is None else g
                    for n, g in zip(names, grads, strict=True)
                }
                if k == 0:
                    inner.append({n: g.detach() for n, g in found.items()})
                fast = {n: fast[n] - lr * found[n] for n in names}
            logits = _logits(patched, fast, {n: v[t] for n, v in query.items()})
            outputs.append(logits.detach())
            losses.append(scalar_loss(logits))
        meta = _meta_gradients(patched, torch.stack(losses).mean())
    return Result(outputs, inner, meta)


def by_batch(
    patched: Patched,
    support: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    *,
    steps: int = 2,
    lr: float = 0.1,
    order: int = 2,
) -> Result:
    """The same through the patched model, all tasks at once."""
    inner: list[dict[str, Tensor]] = []
    with keep_float64():
        params = patched.init(next(iter(support.values())).shape[0])
        for k in range(steps):
            logits = patched(params, **support).logits
            loss = torch.stack([scalar_loss(task) for task in logits]).sum()
            (grad,) = torch.autograd.grad(loss, params.packed, create_graph=order == 2)
            if k == 0:
                grads = TaskParams(patched.layout, grad.detach())
                inner = [grads.task(t) for t in range(params.num_tasks)]
            params = TaskParams(patched.layout, params.packed - lr * grad)
        logits = patched(params, **query).logits
        meta = _meta_gradients(patched, torch.stack([scalar_loss(t) for t in logits]).mean())
    return Result(list(logits.detach()), inner, meta)


def by_leaf(
    patched: Patched,
    support: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    *,
    steps: int = 2,
    lr: float = 0.1,
) -> Result | None:
    """The same by the engine's loop for plain SGD; without the inner gradients, which it never
    makes. None where it leaves the model to the general loop."""

    def losses(outputs, batch) -> Tensor:
        return torch.stack([scalar_loss(task) for task in outputs.logits])

    tasks = next(iter(support.values())).shape[0]
    rates = Rates(lr, patched.layout, steps, patched.slots.initial[0])
    loop = InnerLoop(patched, SGD(), rates, steps, losses, second_order=steps)
    with keep_float64():
        trajectory = unroll_by_leaf(loop, patched.initial(tasks), Support(support))
        if trajectory is None:
            return None
        logits = patched(trajectory.params, **query).logits
        meta = _meta_gradients(patched, torch.stack([scalar_loss(t) for t in logits]).mean())
    return Result(list(logits.detach()), [], meta)


def assert_same(actual: Result, expected: Result, rtol: float = 1e-9) -> None:
    """Everything agrees to `rtol` of each tensor's scale (and of a thousandth of the largest)."""
    for t, (got, want) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        _compare({f"output of task {t}": got}, {f"output of task {t}": want}, rtol)
    for got, want in zip(actual.inner, expected.inner, strict=bool(actual.inner)):
        _compare(got, want, rtol)
    _compare(actual.meta, expected.meta, rtol)
    assert max(float(g.abs().max()) for g in expected.meta.values()) > 1e-6


def _compare(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(want.abs().max()) for want in expected.values())
    for name, want in expected.items():
        scale = max(float(want.abs().max()), 1e-3 * largest)
        error = float((actual[name] - want).abs().max())
        assert error <= rtol * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"


def _logits(patched: Patched, fast: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    model = patched.model
    replaced: dict[str, Tensor] = {}
    for name, tensor in fast.items():
        if ".lora_" not in name:
            replaced[name] = tensor
    for name, b in fast.items():
        if not name.endswith(".lora_B"):
            continue
        module_name = name.removesuffix(".lora_B")
        delta = b @ fast[module_name + ".lora_A"]
        if isinstance(model.get_submodule(module_name), Conv1D):
            delta = delta.t()
        weight = module_name + ".weight"
        scale = patched.slots.owners[module_name].lora_scale
        replaced[weight] = replaced.get(weight, model.get_parameter(weight)) + scale * delta
    return torch.func.functional_call(model, replaced, (), dict(inputs)).logits


def _meta_gradients(patched: Patched, loss: Tensor) -> dict[str, Tensor]:
    named = dict(patched.named_parameters())
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    for parameter in named.values():
        parameter.grad = None
    return found


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that patching must leave alone."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "pointers": {k: v.data_ptr() for k, v in model.state_dict().items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: p.grad is None for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "config": repr(getattr(model, "config", None)),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }
