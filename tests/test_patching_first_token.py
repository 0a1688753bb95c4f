"""The last layer computes only what the head reads, and only where the head reads nothing else."""

import pytest
import torch
import transformers as tf
from torch import nn

import fastmeta as fm

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "pad_token_id": 0,
}


def _inputs(tasks: int = 2, rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (tasks, rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _last_layer_length(patched: fm.Patched, inputs: dict[str, torch.Tensor]) -> int:
    """Tokens that leave the last layer."""
    plan = patched.plan(inputs)
    layers = [m for n, m in plan.structure.named_modules() if n.endswith("layer.1")]
    lengths = []
    handle = layers[0].register_forward_hook(lambda m, a, out: lengths.append(out.shape[1]))
    patched(patched.init(2), **inputs)
    handle.remove()
    return lengths[0]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head(), fm.Prefix(2)])
def test_classifiers_are_shortened(family: str, spec: fm.Spec):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SIZE)
    model = getattr(tf, f"{family}ForSequenceClassification")(config).eval().double()
    patched = fm.patch(model, spec)
    inputs = _inputs()
    assert _last_layer_length(patched, inputs) == 1
    if not isinstance(spec, fm.Prefix):
        want = model(**{k: v.flatten(0, 1) for k, v in inputs.items()}).logits
        got = patched(patched.init(2), **inputs).logits.flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


class Mean(nn.Module):
    """A mean of words that patching does not know, as it knows that of a `SentenceClassifier`."""

    def __init__(self, bert: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.bert, self.classifier = bert, nn.Linear(16, num_labels)

    def forward(self, input_ids, attention_mask):
        states, mask = self.bert(input_ids, attention_mask)[0], attention_mask.unsqueeze(-1)
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))
        return tf.modeling_outputs.SequenceClassifierOutput(logits=logits)


@pytest.mark.parametrize("spec", [fm.Params("*"), fm.Params("classifier")])
@pytest.mark.parametrize("kind", [fm.models.SentenceClassifier, Mean])
def test_means_of_texts_of_one_word_do_not_hide_the_others(kind: type[nn.Module], spec: fm.Spec):
    torch.manual_seed(0)
    bert = tf.BertModel(tf.BertConfig(**SIZE), add_pooling_layer=False)
    model = kind(bert, num_labels=3).double().eval()
    patched = fm.patch(model, spec)
    inputs = _inputs()
    one = {**inputs, "attention_mask": (torch.arange(6) < 1).long().expand(2, 3, 6).clone()}
    for given in (one, inputs):
        want = model(**{k: v.flatten(0, 1) for k, v in given.items()}).logits
        got = patched(patched.init(2), **given).logits.flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head", ["ForTokenClassification", "Model"])
def test_models_that_show_every_token_are_not(head: str):
    torch.manual_seed(0)
    model = getattr(tf, f"Bert{head}")(tf.BertConfig(**SIZE)).eval()
    patched = fm.patch(model, fm.Params("*encoder*"))
    assert _last_layer_length(patched, _inputs()) == 6


def test_mean_pooling_is_not():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tf.BertModel(tf.BertConfig(**SIZE), add_pooling_layer=False)
            self.classifier = nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask):
            states = self.encoder(input_ids, attention_mask).last_hidden_state
            return self.classifier(states.mean(1))

    torch.manual_seed(0)
    patched = fm.patch(Pooled().eval(), fm.Params("*"))
    assert _last_layer_length(patched, _inputs()) == 6


def test_single_tokens_are_left_alone():
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZE)).eval()
    patched = fm.patch(model, fm.Params("*"))
    short, long = _inputs(length=1), _inputs()
    patched(patched.init(2), **short)
    assert _last_layer_length(patched, long) in (1, 6)
    want = model(**{k: v.flatten(0, 1) for k, v in long.items()}).logits
    torch.testing.assert_close(patched(patched.init(2), **long).logits.flatten(0, 1), want)


def test_a_shortened_layer_drops_attention_in_training():
    torch.manual_seed(0)
    only = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZE | only)).train()
    patched, inputs = fm.patch(model, fm.Prefix(2)), _inputs()
    params = patched.init(2)
    assert not torch.equal(patched(params, **inputs).logits, patched(params, **inputs).logits)


@pytest.mark.parametrize("kind", ["linear", "hook", "subclass"])
def test_keys_are_not_computed_unless_they_are_more_than_linear(kind: str):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZE)).eval().double()
    key = model.bert.encoder.layer[1].attention.self.key
    if kind == "hook":
        key.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "subclass":
        key.__class__ = Doubled
    patched = fm.patch(model, fm.Params("*value*", "*classifier*"))
    inputs = _inputs()
    assert _last_layer_length(patched, inputs) == 1
    calls = []
    run = patched.plan(inputs).structure.bert.encoder.layer[1].attention.self.key
    run.register_forward_hook(lambda *_: calls.append(1))
    got = patched(patched.init(2), **inputs).logits.flatten(0, 1)
    want = model(**{k: v.flatten(0, 1) for k, v in inputs.items()}).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert len(calls) == (0 if kind == "linear" else 1)
