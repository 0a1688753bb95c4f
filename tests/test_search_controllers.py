"""Controllers: what they learn, what they allow, exact hypergradients, states that go on."""

from __future__ import annotations

import pytest
import search_oracle as oracle
import torch

import fastmeta as fm
from fastmeta.search import (
    DifferentiableController,
    Evolution,
    LSTMController,
    RandomSearch,
    Range,
    Space,
    When,
    pareto_front,
)
from fastmeta.search.lstm import leave_one_out
from fastmeta.search.relaxed import Relaxation


@pytest.fixture(scope="module")
def space():
    return Space(
        oracle.tiny_bert()[0],
        layers="each",
        heads=[4, 2, 1],
        widths=[1.0, 0.75, 0.5],
        uniform=False,
        optimizer=["sgd", "adam"],
        lr=Range(1e-3, 1, log=True),
        weight_decay=[0.0, 0.1],
        conditions=[When("weight_decay", "optimizer", "adam")],
    )


def reward(p) -> float:
    """Largest with every layer kept, few heads at the bottom, and a rate near 0.03."""
    near = abs(torch.tensor(p.lr / 0.03).log10().item())
    heads = sum(h == want for h, want in zip(p.heads, (1, 2, 4), strict=True))
    return sum(p.kept) + heads + (p.optimizer == "adam") - near


MAKERS = [
    RandomSearch,
    lambda space, **k: Evolution(space, population=16, tournament=4, **k),
    lambda space, **k: LSTMController(space, hidden=16, **k),
]


def search(controller, steps: int, count: int = 16) -> list[float]:
    best, found = float("-inf"), []
    for _ in range(steps):
        proposals = controller.propose(count)
        rewards = [reward(p) for p in proposals]
        controller.observe(proposals, rewards)
        best = max(best, *rewards)
        found.append(sum(rewards) / count)
    return [best, *found]


def test_those_that_learn_do(space):
    random, evolution, lstm = (search(make(space, seed=1), 16) for make in MAKERS)
    assert evolution[-1] > random[-1] + 0.7 and lstm[-1] > random[-1] + 0.7
    assert evolution[0] > random[0] and lstm[0] > random[0]


@pytest.mark.parametrize("make", MAKERS, ids=["random", "evolution", "lstm"])
def test_only_what_is_allowed_is_proposed(space, make):
    controller = make(space, seed=0, allowed=lambda p: sum(p.kept) == 2)
    for _ in range(2):
        proposals = controller.propose(8)
        assert len(proposals) == 8 and all(sum(p.kept) == 2 for p in proposals)
        controller.observe(proposals, [reward(p) for p in proposals])
    with pytest.raises(ValueError, match="of 2000 candidates drawn none is within the budget"):
        make(space, allowed=lambda p: False).propose(1)


@pytest.mark.parametrize(
    "make", [*MAKERS, DifferentiableController], ids=["random", "evolution", "lstm", "relaxed"]
)
def test_a_saved_state_goes_on_exactly(space, make, tmp_path):
    one, other = make(space, seed=3), make(space, seed=4)
    search(one, 2)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        a, b = one.propose(8), other.propose(8)
        assert [p.key for p in a] == [p.key for p in b]
        one.observe(a, [reward(p) for p in a])
        other.observe(b, [reward(p) for p in b])


def test_probabilities_are_those_of_the_samples(space):
    """Over all options of a small space the policy's probabilities sum to one."""
    small = Space(space.model, layers="each", optimizer=["sgd", "adam"], weight_decay=[0.0, 0.1],
                  conditions=[When("weight_decay", "optimizer", "adam")])  # fmt: skip
    controller = LSTMController(small, seed=0, hidden=8)
    proposals = controller.propose(16)
    controller.observe(proposals, [float(p.optimizer == "adam") for p in proposals])
    every = {}
    for bits in range(64):
        values = {f"layer.{i}": bool(bits >> i & 1) for i in range(3)}
        values |= {"optimizer": ("sgd", "adam")[bits >> 3 & 1],
                   "weight_decay": (0.0, 0.1)[bits >> 4 & 1]}  # fmt: skip
        p = small.proposal(values)
        every[p.key] = p
    logs, _ = controller.policy(*controller._coded(list(every.values())), None)
    assert float(logs.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_baseline_leaves_the_candidate_itself_out():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5])
    torch.testing.assert_close(leave_one_out(rewards), expected / expected.std())
    assert not leave_one_out(torch.tensor([3.0])).any()
    assert not leave_one_out(torch.tensor([2.0, 2.0])).any()


def test_a_policy_that_reads_the_task_proposes_for_it(space):
    small = Space(space.model, optimizer=["sgd", "adam"], lr=[0.01, 0.1])
    controller = LSTMController(small, seed=0, hidden=16, context=4)
    tasks = {"sgd": torch.tensor([1.0, 0, 0, 0]), "adam": torch.tensor([0, 1.0, 0, 0])}
    for _ in range(40):
        for name, task in tasks.items():
            proposals = controller.propose(8, task)
            controller.observe(proposals, [float(p.optimizer == name) for p in proposals], task)
    assert all(controller.best_guess(task).optimizer == name for name, task in tasks.items())
    with pytest.raises(ValueError, match="task embeddings of width 4, got 3"):
        controller.propose(1, torch.zeros(3))
    controller.policy.double()  # embeddings come from the model, and go where the policy is
    assert controller.best_guess(tasks["adam"]).optimizer == "adam"


def test_relaxed_choices_have_exact_second_order_gradients():
    model, tokenizer = oracle.tiny_bert(num_layers=2)
    space = Space(
        model, layers=[1, 2], heads=[4, 2], widths=[1.0, 0.5], lora=[0, 2], adapted_layers=[1, 2],
        lr=Range(0.05, 0.5, log=True), steps=[1, 2], weight_decay=[0.0, 0.1],
    )  # fmt: skip
    evaluator = fm.search.Evaluator(space)
    batch = oracle.batch_of(tokenizer)
    controller = DifferentiableController(space)
    with torch.no_grad():
        for logits in controller.logits:
            logits.add_(0.5 * torch.randn_like(logits))
    controller.objective(evaluator, batch).backward()
    step = 1e-5
    for d, logits in zip(controller.decisions, controller.logits, strict=True):
        direction = torch.randn_like(logits)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                logits.add_(sign * step * direction)
            values.append(controller.objective(evaluator, batch).detach())
            with torch.no_grad():
                logits.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(
            (logits.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9, msg=d.name
        )


def test_whole_parts_are_the_model_itself():
    """With all probability on everything, the relaxed pass is the ordinary model."""
    model, tokenizer = oracle.tiny_bert()
    space = Space(model, layers=[3, 1], heads=[4, 2], widths=[1.0, 0.5], lora=[2, 0], lr=[0.1, 0.2])
    evaluator, batch = fm.search.Evaluator(space), oracle.batch_of(tokenizer)
    controller = DifferentiableController(space, cost_weight=0.0)
    with torch.no_grad():
        for logits in controller.logits:
            logits[0] = 200.0
    found = float(controller.objective(evaluator, batch).detach())
    single = evaluator.evaluate([space.proposal()], batch)[0]
    assert found == pytest.approx(sum(single.losses) / len(single.losses), rel=1e-9)


@pytest.mark.parametrize("family", ["modernbert", "gpt2"])
def test_expected_arithmetic_of_layers_whose_parts_are_not_known(family):
    model = oracle.FAMILIES[family]()
    controller = DifferentiableController(Space(model, layers=[2, 1], lr=[0.1, 0.2]))
    arithmetic = Relaxation(controller.space, controller.shares()).arithmetic()
    arithmetic.backward()
    (grad,) = (p.grad for p in controller.logits if p.grad is not None)
    assert float(arithmetic.detach()) == pytest.approx(0.75)
    assert bool(grad.isfinite().all()) and bool(grad.all())


def test_a_range_of_steps_is_not_relaxed():
    """The inner loop takes the expected number of steps; rewards teach the distribution."""
    model, tokenizer = oracle.tiny_bert(num_layers=2)
    batch = oracle.batch_of(tokenizer, tasks=1)
    found = []
    for steps in (Range(1, 3, integer=True), [2]):
        space = Space(model, layers=[2, 1], lr=0.1, steps=steps)
        controller = DifferentiableController(space)
        loss = controller.objective(fm.search.Evaluator(space), batch)
        loss.backward()
        found.append((loss.detach(), controller.logits[0].grad))
        if isinstance(steps, Range):
            assert controller.logits[1].grad is None
            proposals = [space.proposal(steps=n) for n in (1, 2, 3)]
            controller.observe(proposals, [1.0, 0.0, 0.0])
            assert int(controller.shares()["steps"].argmax()) == 0
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_was_not_chosen_gets_no_credit(space):
    small = Space(
        space.model, optimizer=["sgd", "adam"], batch_size=[None, 2],
        conditions=[When("batch_size", "optimizer", "sgd")],
    )  # fmt: skip
    controller = DifferentiableController(small)
    adam, sgd = small.proposal(optimizer="adam"), small.proposal(batch_size=2)
    controller.observe([adam] * 3 + [sgd, small.proposal()], [1.0, 1.0, 1.0, 0.0, 0.0])
    shares = controller.shares()
    assert bool(shares["optimizer"][1] > 0.5)
    assert torch.equal(shares["batch_size"], torch.full((2,), 0.5, dtype=torch.float64))


def test_pareto_front():
    points = [(1, 5), (2, 4), (2, 4), (3, 1), (0, 5), (2, 3)]
    assert pareto_front(points) == [0, 1, 3]
    with pytest.raises(ValueError, match="equally many objectives"):
        pareto_front([(1, 2), (1,)])


def test_optuna_is_asked_for(space):
    optuna = pytest.importorskip("optuna", reason="the optuna controller needs optuna")
    del optuna
    controller = fm.search.OptunaController(space, seed=0)
    assert search(controller, 3)[0] > 0


def test_without_optuna_the_error_says_so(space, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install fastmeta\[optuna\]"):
        fm.search.OptunaController(space)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: LSTMController(s, hidden=0), "hidden must be an integer of at least 1, got 0"),
        (lambda s: LSTMController(s, lr=0.0), "lr and clip must be positive"),
        (lambda s: Evolution(s, population=1), "population must be at least 2"),
        (lambda s: Evolution(s, mutations=1.0), "mutations must be in"),
        (lambda s: DifferentiableController(s, passes=0), "passes at least 1"),
        (lambda s: LSTMController(Space(s.model)), "the space has a single candidate"),
    ],
)
def test_settings_out_of_range(space, make, message):
    with pytest.raises(ValueError, match=message):
        make(space)


def test_a_conditioned_search_learns_what_suits_which_tasks():
    """Tasks of few and of many classes whose best candidates differ by construction."""
    bert, tokenizer = oracle.tiny_bert(num_labels=6)
    model = fm.models.SentenceClassifier(bert.bert, 6, 5.0).double()
    space = Space(model, layers=[1, 3], lr=[0.05, 0.2], steps=1)
    texts = fm.data.builtin_tasks()
    small = {n: t.restrict(t.classes[:w]) for (n, t), w in zip(texts.items(), (2, 6), strict=False)}

    class Judge(fm.search.Evaluator):
        def evaluate(self, candidates, batch, **more):
            scores = super().evaluate(candidates, batch, **more)
            deep = int(batch.ways[0]) == 6
            for s in scores:
                s.accuracies = [float((sum(s.proposal.kept) == 3) == deep)]
            return scores

    loader = fm.data.TaskDataset(small, tokenizer, 1, 1, 2, num_batches=25, prefetch=0)
    found = fm.search.run_conditioned(
        space, loader, candidates=8, evaluator=Judge(space), progress=False, hidden=16
    )
    batch = next(iter(loader))
    depths = [sum(p.kept) for p in found.propose(batch.support, batch.ways)]
    assert depths == [3 if w == 6 else 1 for w in batch.ways.tolist()]
    assert found.rewards[-1] > found.rewards[0]
    embedding = fm.search.task_embedding(found.evaluator, batch.support, batch.ways)
    assert embedding.shape == (2, 2 * 32 + 2)
    first = {k: v[:1] for k, v in batch.support.items()}
    torch.testing.assert_close(
        fm.search.task_embedding(found.evaluator, first, batch.ways[:1]), embedding[:1]
    )
    with pytest.raises(ValueError, match="weights name one of flops"):  # before any task is read
        fm.search.run_conditioned(space, None, weights={"flop": 1.0}, progress=False)
