"""Compare lora_linear with the bare shared products, batched products and torch.func.vmap.

    python -m bench.compare_lora [--device cuda] [--rounds 15] [--out results.json]

Forward and backward with a frozen weight, all ways interleaved; the limit of every row is that of
its shared matrix products (for y and dx) at the best rate of this machine. The second-order rows
differentiate a function of the gradients once more; their limit has one product more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import fastmeta as fm
from bench.bench_lora_linear import CASES, WAYS, bare, floor_flops, step, tensors
from bench.comparison import Case, run
from bench.timing import Way


def first_order(case: str, device: str) -> dict[str, Way]:
    ways: dict[str, Way] = {way: step(way, case, device) for way in WAYS}
    return {"fastmeta": ways.pop("fastmeta"), "bare shared products": bare(case, device), **ways}


def second_order(case: str, device: str) -> dict[str, Way]:
    x, weight, bias, a, b, upstream = tensors(case, device)
    upstream.requires_grad_()

    def both(layer: Callable) -> Way:
        def call():
            y = layer(x, weight, bias, a, b)
            first = torch.autograd.grad(y, (x, a, b), upstream, create_graph=True)
            return torch.autograd.grad(first, (x, a, b, upstream), [f.detach() for f in first])

        return call

    return {way: both(layer) for way, layer in WAYS.items()}


def few_bits(case: str, device: str) -> dict[str, Way]:
    x, weight, bias, a, b, upstream = tensors(case, device)
    ways = {}
    for label, bits in (("8 bits", 8), ("4 bits", 4), ("32 bits", 0)):
        held = fm.ops.QuantizedWeight.quantize(weight, bits) if bits else weight

        def call(held=held):
            y = fm.ops.lora_linear(x, held, bias, a, b, 2.0)
            return torch.autograd.grad(y, (x, a, b), upstream)

        ways[label] = call
    return ways


def cases(device: str) -> dict[str, Case]:
    found = {}
    for case, (tasks, rows, width, outputs, rank) in CASES.items():
        size = f"{case}: T={tasks}, {rows} rows, {width} -> {outputs}, r={rank}"
        flops = floor_flops(case)
        found[f"{size}, forward + backward"] = Case(partial(first_order, case, device), flops=flops)
        if "token" in case:
            found[f"{size}, second order"] = Case(
                partial(second_order, case, device), flops=3 * flops // 2
            )
    case = "d=1024, r=16"
    found[f"{case}, weights of few bits, forward + backward"] = Case(
        partial(few_bits, case, device), flops=floor_flops(case)
    )
    return found


if __name__ == "__main__":
    run("bench.compare_lora", __doc__, cases)
