"""Losses by name, and of one's own, against the per-task loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engine.losses import regression

SMALL = {"vocab_size": 20, "pad_token_id": 0, "num_labels": 3}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def bert(auto: type, **settings) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(tf.BertConfig(**SMALL, **BERT, **settings)).double().eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = tf.T5Config(**SMALL, **T5, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config).double().eval()


def word_loss(logits: Tensor, batch: dict[str, Tensor], ways: None) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def squares(values: Tensor, batch: dict[str, Tensor], ways: None) -> Tensor:
    known = ~batch["labels"].isnan()
    return (values.view_as(batch["labels"])[known] - batch["labels"][known]).square().mean()


def words(classes: int) -> Callable[[dict[str, Tensor], torch.Generator], Tensor]:
    """Labels of tokens, -100 at padding."""

    def labels(inputs: dict[str, Tensor], g: torch.Generator) -> Tensor:
        mask = inputs["attention_mask"]
        drawn = torch.randint(0, classes, mask.shape, generator=g)
        return drawn.masked_fill((mask == 0) | (torch.arange(mask.shape[1]) == 1), -100)

    return labels


def numbers(*size: int) -> Callable[[dict[str, Tensor], torch.Generator], Tensor]:
    def labels(inputs: dict[str, Tensor], g: torch.Generator) -> Tensor:
        drawn = torch.randn(len(inputs["input_ids"]), *size, generator=g, dtype=torch.float64)
        drawn.view(-1)[1] = float("nan")
        return drawn

    return labels


# name -> model, labels of a set, the loss of the loop
NAMED = {
    "token_classification": (
        lambda: bert(tf.AutoModelForTokenClassification), words(3), word_loss),
    "masked_lm": (lambda: bert(tf.AutoModelForMaskedLM), words(20), word_loss),
    "seq2seq_lm": (t5, words(20), word_loss),
    "regression": (lambda: bert(tf.AutoModelForSequenceClassification), numbers(3), squares),
}  # fmt: skip


def named_tasks(name: str) -> list[oracle.Task]:
    """Three tasks with labels as a loss takes them."""
    g, labels = torch.Generator().manual_seed(0), NAMED[name][1]
    return [
        (*({**s, "labels": labels(s, g)} for s in task[:2]), None) for task in oracle.make_tasks(3)
    ]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", NAMED)
def test_losses_by_name(name: str, compile: bool) -> None:
    make, _, loss = NAMED[name]
    model, tasks = make(), named_tasks(name)
    settings = {"lr": 0.1, "steps": 2, "loss_fn": name, "compile": compile}
    learner = fm.MAML(fm.patch(model, fm.LoRA(r=2) + fm.Norm()), **settings)
    out = learner(oracle.as_batch(tasks))
    if name == "seq2seq_lm":
        for s in (s for task in tasks for s in task[:2]):
            s["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(s["labels"])
    expected = oracle.loop(learner, tasks, loss_fn=loss)
    close(out.task_losses, torch.stack(expected.losses))
    oracle.assert_close(oracle.gradients(learner, out.loss), expected.gradients())
    assert (out.accuracy is not None) is (name == "token_classification")


class Tagger(nn.Module):
    """A word's logits from the word alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(23, 8), nn.Linear(8, 23)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.words(input_ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_words_of_a_narrow_model(dtype: torch.dtype) -> None:
    """Their losses are summed up in float32: in float16 the sum would be infinite."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 23, (2, 80, 512), generator=g)
    batch = fm.TaskBatch(*[{"input_ids": ids, "labels": ids}] * 2)
    model = Tagger()
    patched = fm.patch(model.to(dtype), fm.Head())
    out = fm.MAML(patched, lr=1e-9, steps=1, loss_fn="causal_lm")(batch)  # a step of nothing
    logits = patched(patched.init(2), input_ids=ids).float()
    expected = [
        nn.functional.cross_entropy(row[:, :-1].flatten(0, 1), own[:, 1:].flatten())
        for row, own in zip(logits, ids, strict=True)
    ]
    torch.testing.assert_close(out.task_losses, torch.stack(expected).detach())


def test_a_regression_of_one_number() -> None:
    """Labels ``[T, N]``; rows that collate adds do not count."""
    model = bert(tf.AutoModelForSequenceClassification)
    model.classifier, model.config.num_labels = nn.Linear(16, 1).double(), 1
    g = torch.Generator().manual_seed(0)
    tasks = [
        (*({**s, "labels": numbers()(s, g)} for s in task[:2]), None)
        for task in oracle.make_tasks(3, ragged=True)
    ]
    learner = fm.MAML(fm.patch(model, fm.Head()), lr=0.1, steps=2, loss_fn="regression")
    out = learner(oracle.as_batch(tasks))
    expected = oracle.loop(learner, tasks, loss_fn=squares)
    close(out.task_losses, torch.stack(expected.losses))


def test_regression_labels_are_checked() -> None:
    patched = fm.patch(bert(tf.AutoModelForSequenceClassification), fm.Head())
    plain = oracle.as_batch(oracle.make_tasks(3)).support

    def adapt(labels: Tensor) -> None:
        fm.adapt(patched, {**plain, "labels": labels}, lr=0.1, steps=1, loss_fn="regression")

    with pytest.raises(TypeError, match=r"support labels must be floating point, got torch\.int64"):
        adapt(plain["labels"])
    with pytest.raises(ValueError, match=r"shape of the outputs, \[3, 3, 3\], got \[3, 3, 1\]"):
        adapt(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"must have shape \[T, N\] or \[T, N, D\], got \[3, 3, 3"):
        adapt(torch.zeros(3, 3, 3, 1))
    labels = torch.zeros(3, 3, 3)
    labels[1] = float("nan")
    with pytest.raises(ValueError, match="the support set of task 1 is empty: all its labels are"):
        adapt(labels)


def test_an_encoder_decoder_moves_its_labels_already() -> None:
    patched = fm.patch(t5(), fm.LoRA(r=2))
    with pytest.raises(ValueError, match="loss_fn must be 'seq2seq_lm', got 'causal_lm'"):
        fm.adapt(patched, texts(2, 3, 0), lr=0.1, steps=1, loss_fn="causal_lm")


def test_a_decoder_alone_moves_its_labels_itself() -> None:
    patched = fm.patch(tiny_gpt2(), fm.LoRA(r=2, targets="c_attn"))
    with pytest.raises(ValueError, match="no encoder-decoder: loss_fn must be 'causal_lm'"):
        fm.adapt(patched, texts(2, 3, 0), lr=0.1, steps=1, loss_fn="seq2seq_lm")


@dataclass
class Scaled:
    """A loss that compares by value, and therefore has no hash."""

    factor: float

    def __call__(self, outputs, batch) -> Tensor:
        losses = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
        return self.factor * losses.mean(1)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_without_a_hash(compile: bool) -> None:
    batch = oracle.as_batch(oracle.make_tasks(3))
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll"}
    learner = fm.MAML(patched, loss_fn=Scaled(1.0), compile=compile, **settings)
    expected = fm.MAML(patched, **settings)(batch)
    for _ in range(2):
        close(learner(batch).task_losses, expected.task_losses)
    assert not compile or len(learner.capture.steps) > 0


def test_tensors_for_the_loss_alone() -> None:
    """Names that begin with ``labels`` travel with the tasks and do not reach the model."""

    def weighted(outputs, batch) -> Tensor:
        losses = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
        return (losses * batch["labels_weight"]).sum(1)

    plain = oracle.as_batch(oracle.make_tasks(3))
    sets = [
        {**s, "labels_weight": torch.rand(s["labels"].shape)} for s in (plain.support, plain.query)
    ]
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    learner = fm.MAML(patched, lr=0.1, steps=2, loss_fn=weighted, compile=True)
    once = learner(fm.TaskBatch(*sets))
    sets[1] = {**sets[1], "labels_weight": 2 * sets[1]["labels_weight"]}
    close(learner(fm.TaskBatch(*sets)).task_losses, 2 * once.task_losses)
    metric = fm.ProtoNet(oracle.tiny_bert())
    close(*(metric.adapt(s)["prototypes"] for s in (sets[0], plain.support)))


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=20,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = tf.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def texts(tasks: int, rows: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (tasks, rows, 6), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 0, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :, :2] = -100  # the prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def next_token_loss(logits: Tensor, batch: dict[str, Tensor], ways: None) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("spec", [fm.LoRA(r=2, targets="c_attn"), fm.Bias()], ids=repr)
def test_causal_language_model(spec: fm.Spec, memory: str) -> None:
    model = tiny_gpt2().requires_grad_(False)
    patched = fm.patch(model, spec)
    settings = {"lr": 0.3, "steps": 2, "loss_fn": "causal_lm"}
    learner = fm.MAML(patched, memory=memory, **settings)
    batch = fm.TaskBatch(texts(2, 3, 0), texts(2, 2, 1))
    out = learner(batch)
    tasks = [
        (
            {k: v[t] for k, v in batch.support.items()},
            {k: v[t] for k, v in batch.query.items()},
            None,
        )
        for t in range(2)
    ]
    if isinstance(spec, fm.Bias):
        expected = oracle.loop(learner, tasks, loss_fn=next_token_loss)
        torch.testing.assert_close(out.task_losses, torch.stack(expected.losses))
        oracle.assert_close(oracle.gradients(learner, out.loss), expected.gradients())
    assert out.accuracy is None and out.logits.shape == (2, 2, 6, 20)
    found = fm.adapt(patched, batch.support, **settings)
    close(found.params.packed, out.params.packed)


def test_language_model_labels_are_checked() -> None:
    patched = fm.patch(tiny_gpt2(), fm.Bias())
    support = texts(2, 3, 0)
    support["labels"][1, 2, 3] = 20
    with pytest.raises(ValueError, match=r"0\.\.19 \(vocab_size is 20\) .* got 20 in task 1"):
        fm.adapt(patched, support, lr=0.1, steps=1, loss_fn="causal_lm")
    support = texts(2, 3, 0)
    support["labels"][0, :, 1:] = -100
    with pytest.raises(ValueError, match="the support set of task 0 is empty"):
        fm.adapt(patched, support, lr=0.1, steps=1, loss_fn="causal_lm")


def test_labels_of_another_length_than_the_logits() -> None:
    support = texts(2, 3, 0)
    length = support["labels"].shape[2]
    for labels in (support["labels"].repeat(1, 1, 2), support["labels"][:, :, 1:]):
        with pytest.raises(ValueError, match="the causal_lm loss needs labels") as caught:
            fm.adapt(
                fm.patch(tiny_gpt2(), fm.Bias()),
                {**support, "labels": labels},
                lr=0.1,
                steps=1,
                loss_fn="causal_lm",
            )
        assert str(caught.value) == (
            f"the causal_lm loss needs labels [2, 3, {length}] for logits [2, 3, {length}, 20], "
            f"got [2, 3, {labels.shape[2]}]"
        )


def test_a_loss_of_ones_own() -> None:
    """Regression on logits, with floating-point labels that only the loss understands."""

    def squares(outputs, batch) -> Tensor:
        return (outputs.logits[..., 0] - batch["labels"]).square().mean(1)

    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    plain = oracle.as_batch(oracle.make_tasks(3))
    sets = [
        {**s, "labels": torch.randn(s["labels"].shape, dtype=torch.float64)}
        for s in (plain.support, plain.query)
    ]
    found = fm.adapt(patched, sets[0], lr=0.1, steps=20, loss_fn=squares)
    assert bool((found.support_losses[-1] < 0.5 * found.support_losses[0]).all())
    out = fm.MAML(patched, lr=0.1, steps=20, loss_fn=squares)(fm.TaskBatch(*sets))
    close(out.params.packed, found.params.packed)
    assert out.accuracy is None
    out.loss.backward()


def drawing(outputs, batch) -> Tensor:
    """Rows weighted by random numbers."""
    rows = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
    return (rows * torch.rand_like(rows)).mean(1)


@pytest.mark.parametrize("mode", [{"memory": "recompute"}, {"memory": "unroll", "task_chunk": 1}])
def test_a_loss_that_draws_while_the_model_is_evaluated(mode: dict) -> None:
    """A backward pass that computes it again draws the same numbers."""
    tasks = oracle.as_batch(oracle.make_tasks(3))
    model = oracle.tiny_bert()
    learner = fm.MAML(
        fm.patch(model, fm.Params("*query*")), lr=0.1, steps=2, loss_fn=drawing, **mode
    )
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    direction, h = torch.randn_like(weight), 1e-5

    def loss() -> Tensor:
        torch.manual_seed(3)
        return learner(tasks).loss

    loss().backward()
    ends = []
    for step in (h, -2 * h):
        with torch.no_grad():
            weight.add_(step * direction)
        ends.append(loss().detach())
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9)


class Holding(nn.Module):
    """A loss that holds the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, outputs, batch) -> Tensor:
        rows = F.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
        return rows.mean(1) + 0.1 * self.model.bert.pooler.dense.weight.square().sum()


@pytest.mark.parametrize("mode", [{"memory": "recompute"}, {"task_chunk": 1}, {"compile": True}])
def test_a_loss_that_holds_the_model(mode: dict) -> None:
    """Weights of both have their gradient once."""
    found = []
    for settings in ({"memory": "unroll"}, {"memory": "unroll"} | mode):
        model = oracle.tiny_bert()
        patched = fm.patch(model, fm.Params("*query*"))
        learner = fm.MAML(patched, lr=0.1, steps=2, loss_fn=Holding(model), **settings)
        found.append(oracle.gradients(learner, learner(oracle.as_batch(oracle.make_tasks(2))).loss))
    oracle.assert_close(found[1], found[0])


def test_ways_of_tokens() -> None:
    """Classes beyond a task's ways are none of the loss's, nor of the accuracy's."""

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

        def forward(self, input_ids: Tensor) -> tf.modeling_outputs.TokenClassifierOutput:
            logits = self.head(self.words(input_ids))
            return tf.modeling_outputs.TokenClassifierOutput(logits=logits)

    torch.manual_seed(0)
    model = Four()
    with torch.no_grad():
        model.head.bias[3] = 90.0
    ids = torch.arange(12).view(2, 2, 3)
    rows = {"input_ids": ids, "labels": ids % 3}
    patched = fm.patch(model, fm.Params("head"))
    out = fm.MAML(patched, steps=1, loss_fn="token_classification")(fm.TaskBatch(rows, rows, 3))
    assert out.loss < 50 and (out.accuracy > 0).any()


def test_a_regression_of_narrow_numbers() -> None:
    values, labels = torch.randn(2, 300, 1).bfloat16(), torch.randn(2, 300).bfloat16()
    assert regression(values, {"labels": labels}).dtype == torch.float32


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_that_returns_its_logits(compile: bool) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 23, (3, 5, 7), generator=g)
    batch = fm.TaskBatch(*[{"input_ids": ids, "labels": ids}] * 2)
    patched = fm.patch(Tagger().double(), fm.Params("*"))
    out = fm.MAML(patched, lr=1.0, steps=1, loss_fn="token_classification", compile=compile)(batch)
    logits = patched(out.params, input_ids=ids)
    close(out.logits, logits)
    right = (logits.argmax(-1) == ids).flatten(1).double().mean(1)
    close(out.accuracy, right.to(out.accuracy))
    assert 0 < float(out.accuracy.mean()) < 1
