"""The oracle of the metric learners: one unpadded task after another, in plain torch, float64.

Nothing here uses the library's learners: pooling, distances, prototypes, attention and the LSTMs
are written again, for one task at a time, through the user's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm

Task = oracle.Task
Features = Callable[[dict[str, Tensor]], Tensor]


def make_tasks(count: int = 3, *, ragged: bool = False, seed: int = 0) -> list[Task]:
    """Random tasks in which every class has support and query rows in mixed order."""
    tasks = oracle.make_tasks(count, ragged=ragged, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for support, query, ways in tasks:
        for task_set in (support, query):
            rows = len(task_set["labels"])
            labels = torch.arange(rows) % (ways or 3)
            task_set["labels"] = labels[torch.randperm(rows, generator=g)]
    return tasks


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    rows = []
    for row, own in zip(states, mask, strict=True):
        real = row[own.bool()]
        rows.append({"mean": real.mean(0), "cls": real[0], "last": real[-1]}[pooling])
    return torch.stack(rows)


def features_of(encoder: nn.Module, pooling: str = "mean", normalize: bool = False) -> Features:
    """Features ``[N, D]`` of one task's rows by the user's encoder."""

    def features(task_set: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in task_set.items() if k != "labels"}
        states = encoder(**inputs).last_hidden_state
        pooled = pool(states, task_set["attention_mask"], pooling)
        return F.normalize(pooled, dim=-1) if normalize else pooled

    return features


def distance(x: Tensor, y: Tensor, metric: str, p: float | None, precision: Tensor | None):
    """``[Q, D]`` and ``[M, D]`` to ``[Q, M]``, by the definitions."""
    z = x.unsqueeze(1) - y.unsqueeze(0)
    if metric == "sqeuclidean":
        return z.square().sum(-1)
    if metric == "euclidean":
        return z.square().sum(-1).sqrt()
    if metric == "cityblock":
        return z.abs().sum(-1)
    if metric == "minkowski":
        return z.abs().pow(p).sum(-1).pow(1 / p)
    if metric == "chebyshev":
        return z.abs().amax(-1)
    if metric == "cosine":
        return 1 - F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1)
    if metric == "dot":
        return -x @ y.T
    matrix = precision if precision.dim() == 2 else precision.diag()
    return torch.einsum("qmd,de,qme->qm", z, matrix, z).sqrt()


def class_means(x: Tensor, labels: Tensor, ways: int) -> Tensor:
    return torch.stack([x[labels == c].mean(0) for c in range(ways)])


def precision_of(learner: fm.ProtoNet) -> Tensor | None:
    own = dict(learner.named_parameters())
    if "metric.comparison.raw_precision" in own:
        return F.softplus(own["metric.comparison.raw_precision"])
    if "metric.comparison.factor" in own:
        factor = own["metric.comparison.factor"].tril()
        return factor @ factor.T + 1e-6 * torch.eye(len(factor))
    return None


def temperature_of(learner: nn.Module, constant: float = 1.0) -> float | Tensor:
    for name, parameter in learner.named_parameters():
        if name.endswith("log_temperature"):
            return parameter.exp()
    return constant


# -- one task ------------------------------------------------------------------------------------


def protonet(learner, support, labels, query, ways, *, metric="sqeuclidean", p=None, constant=1.0):
    means = class_means(support, labels, ways)
    found = distance(query, means, metric, p, precision_of(learner))
    return -found / temperature_of(learner, constant)


def matchingnet(learner, support, labels, query, ways, *, fce_steps=0, metric="cosine"):
    if fce_steps:
        support, query = full_context(learner.context, support, query, fce_steps)
    scores = -distance(query, support, metric, None, None) / temperature_of(learner)
    attention = scores.softmax(-1)
    return torch.stack([attention[:, labels == c].sum(-1) for c in range(ways)], -1).log()


def full_context(context, support: Tensor, query: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """By torch's own bidirectional LSTM over the support set."""
    width = support.shape[1]
    lstm = nn.LSTM(width, width, bidirectional=True).double()
    weights = {}
    for cell, suffix in ((context.forwards, ""), (context.backwards, "_reverse")):
        for n, p in cell.named_parameters():
            weights[f"{n}_l0{suffix}"] = p
    both, _ = torch.func.functional_call(lstm, weights, (support,))
    g = support + both[:, :width] + both[:, width:]
    rows = []
    for x in query:
        h = c = torch.zeros(width, dtype=x.dtype)
        for _ in range(steps):
            read = (g @ h).softmax(0) @ g
            h, c = context.attending(torch.cat([x, read]), (h, c))
            h = h + x
        rows.append(h)
    return g, torch.stack(rows)


def relationnet(learner, support, labels, query, ways):
    means = class_means(support, labels, ways)
    rows = []
    for x in query:
        found = []
        for m in means:
            of = {"query": x, "mean": m, "difference": (x - m).abs(), "product": x * m}
            found.append(learner.relation(torch.cat([of[n] for n in learner.parts])).squeeze())
        rows.append(torch.stack(found))
    return torch.stack(rows)


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    """The relation network's squared error."""
    return (logits.sigmoid() - F.one_hot(labels, logits.shape[1])).square().mean()


# -- comparison ----------------------------------------------------------------------------------


def assert_same(
    learner: nn.Module,
    tasks: Sequence[Task],
    features: Features,
    rule: Callable,
    loss_fn: Callable = F.cross_entropy,
    **settings,
) -> None:
    """Losses, logits, accuracies and the meta-gradient agree with the loop's."""
    out = learner(oracle.as_batch(tasks))
    losses = []
    for t, (support, query, ways) in enumerate(tasks):
        ways = ways or 3
        x, q = features(support), features(query)
        logits = rule(learner, x, support["labels"], q, ways, **settings)
        losses.append(loss_fn(logits, query["labels"]))
        rows = len(query["labels"])
        oracle.assert_close({"": out.logits[t, :rows, :ways]}, {"": logits})
        assert bool((out.logits[t, :, ways:] == float("-inf")).all())
        right = (logits.argmax(-1) == query["labels"]).double().mean()
        assert float(out.accuracy[t]) == pytest.approx(float(right), abs=1e-6)
    want = torch.stack(losses)
    torch.testing.assert_close(out.task_losses, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.loss, want.mean(), rtol=1e-9, atol=0)
    assert not out.diverged.any()
    expected = gradients(learner, want.mean())
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4
    oracle.assert_close(oracle.gradients(learner, out.loss), expected)


def gradients(learner: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    own = dict(learner.named_parameters())
    found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(own.items(), found, strict=True)
    }
