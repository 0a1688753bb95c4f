"""Proto-MAML against a loop over tasks in float64, second order and through the prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import episode_oracle as oracle
import metric_oracle as metric
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.engine import head

TASKS = metric.make_tasks(3)
RAGGED = metric.make_tasks(3, ragged=True)


def head_input(model: nn.Module, weights: dict[str, Tensor], name: str, task_set) -> Tensor:
    """What the classifying layer is called on."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    inputs = {k: v for k, v in task_set.items() if k != "labels"}
    torch.func.functional_call(model, weights, (), inputs)
    handle.remove()
    return seen[0]


def loop(learner: fm.ProtoMAML, tasks: Sequence[metric.Task], model: nn.Module, name: str):
    """Losses, fast weights and logits, and the leaves that learn; for a patched model."""
    patched = learner.patched
    meta = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    temperature = meta["metric.log_temperature"].exp() if "metric.log_temperature" in meta else 1.0
    names = patched.layout.names
    unused = dict(patched.named_parameters())
    losses, fasts, all_logits = [], [], []
    for support, query, ways in tasks:
        values = {n: meta.get(n, unused[n].detach()) for n in names}
        shared = {n: p for n, p in meta.items() if n not in names and "metric." not in n}
        classes = values[f"{name}.bias"].shape[0]
        with sdpa_kernel(SDPBackend.MATH):
            x = head_input(model, {**shared, **values}, name, support)
            means = metric.class_means(x, support["labels"], ways or classes)
            means = F.pad(means, (0, 0, 0, classes - len(means)))
            fast = dict(values)
            fast[f"{name}.weight"] = 2 * means / temperature
            fast[f"{name}.bias"] = -means.square().sum(1) / temperature
            for step in range(learner.steps):
                # variables of their own: the start of the head depends on the body, a step does not
                at = {n: p + 0 for n, p in fast.items()}
                if learner.order == 1:
                    at = {n: p.detach().requires_grad_() for n, p in fast.items()}
                inputs = {k: v for k, v in support.items() if k != "labels"}
                logits = torch.func.functional_call(model, {**shared, **at}, (), inputs).logits
                loss = F.cross_entropy(logits[:, :ways], support["labels"])
                grads = torch.autograd.grad(
                    loss, [at[n] for n in names], create_graph=learner.order == 2, allow_unused=True
                )
                rate = learner.rates.at(step, None) if learner.rates.constant is None else 0.1
                rate = float(rate.detach()) if isinstance(rate, Tensor) else rate
                for n, g in zip(names, grads, strict=True):
                    if g is not None:
                        fast[n] = fast[n] - rate * g
            inputs = {k: v for k, v in query.items() if k != "labels"}
            logits = torch.func.functional_call(model, {**shared, **fast}, (), inputs).logits
        losses.append(F.cross_entropy(logits[:, :ways], query["labels"]))
        fasts.append(fast)
        all_logits.append(logits)
    found = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()), allow_unused=True)
    grads = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(meta.items(), found, strict=True)
    }
    return torch.stack(losses).detach(), fasts, all_logits, grads


def check(learner: fm.ProtoMAML, tasks, model: nn.Module, name: str = "classifier") -> None:
    out = learner(oracle.as_batch(tasks))
    losses, fasts, logits, grads = loop(learner, tasks, model, name)
    torch.testing.assert_close(out.task_losses.detach(), losses, rtol=1e-9, atol=0)
    for t, (_, query, _) in enumerate(tasks):
        oracle.assert_close(out.params.task(t), fasts[t])
        rows = len(query["labels"])
        oracle.assert_close({"": out.logits[t, :rows]}, {"": logits[t]})
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-4
    oracle.assert_close(oracle.gradients(learner, out.loss), grads)


MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "chunks": {"memory": "unroll", "task_chunk": 2},
}
SPECS = {
    "head": lambda: fm.Head(),
    "head and layer": lambda: fm.Params("bert.encoder.layer.0.output", "classifier"),
    "all": lambda: fm.Params("*"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_patched(spec: str, order: int, mode: str) -> None:
    model = oracle.tiny_bert()
    learner = fm.ProtoMAML(
        fm.patch(model, SPECS[spec]()),
        temperature="learned",
        initial_temperature=1.5,
        lr=0.1,
        steps=2,
        order=order,
        **MODES[mode],
    )
    names = {n for n, _ in learner.named_parameters()}
    assert "classifier.weight" not in names and "metric.log_temperature" in names
    check(learner, RAGGED, model)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"pooling": "cls", "normalize": True, "projection": 6}])
def test_a_plain_model_adapts_a_new_head_in_one_operator(monkeypatch, settings, order) -> None:
    calls = []
    operator = head.ops.head_inner_loop
    monkeypatch.setattr(
        head.ops, "head_inner_loop", lambda *a, **k: calls.append(a[5]) or operator(*a, **k)
    )
    model = oracle.tiny_bert()
    learner = fm.ProtoMAML(
        model, ways=3, lr=0.1, steps=3, order=order, temperature="learned", **settings
    )
    own = dict(learner.named_parameters())
    assert {"bert.embeddings.word_embeddings.weight", "metric.log_temperature"} <= own.keys()
    assert not any("classifier" in n or "embedding.encoder" in n for n in own)
    features = metric.features_of(model.bert, settings.get("pooling", "mean"))

    def read(task_set) -> Tensor:
        x = features(task_set)
        if "projection" in settings:
            x = x @ own["metric.projection.weight"].T
        return F.normalize(x, dim=-1) if settings.get("normalize") else x

    losses = []
    temperature = own["metric.log_temperature"].exp()
    for support, query, ways in RAGGED:
        x = read(support)
        means = metric.class_means(x, support["labels"], ways)
        weight, bias = 2 * means / temperature, -means.square().sum(1) / temperature
        for _ in range(3):
            at = [weight, bias]
            if order == 1:
                at = [t.detach().requires_grad_() for t in at]
            loss = F.cross_entropy(x @ at[0].T + at[1], support["labels"])
            grads = torch.autograd.grad(loss, at, create_graph=order == 2, retain_graph=True)
            weight, bias = weight - 0.1 * grads[0], bias - 0.1 * grads[1]
        losses.append(F.cross_entropy(read(query) @ weight.T + bias, query["labels"]))
    want = torch.stack(losses)
    out = learner(oracle.as_batch(RAGGED))
    assert calls[-1] == 3
    torch.testing.assert_close(out.task_losses, want, rtol=1e-9, atol=0)
    expected = metric.gradients(learner, want.mean())
    oracle.assert_close(oracle.gradients(learner, out.loss), expected)


def test_before_the_first_step_it_is_a_prototypical_network() -> None:
    model = oracle.tiny_bert()
    batch = oracle.as_batch(TASKS)
    with torch.no_grad():
        still = fm.ProtoMAML(model, ways=3, lr=1e-30, steps=1)(batch)
        proto = fm.ProtoNet(model)(batch)
    torch.testing.assert_close(still.task_losses, proto.task_losses, rtol=1e-9, atol=0)


def test_other_heads_and_rules() -> None:
    """A head below a hidden layer; Adam in the inner loop; learned rates."""
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = tf.RobertaForSequenceClassification(config).double().eval()
    patched = fm.patch(model, fm.Head())
    learner = fm.ProtoMAML(patched, lr=0.1, steps=2)
    assert learner.head.name == "classifier.out_proj"
    check(learner, RAGGED, model, "classifier.out_proj")
    rate = fm.LearnedRate(per=("layer", "step"), init=0.1)
    learner = fm.ProtoMAML(patched, lr=rate, steps=2, optimizer="adam")
    learner(oracle.as_batch(RAGGED)).loss.backward()
    assert learner.rates.values.grad.abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patched", [False, True])
def test_a_frozen_model(patched: bool, mode: str) -> None:
    """Prototypes have no gradient; learned rates do. With nothing to learn, tasks are judged."""
    model = oracle.tiny_bert().requires_grad_(False)
    given = fm.patch(model, fm.Head()) if patched else model
    settings = {} if patched else {"ways": 3}
    batch = oracle.as_batch(TASKS)
    alone = fm.ProtoMAML(given, lr=0.1, **settings, **MODES[mode])
    with pytest.warns(UserWarning, match="this ProtoMAML has nothing to learn"):
        judged = alone(batch)
    # clipping takes the general loop
    learner = fm.ProtoMAML(
        given, lr=fm.LearnedRate(per="step", init=0.1), clip_norm=1e3, **settings, **MODES[mode]
    )
    (rates,) = learner.parameters()
    loss = learner(batch).loss
    torch.testing.assert_close(loss.detach(), judged.loss)
    (found,) = torch.autograd.grad(loss, [rates])
    with torch.no_grad():
        for step in range(learner.steps):
            values = []
            for sign in (1, -1):
                rates[step] += sign * 1e-4
                values.append(learner(batch).loss)
                rates[step] -= sign * 1e-4
            want = (values[0] - values[1]) / 2e-4
            torch.testing.assert_close(found[step], want, rtol=1e-5, atol=1e-8)


def test_heads_that_prototypes_do_not_fit() -> None:
    config = tf.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=12, num_labels=3, pad_token_id=0
    )
    gpt = tf.GPT2ForSequenceClassification(config)
    with pytest.raises(ValueError, match="a linear head with a bias"):
        fm.ProtoMAML(fm.patch(gpt, fm.Head()))

    class Scaled(tf.BertForSequenceClassification):
        def forward(self, **inputs):
            out = super().forward(**inputs)
            out.logits = 2 * out.logits
            return out

    model = Scaled(oracle.tiny_bert().config).double()
    learner = fm.ProtoMAML(fm.patch(model, fm.Head()), steps=1)
    with pytest.raises(ValueError, match="the logits must be what 'classifier' gives on one row"):
        learner(oracle.as_batch(TASKS))


def test_a_head_that_runs_one_task_after_another() -> None:
    class Gained(tf.BertForSequenceClassification):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, **inputs):
            return self.classifier(self.bert(**inputs).pooler_output * self.gain)

    model = Gained(oracle.tiny_bert().config).double()
    learner = fm.ProtoMAML(fm.patch(model, fm.Params("gain", "classifier")), steps=1)
    with (
        pytest.warns(fm.PerformanceWarning, match="the whole model"),
        pytest.raises(ValueError, match="'classifier' must run for all tasks at once, but lies in"),
    ):
        learner(oracle.as_batch(TASKS))
    learner = fm.ProtoMAML(fm.patch(model, fm.Params("classifier")), steps=1)
    assert learner(oracle.as_batch(TASKS)).loss.isfinite()


def test_classes_of_the_support_set() -> None:
    learner = fm.ProtoMAML(oracle.tiny_bert(), ways=2)
    with pytest.raises(ValueError, match="a task has 3 classes, but the head 2"):
        learner(oracle.as_batch(TASKS))
    learner = fm.ProtoMAML(oracle.tiny_bert(), ways=4)
    batch = oracle.as_batch(TASKS)
    fine = fm.TaskBatch(batch.support, batch.query, torch.tensor([3, 3, 3]))
    assert torch.equal(learner(fine).loss, learner(batch).loss)
    wide = fm.TaskBatch(batch.support, batch.query, torch.tensor([3, 4, 3]))
    with pytest.raises(ValueError, match="task 1 has 4 classes, but no support row of class 3"):
        learner(wide)
