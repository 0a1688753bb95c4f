"""What patching promises: the user's model untouched, its weights shared, many threads at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial

import families
import oracle
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput

import fastmeta as fm


def different(patched: fm.Patched, tasks: int, seed: int = 0) -> fm.TaskParams:
    """Fast weights that differ from task to task."""
    packed = patched.init(tasks).packed.detach()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(packed.shape, generator=generator, dtype=packed.dtype)
    return fm.TaskParams(patched.layout, packed + 0.1 * noise)


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = oracle.snapshot(model)
    states = [before.pop("state"), after.pop("state")]
    assert before == after
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


CHANGES = {
    "classifier.hooks": lambda m: m.classifier.register_forward_hook(lambda *_: None),
    "dropout.p": lambda m: setattr(m.dropout, "p", 0.5),
    "bert.pooler.__class__": lambda m: setattr(m.bert, "pooler", torch.nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_after_it_was_patched(change: str) -> None:
    model = families.build("bert")
    patched = fm.patch(model, fm.Head())
    inputs = families.inputs("bert", 2, 2)
    patched(patched.init(2), **inputs)
    CHANGES[change](model)
    with pytest.warns(UserWarning, match=rf"^{change}.* changed after it was patched"):
        params = patched.init(2)
    patched(params, **inputs)
    patched.init(2)  # warned of once


def test_longer_texts_of_the_model_itself_are_no_change() -> None:
    """Rotary angles that grow with the longest text seen."""
    model = families.build("llama")
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = type(model)(config).eval()
    patched = fm.patch(model, fm.LoRA(r=2))
    length = config.max_position_embeddings + 3
    model(torch.ones(1, length, dtype=torch.int64))
    assert int(model.model.rotary_emb.max_seq_len_cached) == length
    patched.init(2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "deberta_v2_relative", "vit"])
@pytest.mark.parametrize(
    "spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head(), fm.Norm()], ids=["all", "lora", "norm"]
)
def test_the_model_is_not_modified(family: str, spec: fm.Spec) -> None:
    model = families.build(family).train()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = oracle.snapshot(model)
    patched = fm.patch(model, spec)
    patched.eval()
    inputs = families.inputs(family, 2, 2, padding=None)
    out = patched(patched.init(2), **inputs)
    torch.autograd.grad(out.logits.sum(), list(patched.init(2).views), allow_unused=True)
    patched.train()
    patched(patched.init(2), **inputs)
    patched.record_prefix(patched.init(2), inputs)
    assert_untouched(model, before)


class Gained(nn.Module):
    """Words through a norm that a gain of its own follows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 6), norm
        self.gain, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 20)

    def forward(self, input_ids: Tensor) -> TokenClassifierOutput:
        logits = self.head(self.norm(self.words(input_ids).mT).mT * self.gain)
        return TokenClassifierOutput(logits=logits)


@pytest.mark.parametrize(
    ("spec", "training"),
    [(fm.Params("words"), False), (fm.Params("gain", "norm"), True)],
    ids=["evaluating", "training"],
)
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d, partial(nn.InstanceNorm1d, affine=True, track_running_stats=True)],
    ids=["batch", "instance"],
)
@pytest.mark.filterwarnings("ignore:.* runs one task after another")
def test_running_statistics_stay(norm: Callable, spec: fm.Spec, training: bool) -> None:
    torch.manual_seed(0)
    model = Gained(norm(6)).train(training)
    before = copy.deepcopy(dict(model.named_buffers()))
    patched = fm.patch(model, spec)
    patched(patched.init(2), input_ids=torch.arange(16).view(2, 2, 4))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_model_is_not_modified_by_errors() -> None:
    model = families.build("bert")
    before = oracle.snapshot(model)
    patched = fm.patch(model, fm.Params("*"))
    inputs = families.inputs("bert", 2, 2)
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        patched(patched.init(2), attention_mask=inputs["attention_mask"])
    patched(patched.init(2), **inputs)
    with pytest.raises(ValueError):
        patched(patched.init(2), input_ids=inputs["input_ids"] + 1000, attention_mask=None)
    with pytest.raises(ValueError):
        patched(patched.init(3), **inputs)
    assert_untouched(model, before)
    # An error half-way leaves nothing behind: the next call is right.
    with oracle.keep_float64():
        want = model(**{k: v[0] for k, v in inputs.items()}).logits
        got = patched(patched.init(2), **inputs).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_weights_are_shared_and_outer_updates_are_seen() -> None:
    model = families.build("bert")
    patched = fm.patch(model, fm.Params("classifier"))
    inputs = families.inputs("bert", 2, 2)
    before = patched(patched.init(2), **inputs).logits
    plan = patched.plan(inputs)
    own = {p.data_ptr() for p in model.parameters()}
    for structure in (plan.structure, plan.pristine):
        assert {p.data_ptr() for p in structure.parameters()} == own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    after = patched(patched.init(2), **inputs).logits
    assert not torch.allclose(before, after)
    want = model(**{k: v[1] for k, v in inputs.items()}).logits
    torch.testing.assert_close(after[1], want, rtol=1e-4, atol=1e-5)


def test_meta_parameters_are_the_models_own() -> None:
    model = families.build("bert")
    patched = fm.patch(model, fm.Params("classifier.*"))
    named = dict(patched.named_parameters())
    assert list(named)[:2] == ["classifier.weight", "classifier.bias"]
    assert named["classifier.weight"] is model.classifier.weight
    assert len(named) == len(list(model.parameters()))
    shared = {id(p) for p in patched.shared_parameters()}
    assert shared == {id(p) for n, p in model.named_parameters() if "classifier" not in n}
    for p in model.bert.parameters():
        p.requires_grad_(False)
    assert patched.shared_parameters() == []
    assert len(list(patched.parameters())) == 2


@pytest.mark.parametrize("spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head()], ids=["all", "lora"])
def test_frozen_initial_values_get_the_same_gradients(spec: fm.Spec) -> None:
    support, query = (families.inputs("bert", 2, 2, seed=s) for s in (1, 2))
    results = []
    for frozen in (False, True):
        model = families.build("bert")
        patched = fm.patch(model, spec)
        adapted = set(patched.layout.names)
        if frozen:
            model.requires_grad_(False)
        meta = oracle.by_batch(patched, support, query).meta
        results.append({n: g for n, g in meta.items() if n in adapted})
        assert all(p.requires_grad is not frozen for p in model.parameters())
    oracle._compare(results[1], results[0], 1e-12)


def test_gradients_of_frozen_initial_values_add_up() -> None:
    model = families.build("bert").requires_grad_(False)
    learner = fm.MAML(fm.patch(model, fm.Head()), lr=0.1, steps=1)
    rows = families.inputs("bert", 2, 3) | {"labels": torch.arange(3).repeat(2, 1)}
    found = []
    for _ in range(2):
        learner(fm.TaskBatch(rows, rows)).loss.backward()
        found.append(model.classifier.weight.grad.clone())
    assert found[0].any()
    torch.testing.assert_close(found[1], 2 * found[0])


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("bert_mlm", ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]),
        ("gpt2_lm", ["transformer.wte.weight", "lm_head.weight"]),
        ("t5", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
    ],
)
def test_tied_weights_have_one_slot(family: str, tied: list[str]) -> None:
    model = families.build(family)
    patched = fm.patch(model, fm.Params("*"))
    assert len(patched.layout) == len(list(model.parameters()))
    assert sum(name in tied for name in patched.layout.names) == 1
    owners = patched.slots.owners
    slots = {owners[n.rpartition(".")[0]].slots["weight"] for n in tied}
    assert len(slots) == 1
    # Naming any of the tied parameters adapts all places that read it.
    assert len(fm.patch(model, fm.Params(tied[-1])).slots.owners) >= len(tied)


def test_threads_get_their_own_results() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    jobs = []
    for i in range(6):
        tasks, rows = 1 + i % 3, 1 + i % 2
        inputs = families.inputs("bert", tasks, rows, padding="right", seed=i)
        jobs.append((different(patched, tasks, seed=i), inputs))

    def work(params: fm.TaskParams, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        packed = params.packed.clone().requires_grad_()
        logits = patched(fm.TaskParams(patched.layout, packed), **inputs).logits
        return logits.detach(), torch.autograd.grad(logits.sin().sum(), packed)[0]

    expected = [work(*job) for job in jobs]
    failures: list[object] = []

    def loop(index: int) -> None:
        try:
            for _ in range(8):
                for got, want in zip(work(*jobs[index]), expected[index], strict=True):
                    if not torch.equal(got, want):
                        failures.append(index)
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_first_calls_from_several_threads() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    inputs = families.inputs("bert", 2, 2)
    results: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(patched(patched.init(2), **inputs).logits))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(patched._plans) == 1
    assert all(torch.equal(r, results[0]) for r in results)


def test_training_mode_is_the_patched_models_own() -> None:
    model = families.build("bert")  # eval mode, dropout 0.1
    patched = fm.patch(model, fm.Params("*"))
    inputs, params = families.inputs("bert", 2, 3), None
    params = patched.init(2)
    assert not patched.training
    assert torch.equal(patched(params, **inputs).logits, patched(params, **inputs).logits)
    patched.train()
    assert not torch.equal(patched(params, **inputs).logits, patched(params, **inputs).logits)
    assert not any(m.training for m in model.modules())
    patched.eval()
    model.train()
    with pytest.warns(UserWarning, match=r"switched to training mode .* stays in evaluation mode"):
        before = patched(params, **inputs).logits
    assert torch.equal(patched(params, **inputs).logits, before)  # and is said once
    assert fm.patch(model, fm.Params("*")).training


@pytest.mark.parametrize("spec", [fm.LoRA(r=2), fm.Params("*")], ids=repr)
def test_modules_at_rest_stay_so(spec: fm.Spec) -> None:
    """A backbone whose dropout was switched off by hand keeps it off while the rest trains."""
    model = families.build("bert").train()
    model.bert.eval()
    model.dropout.p = 0.0
    patched = fm.patch(model, spec)
    inputs = families.inputs("bert", 2, 3)
    params = patched.init(2)
    assert patched.training
    before = patched(params, **inputs).logits
    assert torch.equal(patched(params, **inputs).logits, before)
    patched.train()
    assert torch.equal(patched(params, **inputs).logits, before)
    model.bert.train()
    patched = fm.patch(model, spec)
    assert not torch.equal(patched(params, **inputs).logits, before)


def test_modules_at_rest_stay_so_in_copies() -> None:
    model = families.build("bert").train()
    model.bert.encoder.layer[0].eval()
    twin = copy.deepcopy(fm.patch(model, fm.Head())).train()
    structure = twin.plan(families.inputs("bert", 2, 3)).structure
    assert structure.bert.embeddings.dropout.training
    assert not structure.bert.encoder.layer[0].training


@pytest.mark.parametrize("word", [-1, families.VOCAB])
def test_words_are_checked_where_nothing_learns_too(word: int) -> None:
    """A table that adapts would read another word's row at -1."""
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    inputs = families.inputs("bert", 2, 3)
    inputs["input_ids"][1, 2, 3] = word
    with pytest.raises(
        ValueError, match=rf"given input_ids must be in 0\.\.22 .* got {word} in ta"
    ):
        patched(patched.init(2), **inputs)


def test_views_first_read_without_gradients_carry_them() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    for params in (patched.init(2), patched.initial(2)):
        with torch.no_grad():
            assert params["classifier.bias"].shape[0] == 2
        (gradient,) = torch.autograd.grad(
            params["classifier.bias"].sum(), patched.model.classifier.bias
        )
        assert torch.equal(gradient, torch.full_like(gradient, 2.0))


def test_initial_values_of_no_use_have_a_gradient_of_zeros() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    patched.initial(2)["classifier.bias"].sum().backward()
    gradients = {n: p.grad for n, p in patched.named_parameters()}
    assert gradients.pop("classifier.bias").eq(2).all()
    assert all(not g.any() for g in gradients.values())
    selected = patched.initial(3).select(torch.tensor([True, False, True]))
    assert selected.num_tasks == len(selected.packed) == 2
    assert patched.initial(3).select(torch.tensor([2])).num_tasks == 1
    assert patched.initial(3).select(slice(1, 9)).num_tasks == 2
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        patched.initial(0)


def test_specifications_combine() -> None:
    model = families.build("bert")
    spec = fm.LoRA(r=2, targets=("query",)) + fm.Params("classifier") + fm.Bias() + fm.Norm()
    names = fm.patch(model, spec).layout.names
    assert len(set(names)) == len(names)
    assert names[0].endswith("query.lora_A") and "classifier.weight" in names
    assert names.count("classifier.bias") == 1
    assert "bert.embeddings.LayerNorm.weight" in names
    assert not any(n.endswith("query.weight") for n in names)
    support, query = (families.inputs("bert", 2, 2, seed=s) for s in (1, 2))
    both = fm.patch(model, fm.LoRA(r=2, targets="*.query") + fm.Params("*.query.weight"))
    expected = oracle.by_loop(both, support, query)
    oracle.assert_same(oracle.by_batch(both, support, query), expected)


def test_new_parameters_follow_the_seed() -> None:
    model = families.build("bert")
    values = [fm.patch(model, fm.LoRA(r=2), seed=s).slots.initial[0] for s in (0, 0, 1)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    state = torch.random.get_rng_state()
    fm.patch(model, fm.LoRA(r=2) + fm.Prefix(3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_state_dict_round_trip() -> None:
    patched = fm.patch(families.build("bert"), fm.LoRA(r=2) + fm.Head())
    state = {k: torch.randn_like(v) for k, v in patched.state_dict().items()}
    patched.load_state_dict(state)
    for name, tensor in patched.state_dict().items():
        assert torch.equal(tensor, state[name])
    missing = dict(state)
    missing.pop("classifier.weight")
    with pytest.raises(ValueError, match=r"missing \['classifier.weight'\]"):
        patched.load_state_dict(missing)
    wrong = {**state, "classifier.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"expected shape \[3, 16\] for 'classifier.weight'"):
        patched.load_state_dict(wrong)


def test_user_hooks_run_once_per_call() -> None:
    model = families.build("bert")
    calls: list[int] = []
    model.bert.embeddings.word_embeddings.register_forward_hook(lambda *_: calls.append(1))
    model.bert.embeddings.LayerNorm.register_forward_hook(lambda *_: calls.append(2))
    patched = fm.patch(model, fm.Params("*"))
    inputs = families.inputs("bert", 2, 2)
    patched(patched.init(2), **inputs)
    calls.clear()
    patched(patched.init(2), **inputs)
    assert calls == [1, 2]


def test_labels_are_for_the_caller() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    inputs = families.inputs("bert", 2, 2)
    out = patched(patched.init(2), **inputs, labels=torch.zeros(2, 2, dtype=torch.int64))
    assert out.loss is None and out.logits.shape == (2, 2, 3)


def test_one_packed_buffer() -> None:
    patched = fm.patch(families.build("bert"), fm.Params("*"))
    params = patched.init(4)
    assert params.packed.shape == (4, patched.layout.num_params)
    assert params.packed.stride(0) == 0  # rows share memory until the first update
    assert all(o % 16 == 0 for o in patched.layout.offsets)
    for name, parameter in patched.named_parameters():
        assert torch.equal(params[name][2], parameter)
    repacked = patched.layout.pack(params.views)
    assert torch.equal(repacked, params.packed)


def test_replaced_parameters_are_refused() -> None:
    """The patched model would compute with those of before."""
    model = families.build("bert")
    learner = fm.MAML(fm.patch(model, fm.Norm()), steps=1)
    model.load_state_dict(model.state_dict(), assign=False)
    list(learner.parameters())
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"was replaced after it was patched.*patch the model"):
        list(learner.parameters())


def test_a_mode_that_stays_is_not_left_in_between() -> None:
    """A pass in another thread would see it."""

    class Watched(nn.Dropout):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "training":
                modes.append(value)
            super().__setattr__(name, value)

    modes: list[object] = []
    model = families.build("bert").train()
    model.bert.pooler.activation = nn.Sequential(nn.Tanh(), Watched(0.5).eval())
    patched = fm.patch(model, fm.Head())
    inputs = families.inputs("bert", 2, 2)
    patched(patched.init(2), **inputs)
    modes.clear()
    fm.MAML(patched, steps=1)
    patched.eval()
    patched.train()
    assert modes and not any(modes)
