"""Metric-based learners against a loop over tasks in float64."""

from __future__ import annotations

import episode_oracle as oracle
import metric_oracle as metric
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm

TASKS = metric.make_tasks(3)
RAGGED = metric.make_tasks(3, ragged=True)
METRICS = ["sqeuclidean", "euclidean", "cosine", "cityblock", "chebyshev", "dot"]
LEARNERS = {
    "protonet": fm.ProtoNet,
    "matchingnet": fm.MatchingNet,
    "fce": lambda model, **k: fm.MatchingNet(model, full_context=True, fce_steps=2, **k),
    "relationnet": lambda model, **k: fm.RelationNet(model, hidden=6, **k),
    "protomaml": lambda model, **k: fm.ProtoMAML(model, ways=3, lr=0.1, steps=2, **k),
}


@pytest.fixture
def model() -> nn.Module:
    return oracle.tiny_bert()


def tasks_of(ragged: bool):
    return RAGGED if ragged else TASKS


# -- ProtoNet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_protonet_metrics(model, name: str, ragged: bool) -> None:
    learner = fm.ProtoNet(model, metric=name, temperature=0.7)
    features = metric.features_of(model.bert)
    metric.assert_same(
        learner, tasks_of(ragged), features, metric.protonet, metric=name, constant=0.7
    )


def test_protonet_minkowski(model) -> None:
    learner = fm.ProtoNet(model, metric="minkowski", p=3)
    features = metric.features_of(model.bert)
    metric.assert_same(learner, TASKS, features, metric.protonet, metric="minkowski", p=3)


@pytest.mark.parametrize("precision", ["diagonal", "full"])
def test_protonet_learns_precision_and_temperature(model, precision: str) -> None:
    learner = fm.ProtoNet(
        model,
        metric="mahalanobis",
        precision=precision,
        temperature="learned",
        initial_temperature=2.0,
    )
    comparison = learner.comparison
    assert float(comparison.temperature.detach()) == pytest.approx(2.0)
    start = comparison.precision if precision == "full" else comparison.precision.diag()
    torch.testing.assert_close(
        start.detach(), torch.eye(16, dtype=torch.float64), rtol=0, atol=2e-6
    )
    with torch.no_grad():
        for parameter in comparison.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    features = metric.features_of(model.bert)
    metric.assert_same(learner, RAGGED, features, metric.protonet, metric="mahalanobis")
    names = {n for n, _ in learner.named_parameters() if n.startswith("metric.")}
    learned = {"diagonal": "raw_precision", "full": "factor"}[precision]
    assert names == {"metric.comparison.log_temperature", f"metric.comparison.{learned}"}


# -- embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(model, pooling: str, left: bool) -> None:
    tasks = metric.make_tasks(3)
    if left:
        for task in tasks:
            for task_set in task[:2]:
                task_set["attention_mask"] = task_set["attention_mask"].flip(1)
    learner = fm.ProtoNet(model, pooling=pooling, normalize=True)
    features = metric.features_of(model.bert, pooling, normalize=True)
    metric.assert_same(learner, tasks, features, metric.protonet)


def test_projection(model) -> None:
    learner = fm.ProtoNet(model, projection=5, seed=3)
    weight = dict(learner.named_parameters())["metric.projection.weight"]
    assert weight.shape == (5, 16) and weight.dtype == torch.float64
    again = dict(fm.ProtoNet(model, projection=5, seed=3).named_parameters())
    assert torch.equal(weight, again["metric.projection.weight"])
    plain = metric.features_of(model.bert)
    metric.assert_same(learner, RAGGED, lambda s: plain(s) @ weight.T, metric.protonet)
    own = nn.Sequential(nn.Linear(16, 4), nn.Tanh()).double()
    learner = fm.ProtoNet(model, projection=own, metric="mahalanobis")
    assert learner.comparison.raw_precision.shape == (4,)
    metric.assert_same(
        learner, TASKS, lambda s: own(plain(s)), metric.protonet, metric="mahalanobis"
    )


def test_short_texts_do_not_wait_for_long_ones(model) -> None:
    """Rows of similar length run together: the same features, fewer columns."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (3, 20), generator=g)
    mask = (torch.arange(12) < lengths.unsqueeze(2)).long()
    ids = torch.randint(1, 20, (3, 20, 12), generator=g)
    learner = fm.ProtoNet(model)
    seen = []
    learner.embedding.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = learner.embed({"input_ids": ids, "attention_mask": mask})
    assert len(seen) == 4 and sum(n * length for n, length in seen) < mask.numel() * 0.9
    encoder = metric.features_of(model.bert)
    for t in range(3):
        want = encoder({"input_ids": ids[t], "attention_mask": mask[t]})
        torch.testing.assert_close(found[t], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [fm.LoRA(r=2, targets="query") + fm.Norm(), fm.Params("*")])
@pytest.mark.parametrize("head", [True, False])
def test_a_patched_model_learns_its_initial_values(model, spec, head: bool) -> None:
    model.requires_grad_(False)
    patched = fm.patch(model if head else model.bert, spec)
    for parameter in patched.slots.initial:
        with torch.no_grad():
            parameter.add_(0.1)
    learner = fm.ProtoNet(patched)
    assert [n for n, _ in learner.named_parameters()] == list(patched.layout.names)
    batch = oracle.as_batch(TASKS)
    one = learner(batch)
    merged = oracle.tiny_bert()
    values = oracle._merged(patched, dict(patched.named_parameters()), {})
    lead = "" if head else "bert."
    with torch.no_grad():
        for name, value in values.items():
            merged.get_parameter(lead + name).copy_(value)
    two = fm.ProtoNet(merged)(batch)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-10, atol=0)
    one.loss.backward()
    two.loss.backward()
    norm = "encoder.layer.0.output.LayerNorm.weight"
    got = model.bert.get_parameter(norm).grad
    torch.testing.assert_close(got, merged.bert.get_parameter(norm).grad, rtol=1e-9, atol=1e-12)


def test_models_without_and_with_other_outputs(model) -> None:
    """A headless transformer, a decoder, an encoder-decoder and a module of features."""
    batch = oracle.as_batch(TASKS)
    assert torch.equal(fm.ProtoNet(model.bert)(batch).loss, fm.ProtoNet(model)(batch).loss)
    torch.manual_seed(0)
    gpt = (
        tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=12)
        )
        .double()
        .eval()
    )
    learner = fm.ProtoNet(gpt, pooling="last")
    metric.assert_same(learner, TASKS, metric.features_of(gpt.transformer, "last"), metric.protonet)
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).eval()
    out = fm.ProtoNet(t5)(batch)
    out.loss.backward()
    assert t5.encoder.block[0].layer[0].SelfAttention.q.weight.grad is not None

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Net(3, 4)
    sets = [{"x": torch.randn(2, 6, 3), "labels": torch.arange(6).expand(2, 6) % 3}] * 2
    assert fm.ProtoNet(net)(fm.TaskBatch(*sets)).accuracy.tolist() != [0.0, 0.0]


def test_the_users_model_keeps_its_mode_and_shares_its_weights() -> None:
    model = oracle.tiny_bert(dropout=0.5)
    learner = fm.ProtoNet(model)
    batch = oracle.as_batch(TASKS)
    assert learner(batch).loss != learner(batch).loss  # dropout
    learner.eval()
    assert model.training and learner(batch).loss == learner(batch).loss
    model.bert.eval()
    rests = fm.ProtoNet(model)
    assert rests.training and rests(batch).loss == rests(batch).loss
    before = learner(batch).loss
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(1.5)
    assert learner(batch).loss != before


# -- MatchingNet, RelationNet --------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("fce_steps", [0, 1, 3])
def test_matchingnet(model, fce_steps: int, ragged: bool) -> None:
    settings = {"full_context": fce_steps > 0, "fce_steps": max(1, fce_steps)}
    learner = fm.MatchingNet(model, temperature="learned", initial_temperature=0.3, **settings)
    features = metric.features_of(model.bert)
    metric.assert_same(learner, tasks_of(ragged), features, metric.matchingnet, fce_steps=fce_steps)


def test_matchingnet_with_another_metric(model) -> None:
    learner = fm.MatchingNet(model, metric="sqeuclidean")
    features = metric.features_of(model.bert)
    metric.assert_same(learner, RAGGED, features, metric.matchingnet, metric="sqeuclidean")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("parts", [("query", "mean"), ("product", "difference", "mean", "query")])
def test_relationnet(model, parts, loss: str, ragged: bool) -> None:
    learner = fm.RelationNet(model, hidden=7, parts=parts, loss=loss)
    features = metric.features_of(model.bert)
    loss_fn = metric.squares if loss == "mse" else nn.functional.cross_entropy
    metric.assert_same(learner, tasks_of(ragged), features, metric.relationnet, loss_fn)


def test_relationnet_reads_unit_features_at_order_one(model) -> None:
    learner = fm.RelationNet(model, hidden=7, normalize=True)
    features = metric.features_of(model.bert, normalize=True)
    metric.assert_same(learner, RAGGED, lambda s: 4 * features(s), metric.relationnet)


# -- what all share ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_ignored_rows_change_nothing(model, name: str) -> None:
    """Rows labelled -100, anywhere in the support and query set."""
    learner = LEARNERS[name](model)
    batch = oracle.as_batch(TASKS)
    extended = []
    for task_set in (batch.support, batch.query):
        rows = {k: torch.cat([v[:, 1:2], v, v[:, :2]], 1) for k, v in task_set.items()}
        rows["labels"][:, [0, -1, -2]] = -100
        extended.append(rows)
    one, two = learner(batch), learner(fm.TaskBatch(*extended))
    torch.testing.assert_close(two.task_losses, one.task_losses, rtol=1e-11, atol=0)
    torch.testing.assert_close(two.logits[:, 1:-2], one.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(two.logits[:, 0], one.logits[:, 1], rtol=1e-10, atol=1e-12)
    assert torch.equal(one.accuracy, two.accuracy)
    got, want = oracle.gradients(learner, two.loss), oracle.gradients(learner, one.loss)
    oracle.assert_close(got, want)


@pytest.mark.parametrize("measure", ["sqeuclidean", "cosine"])
def test_a_query_without_an_answer_changes_no_logits(model, measure: str) -> None:
    learner, batch = fm.ProtoNet(model, metric=measure), oracle.as_batch(TASKS)
    batch.support["labels"] = torch.arange(3).repeat(3, 1)  # none of which is ignored
    expected = learner(batch).logits
    batch.query["labels"] = batch.query["labels"].clone()
    batch.query["labels"][0, 1] = -100
    torch.testing.assert_close(learner(batch).logits, expected)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_task_that_is_not_finite_leaves_no_trace(model, name: str) -> None:
    """One task's tokens have a NaN embedding that no other task uses."""
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0] = float("nan")
    learner = LEARNERS[name](model)
    batch = oracle.as_batch(metric.make_tasks(4))
    batch.support["input_ids"][1, 0, 0] = 0
    out = learner(batch)
    assert out.diverged.tolist() == [False, True, False, False]
    assert bool(out.task_losses[1].isnan())
    others = torch.tensor([0, 2, 3])
    want = learner(batch.select(others))
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.logits[others], want.logits, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(out.params.packed[others], want.params.packed)
    oracle.assert_close(oracle.gradients(learner, out.loss), oracle.gradients(learner, want.loss))
    with torch.no_grad():
        again = learner(batch)
    assert again.diverged.tolist() == out.diverged.tolist()
    torch.testing.assert_close(again.loss, want.loss)
    every = learner(batch.select(torch.tensor([1, 1])))
    assert every.diverged.all() and every.loss.item() == 0
    every.loss.backward()
    for parameter in learner.parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize("name", LEARNERS)
def test_services_keep_what_a_support_set_becomes(model, name: str) -> None:
    learner = LEARNERS[name](model)
    batch = oracle.as_batch(RAGGED)
    out = learner(batch)
    params = learner.adapt(batch.support, batch.ways)
    assert not params.packed.requires_grad
    torch.testing.assert_close(params.packed, out.params.packed.detach())
    inputs = {k: v for k, v in batch.query.items() if k != "labels"}
    with torch.no_grad():
        logits = learner.predict(params, **inputs)
    torch.testing.assert_close(logits, out.logits.detach())
    if name != "protomaml":
        flat = learner.embed({k: v[0] for k, v in inputs.items()})
        torch.testing.assert_close(flat, learner.embed(inputs)[0])


@pytest.mark.parametrize("name", LEARNERS)
def test_training_learns_and_its_state_goes_round(model, name: str) -> None:
    learner = LEARNERS[name](model)
    batch = oracle.as_batch(TASKS)
    start = {n: t.clone() for n, t in learner.state_dict().items()}
    outer = torch.optim.Adam(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        out = learner(batch)
        losses.append(float(out.loss.detach()))
        outer.zero_grad()
        out.loss.backward()
        outer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(
        start["bert.encoder.layer.0.output.dense.weight"],
        model.bert.encoder.layer[0].output.dense.weight,
    )
    other = LEARNERS[name](oracle.tiny_bert(5))
    other.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert torch.equal(other(batch).loss, learner(batch).loss)
    state = learner.state_dict()
    removed = list(state)[-1]
    value = state.pop(removed)
    with pytest.raises(ValueError, match="the state is of another model or learner: missing"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="expected shape"):
        other.load_state_dict({**state, removed: value.flatten()[:0]})


@pytest.mark.parametrize("name", LEARNERS)
def test_a_frozen_model_is_only_judged(model, name: str) -> None:
    model.requires_grad_(False)
    learner = LEARNERS[name](model)
    names = [n for n, _ in learner.named_parameters()]
    assert all(n.startswith("metric.") for n in names)
    texts = fm.data.builtin("test")
    bert, tokenizer = fm.data.tiny_bert(3, hidden_size=16, num_layers=1)
    bert.requires_grad_(False)
    episodes = fm.data.Episodes(texts, tokenizer, ways=3, tasks=2)
    result = fm.training.evaluate(LEARNERS[name](bert), episodes, 4)
    assert result.accuracies.shape == (4,)
    if not names:
        batch = oracle.as_batch(TASKS)
        with pytest.warns(UserWarning, match=r"has nothing to learn, and its loss no gradient"):
            out = learner(batch)
        with torch.no_grad():
            assert torch.equal(learner(batch).loss, out.loss)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: fm.ProtoNet(m, pooling="max"),
            "pooling must be one of mean, cls, last, got 'max'",
        ),
        (lambda m: fm.ProtoNet(m, metric="l2"), "metric must be one of sqeuclidean, .*, got 'l2'"),
        (lambda m: fm.ProtoNet(m, metric="minkowski"), "metric 'minkowski' needs p, got p=None"),
        (lambda m: fm.ProtoNet(m, p=2), "metric 'sqeuclidean' takes no p, got p=2"),
        (lambda m: fm.ProtoNet(m, precision="block"), "precision must be one of diagonal, full"),
        (
            lambda m: fm.ProtoNet(m, temperature=0),
            "temperature must be .* above 0 or 'learned'",
        ),
        (lambda m: fm.ProtoNet(m, temperature="warm"), "temperature must be .*, got 'warm'"),
        (
            lambda m: fm.ProtoNet(m, temperature="learned", initial_temperature=-1),
            "initial_temperature must be a finite number above 0, got -1",
        ),
        (
            lambda m: fm.ProtoNet(m, projection=0),
            "projection must be an integer of .*, a module",
        ),
        (lambda m: fm.MatchingNet(m, fce_steps=0), "fce_steps must be an integer of at least 1"),
        (lambda m: fm.RelationNet(m, hidden=0), "hidden must be an integer of at least 1, got 0"),
        (lambda m: fm.RelationNet(m, parts=("sum",)), "parts must be some of query, mean"),
        (lambda m: fm.RelationNet(m, loss="hinge"), "loss must be one of cross_entropy, mse"),
        (lambda m: fm.ProtoMAML(m, ways=1), "ways must be an integer of at least 2, got 1"),
        (lambda m: fm.ProtoMAML(m, loss_fn="causal_lm"), "loss_fn must be 'classification'"),
        (
            lambda m: fm.ProtoMAML(fm.patch(m, fm.Norm())),
            r"specification adapts none; add fm\.Head\(\)",
        ),
        (
            lambda m: fm.ProtoMAML(fm.patch(m, fm.Head()), pooling="cls"),
            "pooling is for a model that is not patched",
        ),
        (
            lambda m: fm.RelationNet(nn.Linear(3, 3)),
            "Linear has no configuration that tells its hidden size",
        ),
    ],
)
def test_wrong_settings(model, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model)


def test_no_model() -> None:
    with pytest.raises(TypeError, match="expected a transformers model or a patched one, got str"):
        fm.ProtoNet("bert")


@pytest.mark.parametrize("name", LEARNERS)
def test_wrong_batches(model, name: str) -> None:
    learner = LEARNERS[name](model)
    batch = oracle.as_batch(TASKS)
    with pytest.raises(TypeError, match=r"expected a fm\.TaskBatch, got dict"):
        learner({})

    def changed(which: str, row: int, label: int) -> fm.TaskBatch:
        sets = [{k: v.clone() for k, v in s.items()} for s in (batch.support, batch.query)]
        sets[which == "query"]["labels"][1, row] = label
        return fm.TaskBatch(*sets)

    own = batch.support["labels"][1]
    row = int((own == 2).nonzero()[0])
    with pytest.raises(ValueError, match=r"task 1 .*no support row"):
        learner(changed("support", row, -100))
    with pytest.raises(ValueError, match=r"query labels must be in|query row of class 7"):
        learner(changed("query", 0, 7))
    with pytest.raises(ValueError, match=r"support labels must be in 0\.\.|query row of class"):
        learner(changed("support", 0, -3))
    batch.support["labels"] = batch.support["labels"].int()
    with pytest.raises(TypeError, match="support labels must be int64"):
        learner(batch)


def test_a_model_without_token_states() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor):
            return {"scores": x}

    sets = [{"x": torch.randn(1, 2, 3), "labels": torch.zeros(1, 2, dtype=torch.int64)}] * 2
    with pytest.raises(ValueError, match="expected a model whose output has last_hidden_state"):
        fm.ProtoNet(Odd(3, 3))(fm.TaskBatch(*sets))


def test_the_learner_is_not_moved(model) -> None:
    learner = fm.ProtoNet(model)
    assert learner.to("cpu") is learner and learner.double() is learner
    with pytest.raises(RuntimeError, match="move or convert the model, then patch"):
        learner.float()
