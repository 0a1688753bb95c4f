"""Layers work on tokens without padding, with the results of padded texts, or padded texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import episode_oracle
import families
import oracle
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.pytorch_utils import Conv1D

import fastmeta as fm
from fastmeta.engine import memory
from fastmeta.engine.graphs import tracing
from fastmeta.ops import take_rows
from fastmeta.patching import unpadded
from fastmeta.testing.float64 import keep_float64

EVERYTHING = fm.Params("*")
LENGTH = 8

# Real tokens of every row of two tasks; which ones, `masks` says.
TEXTS = torch.tensor([[5, 3, 2], [4, 1, 3]])
UNEVEN = torch.tensor([[8, 6, 7], [1, 2, 1]])
EMPTY = torch.tensor([[5, 0, 2], [4, 3, 0]])
NEARLY_FULL = torch.tensor([[8, 8, 8], [8, 7, 8]])
ONE_FULL = torch.tensor([[1, 2, 1], [8, 8, 8]])


def masks(lengths: Tensor, side: str = "right", seed: int = 0) -> Tensor:
    """``[T, N, L]`` with so many ones in every row: in front, at the end, or anywhere."""
    place = torch.arange(LENGTH).expand(*lengths.shape, -1)
    if side == "left":
        place = place.flip(-1)
    elif side == "holes":
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(place.shape, generator=generator).argsort(-1)
    return (place < lengths.unsqueeze(-1)).long()


def texts(
    lengths: Tensor = TEXTS, side: str = "right", seed: int = 0, padding: int | None = 0
) -> dict[str, Tensor]:
    """Inputs of two tasks; None leaves words where padding is."""
    generator = torch.Generator().manual_seed(seed)
    mask = masks(lengths, side, seed)
    ids = torch.randint(3, 20, mask.shape, generator=generator)
    ids = ids if padding is None else ids.masked_fill(mask == 0, padding)
    return {"input_ids": ids, "attention_mask": mask}


def padded(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> object:
    """What `run` gives where no layer leaves out padding; it makes inputs of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(unpadded, "_WORTH", 0.0)
        return run()


@contextmanager
def watched(plan, layers: list[str] | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Leading shapes ``(rows, length)`` that linear modules of the layers are called on."""
    layers = plan.unpadded if layers is None else layers
    shapes: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
        for name in layers
        for module in plan.structure.get_submodule(name).modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    assert handles
    yield shapes
    for handle in handles:
        handle.remove()


def layer_shapes(patched: fm.Patched, inputs: dict[str, Tensor], **kwargs) -> set:
    """``(rows, length)`` within layers that can leave out padding, in one call."""
    with watched(patched.plan(inputs), **kwargs) as shapes:
        patched(patched.init(2), **inputs)
    assert shapes
    return set(shapes)


def model_logits(patched: fm.Patched, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the user's model, ``[T, N, ...]``."""
    with keep_float64():
        out = patched.model(**{k: v.flatten(0, 1) for k, v in inputs.items()})
    tasks, rows = inputs["input_ids"].shape[:2]
    return out.logits.unflatten(0, (tasks, rows))


def assert_right(patched: fm.Patched, inputs: dict[str, Tensor]) -> None:
    """The patched model gives what the user's model gives."""
    with keep_float64():
        got = patched(patched.init(2), **inputs).logits
    torch.testing.assert_close(got, model_logits(patched, inputs), rtol=1e-9, atol=1e-12)


# -- what layers see -------------------------------------------------------------------------

LAYERS = {"bert": 1, "distilbert": 2, "modernbert": 2, "llama": 2}  # BERT's last is shortened


@pytest.mark.parametrize("family", LAYERS)
def test_layers_see_the_tokens_of_the_fullest_task(family: str) -> None:
    patched = fm.patch(families.build(family), EVERYTHING)
    inputs = texts(TEXTS)
    assert len(patched.plan(inputs).unpadded) == LAYERS[family]
    assert layer_shapes(patched, inputs) == {(2, 10)}
    assert layer_shapes(patched, texts(UNEVEN.flip(0))) == {(2, 21)}


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


# -- what adapts -----------------------------------------------------------------------------

SPECS = {
    "everything": EVERYTHING,
    "LoRA and head": fm.LoRA(r=2) + fm.Head(),
    "last layer": fm.Params("bert.encoder.layer.2", "classifier"),
    "middle layer": fm.Params("bert.encoder.layer.1"),
    "head": fm.Params("classifier"),
    "prefix": fm.Prefix(2),
}


def bert(**settings) -> nn.Module:
    return episode_oracle.tiny_bert(layers=3, **settings)


@cache
def tasks(seed: int = 0) -> list[episode_oracle.Task]:
    """Three tasks of three support texts and two query texts, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths in ([5, 2, 8], [1, 2, 1], [3, 4, 2]):
        sets = []
        for rows in (3, 2):
            mask = masks(torch.tensor(lengths[:rows]))
            ids = torch.randint(1, 20, mask.shape, generator=generator)
            labels = torch.randperm(3, generator=generator)[:rows]
            sets.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        found.append((*sets, None))
    return found


SUPPORT, QUERY = (3, 15), (3, 7)
"""Tasks, and tokens of the fullest."""


def support_of(batch: fm.TaskBatch) -> dict[str, Tensor]:
    return memory.model_inputs(batch.support)


def steps_of(learner: nn.Module, *, seed: int | None = None) -> tuple[dict[str, Tensor], set]:
    """Losses and meta-gradients of one batch, and what layers saw."""
    batch = episode_oracle.as_batch(tasks())
    with watched(learner.patched.plan(support_of(batch))) as shapes:
        if seed is not None:
            torch.manual_seed(seed)
        out = learner(batch)
        found = episode_oracle.gradients(learner, out.loss)
    found |= {"losses": out.task_losses, "logits": out.logits}
    return {n: t.detach() for n, t in found.items()}, set(shapes)


@cache
def expected(name: str, order: int = 2) -> dict[str, Tensor]:
    """The same by a loop over tasks."""
    return by_loop(fm.MAML(fm.patch(bert(), SPECS[name]), lr=0.1, steps=2, order=order))


def by_loop(learner: fm.MAML) -> dict[str, Tensor]:
    episode = episode_oracle.loop(learner, tasks())
    found = episode.gradients()
    found |= {"losses": torch.stack(episode.losses), "logits": torch.stack(episode.logits)}
    return {n: t.detach() for n, t in found.items()}


@pytest.mark.parametrize("name", SPECS)
def test_specifications(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[dict[str, Tensor], set]:
        patched = fm.patch(bert(), SPECS[name])
        return steps_of(fm.MAML(patched, lr=0.1, steps=2, memory="unroll"))

    found, shapes = run()
    kept, kept_shapes = padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY} and kept_shapes == {(9, LENGTH), (6, LENGTH)}
    episode_oracle.assert_close(found, kept)
    if name != "prefix":
        episode_oracle.assert_close(found, expected(name))


@pytest.mark.parametrize("name", ["last layer", "middle layer"])
def test_a_stored_prefix_is_that_of_tokens(name: str) -> None:
    patched = fm.patch(bert(), SPECS[name])
    inputs = {
        k: v for k, v in support_of(episode_oracle.as_batch(tasks())).items() if k != "labels"
    }
    params = patched.init(3)
    want = patched(params, **inputs).logits
    outputs = []
    first = patched.plan(inputs).unpadded[:1]
    for kept in (False, True):
        store = patched.record_prefix(params, inputs, padded=kept)
        (output,) = store.outputs[first[0]]
        outputs.append(output)
        with watched(patched.plan(inputs), layers=first) as shapes:
            for given in (store, store, store.with_tensors(store.tensors())):
                got = patched(params, prefix_cache=given, **inputs).logits
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert not shapes  # which ran once, before
    assert outputs[0].shape[:2] == SUPPORT and outputs[1].shape[:2] == (9, LENGTH)


def test_transforms_need_a_prefix_of_padded_texts() -> None:
    patched = fm.patch(bert(), SPECS["last layer"])
    inputs = texts()
    params = patched.init(2)
    packed = params.packed.detach()

    def run(factor: Tensor, store) -> Tensor:
        fast = fm.TaskParams(patched.layout, factor * packed)
        return patched(fast, prefix_cache=store, **inputs).logits

    factors = torch.tensor([1.0, 1.5], dtype=packed.dtype)
    with pytest.raises(RuntimeError, match="needs a prefix of padded texts: record_prefix"):
        torch.func.vmap(run, in_dims=(0, None))(factors, patched.record_prefix(params, inputs))
    store = patched.record_prefix(params, inputs, padded=True)
    got = torch.func.vmap(run, in_dims=(0, None))(factors, store)
    want = torch.stack([run(f, store) for f in factors])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


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
    labels[0, 0, 7 if side == "right" else 3] = 4  # of padding, or of the word after it
    if side != "holes":
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


# -- the engine ------------------------------------------------------------------------------

MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "chunks": {"memory": "unroll", "task_chunk": 1},
    "recomputed chunks": {"memory": "recompute", "task_chunk": 2},
    "auto": {"memory": "auto"},
    "packed": {"memory": "unroll", "optimizer": "sgd", "clip_norm": 1e6},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["everything", "last layer"])
def test_memory_modes(name: str, mode: str) -> None:
    learner = fm.MAML(fm.patch(bert(), SPECS[name]), lr=0.1, steps=2, **MODES[mode])
    found, shapes = steps_of(learner)
    # a chunk has the width of its own tasks
    assert SUPPORT in shapes or {(1, 15), (2, 15)} & shapes
    assert all(rows <= 3 for rows, _ in shapes)
    episode_oracle.assert_close(found, expected(name))


def test_first_order() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=2, order=1)
    found, shapes = steps_of(learner)
    assert shapes == {SUPPORT, QUERY}
    episode_oracle.assert_close(found, expected("everything", order=1))


@pytest.mark.parametrize(("pattern", "order"), [("*layer.0.output*", 1), ("*layer.1.*", 2)])
def test_captured_steps_keep_padding(pattern: str, order: int) -> None:
    """Only the query set, which is judged eagerly, is without; a stored prefix has it too."""
    patched = fm.patch(episode_oracle.tiny_bert(layers=2), fm.Params(pattern))
    learner = fm.MAML(patched, lr=0.1, steps=2, order=order, memory="unroll", compile=True)
    found, shapes = steps_of(learner)
    assert learner.capture.steps and all(s is not None for s in learner.capture.steps.values())
    assert shapes == {(9, LENGTH), QUERY}
    episode_oracle.assert_close(found, by_loop(learner))


def test_heads_on_frozen_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[dict[str, Tensor], set]:
        return steps_of(fm.ANIL(fm.patch(bert(), fm.Head()), lr=0.1, steps=3, memory="unroll"))

    (found, shapes), (kept, kept_shapes) = run(), padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY} and kept_shapes == {(9, LENGTH), (6, LENGTH)}
    episode_oracle.assert_close(found, kept)


def test_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that start from what they read."""

    def run() -> tuple[dict[str, Tensor], set]:
        return steps_of(
            fm.ProtoMAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1, memory="unroll")
        )

    (found, shapes), (kept, _) = run(), padded(monkeypatch, run)
    assert shapes == {SUPPORT, QUERY}
    episode_oracle.assert_close(found, kept)


def test_dropout_is_replayed() -> None:
    def run(mode: str, seed: int = 3) -> dict[str, Tensor]:
        learner = fm.MAML(fm.patch(bert(dropout=0.3), EVERYTHING), lr=0.1, steps=2, memory=mode)
        learner.train()
        found, shapes = steps_of(learner, seed=seed)
        assert shapes == {SUPPORT, QUERY}
        return found

    found, again = run("unroll"), run("unroll")
    assert all(torch.equal(found[n], again[n]) for n in found)
    episode_oracle.assert_close(run("recompute"), found)
    assert not torch.equal(run("unroll", seed=4)["losses"], found["losses"])


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


# -- memory plans ----------------------------------------------------------------------------


def batch_of(tokens: int) -> fm.TaskBatch:
    """Two tasks of three texts; the second is the fullest and has so many tokens."""
    lengths = torch.tensor([[1, 1, 1], [1, 1, tokens - 2]])
    sets = [texts(lengths, seed=s) | {"labels": torch.tensor([[0, 1, 2]] * 2)} for s in (0, 1)]
    return fm.TaskBatch(*sets)


def plan_of(learner: fm.MAML, batch: fm.TaskBatch) -> memory.MemoryPlan:
    learner(batch)
    (plan,) = learner._memory_plans.values()
    return plan


def test_many_more_tokens_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    measured = []
    original = memory.predict

    def predict(loop, batch, mode):
        measured.append(memory.computed_tokens(loop, batch[:1]))
        return original(loop, batch, mode)

    monkeypatch.setattr(memory, "predict", predict)
    first = plan_of(learner, batch_of(6))
    assert first.tokens == (6, 6) and measured[0] == (6, 6)  # the fullest task is
    count = len(measured)
    for fewer in (6, 4):
        assert plan_of(learner, batch_of(fewer)) is first
    assert len(measured) == count
    second = plan_of(learner, batch_of(9))
    assert second is not first and second.tokens == (9, 9) and measured[count] == (9, 9)
    assert plan_of(learner, batch_of(6)) is second
    # the query set counts too
    batch = batch_of(6)
    third = plan_of(learner, fm.TaskBatch(batch.support, batch_of(10).query))
    assert third is not second and third.tokens == (6, 10)


@pytest.mark.parametrize("kind", ["captured", "without layers"])
def test_plans_of_padded_texts_hold_for_any(kind: str) -> None:
    model = episode_oracle.tiny_bert(layers=1) if kind == "without layers" else bert()
    patched = fm.patch(model, EVERYTHING)
    learner = fm.MAML(patched, lr=0.1, steps=1, compile=kind == "captured")
    for tokens in (6, 10):
        plan = memory.choose_plan(learner.inner_loop(), batch_of(tokens), "auto", None)
        assert plan.predicted_bytes > 0 and plan.tokens == ()


def test_a_plan_allows_a_few_more_tokens() -> None:
    plan = memory.MemoryPlan("unroll", tokens=(100, 200))
    assert not plan.outgrown((105, 210))
    assert plan.outgrown((106, 10)) and plan.outgrown((10, 211))


def test_a_mask_that_keeps_padding_outgrows_a_plan() -> None:
    learner = fm.MAML(fm.patch(bert(), EVERYTHING), lr=0.1, steps=1)
    first = plan_of(learner, batch_of(6))
    batch = batch_of(6)
    batch.support["attention_mask"] = batch.support["attention_mask"].double()
    assert first.tokens == (6, 6) and plan_of(learner, batch).tokens == (3 * LENGTH, 6)


# -- the operator ----------------------------------------------------------------------------

X, INDEX, INVERSE = torch.zeros(3, 2), torch.tensor([2, -1]), torch.tensor([-1, -1, 0])


@pytest.mark.parametrize(
    ("x", "index", "inverse", "message"),
    [
        (X[0], INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (X.long(), INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (None, INDEX, INVERSE, r"take_rows: x must be a floating-point tensor \[R, C\], got"),
        (X, INDEX.int(), INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, INDEX[None], INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, [2, -1], INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
        (X, INDEX, INVERSE.double(), r"take_rows: inverse must be int64 \[3\] on cpu, got"),
        (X, INDEX, INVERSE[:2], r"take_rows: inverse must be int64 \[3\] on cpu, got"),
        (X, INDEX.to("meta"), INVERSE, r"take_rows: index must be int64 \[S\] on cpu, got"),
    ],
)
def test_wrong_arguments(x, index, inverse, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_rows(x, index, inverse)


def test_rows_that_do_not_exist(cpu_impl: tuple[str, str]) -> None:
    for row in (3, -2) if cpu_impl[0] == "cpp" else (3,):
        with pytest.raises((RuntimeError, IndexError), match=r"range|bounds|-1"):
            take_rows(X, torch.tensor([row, 0]), INVERSE)


def test_orders_are_shared_under_vmap() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(
        ValueError, match="take_rows: index and inverse must be shared by all samples of vmap"
    ):
        torch.func.vmap(lambda index: take_rows(x, index, INVERSE))(INDEX.expand(2, 2))
