"""Models with BatchNorm: embedded, each task by itself, no statistics move; and evaluated."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmeta as fm
from fastmeta.training import evaluate

LEARNERS = {
    "protonet": fm.ProtoNet,
    "matchingnet": fm.MatchingNet,
    "relationnet": partial(fm.RelationNet, projection=5, hidden=6),
}


class Own(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU())
        self.config = SimpleNamespace(hidden_size=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def make_net(kind: type[nn.Module] = nn.BatchNorm1d, seed: int = 0, **settings) -> Net:
    torch.manual_seed(seed)
    net = Net(kind(num_features=8, **settings)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def make_batch(tasks: int = 3, rows: int = 6) -> fm.TaskBatch:
    g = torch.Generator().manual_seed(1)
    sets = [
        {
            "x": torch.randn(tasks, rows, 6, generator=g, dtype=torch.float64)
            + torch.arange(tasks).view(-1, 1, 1),
            "labels": torch.arange(rows).expand(tasks, rows) % 3,
        }
        for _ in range(2)
    ]
    return fm.TaskBatch(*sets)


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["model", "patched"])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_task_does_not_depend_on_those_beside_it(name: str, form: str) -> None:
    net, batch = make_net(), make_batch()
    before = buffers(net)
    learner = LEARNERS[name](net if form == "model" else fm.patch(net, fm.Params("net.0.*")))
    together = learner(batch).task_losses
    alone = [learner(batch[t : t + 1]).task_losses for t in range(3)]
    close(together, torch.cat(alone))
    with torch.no_grad():
        close(learner(batch).task_losses, together)
        features = learner.embedding.rows({"x": batch.support["x"][0]})
        close(learner.embed(batch.support)[0], features)
    assert all(map(torch.equal, before, buffers(net)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("kind", "settings", "form"),
    [
        (nn.BatchNorm1d, {}, "model"),
        (nn.BatchNorm1d, {}, "patched"),
        (nn.BatchNorm1d, {"track_running_stats": False}, "model"),
        (nn.BatchNorm1d, {"track_running_stats": False}, "patched"),
        (nn.SyncBatchNorm, {}, "model"),
        (Own, {}, "model"),
    ],
)
def test_protonet_is_the_loop_over_tasks(kind, settings, form: str, training: bool) -> None:
    """Each set of a task is one batch of the user's own model."""
    net, batch = make_net(kind, **settings), make_batch()
    twin = make_net(nn.BatchNorm1d, **settings)  # SyncBatchNorm alone wants a group of processes
    learner = fm.ProtoNet(net if form == "model" else fm.patch(net, fm.Params("net.0.*")))
    learner.train(training)
    twin.train(training)
    out = learner(batch)
    losses = []
    for t in range(3):
        support, query = twin(batch.support["x"][t]), twin(batch.query["x"][t])
        labels = batch.support["labels"][t]
        means = torch.stack([support[labels == c].mean(0) for c in range(3)])
        logits = -torch.cdist(query, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        losses.append(F.cross_entropy(logits, batch.query["labels"][t]))
    close(out.task_losses, torch.stack(losses))
    out.loss.backward()
    torch.stack(losses).mean().backward()
    for found, expected in zip(net.parameters(), twin.parameters(), strict=True):
        if found.grad is not None:
            close(found.grad, expected.grad)
    assert sum(p.grad is not None for p in net.parameters()) == 4


def test_instance_norm_moves_nothing_either() -> None:
    class Rows(nn.InstanceNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.stack([x, 2 * x + 1], dim=-1))[..., 1]

    net, batch = make_net(Rows, track_running_stats=True), make_batch()
    before = buffers(net)
    fm.ProtoNet(net)(batch)
    assert all(map(torch.equal, before, buffers(net)))


def test_norms_that_rest_use_their_statistics() -> None:
    net, batch = make_net(), make_batch()
    net(batch.support["x"].flatten(0, 1))
    net.net[1].eval()
    found = fm.ProtoNet(net).embed(batch.query)
    close(found, net(batch.query["x"].flatten(0, 1)).view(3, 6, 8))


def test_norms_of_a_projection() -> None:
    own = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)).double()
    before = buffers(own)
    net, batch = Net(nn.GroupNorm(2, 8)).double(), make_batch()
    learner = fm.ProtoNet(net, projection=own, metric="mahalanobis")
    together = learner(batch)
    close(together.task_losses[1:2], learner(batch[1:2]).task_losses)
    together.loss.backward()
    assert own[0].weight.grad is not None
    assert all(map(torch.equal, before, buffers(own)))


def test_texts_of_similar_length_do_not_run_together() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 8), nn.BatchNorm1d(8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.norm(self.table(input_ids).mT).mT

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (3, 20, 12), generator=g)
    mask = (torch.arange(12) < torch.randint(1, 12, (3, 20, 1), generator=g)).long()
    sets = {"input_ids": ids, "attention_mask": mask}
    learner = fm.ProtoNet(Words().double())
    found = learner.embed(sets)
    for t in range(3):
        close(found[t], learner.embed({k: v[t] for k, v in sets.items()}))


def test_copies_and_pickles_compute_with_their_own_modules() -> None:
    learner, batch = fm.ProtoNet(make_net()), make_batch()
    expected = learner(batch).task_losses
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        close(other(batch).task_losses, expected)
        other.eval()
        assert not torch.allclose(other(batch).task_losses, expected)
        close(learner(batch).task_losses, expected)


def test_protomaml_of_a_model_that_is_not_patched() -> None:
    net, batch = make_net(), make_batch()
    before = buffers(net)
    learner = fm.ProtoMAML(net, ways=3, projection=5, lr=0.1, steps=2)
    together = learner(batch).task_losses
    close(together[2:], learner(batch[2:]).task_losses)
    assert all(map(torch.equal, before, buffers(net)))


def test_rows_that_batch_norm_should_not_see() -> None:
    """Those that pad uneven tasks have no label."""
    learner, batch = fm.ProtoNet(make_net()), make_batch()
    for task_set in (batch.support, batch.query):
        task_set["labels"] = task_set["labels"].clone()
        task_set["labels"][1, -1] = -100
    with pytest.warns(UserWarning, match="there are rows without a label"):
        learner(batch)
    with pytest.warns(UserWarning, match="there are rows without a label"):
        learner.adapt(batch.support)
    learner.eval()(batch)


def test_a_layer_that_runs_again_in_the_backward_pass() -> None:
    class Again(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    net = Again(nn.BatchNorm1d(8)).double()
    with pytest.raises(RuntimeError, match=r"as under torch.utils.checkpoint"):
        fm.ProtoNet(net)(make_batch()).loss.backward()


# -- evaluation -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A classifier."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5, **settings)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.ProtoNet])
def test_evaluation_tells_of_norms_that_never_saw_data(algorithm) -> None:
    batch = make_batch()

    def learner_of(model):
        return algorithm(fm.patch(model.double(), fm.Params("*")))

    learner = learner_of(Normed())
    with pytest.warns(UserWarning, match="BatchNorm 'norm' has never seen data") as told:
        evaluate(learner, [batch], 3)
        evaluate(learner, [batch], 3)  # not again
    assert len(told) == 1 and told[0].filename == __file__
    seen = Normed().double()
    seen(batch.support["x"].flatten(0, 1))
    evaluate(learner_of(seen), [batch], 3)
    old = Normed()  # from a checkpoint that did not count batches
    old.norm.running_mean.add_(1)
    evaluate(learner_of(old), [batch], 3)
    rests = Normed()
    rests.norm.eval()
    evaluate(learner_of(rests), [batch], 3)


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.ProtoNet])
def test_norms_without_statistics_are_evaluated_as_trained(algorithm) -> None:
    batch = make_batch()
    model = Normed(track_running_stats=False).double()
    learner = algorithm(fm.patch(model, fm.Params("*")))
    trained = learner(batch)
    found = evaluate(learner, [batch], 3)
    torch.testing.assert_close(
        found.losses, trained.task_losses.detach().double(), rtol=1e-9, atol=1e-9
    )
    alone = torch.cat([evaluate(learner, [batch[t : t + 1]], 1).losses for t in range(3)])
    torch.testing.assert_close(found.losses, alone, rtol=1e-9, atol=1e-9)
