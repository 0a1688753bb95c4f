"""A task that becomes NaN or Inf is frozen and reported, and leaves no trace in the others."""

from __future__ import annotations

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm
from fastmeta.engine.episode import zero_loss

BAD = 1
STEPS = 3

MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "unroll-chunk1": {"memory": "unroll", "task_chunk": 1},
    "unroll-chunk2": {"memory": "unroll", "task_chunk": 2},
    "recompute-chunk3": {"memory": "recompute", "task_chunk": 3},
}

# How the task fails: (factor of its support loss, factor of its query loss, whether it completes
# its first step). 0 stands for a finite loss with an infinite gradient, -1 for one that throws the
# weights far away and is NaN there.
FAILURES = {
    "loss at step 0": (float("nan"), 1.0, False),
    "infinite loss at step 0": (float("inf"), 1.0, False),
    "gradient at step 0": (0.0, 1.0, False),
    "huge gradient at step 0": (1e160, 1.0, False),
    "later step": (-1.0, 1.0, True),
    "query": (1.0, float("nan"), True),
}


def scaled(outputs, batch) -> Tensor:
    """Mean cross-entropy times a factor per task; labels are ``[T, N, (class, factor)]``."""
    labels, factors = batch["labels"][..., 0].long(), batch["labels"][:, 0, 1]
    losses = []
    for logits, label, factor in zip(outputs.logits, labels, factors, strict=True):
        loss = F.cross_entropy(logits, label)
        if factor == 0:
            loss = loss + (logits * 0).sum().sqrt()
        elif factor == -1:
            loss = loss * (1e12 if logits.abs().max() < 1e6 else float("nan"))
        else:
            loss = loss * factor
        losses.append(loss)
    return torch.stack(losses)


def make_batch(support: float = 1.0, query: float = 1.0, tasks: int = 4) -> fm.TaskBatch:
    """Tasks of which `BAD` has these factors."""
    batch = oracle.as_batch(oracle.make_tasks(tasks))
    for task_set, factor in ((batch.support, support), (batch.query, query)):
        factors = torch.ones(task_set["labels"].shape, dtype=torch.float64)
        factors[BAD] = factor
        task_set["labels"] = torch.stack([task_set["labels"].double(), factors], -1)
    return batch


OTHERS = torch.tensor([0, 2, 3])


def check(failure: str, make_learner) -> None:
    """The others' results and the meta-gradient are those of a batch without the bad task."""
    support, query, moved = FAILURES[failure]
    learner = make_learner(4)
    out = learner(make_batch(support, query))
    assert out.diverged.tolist() == [False, True, False, False]
    assert torch.isnan(out.task_losses[BAD])
    without = make_learner(3)
    if "inner_lr.values" in learner.state_dict() and learner.rates.axes[:1] == ("task",):
        with torch.no_grad():
            without.rates.values.copy_(learner.rates.values[OTHERS])
    expected = without(make_batch().select(OTHERS))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    for name in ("task_losses", "logits"):
        torch.testing.assert_close(
            getattr(out, name)[OTHERS], getattr(expected, name), rtol=1e-11, atol=1e-13
        )
    torch.testing.assert_close(
        out.params.packed[OTHERS], expected.params.packed, rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(
        out.support_losses[:, OTHERS], expected.support_losses, rtol=1e-11, atol=1e-13
    )
    start = learner.patched.init(1).packed[0]
    assert out.params.packed.isfinite().all()
    assert torch.equal(out.params.packed[BAD], start) is not moved
    got = oracle.gradients(learner, out.loss)
    want = oracle.gradients(without, expected.loss)
    if "inner_lr.values" in got and learner.rates.axes[:1] == ("task",):
        rates = got["inner_lr.values"]
        assert not rates[BAD].any()
        got["inner_lr.values"] = rates[OTHERS]
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    oracle.assert_close(got, want, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_shared_backbone(failure: str, order: int, mode: str) -> None:
    """The prefix, the body and the head are all meta-learned."""

    def make(tasks: int) -> fm.MAML:
        model = oracle.tiny_bert()
        patched = fm.patch(model, fm.Params("bert.encoder.layer.0.output", "classifier"))
        return fm.MAML(patched, lr=0.1, steps=STEPS, order=order, loss_fn=scaled, **MODES[mode])

    check(failure, make)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per", ["layer", "task", ("task", "param")], ids=str)
def test_learned_rates(per, mode: str) -> None:
    def make(tasks: int) -> fm.MAML:
        patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
        rate = fm.LearnedRate(per=per, init=0.1, num_tasks=tasks)
        learner = fm.MAML(patched, lr=rate, steps=STEPS, loss_fn=scaled, **MODES[mode])
        return oracle.with_varied_rates(learner)

    check("later step", make)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("failure", ["gradient at step 0", "query"])
def test_rules_with_state(failure: str, optimizer: str) -> None:
    def make(tasks: int) -> fm.MAML:
        patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
        settings = {"lr": 0.01, "steps": STEPS, "optimizer": optimizer, "loss_fn": scaled}
        return fm.MAML(patched, memory="recompute", **settings)

    check(failure, make)


@pytest.mark.parametrize("failure", ["loss at step 0", "later step", "query"])
def test_implicit(failure: str) -> None:
    def make(tasks: int) -> fm.IMAML:
        patched = fm.patch(oracle.tiny_bert(), fm.Head())
        return fm.IMAML(patched, lr=0.1, steps=STEPS, lam=1.0, loss_fn=scaled)

    check(failure, make)


@pytest.mark.parametrize("failure", ["loss at step 0", "later step", "query"])
def test_reptile(failure: str) -> None:
    def make(tasks: int) -> fm.Reptile:
        patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
        return fm.Reptile(patched, lr=0.1, steps=STEPS, use_query=False, loss_fn=scaled)

    check(failure, make)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("failure", ["loss at step 0", "query"])
def test_every_task_diverges(failure: str, order: int, mode: str) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    rate = fm.LearnedRate(per="layer", init=0.1)
    learner = fm.MAML(patched, lr=rate, steps=2, order=order, loss_fn=scaled, **MODES[mode])
    support, query, _ = FAILURES[failure]
    batch = make_batch(support, query).select(torch.tensor([BAD, BAD, BAD, BAD]))
    out = learner(batch)
    assert out.diverged.all()
    assert out.task_losses.isnan().all()
    assert out.params.packed.isfinite().all()
    assert out.loss.item() == 0
    out.loss.backward()
    for parameter in learner.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("chunk", [None, 2])
def test_without_gradients(chunk: int | None) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    learner = fm.MAML(patched, lr=0.1, steps=STEPS, loss_fn=scaled, task_chunk=chunk)
    with torch.no_grad():
        out = learner(make_batch(support=-1.0))
        expected = learner(make_batch().select(OTHERS))
    assert out.diverged.tolist() == [False, True, False, False]
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    adapted = fm.adapt(
        patched, make_batch(support=-1.0).support, lr=0.1, steps=STEPS, loss_fn=scaled
    )
    assert adapted.diverged.tolist() == [False, True, False, False]
    torch.testing.assert_close(adapted.params.packed, out.params.packed, rtol=1e-12, atol=1e-14)


def test_a_task_lost_to_other_dropout_masks_ends_too() -> None:
    """Survivors run again under other masks; whoever fails there is left out as well."""
    patched = fm.patch(oracle.tiny_bert(dropout=0.3), fm.Params("*"))
    calls = []

    def second_pass_fails(outputs, batch) -> Tensor:
        losses = scaled(outputs, batch)
        calls.append(len(losses))
        return losses * float("nan") if len(losses) == 3 else losses

    learner = fm.MAML(patched, lr=0.1, steps=1, memory="unroll", loss_fn=second_pass_fails)
    out = learner(make_batch(support=float("nan")))
    assert out.diverged.all() and out.loss.item() == 0
    # by leaf, then as tasks that may diverge; both again for the survivors
    assert calls == [4, 4, 4, 3, 3, 3]


class Rooted(nn.Module):
    """Logits with a square root, whose slope is infinite where a layer gives 0."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 16), nn.Linear(16, 16, bias=bias)
        self.head = nn.Linear(16, 3)
        if bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        x = self.words(input_ids).mean(1)
        root = self.layer(x).abs().sqrt().mean(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(x) + root * torch.arange(3))


@pytest.mark.parametrize("bias", [False, True])
def test_infinite_gradients_of_a_layer(bias: bool) -> None:
    """Its loss is finite."""
    torch.manual_seed(0)
    model = Rooted(bias).double()
    model.words.requires_grad_(False)
    with torch.no_grad():
        model.words.weight[19] = 0
    batch = oracle.as_batch(oracle.make_tasks(2))
    for rows in (batch.support, batch.query):
        del rows["attention_mask"]
    batch.support["input_ids"][1] = 19
    patched = fm.patch(model, fm.Params("layer", "head"))
    out = fm.MAML(patched, lr=0.1, steps=1, memory="unroll")(batch)
    assert out.diverged.tolist() == [False, True] and out.params.packed.isfinite().all()


def test_no_loss_of_anything_has_gradients_of_zero() -> None:
    t = torch.tensor([float("nan"), float("inf")], requires_grad=True)
    loss = zero_loss([t])
    loss.backward()
    assert loss == 0 and (t.grad == 0).all()
