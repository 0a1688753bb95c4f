"""Compare the fused updates with torch's optimizers, torchopt and eager code, interleaved.

    python -m bench.compare_updates [--device cuda] [--rounds 15] [--out results.json]

Every row names its physical limit: the bytes that must move over the bandwidth of a copy (which
reads what it overwrites; updates in place can be faster), or the operations that must be done over
the rate of a matrix product, both measured in the same process. torchopt takes part where it is
installed (``pip install fastmeta[bench]``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastmeta as fm
from bench import bench_head_inner_loop as head
from bench.comparison import Case, run
from bench.timing import Way

LR, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
MANY = (64, 76, 512)  # tasks, tensors, elements: the small tensors of a transformer
IN_PLACE, FUNCTIONAL = 28, 28  # bytes an element: read p g m v, write p m v
WITH_BACKWARD = 28 + 28  # backward: read g m v and one cotangent, write those of g m v


def rows(tasks: int, size: int, device: str, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(tasks, size, generator=generator).to(device) for _ in range(count)]
    return [*made[:3], made[3].abs()] if count == 4 else made


def torch_adam(tensors: list[Tensor], grads: list[Tensor], **settings) -> Way:
    """``torch.optim.Adam`` on parameters of its own."""
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    return torch.optim.Adam(params, lr=LR, betas=BETAS, eps=EPS, **settings).step


def no_grad(way: Way) -> Way:
    return torch.no_grad()(way)


def adam_in_place(size: int, device: str, tasks: int = 64) -> dict[str, Way]:
    p, g, m, v = rows(tasks, size, device)
    return {
        "fastmeta": no_grad(lambda: fm.ops.adam_update_(p, g, m, v, 5, LR)),
        "torch fused": torch_adam([p], [g], fused=True),
        "torch foreach": torch_adam([p], [g], foreach=True),
        "torch for-loop": torch_adam([p], [g], foreach=False),
    }


def adam_functional(size: int, device: str, tasks: int = 64) -> dict[str, Way]:
    p, g, m, v = rows(tasks, size, device)
    step = torch.tensor(5.0, device=device)

    def clone_and_fused():
        new = [t.clone() for t in (p, m, v)]
        torch._fused_adam_(
            [new[0]], [g], [new[1]], [new[2]], [], [step], lr=LR, beta1=BETAS[0], beta2=BETAS[1],
            weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False,
        )  # fmt: skip
        return new

    return {
        "fastmeta": no_grad(lambda: fm.ops.adam_update(p, g, m, v, 5, LR)),
        "clone + torch fused": no_grad(clone_and_fused),
        "eager functional": no_grad(lambda: eager_adam(p, g, m, v)),
    }


def adam_many_tensors(device: str) -> dict[str, Way]:
    tasks, tensors, size = MANY
    p, g, m, v = rows(tasks, tensors * size, device)
    lists = [[x.clone() for x in t.view(-1, size)] for t in (p, g, m, v)]
    by_task = [
        torch_adam(lists[0][i : i + tensors], lists[1][i : i + tensors])
        for i in range(0, tasks * tensors, tensors)
    ]

    def loop():
        for step in by_task:
            step()

    return {
        "fastmeta": no_grad(lambda: fm.ops.adam_update_(p, g, m, v, 5, LR)),
        "fastmeta, lists of tensors": no_grad(lambda: fm.ops.adam_update_(*lists, 5, LR)),
        "torch fused": torch_adam(*lists[:2], fused=True),
        "torch foreach": torch_adam(*lists[:2], foreach=True),
        "per-task loop": loop,
    }


def eager_adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int = 5) -> tuple[Tensor, ...]:
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g * g
    scale = LR / (1 - BETAS[0] ** step)
    return p - scale * m / (v.sqrt() / (1 - BETAS[1] ** step) ** 0.5 + EPS), m, v


def foreach_adam(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], step: int = 5):
    """The same on lists by torch._foreach functions, which autograd can follow."""
    m = torch._foreach_add(torch._foreach_mul(m, BETAS[0]), g, alpha=1 - BETAS[0])
    square = torch._foreach_mul(g, g)
    v = torch._foreach_add(torch._foreach_mul(v, BETAS[1]), square, alpha=1 - BETAS[1])
    root = torch._foreach_div(torch._foreach_sqrt(v), (1 - BETAS[1] ** step) ** 0.5)
    moved = torch._foreach_div(m, torch._foreach_add(root, EPS))
    return torch._foreach_add(p, moved, alpha=-LR / (1 - BETAS[0] ** step)), m, v


def with_backward(update: Callable, tensors: list[Tensor]) -> Way:
    """``update(*tensors)`` and the gradients of the new parameters in all of them."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    upstream = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(update(*leaves)[0], leaves, upstream)


def torchopt_adam(params: list[list[Tensor]], grads: list[list[Tensor]]) -> Way | None:
    """One differentiable step per task from its initial state; gradients in params and grads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchopt
    except ImportError:
        return None
    p = [[t.detach().clone().requires_grad_() for t in task] for task in params]
    g = [[t.detach().clone().requires_grad_() for t in task] for task in grads]
    optimizer = torchopt.adam(lr=LR, moment_requires_grad=True)
    upstream = [torch.randn_like(t) for task in p for t in task]

    def step():
        new = []
        for task_p, task_g in zip(p, g, strict=True):
            state = optimizer.init(tuple(task_p))
            updates, _ = optimizer.update(tuple(task_g), state, params=tuple(task_p), inplace=False)
            new += torchopt.apply_updates(tuple(task_p), updates, inplace=False)
        leaves = [t for group in (p, g) for task in group for t in task]
        return torch.autograd.grad(new, leaves, upstream)

    return step


def differentiable(size: int, device: str, tasks: int = 64) -> dict[str, Way]:
    tensors = rows(tasks, size, device)
    ways = {
        "fastmeta": with_backward(lambda *x: fm.ops.adam_update(*x, 5, LR), tensors),
        "eager functional": with_backward(eager_adam, tensors),
    }
    p, g, m, v = ([x.detach().requires_grad_()] for x in tensors)
    upstream = [torch.randn_like(p[0])]
    ways["torch._foreach"] = lambda: torch.autograd.grad(
        foreach_adam(p, g, m, v)[0], [*p, *g, *m, *v], upstream
    )
    ways["torchopt"] = torchopt_adam([[tensors[0]]], [[tensors[1]]])
    return {k: w for k, w in ways.items() if w is not None}


def differentiable_many(device: str) -> dict[str, Way]:
    tasks, tensors, size = MANY
    packed = rows(tasks, tensors * size, device)
    split = [[x.clone() for x in t.view(-1, size)] for t in packed]
    leaves = [[x.requires_grad_() for x in group] for group in split]
    upstream = [torch.randn_like(x) for x in leaves[0]]
    everything = [x for group in leaves for x in group]

    def eager():
        new = [eager_adam(*x)[0] for x in zip(*leaves, strict=True)]
        return torch.autograd.grad(new, everything, upstream)

    def foreach():
        return torch.autograd.grad(foreach_adam(*leaves)[0], everything, upstream)

    batched = [t.view(tasks, tensors, size).transpose(0, 1) for t in packed[:2]]
    params, grads = ([x.clone().requires_grad_() for x in t] for t in batched)
    up = [torch.randn_like(x) for x in params]
    optimizer = fm.optim.Adam(lr=LR)

    def optim():
        fast = optimizer.step(optimizer.init(params, batched=True), grads)
        return torch.autograd.grad(fast.params, [*params, *grads], up)

    by_task = [[group[i : i + tensors] for i in range(0, len(group), tensors)] for group in split]
    ways = {
        "fastmeta": with_backward(lambda *x: fm.ops.adam_update(*x, 5, LR), packed),
        "fm.optim, 76 tensors [64, 512]": optim,
        "eager functional": eager,
        "torch._foreach": foreach,
        "torchopt": torchopt_adam(*by_task[:2]),
    }
    return {k: w for k, w in ways.items() if w is not None}


def cases(device: str) -> dict[str, Case]:
    large = 1_100_000 if device == "cuda" else 262_144
    many = MANY[0] * MANY[1] * MANY[2]
    found = {}
    for size in (large, 2_000, 30_000):
        found[f"Adam in place, 64 x {size:,}"] = Case(
            partial(adam_in_place, size, device), bytes=IN_PLACE * 64 * size
        )
    found[f"Adam functional, 64 x {large:,}"] = Case(
        partial(adam_functional, large, device), bytes=FUNCTIONAL * 64 * large
    )
    found["Adam in place, 64 tasks x 76 tensors of 512"] = Case(
        partial(adam_many_tensors, device), bytes=IN_PLACE * many
    )
    title = "Adam differentiable, forward + backward, 64"
    found[f"{title} x 100,000"] = Case(
        partial(differentiable, 100_000, device), bytes=WITH_BACKWARD * 6_400_000
    )
    found[f"{title} tasks x 76 tensors of 512"] = Case(
        partial(differentiable_many, device), bytes=WITH_BACKWARD * many
    )
    for name in head.CASES:
        found[f"head_inner_loop, forward + backward, {head.title(name)}"] = Case(
            partial(head.ways, name, device), flops=head.floor_flops(name)
        )
    return found


if __name__ == "__main__":
    run("bench.compare_updates", __doc__, cases)
