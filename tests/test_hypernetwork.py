"""The hypernetwork: exact against a loop over tasks, what it depends on, specifications, errors."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from oracle import _logits as loop_logits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.algorithms.generator import row_labels
from fastmeta.models import SentenceClassifier
from fastmeta.testing.float64 import keep_float64

TASKS, SHOTS, WAYS, LENGTH, VOCABULARY = 3, 2, 3, 6, 30
SPEC = fm.LoRA(r=2, alpha=4, targets=("query", "value")) + fm.Bias() + fm.Head()


def make_model(ways: int = WAYS, dtype=torch.float64) -> SentenceClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=16, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return SentenceClassifier(tf.BertModel(config, add_pooling_layer=False), ways, 4.0).to(
            dtype
        )


@cache
def batch(seed: int = 0, ways: int = WAYS) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def part() -> dict[str, Tensor]:
        rows = SHOTS * ways
        ids = torch.randint(1, VOCABULARY, (TASKS, rows, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, ::2, 4:] = 0
        labels = torch.arange(rows).expand(TASKS, rows) % ways
        return {"input_ids": ids, "attention_mask": mask, "labels": labels.contiguous()}

    return fm.TaskBatch(part(), part())


def learner_of(spec=SPEC, model=None, spoil: bool = True, **settings) -> fm.HyperNetwork:
    """A small one that has been trained a little: nothing is zero."""
    patched = fm.patch(make_model() if model is None else model, spec)
    sizes = {"latent": 5, "hidden": 6, "embedding": 3, "rank": 2, "scale": 1.0}
    learner = fm.HyperNetwork(patched, **sizes, **settings)
    if spoil:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in learner.net.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return learner


def description(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (TASKS, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize(("steps", "order"), [(0, 2), (2, 1), (2, 2)])
def test_meta_gradient_is_that_of_a_loop(steps: int, order: int, memory: str):
    if steps == 0 and memory == "recompute":
        pytest.skip("no steps to recompute")
    learner = learner_of(steps=steps, order=order, lr=0.1, memory=memory, train_encoder=True)
    given, losses = batch(), []
    with keep_float64():
        out = learner(given)
        with sdpa_kernel(SDPBackend.MATH):
            for t in range(TASKS):
                support, query = (
                    {k: v[t] for k, v in s.items()} for s in (given.support, given.query)
                )
                fast = learner.generate({k: v.unsqueeze(0) for k, v in support.items()}).task(0)
                for _ in range(steps):
                    fast = {n: p + 0 for n, p in fast.items()}
                    logits = loop_logits(learner.patched, fast, without_labels(support))
                    loss = F.cross_entropy(logits, support["labels"])
                    grads = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
                    fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
                logits = loop_logits(learner.patched, fast, without_labels(query))
                losses.append(F.cross_entropy(logits, query["labels"]))
        losses = torch.stack(losses)
        own = dict(learner.named_parameters())
        got = torch.autograd.grad(out.loss, list(own.values()), allow_unused=True)
        want = torch.autograd.grad(losses.mean(), list(own.values()), allow_unused=True)
    torch.testing.assert_close(out.task_losses, losses, rtol=1e-9, atol=0)
    largest = max(float(w.abs().max()) for w in want if w is not None)
    for name, g, w in zip(own, got, want, strict=True):
        w = torch.zeros_like(own[name]) if w is None else w
        g = torch.zeros_like(own[name]) if g is None else g
        scale = max(float(w.abs().max()), 1e-3 * largest)
        assert float((g - w).abs().max()) <= 1e-9 * scale, name
    assert not any(n.startswith("classifier") for n in own)  # made from examples, never used


def without_labels(examples):
    return {k: v for k, v in examples.items() if k != "labels"}


def test_order_and_names_of_examples_do_not_matter():
    """Shuffled rows give the same weights; renamed classes the same body and a permuted head."""
    learner, support = learner_of(), batch().support
    before = learner.generate(support)
    order = torch.randperm(SHOTS * WAYS, generator=torch.Generator().manual_seed(0))
    shuffled = learner.generate({k: v[:, order] for k, v in support.items()})
    torch.testing.assert_close(shuffled.packed, before.packed)
    names = torch.tensor([2, 0, 1])
    renamed = learner.generate(support | {"labels": names[support["labels"]]})
    for name, value in before.items():
        other = renamed[name]
        other = other[:, names] if name.startswith("classifier") else other
        torch.testing.assert_close(other, value)


def test_rows_that_do_not_count_change_nothing():
    learner, support = learner_of(), batch().support
    more = {k: torch.cat([v, v[:, :2]], 1) for k, v in support.items()}
    more["labels"][:, -2:] = -100
    before = learner.generate(support).packed
    torch.testing.assert_close(learner.generate(more).packed, before)
    other = support | {"labels": support["labels"].flip(1)}
    assert not torch.allclose(learner.generate(other).packed, before)


def test_a_tasks_weights_do_not_depend_on_its_neighbours():
    learner, support = learner_of(), batch().support
    whole = learner.generate(support).packed
    for t in range(TASKS):
        alone = learner.generate({k: v[t : t + 1] for k, v in support.items()}).packed
        torch.testing.assert_close(alone[0], whole[t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        fm.Params("*"),
        fm.Prefix(3) + fm.Head(),
        fm.Norm(),
        fm.LoRA(r=2, targets="all-linear"),
        fm.Head(),
    ],
    ids=repr,
)
def test_every_specification(spec):
    """Untrained, all but a generated head are the initial values; every tensor can be reached."""
    model = None
    if "Prefix" in repr(spec):  # which needs the model's own kind of attention
        config = make_model().config
        model = tf.BertForSequenceClassification(config).double()
    learner = learner_of(spec, model, spoil=False)
    params = learner.generate(batch().support)
    start = learner.patched.init(TASKS)
    for name in start:
        if learner.head is None or not name.startswith("classifier"):
            torch.testing.assert_close(params[name], start[name])
    learner = learner_of(spec, model)
    params = learner.generate(batch().support)
    for name, value in params.items():
        assert not torch.equal(value[0], value[1]), name
    with keep_float64():
        learner(batch()).loss.backward()
    for name, p in learner.named_parameters():
        if name.startswith("hypernet.") and not name.endswith("project.weight"):
            assert p.grad is not None, name


def test_large_tensors_are_products_of_low_rank(monkeypatch):
    from fastmeta.algorithms import generator

    monkeypatch.setattr(generator, "_DIRECT", 20)
    learner = learner_of(fm.Params("*"))
    start = learner.patched.init(TASKS)
    more = learner.generate(batch().support)["encoder.embeddings.word_embeddings.weight"]
    difference = more - start["encoder.embeddings.word_embeddings.weight"]
    assert torch.linalg.matrix_rank(difference).tolist() == [2] * TASKS


def test_the_head_is_made_of_the_classes_examples():
    learner = learner_of(fm.Head(), spoil=False, gain=2.5)
    with torch.no_grad():
        params = learner.generate(batch().support)
        features = learner.encoder(batch().support)
    for t in range(TASKS):
        for c in range(WAYS):
            rows = features[t][batch().support["labels"][t] == c]
            expected = 2.5 * F.normalize(rows.mean(0), dim=0)
            torch.testing.assert_close(params["classifier.weight"][t, c], expected)


def test_trained_on_few_classes_used_on_more():
    few, many = learner_of(), learner_of(model=make_model(5))
    many.load_state_dict(few.state_dict())
    given = batch(ways=5)
    with torch.no_grad():
        assert many(given).logits.shape == (TASKS, 5 * SHOTS, 5)
        ragged = batch()
        a, b = few(ragged), many(ragged)
        torch.testing.assert_close(b.task_losses, a.task_losses)


def test_a_description_is_read():
    for reads in ("description", "both"):
        learner = learner_of(reads=reads, steps=1, lr=0.1)
        given = batch()
        with keep_float64():
            first = learner(given, description=description())
            second = learner(given, description=description(1))
            assert not torch.allclose(first.task_losses, second.task_losses)
            first.loss.backward()
        assert learner.net["set"].described.weight.grad.abs().sum() > 0
    alone = learner_of(reads="description")
    params = alone.generate(description=description())
    assert params.packed.shape == (TASKS, alone.patched.layout.num_params)
    assert alone.head is None  # a description has no classes


def test_texts_of_a_language_model_are_read():
    """They are all of one class; a text without labels does not count."""
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = tf.GPT2LMHeadModel(config).double().eval()
    learner = learner_of(fm.LoRA(r=2), model, loss_fn="causal_lm", memory="unroll")

    def texts(task_set) -> dict[str, Tensor]:
        ids = task_set["input_ids"]
        labels = ids.masked_fill(task_set["attention_mask"] == 0, -100)
        labels[1, 2] = -100
        return {**task_set, "labels": labels}

    support, query = texts(batch().support), texts(batch().query)
    expected = torch.zeros(TASKS, SHOTS * WAYS, dtype=torch.int64)
    expected[1, 2] = -100
    assert torch.equal(row_labels(support["labels"]), expected)
    numbers = torch.where(expected == 0, 0.5, float("nan"))
    assert torch.equal(row_labels(numbers), expected)
    with keep_float64():
        found = learner(fm.TaskBatch(support, query))
        found.loss.backward()
        assert learner.net["set"].phi[0].weight.grad.abs().sum() > 0
        for task, row, changes in ((1, 2, False), (1, 3, True)):
            ids = support["input_ids"].clone()
            ids[task, row] = ids[task, row].flip(0)
            params = learner.generate({**support, "input_ids": ids})
            assert torch.equal(params.packed, found.params.packed) is not changes
            others = params.packed[[0, 2]]
            torch.testing.assert_close(others, found.params.packed[[0, 2]])


def test_services_generate_once_and_predict_often():
    learner, given = learner_of(), batch()
    with keep_float64(), torch.no_grad():
        params = learner.adapt(given.support)
        logits = learner.predict(params, **without_labels(given.query))
        torch.testing.assert_close(logits, learner(given).logits)
        refined = learner.adapt(given.support, steps=2)
        found = fm.adapt(learner.patched, given.support, steps=2, lr=1e-2, params=params)
        torch.testing.assert_close(refined.packed, found.params.packed)


class Spoilt(nn.Module):
    """A generator whose second task is not finite."""

    def __init__(self, value: float, latent: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(latent, 8)
        self.value = value

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        bias = 0.1 * self.linear(z)
        bad = torch.zeros_like(bias)
        if len(z) == TASKS:
            bad[1] = self.value
        return {"encoder.encoder.layer.1.output.dense.bias": bias + bad}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_freeze_their_task_alone(value: float, steps: int):
    torch.manual_seed(0)
    bad = learner_of(spoil=False, generator=Spoilt(value), steps=steps, lr=0.1, memory="unroll")
    torch.manual_seed(0)
    good = learner_of(spoil=False, generator=Spoilt(0.0), steps=steps, lr=0.1, memory="unroll")
    with keep_float64():
        out = bad(batch())
        alone = good(batch().select(torch.tensor([0, 2])))
        assert out.diverged.tolist() == [False, True, False]
        torch.testing.assert_close(out.task_losses[[0, 2]], alone.task_losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.params.packed[[0, 2]], alone.params.packed)
        out.loss.backward(), alone.loss.backward()
    for (name, p), q in zip(bad.named_parameters(), good.parameters(), strict=True):
        if p.grad is not None or q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13, msg=name)
    assert out.support_losses.shape == (steps, TASKS)


def test_all_tasks_spoilt():
    class All(Spoilt):
        def forward(self, z):
            return {n: v * float("nan") for n, v in super().forward(z).items()}

    learner = learner_of(spoil=False, generator=All(0.0))
    with keep_float64():
        out = learner(batch())
        out.loss.backward()
    assert out.diverged.all() and float(out.loss.detach()) == 0


def test_generated_weights_are_never_copied_per_token():
    """What autograd keeps of LoRA's factors has one row per task."""
    learner = learner_of(fm.LoRA(r=2, targets=("query",)) + fm.Head(), model=make_model())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        params = learner.generate(batch().support)
        learner.patched(params, **without_labels(batch().query))
    factor = params["encoder.encoder.layer.0.attention.self.query.lora_A"]
    mine = [t for t in kept if t.shape[-2:] == factor.shape[-2:] and t.dim() == 3]
    assert mine and all(t.shape[0] == TASKS for t in mine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": "labels"}, "reads must be one of support, description, both, got 'labels'"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"pooling": "max"}, "pooling must be one of"),
    ],
)
def test_settings_out_of_range(change, message):
    patched = fm.patch(make_model(), SPEC)
    with pytest.raises(ValueError, match=message):
        fm.HyperNetwork(patched, **change)


def test_batches_that_do_not_fit():
    learner, given = learner_of(), batch()
    support = given.support | {"labels": given.support["labels"].clamp_max(1)}
    with pytest.raises(ValueError, match="task 0 has 3 classes, but no support row of class 2"):
        learner(fm.TaskBatch(support, given.query))
    long = {k: v.repeat(1, 1, 3) if v.dim() == 3 else v for k, v in given.support.items()}
    with pytest.raises(ValueError, match="takes at most 16 tokens, got support texts of 18"):
        learner(fm.TaskBatch(long, given.query))
    with pytest.raises(ValueError, match="reads 'support': expected no description, got a desc"):
        learner(given, description=description())
    with pytest.raises(ValueError, match="reads 'both': expected a description, got none"):
        learner_of(reads="both")(given)
    with pytest.raises(ValueError, match="expected support, got none"):
        learner.generate()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"classifier.bias": (TASKS, 4)},
            r"must return \[3, 3\] for 'classifier.bias', got \[3, 4\]",
        ),
        ({"pooler.bias": (TASKS, 4)}, "returned 'pooler.bias', which the specification does not"),
        (None, r"must return a mapping name -> \[T, \*shape\], got NoneType"),
    ],
)
def test_generated_shapes_that_do_not_fit(found, message):
    def generator(z):
        return found and {n: torch.zeros(s, dtype=z.dtype) for n, s in found.items()}

    learner = learner_of(spoil=False, generator=generator)
    with pytest.raises((TypeError, ValueError), match=message):
        learner(batch())


def test_a_state_of_another_specification():
    first, second = learner_of(), learner_of(fm.LoRA(r=3) + fm.Head())
    before = {n: t.clone() for n, t in second.state_dict().items()}
    with pytest.raises(ValueError, match="the state is of another model or learner: missing"):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in second.state_dict().items())


def test_it_learns():
    model = make_model(dtype=torch.float32)
    model.requires_grad_(False)
    learner = learner_of(fm.LoRA(r=2) + fm.Head(), model=model, spoil=False)
    outer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    given = fm.TaskBatch(batch().support, batch().support)
    for _ in range(60):
        out = learner(given)
        outer.zero_grad()
        out.loss.backward()
        outer.step()
        losses.append(float(out.loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
