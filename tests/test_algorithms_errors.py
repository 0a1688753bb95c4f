"""Every wrong call of a learner or of `fm.adapt` is one sentence: what was expected, what came."""

from __future__ import annotations

import episode_oracle as oracle
import families
import pytest
import torch
import transformers as tf

import fastmeta as fm

BATCH = oracle.as_batch(oracle.make_tasks(2))


@pytest.fixture(scope="module")
def patched() -> fm.Patched:
    return fm.patch(oracle.tiny_bert(), fm.Head())


def message_of(error: type[Exception], call) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


def changed(which: str = "support", **tensors) -> fm.TaskBatch:
    sets = {"support": dict(BATCH.support), "query": dict(BATCH.query)}
    sets[which].update(tensors)
    return fm.TaskBatch(sets["support"], sets["query"])


SETTINGS = [
    ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an integer of at least 1, got 2.0"),
    ({"steps": True}, TypeError, "steps must be an integer of at least 1, got True"),
    ({"lr": 0}, ValueError, "lr must be positive and finite, got 0"),
    ({"lr": -0.1}, ValueError, "lr must be positive and finite, got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be positive and finite, got nan"),
    ({"lr": "fast"}, TypeError, "lr must be a positive number or a fm.LearnedRate, got 'fast'"),
    ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
    ({"optimizer": "lion"}, ValueError, "optimizer must be one of ['adagrad', 'adam', 'adamw'"),
    ({"memory": "disk"}, ValueError, "memory must be one of unroll, recompute, auto; got 'disk'"),
    ({"task_chunk": 0}, ValueError, "task_chunk must be an integer of at least 1, None or 'auto'"),
    ({"task_chunk": "half"}, ValueError, "an integer of at least 1, None or 'auto', got 'half'"),
    ({"clip_norm": 0}, ValueError, "clip_norm must be positive or None, got 0"),
    ({"clip_norm": "1"}, TypeError, "clip_norm must be a positive number or None, got '1'"),
    ({"truncate": 6}, ValueError, "truncate must be between 0 and steps=5, got 6"),
    ({"truncate": -1}, ValueError, "truncate must be between 0 and steps=5, got -1"),
    ({"truncate": 1.5}, TypeError, "truncate must be an integer or None, got 1.5"),
    (
        {"loss_fn": "mse"},
        ValueError,
        "loss_fn must be one of ['causal_lm', 'classification',",
    ),
]


def test_unknown_settings(patched: fm.Patched) -> None:
    """The class that was called is named, wherever its settings are defined."""
    for learner, setting, near in (
        (fm.MAML, "step", "'steps'"),
        (fm.IMAML, "lambda", "'lam'"),
        (fm.HyperNetwork, "optimiser", "'optimizer'"),
        (fm.ProtoMAML, "temprature", "'temperature' or 'initial_temperature'"),
        (fm.MatchingNet, "poling", "'pooling'"),
    ):
        found = message_of(TypeError, lambda: learner(patched, **{setting: 1}))  # noqa: B023
        assert found == f"{learner.__name__} has no setting {setting!r} (did you mean {near}?)"


@pytest.mark.parametrize(("setting", "error", "text"), SETTINGS, ids=lambda x: str(x)[:40])
def test_settings(setting: dict, error: type[Exception], text: str, patched: fm.Patched) -> None:
    assert text in message_of(error, lambda: fm.MAML(patched, **setting))
    (name,) = setting
    if name in ("steps", "lr", "optimizer", "clip_norm", "loss_fn", "task_chunk"):
        settings = {"steps": 1, "lr": 0.1, **setting}
        found = message_of(error, lambda: fm.adapt(patched, BATCH.support, **settings))
        assert text in found


RATES = [
    ({"per": "head"}, "a learned rate is per step, task, layer, param; got 'head'"),
    ({"per": ("layer", "param")}, "a learned rate per 'param' already varies per 'layer'"),
    (
        {"per": "task"},
        "a learned rate per 'task' needs num_tasks, an integer of at least 1, got None",
    ),
    ({"init": 0.0}, "lr must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(("setting", "text"), RATES)
def test_rates(setting: dict, text: str) -> None:
    assert text in message_of(ValueError, lambda: fm.LearnedRate(**setting))


def test_a_rate_per_task_fits_its_tasks(patched: fm.Patched) -> None:
    learner = fm.MAML(patched, lr=fm.LearnedRate(per="task", num_tasks=3), steps=1)
    found = message_of(ValueError, lambda: learner(BATCH))
    assert found == "the rate is learned per task for 3 tasks, got 2 tasks"


def test_what_is_no_patched_model_or_batch(patched: fm.Patched) -> None:
    found = message_of(TypeError, lambda: fm.MAML(patched.model))
    assert found.startswith("expected a patched model (fm.patch(model, spec)), got BertFor")
    found = message_of(TypeError, lambda: fm.ANIL(patched.model))
    assert found.startswith("expected a patched model")
    found = message_of(TypeError, lambda: fm.adapt(patched.model, BATCH.support, steps=1, lr=0.1))
    assert found.startswith("expected a patched model")
    learner = fm.MAML(patched, steps=1)
    found = message_of(TypeError, lambda: learner((BATCH.support, BATCH.query)))
    assert found == "expected a fm.TaskBatch, got tuple"


LABELS = [
    (torch.tensor([[0, 1, 3], [0, 1, 2]]), ValueError, "labels must be in 0..2 (num_labels is 3)"),
    (torch.tensor([[0, 1, 2], [0, -1, 2]]), ValueError, "ignore, got -1 in task 1"),
    (torch.zeros(2, 3), TypeError, "labels must be int64 class indices, got torch.float32"),
    (
        torch.zeros(2, 3, dtype=torch.int32),
        TypeError,
        "must be int64 class indices, got torch.int32",
    ),
    (torch.zeros(2, 3, 1, dtype=torch.int64), ValueError, "must have shape [T, N], got [2, 3, 1]"),
    (torch.tensor([[0, 1, 2], [-100] * 3]), ValueError, "set of task 1 is empty: all its labels"),
]


@pytest.mark.parametrize("which", ["support", "query"])
@pytest.mark.parametrize(("labels", "error", "text"), LABELS, ids=lambda x: str(x)[-30:])
def test_labels(labels, error, text: str, which: str, patched: fm.Patched) -> None:
    learner = fm.MAML(patched, steps=1)
    if which == "query":  # a fourth row
        labels = torch.cat([labels, labels[:, :1]], 1)
        text = text.replace("[2, 3, 1]", "[2, 4, 1]")
    found = message_of(error, lambda: learner(changed(which, labels=labels)))
    assert which in found and text in found
    if which == "support":
        call = lambda: fm.adapt(  # noqa: E731
            patched, {**BATCH.support, "labels": labels}, steps=1, lr=0.1
        )
        assert text in message_of(error, call)


def test_missing_labels(patched: fm.Patched) -> None:
    sets = [{k: v for k, v in s.items() if k != "labels"} for s in (BATCH.support, BATCH.query)]
    found = message_of(ValueError, lambda: fm.MAML(patched, steps=1)(fm.TaskBatch(*sets)))
    assert found == "the support set needs 'labels', got ['attention_mask', 'input_ids']"


def test_labels_beyond_the_ways(patched: fm.Patched) -> None:
    labels = torch.tensor([[0, 1, 0], [0, 1, 2]])
    query = torch.zeros(2, 4, dtype=torch.int64)
    batch = fm.TaskBatch(
        {**BATCH.support, "labels": labels},
        {**BATCH.query, "labels": query},
        ways=torch.tensor([3, 2]),
    )
    found = message_of(ValueError, lambda: fm.MAML(patched, steps=1)(batch))
    assert found == (
        "support labels must be in 0..1 (the task's ways is 2) or -100 to ignore, got 2 in task 1"
    )


def test_a_model_without_a_head() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    patched = fm.patch(tf.BertModel(config).double().eval(), fm.Params("pooler"))
    found = message_of(ValueError, lambda: fm.MAML(patched, steps=1)(BATCH))
    assert found.startswith("the classification loss needs a model with a head")
    assert "AutoModelForSequenceClassification" in found
    found = message_of(ValueError, lambda: fm.adapt(patched, BATCH.support, steps=1, lr=0.1))
    assert found.startswith("the classification loss needs a model with a head")


def test_a_classifier_is_no_language_model(patched: fm.Patched) -> None:
    learner = fm.MAML(patched, steps=1, loss_fn="causal_lm", memory="unroll")
    found = message_of(ValueError, lambda: learner(BATCH))
    assert found == "support labels must have shape [T, N, L], got [2, 3]"
    ids = {w: s["input_ids"] for w, s in (("support", BATCH.support), ("query", BATCH.query))}
    batch = fm.TaskBatch(
        {**BATCH.support, "labels": ids["support"]}, {**BATCH.query, "labels": ids["query"]}
    )
    found = message_of(ValueError, lambda: learner(batch))
    assert found == "the causal_lm loss needs logits [T, N, L, C], got [2, 3, 3]"


LOSSES = [
    (
        lambda out, batch: out.logits.sum(),
        "loss_fn must return one loss per task, shape [",
    ),
    (lambda out, batch: out.logits.mean(2), "one loss per task, shape ["),
    (lambda out, batch: 0.0, "one loss per task, shape ["),
    (
        lambda out, batch: torch.ones(len(out.logits)),
        "the support loss must depend on the adapted parameters",
    ),
    (lambda out, batch: out.logits.detach().sum((1, 2)), "the support loss must depend on"),
]


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize(("loss_fn", "text"), LOSSES)
def test_loss_functions(loss_fn, text: str, memory: str, patched: fm.Patched) -> None:
    learner = fm.MAML(patched, steps=1, loss_fn=loss_fn, memory=memory)
    assert text in message_of(ValueError, lambda: learner(BATCH))
    call = lambda: fm.adapt(patched, BATCH.support, steps=1, lr=0.1, loss_fn=loss_fn)  # noqa: E731
    assert text in message_of(ValueError, call)


def test_a_loss_of_a_fixed_number_of_tasks(patched: fm.Patched) -> None:
    """``memory="auto"`` calls it with fewer, which the error says."""
    fewer = "memory='auto' measures with few tasks, and chunks hold fewer than a batch"
    learner = fm.MAML(patched, loss_fn=lambda out, batch: out.logits.mean() * torch.ones(2))
    found = message_of(ValueError, lambda: learner(BATCH))
    assert found == f"loss_fn must return one loss per task, shape [1], got [2] ({fewer})"
    learner = fm.MAML(patched, loss_fn=lambda out, batch: out.logits.view(2, 9).mean(1))
    with pytest.raises(RuntimeError, match="invalid for input of size 9") as caught:
        learner(BATCH)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == [
            "loss_fn was called as loss_fn(outputs, batch), where batch holds 'labels' and all "
            f"other inputs of 1 tasks ({fewer})"
        ]
    learner = fm.MAML(patched, loss_fn=lambda out, batch: out.loss)
    assert "None (models are given no labels" in message_of(ValueError, lambda: learner(BATCH))


def long_texts(which: str) -> dict:
    rows = 3 if which == "support" else 4
    return {k: torch.ones(2, rows, 40).long() for k in ("input_ids", "attention_mask")}


def test_inputs_that_the_model_cannot_read(patched: fm.Patched) -> None:
    proto = fm.ProtoNet(patched.model)
    for which in ("support", "query"):
        ids = getattr(BATCH, which)["input_ids"]
        words, most = patched.model.config.vocab_size, patched.model.config.max_position_embeddings
        unknown = ids.clone()
        unknown[1, 2, 0] = words
        short = torch.ones_like(ids)[:, :, 1:]  # hides nothing: transformers would drop it
        for tensors, text in (
            ({"input_ids": unknown}, f"input_ids must be in 0..{words - 1} (the model's words), "),
            ({"input_ids": ids - 40}, "(the model's words), got -"),
            (long_texts(which), f"the model takes at most {most} tokens, got {which} texts of 40"),
            ({"attention_mask": short}, "attention_mask must have the shape of input_ids, [2, "),
        ):
            for learner in (fm.MAML(patched, steps=1), fm.ANIL(patched, steps=1), proto):
                assert text in message_of(ValueError, lambda: learner(changed(which, **tensors)))  # noqa: B023
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        patched(patched.init(2), input_ids=ids, attention_mask=short)


def test_texts_as_long_as_the_model_takes() -> None:
    """OPT's table of positions has two rows more than it serves."""
    model = families.build("opt")
    learners = fm.MAML(fm.patch(model, fm.Head()), steps=1), fm.ProtoNet(model)

    def texts(length: int) -> fm.TaskBatch:
        support = {k: torch.ones(2, 3, length).long() for k in ("input_ids", "attention_mask")}
        support["labels"] = torch.arange(3).expand(2, 3)
        return fm.TaskBatch(support, support)

    for learner in learners:
        assert learner(texts(16)).loss.isfinite()
        found = message_of(ValueError, lambda: learner(texts(17)))  # noqa: B023
        assert found == "the model takes at most 16 tokens, got support texts of 17"
    decoder = model.model.decoder  # tables may be replaced
    decoder.embed_positions = type(decoder.embed_positions)(4, 16).double()
    found = message_of(ValueError, lambda: fm.ProtoNet(model)(texts(16)))
    assert found == "the model takes at most 6 tokens, got support texts of 16"


def test_another_device(patched: fm.Patched) -> None:
    moved = fm.TaskBatch(
        {k: v.to("meta") for k, v in BATCH.support.items()},
        {k: v.to("meta") for k, v in BATCH.query.items()},
    )
    found = message_of(ValueError, lambda: fm.MAML(patched, steps=1)(moved))
    assert found == (
        "the model is on cpu, but support['input_ids'] is on meta; move it with .to('cpu')"
    )
    found = message_of(ValueError, lambda: fm.adapt(patched, moved.support, steps=1, lr=0.1))
    assert "is on meta" in found


def test_inference_mode(patched: fm.Patched) -> None:
    learner = fm.MAML(patched, steps=1)
    with torch.inference_mode():
        found = message_of(RuntimeError, lambda: learner(BATCH))
    assert found.endswith("which torch.inference_mode() forbids; evaluate under torch.no_grad()")


def test_what_adapt_refuses(patched: fm.Patched) -> None:
    def adapt(support=BATCH.support, **kwargs):
        return fm.adapt(patched, support, **{"steps": 1, "lr": 0.1, **kwargs})

    found = message_of(TypeError, lambda: adapt(BATCH))
    assert found == (
        "expected a support set, a mapping of inputs such as batch.support, got TaskBatch"
    )
    found = message_of(ValueError, lambda: adapt({}))
    assert found == "the support set must hold at least one tensor, got none"
    empty = {k: v[:, :0] for k, v in BATCH.support.items()}
    assert "the support set is empty: it has 2 tasks of 0 examples" == message_of(
        ValueError, lambda: adapt(empty)
    )
    found = message_of(TypeError, lambda: adapt(lr=fm.LearnedRate()))
    assert found == "adapt takes a number as lr; learned rates belong to a learner"
    found = message_of(ValueError, lambda: adapt(params=patched.init(3)))
    assert found == "params hold 3 tasks, but the support set 2"
    found = message_of(ValueError, lambda: adapt(ways=torch.tensor([3])))
    assert found == "ways must have shape [2], got [1]"
    found = message_of(TypeError, lambda: adapt(ways=[2, 2.5]))
    assert found == "ways must be integers or an int64 tensor, got [2, 2.5]"


def test_settings_that_may_change_and_others(patched: fm.Patched) -> None:
    learner = fm.MAML(patched, steps=2, lr=0.1)
    learner.order, learner.steps, learner.loss_fn = 1, 1, "token_classification"
    learner.clip_norm, learner.truncate, learner.loss_fn = 2.0, 1, "classification"
    expected = fm.MAML(patched, steps=1, lr=0.1, order=1, clip_norm=2.0, truncate=1)
    assert torch.equal(learner(BATCH).task_losses, expected(BATCH).task_losses)
    for name, value, message in [
        ("order", "2", "order must be 1 or 2, got '2'"),
        ("steps", -1, "steps must be an integer of at least 0, got -1"),
        ("clip_norm", -1.0, "clip_norm must be positive or None"),
        ("truncate", 2, "truncate must be between 0 and steps=1"),
        ("loss_fn", "hinge", "loss_fn must be one of"),
        ("compute_dtype", "float32", "compute_dtype must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            setattr(learner, name, value)
    for name in ("lr", "optimizer", "memory", "task_chunk", "memory_budget", "compile"):
        with pytest.raises(AttributeError, match=f"^{name} is chosen when a MAML is built"):
            setattr(learner, name, 0.1)
    assert torch.equal(learner(BATCH).task_losses, expected(BATCH).task_losses)
