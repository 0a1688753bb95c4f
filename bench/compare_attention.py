"""Compare attention with plain softmax math and torch's fused attention, interleaved.

    python -m bench.compare_attention [--device cuda] [--rounds 15] [--out results.json]

Cases take operands as projections give them, heads within rows. The limit of a case is the
operations of its matrix products over their rate: 2 in the forward pass, 5 in the gradient and 12
in the derivative of that. torch's fused attention has no second derivative.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from bench.comparison import Case, run
from bench.timing import Way


def operands(batch: int, heads: int, rows: int, width: int, device: str, count: int):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, rows, heads, width)
    made = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [t.to(device).transpose(1, 2).requires_grad_() for t in made]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What patched models ran before there was an operator."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, float("-inf"))
    return torch.matmul(torch._safe_softmax(scores, -1), v)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def ways(batch: int, heads: int, rows: int, width: int, device: str, order: int) -> dict[str, Way]:
    q, k, v, upstream, *cotangents = operands(batch, heads, rows, width, device, 7)
    cotangents = [t.detach() for t in cotangents]
    mask = torch.ones(batch, 1, 1, rows, dtype=torch.bool, device=device)
    mask[1::2, ..., -rows // 4 :] = False  # a quarter of every second row is padding

    def derivatives(attend) -> Way:
        def forward():
            with torch.no_grad():
                return attend(q, k, v, mask)

        def way():
            out = attend(q, k, v, mask)
            first = torch.autograd.grad(out, (q, k, v), upstream, create_graph=order == 2)
            if order == 2:
                return torch.autograd.grad(first, (upstream, q, k, v), cotangents)
            return first

        return way if order else forward

    found = {
        "fastmeta": derivatives(fm.ops.attention),
        "plain softmax math": derivatives(plain),
    }
    if order < 2:
        found["scaled_dot_product_attention"] = derivatives(fused)
    return found


SHAPES = (  # B, H, L, D
    (800, 12, 32, 32),
    (160, 2, 16, 64),
    (200, 12, 24, 32),
    (16, 12, 128, 64),
    (2, 4, 512, 64),
    (1, 2, 2048, 64),
)
ORDERS = ("forward", "forward + backward", "forward + backward + double backward")


def cases(device: str) -> dict[str, Case]:
    found = {}
    for batch, heads, rows, width in SHAPES:
        product = 2 * batch * heads * rows * rows * width
        for order, title in enumerate(ORDERS):
            found[f"{title}, B={batch}, H={heads}, L={rows}, D={width}"] = Case(
                partial(ways, batch, heads, rows, width, device, order),
                flops=product * (2, 7, 19)[order],
                memory=order == 2,
            )
    return found


if __name__ == "__main__":
    run("bench.compare_attention", __doc__, cases)
