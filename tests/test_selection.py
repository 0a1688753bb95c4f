"""`fm.select_models` against one candidate and one task at a time."""

from __future__ import annotations

import episode_oracle as oracle
import metric_oracle as metric
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.algorithms.selection import _choose

TASKS = metric.make_tasks(3)
RAGGED = metric.make_tasks(3, ragged=True)
GRID = [
    fm.Candidate(lr=0.05, steps=2),
    fm.Candidate(lr=0.4, steps=2, noise=0.3, seed=1),
    fm.Candidate(lr=0.4, steps=2, noise=0.3, seed=2),
    fm.Candidate(lr=0.05, steps=3, optimizer="adam"),
    fm.Candidate(lr=0.3, steps=3, clip_norm=0.5),
]
DIVERGING = fm.Candidate(lr=1e200, steps=4, optimizer="adamw")  # its weight decay overflows


@pytest.fixture(scope="module", params=["head", "head and norm"])
def patched(request) -> fm.Patched:
    spec = fm.Head() if request.param == "head" else fm.Head() + fm.Norm()
    return fm.patch(oracle.tiny_bert(), spec)


def inputs_of(task_set: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in task_set.items() if k != "labels"}


def one_by_one(patched: fm.Patched, tasks, candidates, train=lambda s: s):
    """Probabilities per task and candidate ``[T][M] [Q, C]`` and adapted rows ``[T][M] [P]``."""
    found, rows = [], []
    for support, query, ways in tasks:
        found.append([])
        rows.append([])
        for c in candidates:
            start = patched.init(1)
            if c.noise:
                g = torch.Generator().manual_seed(c.seed)
                noise = torch.randn(1, start.packed.shape[1], generator=g, dtype=torch.float64)
                noise = fm.TaskParams(patched.layout, noise)
                moved = [start[n] + c.noise * noise[n] for n in patched.layout.names]
                start = fm.TaskParams(patched.layout, patched.layout.pack(moved))
            single = {k: v.unsqueeze(0) for k, v in train(support).items()}
            fast = fm.adapt(
                patched, single, steps=c.steps, lr=c.lr, optimizer=c.optimizer,
                clip_norm=c.clip_norm, params=start,
                ways=None if ways is None else torch.tensor([ways]),
            )  # fmt: skip
            with torch.no_grad():
                one = {k: v.unsqueeze(0) for k, v in inputs_of(query).items()}
                logits = patched(fast.params, **one).logits[0]
            found[-1].append(logits[:, :ways].softmax(-1))
            rows[-1].append(fast.params.packed[0])
    return found, rows


def hellinger(p: Tensor, q: Tensor) -> float:
    return float(((p.sqrt() - q.sqrt()).square().sum(1) / 2).sqrt().mean())


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    m = (p + q) / 2
    divergence = (p * (p / m).log() + q * (q / m).log()).sum(1) / 2
    return float(divergence.sqrt().mean())


def select(patched, tasks=TASKS, candidates=GRID, **settings) -> fm.Selection:
    batch = oracle.as_batch(tasks)
    settings.setdefault("query", batch.query)
    settings.setdefault("criterion", "medoid")
    return fm.select_models(patched, batch.support, candidates, ways=batch.ways, **settings)


# -- distances and criteria ----------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [TASKS, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("criterion", ["medoid", "farthest"])
@pytest.mark.parametrize(
    ("compare", "metric_name"),
    [
        ("probabilities", "hellinger"),
        ("probabilities", "js"),
        ("probabilities", "cityblock"),
        ("predictions", None),
        ("parameters", None),
    ],
)
def test_criteria_by_brute_force(patched, compare, metric_name, criterion, tasks) -> None:
    found = select(patched, tasks, compare=compare, metric=metric_name, criterion=criterion)
    probabilities, rows = one_by_one(patched, tasks, GRID)
    rule = {
        "hellinger": hellinger,
        "js": jensen_shannon,
        "cityblock": lambda p, q: float((p - q).abs().sum(1).mean()),
        None: lambda p, q: float((p.argmax(1) != q.argmax(1)).double().mean()),
    }[metric_name]
    for t, of_task in enumerate(probabilities):
        items = of_task
        if compare == "parameters":
            items, rule = rows[t], lambda p, q: float((p - q).norm())
        want = torch.tensor([[rule(a, b) for b in items] for a in items], dtype=torch.float64)
        torch.testing.assert_close(found.distances[t], want, rtol=1e-9, atol=1e-7)
        mean = (want.sum(1) - want.diag()) / (len(GRID) - 1)
        torch.testing.assert_close(found.scores[t], mean, rtol=1e-9, atol=1e-7)
        best = mean.argmin() if criterion == "medoid" else mean.argmax()
        chosen = int(found.chosen[t])
        assert mean[chosen] == pytest.approx(float(mean[best]), abs=1e-7)
        torch.testing.assert_close(found.params.packed[t], rows[t][chosen])
        size, ways = of_task[0].shape
        for m, p in enumerate(of_task):
            torch.testing.assert_close(found.probabilities[t, m, :size, :ways], p)
        want = of_task[chosen].argmax(1)
        assert torch.equal(found.predictions[t, :size], want)
        ensemble = torch.stack(of_task).mean(0)
        torch.testing.assert_close(found.ensemble[t, :size, :ways], ensemble)


def test_logits_and_minkowski(patched) -> None:
    found = select(patched, compare="logits", metric="minkowski", p=3)
    batch = oracle.as_batch(TASKS)
    with torch.no_grad():
        logits = [patched(q, **inputs_of(batch.query)).logits for q in found.all_params]
    for a, x in enumerate(logits):
        for b, y in enumerate(logits):
            want = (x - y).abs().pow(3).sum(-1).pow(1 / 3).mean(1)
            torch.testing.assert_close(found.distances[:, a, b], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("refit", [True, False], ids=["held out", "given"])
def test_validation(patched, refit: bool) -> None:
    """Held out of the support set (the last half of each class), or a set of its own."""
    tasks = metric.make_tasks(3, ragged=True)
    doubled = []
    for support, query, ways in tasks:
        support = {k: torch.cat([v, v.flip(0)]) for k, v in support.items()}
        doubled.append((support, query, ways))
    batch = oracle.as_batch(doubled)
    validation = 0.5 if refit else batch.query
    found = fm.select_models(
        patched, batch.support, GRID, query=batch.query, criterion="validation",
        validation=validation, ways=batch.ways,
    )  # fmt: skip

    def held(labels: Tensor) -> Tensor:
        mask = torch.zeros_like(labels, dtype=torch.bool)
        for c in labels.unique():
            rows = (labels == c).nonzero().flatten()
            mask[rows[len(rows) - max(1, len(rows) // 2) :]] = True
        return mask

    def train(support):
        keep = ~held(support["labels"])
        return {k: v[keep] for k, v in support.items()} if refit else support

    judged = []
    for support, query, ways in doubled:
        mask = held(support["labels"])
        rows = {k: v[mask] for k, v in support.items()} if refit else query
        judged.append((support, rows, ways))
    probabilities, _ = one_by_one(patched, judged, GRID, train)
    final, _ = one_by_one(patched, doubled, GRID)
    for t, (_, rows, _) in enumerate(judged):
        labels = rows["labels"]
        right = torch.stack([(p.argmax(1) == labels).double().mean() for p in probabilities[t]])
        loss = torch.stack([F.nll_loss(p.log(), labels) for p in probabilities[t]])
        torch.testing.assert_close(found.scores[t].double(), right, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.validation_losses[t], loss, rtol=1e-9, atol=0)
        best = max(range(len(GRID)), key=lambda m: (round(float(right[m]), 5), -float(loss[m])))
        assert int(found.chosen[t]) == best
        size, ways = final[t][best].shape
        torch.testing.assert_close(found.probabilities[t, best, :size, :ways], final[t][best])


def test_equal_candidates_and_the_first(patched) -> None:
    for criterion in ("medoid", "farthest"):
        found = select(patched, candidates=[GRID[1]] * 4, criterion=criterion)
        assert found.chosen.tolist() == [0, 0, 0]
    alone = select(patched, candidates=GRID[:1])
    assert alone.chosen.tolist() == [0, 0, 0] and not alone.distances.any()
    pair = select(patched, candidates=GRID[:2], criterion="farthest")
    assert pair.chosen.tolist() == [0, 0, 0]  # both are as far from the other


@pytest.mark.parametrize("criterion", ["medoid", "farthest", "validation"])
def test_diverged_candidates_are_left_out(patched, criterion: str) -> None:
    batch = oracle.as_batch(TASKS)
    settings = {"criterion": criterion, "validation": batch.query}
    with_it = select(patched, candidates=[DIVERGING, *GRID, DIVERGING], **settings)
    without = select(patched, **settings)
    assert with_it.diverged.tolist() == [[True, *[False] * 5, True]] * 3
    assert torch.equal(with_it.chosen, without.chosen + 1)
    assert bool(with_it.scores[:, [0, 6]].isnan().all())
    assert bool(with_it.distances[:, 0].isnan().all())
    torch.testing.assert_close(with_it.distances[:, 1:6, 1:6], without.distances)
    torch.testing.assert_close(with_it.scores[:, 1:6], without.scores)
    torch.testing.assert_close(with_it.ensemble, without.ensemble)
    torch.testing.assert_close(with_it.params.packed, without.params.packed)
    nobody = select(patched, candidates=[DIVERGING] * 2, **settings)
    assert nobody.chosen.tolist() == [-1] * 3 and bool(nobody.diverged.all())
    assert not nobody.ensemble.any()


def test_without_a_query_set(patched) -> None:
    found = select(patched, query=None)
    assert found.predictions is None and found.ensemble is None and found.logits is None
    batch = oracle.as_batch(TASKS)
    on_support = select(patched, query=batch.support)
    assert torch.equal(found.chosen, on_support.chosen)
    unlabelled = select(patched, query=inputs_of(batch.query))
    torch.testing.assert_close(unlabelled.distances, select(patched).distances)


def test_chunks_and_a_task_alone_change_nothing(patched) -> None:
    whole = select(patched, RAGGED)
    chunks = select(patched, RAGGED, task_chunk=2)
    torch.testing.assert_close(whole.distances, chunks.distances, rtol=1e-9, atol=1e-9)
    for t, task in enumerate(RAGGED):
        alone = select(patched, [task])
        torch.testing.assert_close(alone.distances[0], whole.distances[t], rtol=1e-9, atol=1e-9)
        assert int(alone.chosen[0]) == int(whole.chosen[t])


def test_candidates_of_several_models() -> None:
    one = fm.patch(oracle.tiny_bert(), fm.Head())
    two = fm.patch(oracle.tiny_bert(3), fm.LoRA(r=2) + fm.Head())
    candidates = [fm.Candidate(lr=0.1), fm.Candidate(lr=0.1, patched=two)]
    found = select(one, candidates=candidates)
    assert found.params is None and found.all_params[1].layout is two.layout
    alone = select(two, candidates=[fm.Candidate(lr=0.1)])
    torch.testing.assert_close(found.all_params[1].packed, alone.params.packed)
    with pytest.raises(ValueError, match="parameters can be compared between candidates of one"):
        select(one, candidates=candidates, compare="parameters")


def test_candidates_of_another_model_than_the_first() -> None:
    """Specifications of equal shapes are different ones."""
    first, second = (
        fm.patch(oracle.tiny_bert(), fm.LoRA(r=2, targets=target)) for target in ("query", "key")
    )
    query = inputs_of(oracle.as_batch(TASKS).query)
    found = select(first, candidates=[fm.Candidate(lr=0.1, patched=second)] * 2)
    assert found.params.layout is second.layout
    torch.testing.assert_close(second(found.params, **query).logits, found.logits)
    mixed = [fm.Candidate(lr=0.1), fm.Candidate(lr=0.1, patched=second)]
    assert select(first, candidates=mixed).params is None
    with pytest.raises(ValueError, match="parameters can be compared between candidates of one"):
        select(first, candidates=mixed, compare="parameters")


def test_rates_are_not_rounded(patched) -> None:
    candidates = [fm.Candidate(lr=0.1, steps=2), fm.Candidate(lr=0.3, steps=2)]
    support = oracle.as_batch(TASKS).support
    for c, found in zip(candidates, select(patched, candidates=candidates).all_params, strict=True):
        alone = fm.adapt(patched, support, lr=c.lr, steps=2).params.packed
        torch.testing.assert_close(found.packed, alone, rtol=1e-12, atol=1e-13)


def test_of_equal_accuracies_the_smaller_loss_whatever_others_lose() -> None:
    scores, diverged = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    losses = torch.tensor([[0.05, 0.01, 2e4]])
    assert _choose("validation", scores, losses, diverged).tolist() == [1]


def test_a_linear_head_reads_the_encoder_once() -> None:
    """Candidates that differ in the head only share the features."""
    model = oracle.tiny_bert()
    patched = fm.patch(model, fm.Head())
    select(patched, candidates=GRID[:1])  # the plans are made
    rows = []
    for plan in patched._plans.values():
        plan.structure.bert.embeddings.register_forward_hook(
            lambda _, __, out: rows.append(len(out))
        )
    select(patched, candidates=GRID[:3])
    batch = oracle.as_batch(TASKS)
    assert max(rows) <= 3 * max(s["labels"].shape[1] for s in (batch.support, batch.query))


def test_an_optimizer_that_knows_layers(patched) -> None:
    """Of a learned optimizer, which reads each layer's statistics: as `fm.adapt` has it."""
    rule = fm.LearnedOptimizer("mlp", hidden=4).double()
    candidates = [fm.Candidate(lr=r, steps=2, optimizer=rule) for r in (0.1, 0.4)]
    found = select(patched, candidates=candidates)
    _, rows = one_by_one(patched, TASKS, candidates)
    for t, each in enumerate(rows):
        for m, expected in enumerate(each):
            torch.testing.assert_close(found.all_params[m].packed[t], expected)
    with pytest.raises(ValueError, match="task_chunk must be"):
        select(patched, task_chunk=0)


def test_a_plain_module_of_features() -> None:
    """Any module whose output is logits, on stored features."""
    net = torch.nn.Linear(4, 3).double()
    g = torch.Generator().manual_seed(0)
    sets = [
        {
            "input": torch.randn(2, 6, 4, generator=g).double(),
            "labels": torch.arange(6).expand(2, 6) % 3,
        }
        for _ in range(2)
    ]
    found = fm.select_models(
        fm.patch(net, fm.Params("*")), sets[0], fm.Candidate.grid(lr=[0.1, 1.0]), query=sets[1]
    )
    assert found.predictions.shape == (2, 6) and found.scores.shape == (2, 2)


# -- arguments -----------------------------------------------------------------------------------


def test_grid() -> None:
    grid = fm.Candidate.grid(lr=[0.1, 0.2], seed=range(3), noise=0.5)
    assert [(c.lr, c.seed) for c in grid] == [(lr, s) for lr in (0.1, 0.2) for s in range(3)]
    assert all(c.noise == 0.5 for c in grid)
    with pytest.raises(ValueError, match=r"a candidate has .*; got 'rate'"):
        fm.Candidate.grid(rate=[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"criterion": "best"}, ValueError, "criterion must be one of validation, medoid, farth"),
        ({"compare": "weights"}, ValueError, "compare must be one of probabilities, predictions"),
        ({"metric": "kl"}, ValueError, "metric of probabilities must be one of .*, got 'kl'"),
        ({"compare": "logits", "metric": "js"}, ValueError, "metric of logits must be one of"),
        ({"metric": "minkowski"}, ValueError, "metric 'minkowski' needs p"),
        ({"p": 2}, ValueError, "p is for metric 'minkowski', got p=2"),
        ({"candidates": []}, TypeError, "expected fm.Candidate objects, at least one, got None"),
        ({"candidates": [3]}, TypeError, "expected fm.Candidate objects, at least one, got 3"),
        (
            {"criterion": "validation", "validation": 1.5},
            ValueError,
            r"a share of the support rows in \(0, 1\), got 1.5",
        ),
        (
            {"criterion": "validation"},
            ValueError,
            "task 0 has one support row per class, and none to hold out",
        ),
    ],
)
def test_errors(patched, settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        select(patched, **settings)


def test_wrong_candidates() -> None:
    with pytest.raises(TypeError, match="expected a patched model"):
        fm.select_models(oracle.tiny_bert(), oracle.as_batch(TASKS).support, GRID)
    with pytest.raises(ValueError, match="noise must be a finite number of at least 0, got -1"):
        fm.Candidate(noise=-1)
    with pytest.raises(ValueError, match="lr must be positive and finite, got 0"):
        fm.Candidate(lr=0)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        fm.Candidate(steps=0)
