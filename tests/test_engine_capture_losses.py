"""Captured steps and what a loss reads, holds and becomes meanwhile."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from test_engine_capture import captured, gradients_of

import fastmeta as fm


def reading(outputs, batch):
    """As many rows of a task as have a label, which Python is told."""
    counts = (batch["labels"] != -100).sum(1).tolist()
    return torch.stack(
        [
            F.cross_entropy(logits[:n], labels[:n])
            for n, logits, labels in zip(counts, outputs.logits, batch["labels"], strict=True)
        ]
    )


def test_values_that_python_reads_are_not_kept() -> None:
    batches = [oracle.as_batch(oracle.make_tasks(2, seed=seed)) for seed in (0, 1)]
    for task_set in (batches[0].support, batches[0].query):
        task_set["labels"][:, 2:] = -100
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.MAML(patched, lr=0.1, steps=2, loss_fn=reading, compile=True)
    with pytest.warns(RuntimeWarning, match=r"could not be captured.*tolist asks for values"):
        learner(batches[0])
    eager = fm.MAML(patched, lr=0.1, steps=2, loss_fn=reading)
    oracle.assert_close(gradients_of(learner, batches[1]), gradients_of(eager, batches[1]))


def test_a_loss_that_adapts_by_captured_steps() -> None:
    """Of the same model, which captures one step at a time."""
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    inner, other = fm.MAML(patched, steps=1, compile=True), oracle.as_batch(oracle.make_tasks(2))

    def loss(outputs, batch):
        rows = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none").mean(1)
        return rows + inner.adapt(other.support).packed.square().mean()

    batch = oracle.as_batch(oracle.make_tasks(2, seed=1))
    with pytest.warns(RuntimeWarning, match="an inner step could not be captured"):
        found = fm.MAML(patched, steps=1, loss_fn=loss, compile=True, memory="unroll")(batch)
    inner = fm.MAML(patched, steps=1)
    expected = fm.MAML(patched, steps=1, loss_fn=loss, memory="unroll")(batch)
    torch.testing.assert_close(found.task_losses, expected.task_losses, rtol=1e-9, atol=1e-12)


class Weighted(torch.nn.Module):
    """Cross-entropy with weights of classes in training, a flag among the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3, dtype=torch.float64))

    def forward(self, outputs, batch):
        labels = batch["labels"]
        weight = self.weight if self.training else None
        rows = F.cross_entropy(outputs.logits.mT, labels, weight=weight, reduction="none")
        return (rows * ((labels >= 0) * 0.1)).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_loss_holds_and_its_mode_may_change(dtype: torch.dtype) -> None:
    model, loss = oracle.tiny_bert().to(dtype), Weighted().to(dtype)
    patched = fm.patch(model, fm.Params("*query*"))
    learner, eager = (
        fm.MAML(patched, lr=0.1, steps=2, memory="unroll", loss_fn=loss, compile=compile)
        for compile in (True, False)
    )
    for change in ("nothing", "buffer", "tensors", "mode"):
        if change == "mode":
            loss.eval()
        elif change == "buffer":
            loss.weight = torch.tensor([9.0, 1.0, 5.0], dtype=dtype)
        elif change == "tensors":
            loss.weight = torch.tensor([1.0, 5.0, 9.0], dtype=dtype)
            weight = model.bert.pooler.dense.weight
            weight.data = weight.data.t().contiguous().t()  # the same numbers elsewhere
        found, expected = gradients_of(learner), gradients_of(eager)
        assert found["loss"].dtype == dtype
        oracle.assert_close(found, expected, 1e-4 if dtype == torch.float32 else 1e-9)
    captured(learner)


@pytest.mark.parametrize("kind", ["object", "closure", "partial", "module", "method"])
def test_tensors_that_a_loss_holds_may_be_replaced(kind: str) -> None:
    held = SimpleNamespace(weight=torch.ones(3, dtype=torch.float64))

    def weighted(outputs, batch, weight: torch.Tensor) -> torch.Tensor:
        labels = batch["labels"]
        rows = F.cross_entropy(outputs.logits.mT, labels, weight=weight, reduction="none")
        return rows.mean(1)

    class Held(torch.nn.Module):
        weight = held.weight

        def forward(self, outputs, batch):
            return weighted(outputs, batch, self.weight)

    holder = Held()

    class Plain:
        weight = held.weight

        def __call__(self, outputs, batch):
            return weighted(outputs, batch, self.weight)

    weight = held.weight
    losses = {
        "object": Plain(),
        "module": Held(),
        "closure": lambda outputs, batch: weighted(outputs, batch, weight),
        "partial": partial(weighted, weight=weight),
        "method": holder.forward,
    }
    loss = losses[kind]
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*query*"))
    learner, eager = (
        fm.MAML(patched, lr=0.1, steps=2, memory="unroll", loss_fn=loss, compile=compile)
        for compile in (True, False)
    )
    first = gradients_of(learner)
    weight = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    if kind == "partial":
        loss.keywords["weight"] = weight
    elif kind == "method":
        holder.weight = weight
    else:
        loss.weight = weight
    found = gradients_of(learner)
    oracle.assert_close(found, gradients_of(eager))
    assert found["loss"] != first["loss"]


class Buffered(torch.nn.Module):
    """Cross-entropy with weights of classes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3, dtype=torch.float64))

    def forward(self, outputs, batch) -> torch.Tensor:
        logits = outputs.logits.mT
        return F.cross_entropy(logits, batch["labels"], self.weight, reduction="none").mean(1)


def test_a_buffer_of_a_loss_is_replaced() -> None:
    loss, patched = Buffered(), fm.patch(oracle.tiny_bert(), fm.Params("*query*"))
    batch = oracle.as_batch(oracle.make_tasks(2))
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", "loss_fn": loss}
    learners = [fm.MAML(patched, compile=c, **settings) for c in (True, False)]
    learners[0](batch)
    loss.weight = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    oracle.assert_close(*(oracle.gradients(o, o(batch).loss) for o in learners))


def test_numbers_with_a_factor() -> None:
    def moved(outputs, batch) -> torch.Tensor:
        rows = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none").mean(1)
        return torch.add(rows, 2.0, alpha=3)

    patched = fm.patch(oracle.tiny_bert(), fm.Params("*query*"))
    batch = oracle.as_batch(oracle.make_tasks(2))
    settings = {"lr": 0.1, "steps": 1, "memory": "unroll", "loss_fn": moved}
    found, expected = (fm.MAML(patched, compile=c, **settings)(batch) for c in (True, False))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.support_losses, expected.support_losses)
