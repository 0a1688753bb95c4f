"""Each algorithm against its paper, in float64."""

from __future__ import annotations

from pathlib import Path

import episode_oracle as oracle
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.batch import join_sets
from fastmeta.engine.implicit import conjugate_gradient
from fastmeta.engine.losses import mask_ways

TASKS = oracle.make_tasks(3)
BATCH = oracle.as_batch(TASKS)


# -- ANIL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("backbone", [True, False], ids=["body learns", "body frozen"])
@pytest.mark.parametrize("order", [1, 2])
def test_anil(order: int, backbone: bool, memory: str) -> None:
    model = oracle.tiny_bert()
    model.bert.requires_grad_(backbone)
    learner = fm.ANIL(fm.patch(model, fm.Head()), lr=0.3, steps=3, order=order, memory=memory)
    names = {name for name, _ in learner.named_parameters()}
    assert ("bert.pooler.dense.weight" in names) is backbone
    oracle.assert_same(learner, learner(BATCH), oracle.loop(learner, TASKS), TASKS)


def test_anil_refuses_a_body() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Norm())
    with pytest.raises(ValueError, match=r"ANIL adapts the head only, but .* 'bert\.embeddings"):
        fm.ANIL(patched)


# -- MetaSGD ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, fm.LearnedRate(per="layer", init=0.1)], ids=["param", "layer"])
def test_meta_sgd(lr) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    learner = fm.MetaSGD(patched, lr=lr, steps=2)
    expected = patched.layout.num_params if lr == 0.1 else len(patched.layout)
    assert learner.rates.values.shape == (expected,)
    assert bool((learner.rates.values == 0.1).all())
    oracle.with_varied_rates(learner)
    oracle.assert_same(learner, learner(BATCH), oracle.loop(learner, TASKS), TASKS)


# -- Reptile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("use_query", [True, False])
def test_reptile(use_query: bool, chunk: int | None) -> None:
    """The pseudo-gradient is the mean of (initial - adapted)."""
    tasks = oracle.make_tasks(3, ragged=True, classes=4)
    model = oracle.tiny_bert(classes=4)
    patched = fm.patch(model, fm.Params("bert.encoder", "classifier"))
    learner = fm.Reptile(patched, lr=0.1, steps=3, use_query=use_query, task_chunk=chunk)
    out = learner(oracle.as_batch(tasks))
    seen = []
    for support, query, ways in tasks:
        both = oracle.as_batch([(support, query, ways)])
        joined = {k: v[0] for k, v in join_sets(both.support, both.query).items()}
        seen.append((joined if use_query else support, query, ways))
    expected = oracle.loop(learner, seen)
    torch.testing.assert_close(out.task_losses, torch.stack(expected.losses).detach())
    torch.testing.assert_close(out.loss.detach(), out.task_losses.mean())
    found = oracle.gradients(learner, out.loss)
    start = dict(learner.named_parameters())
    want = {
        name: torch.stack([start[name] - fast[name] for fast in expected.fast]).mean(0)
        for name in patched.layout.names
    }
    oracle.assert_close({name: found[name] for name in want}, want)
    assert not found["bert.pooler.dense.weight"].any()


def test_reptile_with_sgd_is_the_papers_update() -> None:
    model = oracle.tiny_bert()
    learner = fm.Reptile(fm.patch(model, fm.Head()), lr=0.1, steps=3)
    start = model.classifier.weight.detach().clone()
    out = learner(BATCH)
    out.loss.backward()
    torch.optim.SGD(learner.parameters(), lr=0.25).step()
    target = out.params["classifier.weight"].mean(0)
    torch.testing.assert_close(model.classifier.weight, start + 0.25 * (target - start))


def test_reptile_evaluates_on_the_support_set() -> None:
    learner = fm.Reptile(fm.patch(oracle.tiny_bert(), fm.Head()), lr=0.1, steps=3)
    with torch.no_grad():
        found = learner(BATCH)
    expected = fm.adapt(learner.patched, BATCH.support, lr=0.1, steps=3)
    torch.testing.assert_close(found.params.packed, expected.params.packed)


def test_reptile_sums_over_the_places_of_a_word() -> None:
    """A table of which the texts name few rows, against one that is held whole."""
    support, query = (dict(rows) for rows in (BATCH.support, BATCH.query))
    support["input_ids"] = support["input_ids"][:, :1].expand(-1, 3, -1).clone()
    patched = fm.patch(oracle.tiny_bert(words=200), fm.Params("*"))
    whole = fm.rules.SGD(weight_decay=torch.tensor(0.0, dtype=torch.float64))
    found = []
    for optimizer in ("sgd", whole):
        learner = fm.Reptile(patched, lr=0.1, steps=2, optimizer=optimizer)
        found.append(oracle.gradients(learner, learner(fm.TaskBatch(support, query)).loss))
    oracle.assert_close(found[0], found[1])


def test_reptile_stays_where_every_task_diverges() -> None:
    def lost(outputs, batch) -> Tensor:
        return outputs.logits.flatten(1).sum(1) * float("nan")

    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.Reptile(patched, lr=0.1, steps=1, loss_fn=lost)
    out = learner(BATCH)
    out.loss.backward()
    assert out.diverged.all()
    assert all((p.grad == 0).all() for p in learner.parameters() if p.grad is not None)


def test_reptile_is_first_order() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    assert fm.Reptile(patched).order == 1
    with pytest.raises(ValueError, match="Reptile is first-order: order must be 1, got 2"):
        fm.Reptile(patched, order=2)
    with pytest.raises(ValueError, match=r"initial values only: .* 'inner_lr.values' would learn"):
        fm.Reptile(patched, lr=fm.LearnedRate())


# -- iMAML -----------------------------------------------------------------------------------


def test_conjugate_gradients_solve_every_row() -> None:
    g = torch.Generator().manual_seed(0)
    half = torch.randn(4, 6, 6, generator=g).double()
    a = half @ half.mT + torch.eye(6)
    b = torch.randn(4, 6, generator=g).double()
    b[3] = 0
    x = conjugate_gradient(lambda v: (a @ v.unsqueeze(2)).squeeze(2), b, 6)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-10)
    more = conjugate_gradient(lambda v: (a @ v.unsqueeze(2)).squeeze(2), b, 40)
    torch.testing.assert_close(more, torch.linalg.solve(a, b), rtol=1e-10, atol=1e-12)
    assert not more[3].any()


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    a = torch.diag(torch.tensor([2.0, 1.0, -1.0]))
    b = torch.tensor([[1.0, 1.0, 0.9], [1.0, 2.0, 0.0]])
    found = [conjugate_gradient(lambda v: v @ a, b, steps) for steps in range(1, 6)]
    for later in found[1:]:
        torch.testing.assert_close(later[0], found[0][0])
    torch.testing.assert_close(found[-1][1], torch.tensor([0.5, 2.0, 0.0]))


def imaml(spec: fm.Spec, lam: float, steps: int, cg_steps: int, lr: float, **kwargs) -> fm.IMAML:
    model = oracle.tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    return fm.IMAML(fm.patch(model, spec), lr=lr, steps=steps, lam=lam, cg_steps=cg_steps, **kwargs)


@pytest.mark.parametrize("chunk", [None, 2])
def test_imaml_solves_the_dense_system(chunk: int | None) -> None:
    """(I + H / lam) v = d with H formed column by column, wherever the inner loop stopped."""
    lam = 2.0
    learner = imaml(fm.Head(), lam, steps=3, cg_steps=60, lr=0.1, task_chunk=chunk)
    out = learner(BATCH)
    found = oracle.gradients(learner, out.loss)
    model, names = learner.patched.model, ["classifier.weight", "classifier.bias"]
    shared = {n: p for n, p in learner.named_parameters() if n not in names}
    want = {n: torch.zeros_like(p) for n, p in learner.named_parameters()}
    for t, (support, query, _) in enumerate(TASKS):
        phi = torch.cat([out.params.task(t)[n].detach().flatten() for n in names])
        phi.requires_grad_()

        def loss(task_set: dict[str, Tensor], phi: Tensor) -> Tensor:
            weight, bias = phi[:48].view(3, 16), phi[48:]
            inputs = {k: v for k, v in task_set.items() if k != "labels"}
            tensors = dict(zip(names, (weight, bias), strict=True))
            logits = torch.func.functional_call(model, tensors, (), inputs).logits
            return oracle.cross_entropy(logits, task_set, None)

        (d, *direct) = torch.autograd.grad(
            loss(query, phi), [phi, *shared.values()], allow_unused=True
        )
        (g,) = torch.autograd.grad(loss(support, phi), phi, create_graph=True)
        h = torch.stack([torch.autograd.grad(e, phi, retain_graph=True)[0] for e in g])
        v = torch.linalg.solve(torch.eye(51) + h / lam, d)
        mixed = torch.autograd.grad(g, list(shared.values()), -v / lam, allow_unused=True)
        want["classifier.weight"] += v[:48].view(3, 16) / 3
        want["classifier.bias"] += v[48:] / 3
        for name, one, two in zip(shared, direct, mixed, strict=True):
            for part in (one, two):
                if part is not None:
                    want[name] += part / 3
    oracle.assert_close(found, want)


def test_imaml_is_maml_where_the_inner_loop_has_converged() -> None:
    """Unrolling the same proximal loop gives the same gradient of everything that learns."""
    steps, lam, lr = 120, 4.0, 0.2
    learner = imaml(fm.Head(), lam, steps, cg_steps=60, lr=lr)
    out = learner(BATCH)
    found = oracle.gradients(learner, out.loss)
    meta = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    losses = []
    for support, query, _ in TASKS:

        def logits(task_set: dict[str, Tensor], head: dict[str, Tensor]) -> Tensor:
            inputs = {k: v for k, v in task_set.items() if k != "labels"}
            tensors = {**meta, **head}
            return torch.func.functional_call(learner.patched.model, tensors, (), inputs).logits

        theta = {n: meta[n] for n in ("classifier.weight", "classifier.bias")}
        phi = dict(theta)
        for _ in range(steps):
            loss = oracle.cross_entropy(logits(support, phi), support, None)
            loss = loss + lam / 2 * sum((phi[n] - theta[n]).square().sum() for n in phi)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        losses.append(oracle.cross_entropy(logits(query, phi), query, None))
    unrolled = torch.autograd.grad(
        torch.stack(losses).mean(), list(meta.values()), allow_unused=True
    )
    want = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(meta.items(), unrolled, strict=True)
    }
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    oracle.assert_close(found, want, rtol=1e-8)


def test_imaml_memory_does_not_depend_on_the_steps() -> None:
    from fastmeta.engine.meter import PeakMemory

    def peak(steps: int) -> int:
        learner = imaml(fm.Head(), 1.0, steps, cg_steps=2, lr=0.1)
        learner(BATCH).loss.backward()
        with PeakMemory() as meter:
            learner(BATCH).loss.backward()
        return meter.peak

    assert peak(12) <= peak(2) + 1024


def test_imaml_refuses_a_learned_rate_and_bad_settings() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    with pytest.raises(ValueError, match="does not depend on the path: lr must be a number"):
        fm.IMAML(patched, lr=fm.LearnedRate())
    with pytest.raises(ValueError, match="lam must be a finite number above 0, got 0"):
        fm.IMAML(patched, lam=0)
    with pytest.raises(ValueError, match="cg_steps must be an integer of at least 1, got 0"):
        fm.IMAML(patched, cg_steps=0)
    with pytest.raises(ValueError, match="differentiates no inner step: expected no order, got 1"):
        fm.IMAML(patched, order=1)
    with pytest.raises(ValueError, match="inner step: expected no truncate, got 3"):
        fm.IMAML(patched, truncate=3)


# -- what all learners share -----------------------------------------------------------------

LEARNERS = [fm.MAML, fm.ANIL, fm.Reptile, fm.MetaSGD, fm.IMAML]


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_training_learns_and_is_saved(algorithm, tmp_path: Path) -> None:
    """The outer optimizer moves the user's model, and save_pretrained keeps what it learned."""
    model = oracle.tiny_bert()
    learner = algorithm(fm.patch(model, fm.Head()), lr=0.1, steps=2)
    outer = torch.optim.Adam(learner.parameters(), lr=0.02)
    start = {n: p.detach().clone() for n, p in learner.named_parameters()}
    losses = []
    for _ in range(12):
        out = learner(BATCH)
        losses.append(out.loss.item())
        outer.zero_grad()
        out.loss.backward()
        outer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(model.classifier.weight, start["classifier.weight"])
    model.save_pretrained(tmp_path)
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    found = algorithm(fm.patch(loaded.eval(), fm.Head()), lr=0.1, steps=2)
    if algorithm is not fm.MetaSGD:
        with torch.no_grad():
            torch.testing.assert_close(found(BATCH).loss, learner(BATCH).loss)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_evaluating_keeps_no_graph(algorithm) -> None:
    learner = algorithm(fm.patch(oracle.tiny_bert(), fm.Head()), lr=0.1, steps=2)
    with torch.no_grad():
        out = learner(BATCH, steps=4)
    for tensor in (out.loss, out.task_losses, out.logits, out.params.packed):
        assert not tensor.requires_grad
    assert out.support_losses.shape == (4, 3)
    assert out.accuracy.shape == (3,) and out.logits.shape == (3, 4, 3)
    assert bool((out.support_losses[-1] < out.support_losses[0]).all())


@pytest.mark.parametrize("chunk", [None, 2, "auto"])
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_adapting_and_predicting(algorithm, chunk: int | str | None) -> None:
    """What a service takes from a learner: its own fast weights and logits, no graph."""
    tasks = oracle.make_tasks(3, ragged=True)
    batch = oracle.as_batch(tasks)
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = algorithm(patched, lr=0.1, steps=2, optimizer="momentum", task_chunk=chunk)
    if algorithm is fm.MetaSGD:
        oracle.with_varied_rates(learner)
    with torch.no_grad():
        out = learner(batch, steps=3)
    params = learner.adapt(batch.support, batch.ways, steps=3)
    torch.testing.assert_close(params.packed, out.params.packed)
    assert not params.packed.requires_grad
    inputs = {k: v for k, v in batch.query.items() if k != "labels"}
    masked = mask_ways(out.logits, batch.ways)
    torch.testing.assert_close(learner.predict(params, ways=batch.ways, **inputs), masked)
    torch.testing.assert_close(learner.predict(params, **inputs), out.logits)
    again = learner.adapt(batch.support, batch.ways.tolist())  # the learner's own steps
    assert not torch.equal(again.packed, params.packed)
    with pytest.raises(ValueError, match=r"in 0\.\.1 \(the task's ways is 2"):
        learner.adapt(batch.support, 2)


def test_rates_of_tasks_are_those_of_their_places() -> None:
    rate = fm.LearnedRate(per="task", init=0.1, num_tasks=3)
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Norm())
    for chunk in (None, 2):
        learner = fm.MAML(patched, lr=rate, steps=2, task_chunk=chunk)
        oracle.with_varied_rates(learner)
        found = learner.adapt(BATCH.support)
        torch.testing.assert_close(found.packed, learner(BATCH).params.packed.detach())
    with pytest.raises(ValueError, match="learned per task for 3 tasks, got 2 tasks"):
        learner.adapt(BATCH[:2].support)


def test_state_dict_round_trip() -> None:
    def make(seed: int) -> fm.MetaSGD:
        return fm.MetaSGD(fm.patch(oracle.tiny_bert(seed), fm.Head()), lr=0.1, steps=1)

    one, two = make(0), make(1)
    oracle.with_varied_rates(one)
    assert one(BATCH).loss != two(BATCH).loss
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(BATCH).loss, two(BATCH).loss)
    state = one.state_dict()
    assert state.keys() == dict(one.named_parameters()).keys()
    rate = state.pop("inner_lr.values")
    with pytest.raises(ValueError, match=r"missing \['inner_lr"):
        two.load_state_dict(state)
    before = {n: p.detach().clone() for n, p in two.named_parameters()}
    with pytest.raises(
        ValueError, match=r"expected shape \[\d+\] for 'inner_lr.values', got \[3\]"
    ):
        two.load_state_dict({**state, "inner_lr.values": rate[:3]})
    assert all(torch.equal(before[n], p) for n, p in two.named_parameters())


def test_the_model_is_moved_before_patching() -> None:
    learner = fm.MAML(fm.patch(oracle.tiny_bert(), fm.Head()))
    for stay in (learner.double, learner.cpu, lambda: learner.to("cpu", torch.float64)):
        assert stay() is learner
    for move in (learner.float, lambda: learner.to("meta"), learner.half):
        with pytest.raises(RuntimeError, match="move or convert the model, then patch"):
            move()


def test_a_rule_of_ones_own() -> None:
    """The example of UpdateRule: smoothed signs, with the library's masks and chunks."""

    class Smooth(fm.rules.UpdateRule):
        def update(self, params, grads, state, lr, step, *, active=None, segments=None):
            new = params - lr * torch.tanh(grads)
            if active is not None:
                new = torch.where(active.unsqueeze(1), new, params)
            return new, state

    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    for memory in ("unroll", "recompute"):
        learner = fm.MAML(patched, lr=0.1, steps=2, optimizer=Smooth(), memory=memory)
        out = learner(BATCH)
        expected = oracle.loop(
            learner, TASKS, rule=lambda p, g, s, lr, k: (p - lr * torch.tanh(g), s)
        )
        oracle.assert_same(learner, out, expected, TASKS)


def test_a_plain_module() -> None:
    """Any module with logits works: no transformers model, no configuration."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 7).double()
            self.head = nn.Linear(7, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    torch.manual_seed(0)
    net = Net()
    sets = [
        {"x": torch.randn(3, 4, 5, dtype=torch.float64), "labels": torch.randint(0, 3, (3, 4))}
        for _ in range(2)
    ]
    learner = fm.MAML(fm.patch(net, fm.Params("*")), lr=0.2, steps=3)
    out = learner(fm.TaskBatch(*sets))
    meta = list(net.parameters())
    losses = []
    for t in range(3):
        fast = dict(net.named_parameters())
        for task_set in [sets[0]] * 3:
            logits = torch.func.functional_call(net, fast, (task_set["x"][t],))
            loss = nn.functional.cross_entropy(logits, task_set["labels"][t])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - 0.2 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        logits = torch.func.functional_call(net, fast, (sets[1]["x"][t],))
        losses.append(nn.functional.cross_entropy(logits, sets[1]["labels"][t]))
    want = torch.autograd.grad(torch.stack(losses).mean(), meta)
    found = oracle.gradients(learner, out.loss)
    oracle.assert_close(found, dict(zip(found, want, strict=True)))
