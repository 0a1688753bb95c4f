"""Compare distances, prototypical loss and nearest rows with torch and scikit-learn, interleaved.

    python -m bench.compare_pairwise [--device cuda] [--rounds 15] [--out results.json]

Every row names its physical limit: the bytes that must move over the bandwidth of a copy, or the
operations of its matrix products over their rate, both measured in the same process. scikit-learn
takes part where it is installed.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from bench.comparison import Case, run
from bench.timing import Way


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def episodes(tasks: int, rows: int, classes: int, width: int, shots: int, device: str):
    """The prototypical loss of few classes, forward and backward."""
    query = random(tasks, rows, width, device=device).requires_grad_()
    support = random(tasks, classes * shots, width, device=device, seed=1).requires_grad_()
    labels = (torch.arange(rows, device=device) % classes).expand(tasks, rows).contiguous()
    of_support = torch.arange(classes, device=device).repeat_interleave(shots)
    of_support = of_support.expand(tasks, classes * shots).contiguous()

    def ours():
        given = (support, None) if shots == 1 else (support, of_support)
        loss, _ = fm.ops.prototypical_loss(query, labels, *given, num_classes=classes)
        return torch.autograd.grad(loss.mean(), (query, support))

    def eager():
        means = support.view(tasks, classes, shots, width).mean(2) if shots > 1 else support
        logits = -torch.cdist(query, means).square()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return torch.autograd.grad(loss, (query, support))

    return {"fastmeta": ours, "cdist^2 + cross_entropy": eager}


def many_classes(rows: int, classes: int, width: int, device: str) -> dict[str, Way]:
    """The prototypical loss of many classes, forward and backward."""
    query = random(1, rows, width, device=device).requires_grad_()
    means = random(1, classes, width, device=device, seed=1).requires_grad_()
    labels = (torch.arange(rows, device=device) % classes).unsqueeze(0)

    def ours():
        loss, _ = fm.ops.prototypical_loss(query, labels, means, None, temperature=100.0)
        return torch.autograd.grad(loss.sum(), (query, means))

    def eager():
        logits = -torch.cdist(query[0], means[0]).square() / 100
        return torch.autograd.grad(F.cross_entropy(logits, labels[0]), (query, means))

    return {"fastmeta": ours, "cdist^2 + cross_entropy": eager}


def nearest(rows: int, width: int, k: int, device: str) -> dict[str, Way]:
    x = random(rows, width, device=device)
    y = random(rows, width, device=device, seed=1)
    ways = {
        "fastmeta": lambda: fm.ops.nearest(x, y, k),
        "cdist + topk": lambda: torch.cdist(x, y).topk(k, largest=False),
    }
    if device == "cpu":
        ways |= scikit_learn(x.numpy(), y.numpy(), k)
    return ways


def scikit_learn(x, y, k: int) -> dict[str, Way]:
    try:
        from sklearn.metrics import pairwise_distances_argmin_min
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        return {}
    if k == 1:
        return {"scikit-learn argmin": lambda: pairwise_distances_argmin_min(x, y)}
    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y)
    return {"scikit-learn kneighbors": lambda: index.kneighbors(x)}


def cityblock(rows: int, width: int, device: str, *, backward: bool) -> dict[str, Way]:
    x = random(rows, width, device=device).requires_grad_(backward)
    y = random(rows, width, device=device, seed=1).requires_grad_(backward)
    ways = {
        "fastmeta": lambda: fm.ops.pairwise_distance(x, y, "cityblock"),
        "torch.cdist": lambda: torch.cdist(x, y, p=1.0),
    }
    if not backward:
        return ways
    upstream = random(rows, rows, device=device, seed=2)

    def gradient(way: Way) -> Way:
        distances = way()
        return lambda: torch.autograd.grad(distances, (x, y), upstream, retain_graph=True)

    return {label: gradient(way) for label, way in ways.items()}


def cases(device: str) -> dict[str, Case]:
    found = {}
    for width in (384, 1600):
        for shots in (1, 5):
            title = "from prototypes" if shots == 1 else "of 5 shots"
            # forward reads the query, backward reads it and writes its gradient (which a copy's
            # bandwidth counts once); the support is small beside it
            found[f"prototypical loss, forward + backward, T=64, N=75, M=5, D={width}, {title}"] = (
                Case(
                    partial(episodes, 64, 75, 5, width, shots, device),
                    bytes=4 * 64 * width * (3 * 75 + 3 * 5 * shots),
                )
            )
    big = (65536, 16384, 512) if device == "cuda" else (8192, 4096, 256)
    rows, classes, width = big
    found[f"prototypical loss, forward + backward, {rows} x {classes} x {width}"] = Case(
        partial(many_classes, *big, device), flops=3 * 2 * rows * classes * width, memory=True
    )
    for k in (1, 10):
        found[f"nearest, 16384 x 16384 x 128, k={k}"] = Case(
            partial(nearest, 16384, 128, k, device), flops=2 * 16384**2 * 128
        )
    # no matrix product: the limit is that of the bytes, which says little here
    found["cityblock, 2048 x 2048 x 256, forward"] = Case(
        partial(cityblock, 2048, 256, device, backward=False),
        bytes=4 * (2048 * 2048 + 2 * 2048 * 256),
    )
    found["cityblock, 2048 x 2048 x 256, backward"] = Case(
        partial(cityblock, 2048, 256, device, backward=True),
        bytes=4 * (2048 * 2048 + 4 * 2048 * 256),
        memory=True,
    )
    return found


if __name__ == "__main__":
    run("bench.compare_pairwise", __doc__, cases)
