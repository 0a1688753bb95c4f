"""Truncated unrolls and persistent evolution strategies."""

from __future__ import annotations

import pytest
import torch
from episode_oracle import tiny_bert
from learned_oracle import Small, batch, oracle
from torch import Tensor

import fastmeta as fm

LR = 0.3


def learner_of(order: int = 1) -> fm.MAML:
    rule = fm.LearnedOptimizer(hidden=3, layers=1).double()
    patched = fm.patch(Small(), fm.Params("*"))
    return fm.MAML(patched, lr=LR, optimizer=rule, order=order, steps=2)


def by_loop(learner: fm.MAML, given: fm.TaskBatch, steps: int, order: int = 1) -> Tensor:
    """Mean query loss of every task after each of the first `steps` steps."""
    own = dict(learner.rule.named_parameters())
    model = learner.patched.model
    each = [oracle(model, own, "lstm", 1, given, k, LR, order) for k in range(1, steps + 1)]
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("order", [1, 2])
def test_one_window_is_exact(order: int):
    learner, given = learner_of(order), batch()
    out = fm.TruncatedUnroll(learner, horizon=3, truncation=3)(given)
    expected = by_loop(learner, given, 3, order)
    own = list(learner.rule.parameters())
    torch.testing.assert_close(out.task_losses, expected, rtol=1e-9, atol=0)
    got = torch.autograd.grad(out.loss, own)
    for g, e in zip(got, torch.autograd.grad(expected.mean(), own), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-12)


def test_windows_go_on_where_the_last_one_ended():
    learner, given = learner_of(), batch()
    unroll = fm.TruncatedUnroll(learner, horizon=4, truncation=2)
    first, second = unroll(given), unroll(batch(seed=5))  # the new batch waits
    whole = fm.adapt(learner.patched, given.support, steps=4, lr=LR, optimizer=learner.rule)
    torch.testing.assert_close(second.params.packed, whole.params.packed, rtol=1e-10, atol=1e-12)
    assert unroll.batch is None
    third = unroll(batch(seed=5))
    assert not torch.equal(third.params.packed, first.params.packed)
    assert {n.split(".")[0] for n, _ in unroll.named_parameters()} == {"optimizer"}


def test_pes_is_its_formula():
    """Against losses of the per-task loop at the same draws."""
    learner, given = learner_of(), batch()
    pes = fm.PES(learner, horizon=2, truncation=2, pairs=2, std=0.05, seed=3)
    center = {n: p.detach().clone() for n, p in learner.rule.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    expected = {n: torch.zeros_like(p) for n, p in center.items()}
    for _ in range(2):
        draw = {
            n: 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for n, p in center.items()
        }
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for n, p in learner.rule.named_parameters():
                    p.copy_(center[n] + sign * draw[n])
            losses.append(by_loop(learner, given, 2).mean().detach())
        for n in expected:
            expected[n] += draw[n] * (losses[0] - losses[1]) / (2 * 2 * 0.05**2)
    with torch.no_grad():
        for n, p in learner.rule.named_parameters():
            p.copy_(center[n])
    out = pes(given)
    out.loss.backward()
    for n, p in learner.rule.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-7, atol=1e-9)
        assert torch.equal(p.detach(), center[n])


def test_pes_estimates_the_gradient_of_the_whole_unroll():
    """Summed over windows, with many pairs, it points where the exact gradient does."""
    learner, given = learner_of(), batch()
    own = list(learner.rule.parameters())
    exact = torch.autograd.grad(by_loop(learner, given, 4).mean(), own)
    pes = fm.PES(learner, horizon=4, truncation=2, pairs=120, std=0.02)
    total = [torch.zeros_like(p) for p in own]
    for _ in range(2):
        found = torch.autograd.grad(pes(given).loss, own)
        total = [t + f / 2 for t, f in zip(total, found, strict=True)]
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (total, exact))
    assert float(a @ b / a.norm() / b.norm()) > 0.8
    assert 0.7 < float(a @ b / (b @ b)) < 1.3


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_evaluation_is_the_learners(make):
    learner, given = learner_of(), batch()
    unroll = make(learner, horizon=2, truncation=1)
    with torch.no_grad():
        torch.testing.assert_close(unroll(given).loss, learner(given).loss)
    assert unroll.batch is None


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_windows_in_bfloat16(make):
    """Products of a window are in the learner's dtype: as under autocast, near to float32."""
    given = batch()
    given = given.map(lambda t: t.float() if t.is_floating_point() else t)
    found = []
    for dtype, region in ((torch.bfloat16, False), (None, True), (None, False)):
        rule = fm.LearnedOptimizer(hidden=3, layers=1)
        patched = fm.patch(Small().float(), fm.Params("*"))
        learner = fm.MAML(patched, lr=LR, optimizer=rule, order=1, steps=2, compute_dtype=dtype)
        unroll = make(learner, horizon=4, truncation=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            unroll(given)
        if dtype:  # as one that a checkpoint takes up again
            again = make(learner, horizon=4, truncation=2)
            again.load_progress(unroll.progress())
            unroll = again
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            found.append(unroll(given).task_losses)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[2], rtol=0.05, atol=0)


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_a_checkpoint_goes_on_bit_by_bit(make):
    given = batch()
    first, second = (make(learner_of(), horizon=4, truncation=1) for _ in range(2))
    first(given)
    second.load_progress(first.progress())
    for _ in range(2):
        a, b = first(given), second(batch(seed=9))
        assert torch.equal(a.params.packed, b.params.packed)
        a.loss.backward(), b.loss.backward()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("part", ["support", "query"])
def test_a_task_that_diverges_leaves_the_gradient_alone(part: str):
    given, learner = batch(), learner_of(order=2)
    kept = torch.tensor([0, 2])
    unroll = fm.TruncatedUnroll(learner, horizon=4, truncation=2)
    alone = fm.TruncatedUnroll(learner, horizon=4, truncation=2)
    expected = [oracle_step(alone, given.select(kept)) for _ in range(2)]
    getattr(given, part)["x"][1] = float("nan")
    for loss, gradients in expected:
        found_loss, found = oracle_step(unroll, given)
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(found, gradients)


def oracle_step(unroll: fm.TruncatedUnroll, given: fm.TaskBatch):
    """Loss and gradients of the next window."""
    out = unroll(given)
    return out.loss.detach(), torch.autograd.grad(out.loss, list(unroll.parameters()))


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_learners_that_start_elsewhere_are_refused(make):
    """Or that do not learn their optimizer."""
    rule = fm.LearnedOptimizer(hidden=3, layers=1)
    patched = fm.patch(tiny_bert(), fm.Head())
    for learner in (
        fm.ProtoMAML(patched, optimizer=rule),
        fm.HyperNetwork(patched, optimizer=rule, steps=2),
    ):
        with pytest.raises(ValueError, match=f"from the model's own.*{type(learner).__name__}"):
            make(learner)
    with pytest.raises(ValueError, match="whose optimizer learns"):
        make(fm.MAML(patched, optimizer=rule.requires_grad_(False)))


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_the_mode_is_the_learners(make):
    learner = learner_of().eval()
    unroll = make(learner, horizon=2, truncation=1)
    assert not unroll.training and not learner.training and not learner.patched.training
    assert unroll(batch()).loss.requires_grad  # it learns in either mode
    assert unroll.train() is unroll and learner.patched.training


@pytest.mark.parametrize("make", [fm.TruncatedUnroll, fm.PES])
def test_a_task_that_diverges_does_not_count(make):
    given = batch()
    given.support["x"][1] = float("nan")
    out = make(learner_of(), horizon=2, truncation=2)(given)
    assert out.diverged.tolist() == [False, True, False]
    out.loss.backward()
    assert torch.isfinite(out.loss)
