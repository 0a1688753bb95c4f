"""What a backward pass builds again is what the forward pass ran: dropout, autocast, weights."""

from __future__ import annotations

import gc
import threading

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.engine.meter import PeakMemory

BATCH = oracle.as_batch(oracle.make_tasks(4))
SETTINGS = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "unroll-chunk2": {"memory": "unroll", "task_chunk": 2},
    "recompute-chunk2": {"memory": "recompute", "task_chunk": 2},
}


def run(learner, seed: int = 5, batch: fm.TaskBatch = BATCH) -> dict[str, Tensor]:
    """Loss, weights and meta-gradient under one seed."""
    torch.manual_seed(seed)
    out = learner(batch)
    loss = oracle.weighted(out)
    found = {"loss": loss.detach(), "params": out.params.packed.detach()}
    # What happens in between must not matter, and backward must not disturb the random state.
    torch.rand(7)
    before = torch.get_rng_state()
    found |= oracle.gradients(learner, loss)
    if learner.plans.memory != "unroll" or learner.plans.task_chunk:
        assert torch.equal(torch.get_rng_state(), before)
    return found


def learner_of(name: str, spec: fm.Spec | None = None, **kwargs) -> fm.MAML:
    patched = fm.patch(oracle.tiny_bert(dropout=0.3), spec or fm.Params("*"))
    assert patched.training
    return fm.MAML(patched, lr=0.1, steps=3, **{**SETTINGS[name], **kwargs})


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spec", [fm.Params("*"), fm.Head()], ids=repr)
def test_recompute_draws_the_masks_of_its_forward_pass(spec: fm.Spec, order: int) -> None:
    unrolled = run(learner_of("unroll", spec, order=order))
    again = run(learner_of("recompute", spec, order=order))
    oracle.assert_close(again, unrolled)
    other = run(learner_of("unroll", spec, order=order), seed=6)
    assert (other["loss"] - unrolled["loss"]).abs() > 1e-4


@pytest.mark.parametrize("order", [1, 2])
def test_chunks_draw_the_masks_of_their_forward_pass(order: int) -> None:
    """A chunk draws what a batch of its tasks alone draws, in either mode."""
    found = run(learner_of("unroll-chunk2", order=order))
    oracle.assert_close(run(learner_of("recompute-chunk2", order=order)), found)
    # The same two halves, unrolled one after the other.
    learner = learner_of("unroll", order=order)
    torch.manual_seed(5)
    losses = torch.cat([learner(BATCH[s]).task_losses for s in (slice(0, 2), slice(2, 4))])
    weights = torch.arange(1, 5, dtype=losses.dtype)
    expected = oracle.gradients(learner, (losses * weights).mean())
    oracle.assert_close({n: found[n] for n in expected}, expected)


def test_implicit_gradients_are_reproducible() -> None:
    patched = fm.patch(oracle.tiny_bert(dropout=0.3), fm.Head())
    for chunk in (None, 2):
        learner = fm.IMAML(patched, lr=0.1, steps=2, task_chunk=chunk)
        torch.manual_seed(0)
        out = learner(BATCH)
        before = torch.get_rng_state()
        first = oracle.gradients(learner, out.loss, retain_graph=True)
        assert torch.equal(torch.get_rng_state(), before)
        oracle.assert_close(oracle.gradients(learner, out.loss), first, rtol=1e-14)


def test_evaluation_mode_reaches_the_patched_model() -> None:
    model = oracle.tiny_bert(dropout=0.3)
    learner = fm.MAML(fm.patch(model, fm.Params("*")), lr=0.1, steps=1, memory="unroll")
    assert learner.training and learner.patched.training
    learner.eval()
    assert not learner.patched.training and model.training
    assert torch.equal(learner(BATCH).loss, learner(BATCH).loss)
    learner.train()
    assert learner.patched.training
    assert not torch.equal(learner(BATCH).loss, learner(BATCH).loss)


@pytest.mark.parametrize("name", ["recompute", "unroll-chunk2"])
def test_changing_mode_before_backward_is_refused(name: str) -> None:
    learner = learner_of(name)
    out = learner(BATCH)
    learner.eval()
    with pytest.raises(RuntimeError, match="expected training=True, got False"):
        oracle.weighted(out).backward()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("which", ["adapted", "shared", "rate"])
def test_changing_weights_before_backward_is_refused(which: str, name: str) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Norm())
    learner = fm.MAML(patched, lr=fm.LearnedRate(per=()), steps=2, **SETTINGS[name])
    out = learner(BATCH)
    changed = {
        "adapted": patched.model.classifier.weight,
        "shared": patched.model.bert.pooler.dense.weight,
        "rate": learner.rates.values,
    }[which]
    expected = oracle.gradients(learner, learner(BATCH).loss)
    with torch.no_grad():
        changed.add_(1.0)
    if which == "adapted" and "chunk" not in name:
        # copied into the packed buffer
        oracle.assert_close(oracle.gradients(learner, out.loss), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.backward()


@pytest.mark.parametrize("name", ["recompute", "unroll-chunk2"])
def test_autocast_is_restored(name: str) -> None:
    def grads(settings: dict, lowered: bool = True) -> dict[str, Tensor]:
        patched = fm.patch(oracle.tiny_bert().float(), fm.Params("*"))
        # a bound that clips nothing: the same products, whatever the mode
        learner = fm.MAML(patched, lr=0.1, steps=2, clip_norm=1e6, **settings)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            out = learner(BATCH)
        return oracle.gradients(learner, oracle.weighted(out))

    reference = grads({"memory": "unroll"})
    found = grads(SETTINGS[name])
    plain = grads({"memory": "unroll"}, lowered=False)

    def distance(a, b) -> float:
        return float(sum((a[n] - b[n]).square().sum() for n in a).sqrt())

    assert distance(found, reference) < 1e-3 * distance(plain, reference)


# -- graphs: repeated backward, accumulation, lifetime ---------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_backward_twice(name: str) -> None:
    """retain_graph accumulates; without it the second backward is torch's own error."""
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.MAML(patched, lr=0.1, steps=2, **SETTINGS[name])
    once = oracle.gradients(learner, learner(BATCH).loss)
    out = learner(BATCH)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    twice = {n: p.grad for n, p in learner.named_parameters()}
    oracle.assert_close(twice, {n: 2 * g for n, g in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_frozen_adapted_parameters_accumulate_too(name: str) -> None:
    model = oracle.tiny_bert().requires_grad_(False)
    learner = fm.MAML(fm.patch(model, fm.Head()), lr=0.1, steps=2, **SETTINGS[name])
    learner(BATCH).loss.backward()
    first = model.classifier.weight.grad.clone()
    learner(BATCH).loss.backward()
    torch.testing.assert_close(model.classifier.weight.grad, 2 * first, rtol=1e-12, atol=0)
    assert not model.classifier.weight.requires_grad
    assert model.bert.pooler.dense.weight.grad is None
    learner.zero_grad()
    assert model.classifier.weight.grad is None


@pytest.mark.parametrize("name", [*SETTINGS, "implicit"])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "unused"])
def test_nothing_outlives_the_output(backward: bool, name: str) -> None:
    """Everything a step allocates is freed by counting references, without the collector."""
    model = oracle.tiny_bert(layers=2)
    patched = fm.patch(model, fm.Params("bert.encoder.layer.1", "classifier"))
    if name == "implicit":
        learner = fm.IMAML(patched, lr=0.1, steps=2)
    else:
        learner = fm.MAML(patched, lr=0.1, steps=2, **SETTINGS[name])
    learner(BATCH).loss.backward()  # first use: plans and gradients
    gc.collect()
    gc.disable()
    try:
        with PeakMemory() as all_gone:
            out = learner(BATCH)
            if backward:
                out.loss.backward()
                learner.zero_grad(set_to_none=False)
            del out
        with PeakMemory() as graph_gone:
            out = learner(BATCH)
            out.loss.backward()
            learner.zero_grad(set_to_none=False)
    finally:
        gc.enable()
    assert all_gone.peak > 100_000 and all_gone.now == 0
    # backward() frees the graph while the caller still holds the output; the row of initial
    # values and some small masks stay until then.
    results = sum(t.numel() * 8 for t in (out.params.packed, out.logits, out.support_losses))
    assert graph_gone.now <= results + patched.init(1).packed.nbytes + 2048


def test_threads_share_one_learner() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    learner = fm.MAML(patched, lr=0.1, steps=2, memory="recompute")
    batches = [oracle.as_batch(oracle.make_tasks(3, seed=i)) for i in range(4)]
    expected = [learner(b).loss.item() for b in batches]
    found: dict[int, float] = {}

    def work(i: int) -> None:
        for _ in range(3):
            out = learner(batches[i])
            torch.autograd.grad(out.loss, patched.model.classifier.weight)
            found[i] = out.loss.item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == pytest.approx(expected, rel=1e-12)


REREAD = [{"memory": "recompute"}, {"memory": "unroll", "task_chunk": 1}]


@pytest.mark.parametrize("settings", REREAD, ids=["recompute", "chunks"])
@pytest.mark.parametrize("what", ["labels", "frozen"])
def test_what_is_read_again_may_not_change_meanwhile(what: str, settings: dict) -> None:
    model = oracle.tiny_bert()
    model.bert.requires_grad_(False)
    learner = fm.MAML(fm.patch(model, fm.LoRA(r=2) + fm.Head()), lr=0.1, steps=2, **settings)
    batch = oracle.as_batch(oracle.make_tasks(2))
    out = learner(batch)
    with torch.no_grad():
        if what == "labels":
            batch.support["labels"].add_(0)
        else:
            model.bert.encoder.layer[0].output.dense.bias.mul_(2)
    weights = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="a batch or a frozen weight was changed in place"):
        (out.task_losses * weights).sum().backward()


class Scaled(torch.nn.Module):
    """Cross-entropy of logits that a learned number scales."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, outputs, batch) -> Tensor:
        logits = (outputs.logits * self.scale).movedim(2, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").mean(1)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"compile": True}], ids=str)
def test_losses_that_learn(settings: dict, optimizer: str) -> None:
    found = {}
    for name, more in {"expected": {"memory": "unroll"}, "got": settings}.items():
        learner = fm.MAML(
            fm.patch(oracle.tiny_bert(), fm.LoRA(r=2) + fm.Head()),
            lr=0.3, steps=2, optimizer=optimizer, loss_fn=Scaled(), **more,
        )  # fmt: skip
        found[name] = oracle.gradients(learner, oracle.weighted(learner(BATCH)))
    assert float(found["got"]["loss_fn.scale"].abs()) > 1e-3
    oracle.assert_close(found["got"], found["expected"])
