"""Learned update rules: exact against a per-task loop, in every algorithm, frozen tasks, errors."""

from __future__ import annotations

import pytest
import torch
from learned_oracle import Small, batch, oracle

import fastmeta as fm

LR, NAN = 0.3, float("nan")
KINDS = ("lstm", "mlp", "gated")


def learner_of(kind: str, model: Small, layers: int = 2, **settings) -> fm.MAML:
    patched = fm.patch(model, fm.Params("*"))
    if kind == "gated":
        return fm.LSTMMetaLearner(patched, lr=LR, hidden=4, **settings)
    rule = fm.LearnedOptimizer(kind, hidden=4, layers=layers)
    return fm.MAML(patched, lr=LR, optimizer=rule, **settings)


def gradients(loss, learner) -> dict[str, torch.Tensor]:
    named = dict(learner.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient_is_that_of_a_loop(kind: str, order: int, memory: str):
    model, given, steps = Small(), batch(), 3
    learner = learner_of(kind, model, steps=steps, order=order, memory=memory)
    out = learner(given)
    own = dict(learner.rule.named_parameters())
    losses = oracle(model, own, kind, 2, given, steps, LR, order)
    torch.testing.assert_close(out.task_losses, losses, rtol=1e-9, atol=0)
    got, want = gradients(out.loss, learner), gradients(losses.mean(), learner)
    assert sum(n.startswith("optimizer.") for n in got) == len(own)
    # the rule's parameters are float32: their gradients are rounded to it
    for name, expected in want.items():
        low = expected.dtype == torch.float32
        scale = max(float(expected.abs().max()), 1e-6)
        error = float((got[name] - expected).abs().max())
        assert error <= (1e-6 if low else 1e-9) * scale, f"{name}: {error:.1e} at {scale:.1e}"
    assert max(float(g.abs().max()) for n, g in want.items() if "optimizer" in n) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_tasks_change_nothing(kind: str):
    found = []
    for chunk in (None, 2):
        learner = learner_of(kind, Small(), steps=2, task_chunk=chunk, memory="unroll")
        out = learner(batch())
        out.loss.backward()
        found.append([out.task_losses.detach(), *(p.grad for p in learner.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if a.dtype == torch.float32 else 1e-10, atol=1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_diverges_is_frozen_alone(kind: str):
    """The others and the gradient are what they are without it."""
    given = batch()
    given.support["x"][1] = float("inf")
    bad = learner_of(kind, Small(), steps=2, memory="unroll")
    out = bad(given)
    assert out.diverged.tolist() == [False, True, False]
    good = learner_of(kind, Small(), steps=2, memory="unroll")
    alone = good(given.select(torch.tensor([0, 2])))
    torch.testing.assert_close(out.task_losses[[0, 2]], alone.task_losses, rtol=1e-12, atol=0)
    out.loss.backward(), alone.loss.backward()
    for a, b in zip(bad.parameters(), good.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-12)
    start = bad.patched.init(1).packed[0]
    torch.testing.assert_close(out.params.packed[1], start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_task_gives_no_gradient_that_is_not_finite(kind: str):
    rule = learner_of(kind, Small()).rule.double()
    params = torch.randn(2, rule.layout.num_params, dtype=torch.float64, requires_grad=True)
    grads, losses = torch.ones_like(params), torch.tensor([0.5, NAN], dtype=torch.float64)
    grads[1] = NAN
    active = torch.tensor([True, False])
    options = {"losses": losses} if kind == "gated" else {}
    new, _ = rule.update(params, grads, rule.init(params), LR, 0, active=active, **options)
    found = torch.autograd.grad(new.sum(), [params, *rule.parameters()])
    assert torch.equal(new[1], params[1]) and all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_gradient_of_zeros(kind: str):
    rule = learner_of(kind, Small()).rule.double()
    params = torch.randn(2, rule.layout.num_params, dtype=torch.float64)
    new, _ = rule.update(params, torch.zeros_like(params), rule.init(params), LR, 0)
    assert new.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_stays_zero(kind: str):
    learner = learner_of(kind, Small(), steps=3, memory="unroll")
    packed = learner(batch()).params.packed
    for start, stop in learner.patched.layout.gaps:
        assert not packed[:, start:stop].any()


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_adapt_takes_it(kind: str):
    """The same fast weights as a learner's; nothing learns."""
    learner = learner_of(kind, Small(), steps=2, memory="unroll")
    given = batch()
    found = fm.adapt(learner.patched, given.support, steps=2, lr=LR, optimizer=learner.rule)
    torch.testing.assert_close(found.params.packed, learner(given).params.packed)
    assert not found.params.packed.requires_grad


def test_rates_of_every_form():
    for per in ("step", "layer", "param", ("layer", "step"), ()):
        patched = fm.patch(Small(), fm.Params("*"))
        rule = fm.LearnedOptimizer(hidden=3, layers=1)
        learner = fm.MAML(patched, lr=fm.LearnedRate(per=per, init=LR), optimizer=rule, steps=2)
        expected = fm.MAML(patched, lr=LR, optimizer=rule, steps=2)(batch()).task_losses
        out = learner(batch())
        torch.testing.assert_close(out.task_losses, expected, rtol=1e-6, atol=0)
        out.loss.backward()
        assert float(learner.rates.values.grad.abs().sum()) > 0


def test_other_algorithms_take_it():
    given = batch()
    rule = fm.LearnedOptimizer(hidden=3, layers=1)
    settings = {"optimizer": rule, "steps": 2}
    for make in (fm.Reptile, fm.IMAML):
        with pytest.raises(ValueError, match=r"frozen \(requires_grad_\(False\)\)"):
            make(fm.patch(Small(), fm.Params("*")), **settings)
    for make, spec in ((fm.ANIL, "head.*"), (fm.MetaSGD, "*"), (fm.Reptile, "*"), (fm.IMAML, "*")):
        rule.requires_grad_(make not in (fm.Reptile, fm.IMAML))
        learner = make(fm.patch(Small(), fm.Params(spec)), **settings)
        assert torch.isfinite(learner(given).loss)


def test_state_dict_carries_the_rule_and_names_what_is_missing():
    first, second = (learner_of("lstm", Small(), steps=1) for _ in range(2))
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.1)
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = fm.MAML(fm.patch(Small(), fm.Params("*")), steps=1)
    with pytest.raises(ValueError, match=r"missing \['optimizer\.lstm0_bias'"):
        second.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"unexpected.*optimizer"):
        plain.load_state_dict(first.state_dict())


def test_one_rule_serves_models_of_other_sizes():
    rule = fm.LearnedOptimizer("mlp", hidden=3)
    small = fm.patch(Small(), fm.Params("head.*"))
    large = fm.patch(Small(), fm.Params("*"))
    given = batch().support
    for patched in (small, large):
        found = fm.adapt(patched, given, steps=1, lr=0.1, optimizer=rule)
        assert found.params.packed.shape[1] == patched.layout.num_params
    assert rule.layout is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fm.LearnedOptimizer("gru"), "kind must be one of lstm, mlp, got 'gru'"),
        (lambda: fm.LearnedOptimizer(hidden=0), "hidden must be an integer of at least 1, got 0"),
        (lambda: fm.LearnedOptimizer(layers=0), "layers must be an integer of at least 1"),
        (lambda: fm.LearnedOptimizer(log_range=-1), "log_range must be a finite number above 0"),
        (
            lambda: fm.LSTMMetaLearner(fm.patch(Small(), fm.Params("*")), forget=1.0),
            r"forget must be a number in \(0, 1\), got 1.0",
        ),
        (
            lambda: fm.LSTMMetaLearner(fm.patch(Small(), fm.Params("*")), optimizer="sgd"),
            "is an optimizer itself: expected no optimizer, got 'sgd'",
        ),
        (
            lambda: fm.PES(fm.MAML(fm.patch(Small(), fm.Params("*")))),
            "expected a learner whose optimizer learns",
        ),
        (
            lambda: fm.TruncatedUnroll(learner_of("lstm", Small()), horizon=10, truncation=3),
            "horizon must be a multiple of truncation=3, got 10",
        ),
        (lambda: fm.PES(learner_of("lstm", Small()), std=0), "std must be a finite number above 0"),
        (lambda: fm.PES(fm.LearnedOptimizer()), "expected a learner such as fm.MAML"),
    ],
)
def test_settings_out_of_range(call, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_it_learns():
    """A few steps of meta-training lower the query loss after adaptation."""
    learner = learner_of("lstm", Small(), layers=1, steps=5, order=1)
    outer = torch.optim.Adam(learner.rule.parameters(), lr=2e-2)
    given = batch(tasks=8)
    given = fm.TaskBatch(given.support, given.support)
    losses = []
    for _ in range(25):
        out = learner(given)
        outer.zero_grad()
        out.loss.backward()
        outer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
