"""Layers work on tokens without padding, with the results of padded texts, or padded texts."""

from __future__ import annotations

import episode_oracle
import families
import oracle
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from unpadded_texts import (
    EMPTY,
    EVERYTHING,
    LENGTH,
    NEARLY_FULL,
    ONE_FULL,
    TEXTS,
    UNEVEN,
    assert_right,
    layer_shapes,
    masks,
    model_logits,
    padded,
    texts,
    watched,
)

import fastmeta as fm
from fastmeta.engine.graphs import tracing
from fastmeta.patching import unpadded
from fastmeta.testing.float64 import keep_float64

# -- what layers see -------------------------------------------------------------------------

LAYERS = {"bert": 1, "distilbert": 2, "modernbert": 2, "llama": 2}  # BERT's last is shortened


@pytest.mark.parametrize("family", LAYERS)
def test_layers_see_the_tokens_of_the_fullest_task(family: str) -> None:
    patched = fm.patch(families.build(family), EVERYTHING)
    inputs = texts(TEXTS)
    assert len(patched.plan(inputs).unpadded) == LAYERS[family]
    assert layer_shapes(patched, inputs) == {(2, 10)}
    assert layer_shapes(patched, texts(UNEVEN.flip(0))) == {(2, 21)}


def test_decoders_that_see_padding_on_their_left_keep_it() -> None:
    """BART's decoder has no mask of its own."""
    model = families.build("bart")
    patched = fm.patch(model, fm.Head())
    for side in ("right", "left"):
        inputs = texts(side=side)
        inputs["input_ids"][..., -1] = model.config.eos_token_id  # whose state is read
        want = model(**{k: v.flatten(0, 1) for k, v in inputs.items()}).logits
        got = patched(patched.init(2), **inputs).logits.flatten(0, 1)
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:module .* runs one task after another")
@pytest.mark.parametrize("lengths", [[[5, 3], [4, 3]], [[8, 1], [2, 3]], [[4, 2], [4, 2]]])
def test_units_get_the_tokens_of_their_tasks(lengths: list) -> None:
    """Also where a task's tokens are no multiple of its texts."""
    patched = fm.patch(families.build("mixtral"), EVERYTHING)
    inputs = texts(torch.tensor(lengths))
    assert patched.plan(inputs).unpadded
    params = patched.init(2)
    for task in range(2):
        alone = patched(patched.init(1), **{k: v[task : task + 1] for k, v in inputs.items()})
        both = patched(params, **inputs)
        torch.testing.assert_close(both.logits[task], alone.logits[0])


def test_a_row_keeps_its_first_position() -> None:
    patched = fm.patch(families.build("distilbert"), EVERYTHING)
    assert layer_shapes(patched, texts(EMPTY)) == {(2, 8)}


def test_the_first_inputs_need_no_padding() -> None:
    """Layers without padding are found on the first call, whatever its texts."""
    patched = fm.patch(families.build("bert"), EVERYTHING)
    full = texts(torch.full((2, 3), LENGTH))
    assert layer_shapes(patched, full, layers=["bert.encoder.layer.0"]) == {(6, LENGTH)}
    assert layer_shapes(patched, texts()) == {(2, 10)}


def four_axes(mask: Tensor) -> Tensor:
    return mask.bool()[:, :, None, None, :].expand(-1, -1, 1, LENGTH, -1)


KEPT = {
    "nearly nothing is padded": lambda: texts(NEARLY_FULL),
    "one task is full": lambda: texts(ONE_FULL),
    "floating-point mask": lambda: {
        k: v.double() if "mask" in k else v for k, v in texts().items()
    },
    "mask of four axes": lambda: {
        k: four_axes(v) if "mask" in k else v for k, v in texts().items()
    },
}


@pytest.mark.parametrize("kind", KEPT)
def test_padding_is_kept(kind: str) -> None:
    patched = fm.patch(families.build("bert"), EVERYTHING)
    assert layer_shapes(patched, texts()) == {(2, 10)}
    inputs = KEPT[kind]()
    assert layer_shapes(patched, inputs) == {(6, LENGTH)}
    assert_right(patched, inputs)


def test_nothing_is_left_out_without_a_mask() -> None:
    patched = fm.patch(families.build("bert"), EVERYTHING)
    inputs = {"input_ids": texts()["input_ids"]}
    assert patched.plan(inputs).unpadded == []
    assert layer_shapes(patched, inputs, layers=["bert.encoder.layer.0"]) == {(6, LENGTH)}
    assert_right(patched, inputs)


def test_filling_tokens_have_no_gradient() -> None:
    """Tasks with fewer tokens are filled up; what is put back has zeros where padding was."""
    mask = masks(UNEVEN, "holes")
    tokens = unpadded.Tokens(mask.flatten(0, 1), 2)
    kept = mask.clone()
    kept[:, :, 0] = 1
    x = torch.rand(6, LENGTH, 2, dtype=torch.float64, requires_grad=True)
    packed = tokens.packed(x)
    found = tokens.padded(packed)
    weight = kept.flatten(0, 1).unsqueeze(-1).expand_as(x).double()
    assert torch.equal(found, x * weight)
    to_tokens, to_texts = torch.autograd.grad(found.sum(), (packed, x))
    assert torch.equal(to_texts, weight)
    assert to_tokens[:, :, 0].sum(1).tolist() == kept.flatten(1).sum(1).tolist()


# -- numbers ---------------------------------------------------------------------------------

CASES = [
    ("bert", UNEVEN, "right"),
    ("bert", TEXTS, "holes"),
    ("bert", EMPTY, "right"),
    ("distilbert", EMPTY, "holes"),
    ("modernbert", UNEVEN, "holes"),
    ("eurobert", TEXTS, "left"),
    ("llama", TEXTS, "left"),
    ("llama", UNEVEN, "holes"),
]


@pytest.mark.parametrize(("family", "lengths", "side"), CASES)
def test_the_numbers_of_padded_texts_and_of_a_loop(
    family: str, lengths: Tensor, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, inner gradients and second-order meta-gradients."""
    model = families.build(family)

    def run() -> tuple[oracle.Result, oracle.Result | None]:
        patched = fm.patch(model, EVERYTHING)
        support, query = (texts(lengths, side, seed) for seed in (1, 2))
        with watched(patched.plan(support)) as shapes:
            found = oracle.by_batch(patched, support, query, steps=1)
            leaf = oracle.by_leaf(patched, support, query, steps=1)
        seen.append(set(shapes))
        return found, leaf

    seen: list[set] = []
    found, leaf = run()
    kept, kept_leaf = padded(monkeypatch, run)
    most = int(lengths.clamp_min(1).sum(1).max())  # a lone first position may be one more
    assert all(s[0] == 2 and most <= s[1] < 3 * LENGTH for s in seen[0])
    assert seen[1] == {(6, LENGTH)}
    oracle.assert_same(found, kept)
    assert (leaf is None) == (kept_leaf is None)
    if leaf is not None:
        oracle.assert_same(leaf, kept_leaf)
    patched = fm.patch(model, EVERYTHING)
    support, query = (texts(lengths, side, seed) for seed in (1, 2))
    oracle.assert_same(found, oracle.by_loop(patched, support, query, steps=1))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_words_under_the_mask_are_never_read(family: str) -> None:
    patched = fm.patch(families.build(family), EVERYTHING)
    found = []
    for padding in (0, None):
        packed = patched.init(2).packed.detach().requires_grad_()
        inputs = texts(TEXTS, "holes", padding=padding)
        # as the first word of a text is always computed
        inputs["input_ids"][:, :, 0] = 5
        logits = patched(fm.TaskParams(patched.layout, packed), **inputs).logits
        if family == "modernbert":  # which pools the first token, masked or not
            logits = logits[inputs["attention_mask"][:, :, 0] == 1]
        found.append((logits, *torch.autograd.grad(logits.sin().sum(), packed)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_text_without_tokens_changes_no_other(family: str) -> None:
    patched = fm.patch(families.build(family), EVERYTHING)
    side = "left" if family == "llama" else "right"
    lengths = TEXTS.clone()
    before = patched(patched.init(2), **texts(lengths, side)).logits
    lengths[0, 1] = 0
    inputs = texts(lengths, side)
    packed = patched.init(2).packed.detach().requires_grad_()
    after = patched(fm.TaskParams(patched.layout, packed), **inputs).logits
    (gradient,) = torch.autograd.grad(after.sin().sum(), packed, create_graph=True)
    assert bool(after.isfinite().all()) and bool(gradient.isfinite().all())
    (second,) = torch.autograd.grad(gradient.sin().sum(), packed)
    assert bool(second.isfinite().all())
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(after[others], before[others], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(after[0, 1], before[0, 1])


# -- models that show their padding ----------------------------------------------------------


class Pooled(nn.Module):
    """The mean of all states, or of those of real tokens."""

    def __init__(self, by_mask: bool) -> None:
        super().__init__()
        self.encoder = families.build("bert").bert
        self.classifier = nn.Linear(families.HIDDEN, 3).double()
        self.by_mask = by_mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        if not self.by_mask:
            return self.classifier(states.mean(1))
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.classifier((states * weight).sum(1) / weight.sum(1))


def token_classifier() -> nn.Module:
    config = families.build("bert").config
    return tf.BertForTokenClassification(config).double().eval()


def shown_states() -> nn.Module:
    model = families.build("distilbert")
    model.config.output_hidden_states = True
    return model


def eager() -> nn.Module:
    model = families.build("distilbert")
    model.set_attn_implementation("eager")
    return model


SHOWING = {
    "states": lambda: families.build("bert").bert,
    "token classification": token_classifier,
    "mean of all positions": lambda: Pooled(by_mask=False),
    "hidden states": shown_states,
    "language model": lambda: families.build("gpt2_lm"),
    "attention of its own": eager,
}


def shown(out: object) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits


@pytest.mark.parametrize("kind", SHOWING)
def test_models_that_show_padding_keep_it(kind: str) -> None:
    model = SHOWING[kind]().eval()
    patched = fm.patch(model, EVERYTHING)
    inputs = texts()
    plan = patched.plan(inputs)
    assert plan.unpadded == [] or plan.shows_padding
    got = shown(patched(patched.init(2), **inputs)).flatten(0, 1)
    want = shown(model(**{k: v.flatten(0, 1) for k, v in inputs.items()}))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_pooling_by_the_mask_leaves_it_out() -> None:
    model = Pooled(by_mask=True).eval()
    patched = fm.patch(model, EVERYTHING)
    inputs = texts(TEXTS, "holes")
    assert len(patched.plan(inputs).unpadded) == 2
    ((rows, width),) = layer_shapes(patched, inputs)
    assert rows == 2 and 10 <= width < 16
    got = patched(patched.init(2), **inputs)
    want = model(**{k: v.flatten(0, 1) for k, v in inputs.items()}).unflatten(0, (2, 3))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_that_holds_words_shows_where_the_last_word_is_read(family: str) -> None:
    """Decoders find a text's last word by its id, and so read a masked one that is no padding."""
    patched = fm.patch(families.build(family), EVERYTHING)
    assert layer_shapes(patched, texts()) == {(2, 10)}
    inputs = texts(padding=None)
    assert layer_shapes(patched, inputs) == {(6, LENGTH) if family == "llama" else (2, 10)}
    assert_right(patched, inputs)
    # the same mask with other words, and words changed in place
    ids = texts()["input_ids"]
    assert layer_shapes(patched, {**inputs, "input_ids": ids}) == {(2, 10)}
    ids.masked_fill_(inputs["attention_mask"] == 0, 7)
    assert_right(patched, {**inputs, "input_ids": ids})


def labelled(side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Texts whose labels are their words, but for padding and words after padding."""
    inputs = texts(side=side, seed=seed)
    real = inputs["attention_mask"] != 0
    counted = real.clone()
    counted[..., 1:] &= real[..., :-1]
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~counted, -100)}


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("family", ["gpt2_lm", "bert_mlm"])
def test_labels_tell_that_nobody_reads_padding(family: str, side: str) -> None:
    patched = fm.patch(families.build(family), EVERYTHING)
    inputs = labelled(side)
    ((rows, width),) = layer_shapes(patched, inputs)
    assert rows == 2 and 10 <= width < 16
    with keep_float64():
        got = patched(patched.init(2), **inputs).logits
    labels = inputs.pop("labels")
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(got[real], model_logits(patched, inputs)[real], rtol=1e-9, atol=0)
    assert layer_shapes(patched, inputs) == {(6, LENGTH)}
    if side != "holes":
        labels[0, 0, 7 if side == "right" else 3] = 4  # of padding, or of the word after it
        assert layer_shapes(patched, {**inputs, "labels": labels}) == {(6, LENGTH)}


def test_labels_of_other_texts_tell_nothing() -> None:
    patched = fm.patch(families.build("bart_lm"), EVERYTHING)
    assert patched.plan(labelled()).unpadded == []


@pytest.mark.parametrize("order", [1, 2])
def test_language_models_learn_the_same_without_padding(
    monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    def run() -> dict[str, Tensor]:
        patched = fm.patch(families.build("gpt2_lm"), EVERYTHING)
        settings = {"order": order, "memory": "unroll", "loss_fn": "causal_lm"}
        learner = fm.MAML(patched, lr=0.1, steps=2, **settings)
        with watched(patched.plan(labelled())) as shapes, keep_float64():
            out = learner(fm.TaskBatch(labelled(), labelled("left", seed=1)))
            found = episode_oracle.gradients(learner, out.loss)
        seen.append({rows for rows, _ in shapes})
        return found

    seen: list[set] = []
    episode_oracle.assert_close(run(), padded(monkeypatch, run))
    assert seen == [{2}, {6}]


def test_layers_that_training_leaves_out_keep_padding() -> None:
    model = families.build("opt")
    model.model.decoder.layerdrop = 0.5
    for module in model.modules():
        module.dropout = 0.0 if isinstance(getattr(module, "dropout", None), float) else None
    patched = fm.patch(model.train(), EVERYTHING)
    inputs = texts()
    for seed in range(4):
        torch.manual_seed(seed)
        want = model_logits(patched, inputs)
        torch.manual_seed(seed)
        with keep_float64():
            got = patched(patched.init(2), **inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# -- masks that change, tracing --------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_masks_that_change_in_place(inference: bool) -> None:
    patched = fm.patch(families.build("distilbert"), EVERYTHING)
    with torch.inference_mode() if inference else torch.no_grad():
        inputs = texts()
        assert layer_shapes(patched, inputs) == {(2, 10)}
        assert_right(patched, inputs)
        inputs["attention_mask"][0, 0, 1:] = 0
        assert layer_shapes(patched, inputs) == {(2, 8)}
        assert_right(patched, inputs)
        inputs["attention_mask"].fill_(1)
        assert layer_shapes(patched, inputs) == {(6, LENGTH)}
        assert_right(patched, inputs)


def test_evaluation_in_inference_mode_leaves_training_alone() -> None:
    patched = fm.patch(families.build("distilbert"), EVERYTHING)
    inputs = texts()
    found = []
    with torch.inference_mode():
        want = patched(patched.init(2), **inputs).logits
    assert layer_shapes(patched, inputs) == {(2, 10)}
    for given in (inputs, texts()):
        logits = patched(patched.init(2), **given).logits
        torch.testing.assert_close(logits.detach(), want.clone())
        found.append(torch.autograd.grad(logits.sin().sum(), patched.slots.initial))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["vmap", "grad", "make_fx"])
def test_transformed_and_traced_calls_keep_padding(how: str) -> None:
    patched = fm.patch(families.build("distilbert"), EVERYTHING)
    inputs = texts()

    def run(packed: Tensor) -> Tensor:
        return patched(fm.TaskParams(patched.layout, packed), **inputs).logits

    packed = patched.init(2).packed.detach().clone().requires_grad_()
    want = run(packed)
    (gradient,) = torch.autograd.grad(want.sin().sum(), packed)
    packed = packed.detach()
    with watched(patched.plan(inputs)) as shapes:
        if how == "vmap":
            got = torch.func.vmap(run)(torch.stack([1.1 * packed, packed]))[1]
        elif how == "grad":
            got = torch.func.grad(lambda p: run(p).sin().sum())(packed)
        else:
            with tracing():
                graph = make_fx(run)(packed)
    assert set(shapes) == {(6, LENGTH)}
    if how == "make_fx":
        got = graph(packed)
    want = gradient if how == "grad" else want.detach()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
