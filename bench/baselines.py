"""The same second-order meta-step in other people's way, one function each.

Every function returns the mean query loss and leaves the meta-gradient in ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from bench.cases import LR


def inputs_of(task_set: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
    """One task's, no wider than its longest text."""
    width = int(task_set["attention_mask"][t].sum(-1).max())
    return {k: v[t, :, :width] for k, v in task_set.items() if k != "labels"}


def per_task_loop(model: nn.Module, names: list[str], batch: fm.TaskBatch, steps: int) -> float:
    """`functional_call` + ``create_graph`` for one task after another."""
    parameters = dict(model.named_parameters())
    total = 0.0
    for t in range(batch.num_tasks):
        fast = {n: parameters[n] for n in names}
        for _ in range(steps):
            out = torch.func.functional_call(model, fast, kwargs=inputs_of(batch.support, t))
            loss = F.cross_entropy(out.logits, batch.support["labels"][t])
            grads = torch.autograd.grad(
                loss, list(fast.values()), create_graph=True, allow_unused=True
            )
            fast = {
                n: p if g is None else p - LR * g
                for (n, p), g in zip(fast.items(), grads, strict=True)
            }
        out = torch.func.functional_call(model, fast, kwargs=inputs_of(batch.query, t))
        loss = F.cross_entropy(out.logits, batch.query["labels"][t]) / batch.num_tasks
        loss.backward()
        total += loss.item()
    return total


def vmap(model: nn.Module, names: list[str], batch: fm.TaskBatch, steps: int) -> float:
    """`torch.func.vmap` over tasks of a functional episode.

    2-D masks fail under vmap, so the masks are additive and 4-D.
    """
    parameters = dict(model.named_parameters())

    def loss_of(fast, ids, mask, labels):
        out = torch.func.functional_call(
            model, fast, kwargs={"input_ids": ids, "attention_mask": mask}
        )
        return F.cross_entropy(out.logits, labels)

    def episode(fast, support, query):
        for _ in range(steps):
            grads = torch.func.grad(loss_of)(fast, *support)
            fast = {n: p - LR * grads[n] for n, p in fast.items()}
        return loss_of(fast, *query)

    def additive(task_set):
        mask = task_set["attention_mask"].float()[:, :, None, None, :]
        mask = ((1 - mask) * torch.finfo(torch.float32).min).expand(-1, -1, -1, mask.shape[-1], -1)
        return task_set["input_ids"], mask, task_set["labels"]

    def mean_loss(fast):
        losses = torch.func.vmap(episode, in_dims=(None, 0, 0))(
            fast, additive(batch.support), additive(batch.query)
        )
        return losses.mean()

    leaves = {n: parameters[n] for n in names}
    loss = mean_loss(leaves)
    loss.backward()
    return loss.item()


def higher(model: nn.Module, names: list[str], batch: fm.TaskBatch, steps: int) -> float:
    """facebookresearch/higher: one `innerloop_ctx` per task."""
    import higher as library

    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([parameters[n] for n in names], lr=LR)
    total = 0.0
    for t in range(batch.num_tasks):
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (net, inner):
            for _ in range(steps):
                out = net(**inputs_of(batch.support, t))
                inner.step(F.cross_entropy(out.logits, batch.support["labels"][t]))
            out = net(**inputs_of(batch.query, t))
            loss = F.cross_entropy(out.logits, batch.query["labels"][t]) / batch.num_tasks
            loss.backward()
            total += loss.item()
    return total


def torchopt(model: nn.Module, names: list[str], batch: fm.TaskBatch, steps: int) -> float:
    """metaopt/torchopt: `MetaSGD` on the module, its state restored after every task."""
    import torchopt as library

    inner = library.MetaSGD(model, lr=LR)
    start = library.extract_state_dict(model, by="reference", detach_buffers=True)
    start_inner = library.extract_state_dict(inner, by="reference", detach_buffers=True)
    total = 0.0
    for t in range(batch.num_tasks):
        for _ in range(steps):
            out = model(**inputs_of(batch.support, t))
            inner.step(F.cross_entropy(out.logits, batch.support["labels"][t]))
        out = model(**inputs_of(batch.query, t))
        loss = F.cross_entropy(out.logits, batch.query["labels"][t]) / batch.num_tasks
        loss.backward()
        total += loss.item()
        library.recover_state_dict(model, start)
        library.recover_state_dict(inner, start_inner)
    return total


class LoRALinear(nn.Module):
    """A linear layer with a low-rank term, as adapter libraries wrap it."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return self.base(x) + self.scale * low


def with_lora(model: nn.Module, patched: fm.Patched) -> list[str]:
    """Wrap the model's linear layers with the patched model's LoRA values; adapted names."""
    values = dict(patched.named_parameters())
    for name, adapted in patched.slots.owners.items():
        if "lora_A" in adapted.slots:
            parent, _, child = name.rpartition(".")
            wrapped = LoRALinear(
                model.get_submodule(name),
                values[f"{name}.lora_A"].detach(),
                values[f"{name}.lora_B"].detach(),
                adapted.lora_scale,
            )
            setattr(model.get_submodule(parent), child, wrapped)
    return list(patched.layout.names)


BASELINES: dict[str, Callable[[nn.Module, list[str], fm.TaskBatch, int], float]] = {
    "per-task loop": per_task_loop,
    "torch.func.vmap": vmap,
    "higher": higher,
    "torchopt": torchopt,
}


def math_attention():
    """The only attention of torch that differentiates twice; peers need it selected by hand."""
    return sdpa_kernel(SDPBackend.MATH)
