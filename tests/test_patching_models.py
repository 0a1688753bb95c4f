"""Models as users bring them: with checkpointed activations, or wrapped by `torch.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType

import episode_oracle as oracle
import pytest
import torch
from transformers import BertForMultipleChoice

import fastmeta as fm
from fastmeta.patching import PerformanceWarning

BATCH = oracle.as_batch(oracle.make_tasks(2))


def meta_step(model: torch.nn.Module, spec: fm.Spec) -> list[torch.Tensor]:
    """Loss and meta-gradient, with the dropout of one seed."""
    learner = fm.MAML(fm.patch(model, spec), steps=2)
    torch.manual_seed(0)
    loss = learner(BATCH).loss
    return [loss, *torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)]


@pytest.mark.parametrize("spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head()], ids=["all", "lora"])
def test_checkpointed_activations(spec: fm.Spec) -> None:
    """They are kept, as the learner's memory mode says; the user's model stays as it is."""
    model = oracle.tiny_bert().train()
    expected = meta_step(model, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the name
        model.gradient_checkpointing_enable()
    for found, want in zip(meta_step(model, spec), expected, strict=True):
        assert torch.equal(found, want) if want is not None else found is None
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


def test_compiled_models() -> None:
    model = oracle.tiny_bert()
    compiled = torch.compile(model)
    patched = fm.patch(compiled, fm.Params("classifier"))
    assert patched.model is model
    assert patched.layout.names == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("kind", [None, "weight_norm", "spectral_norm", "orthogonal"])
def test_lora_beside_a_weight_that_is_computed(kind: str | None) -> None:
    model = oracle.tiny_bert()
    name = "bert.encoder.layer.0.attention.self.query"
    layer = model.get_submodule(name)
    if kind is not None:
        getattr(torch.nn.utils.parametrizations, kind)(layer)
    patched = fm.patch(model, fm.LoRA(r=2, alpha=4, targets="query"))
    inputs = {k: v for k, v in BATCH.support.items() if k != "labels"}
    params = fm.TaskParams(patched.layout, patched.init(2).packed.detach() + 0.5)
    found = patched(params, **inputs).logits
    for task in range(2):
        a, b = (params[f"{name}.lora_{which}"][task] for which in "AB")
        handle = layer.register_forward_hook(
            lambda _, x, y, ab=(a, b): y + 2 * x[0] @ ab[0].T @ ab[1].T
        )
        expected = model(**{k: v[task] for k, v in inputs.items()}).logits
        handle.remove()
        torch.testing.assert_close(found[task], expected)


class Quantised(torch.nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        whole = (self.weight * 100).to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float() / 100, self.bias)


def test_lora_beside_a_weight_of_integers() -> None:
    model = Normed(torch.nn.Identity)
    model.head = Quantised(6, 3)
    patched = fm.patch(model, fm.LoRA(r=2, targets="head"))
    assert patched.dtype == torch.float32
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(patched(patched.init(2), x=x)[1], model(x[1]))


def test_a_flag_that_comes_later() -> None:
    """Layers that compute less for one flag compute all for another."""
    model = oracle.tiny_bert()
    patched = fm.patch(model, fm.LoRA(r=2))
    inputs = {k: v for k, v in BATCH.support.items() if k != "labels"}
    params = patched.init(2)
    for flag in (False, True):
        found = patched(params, **inputs, output_hidden_states=flag)
    expected = model(**{k: v[0] for k, v in inputs.items()}, output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[0], b)


class Own(torch.nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Normed(torch.nn.Module):
    def __init__(self, norm: type[torch.nn.Module]) -> None:
        super().__init__()
        self.body, self.norm, self.head = torch.nn.Linear(4, 6), norm(6), torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def test_statistics_of_a_batch_are_those_of_each_task() -> None:
    x = torch.randn(2, 5, 4)
    state, expected = Normed(torch.nn.BatchNorm1d).state_dict(), None
    for norm in (torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm):
        model = Normed(norm).train()
        model.load_state_dict(state)
        patched = fm.patch(model, fm.Params("head"))
        found = patched(patched.init(2), x=x)
        expected = torch.stack([Normed.forward(model_of(state), rows) for rows in x])
        torch.testing.assert_close(found, expected)
    patched = fm.patch(Normed(Own).train(), fm.Params("head"))
    with pytest.raises(RuntimeError, match=r"'norm' \(Own\) would normalise over the rows of all"):
        patched(patched.init(2), x=x)
    patched.eval()(patched.init(2), x=x)


def model_of(state: dict[str, torch.Tensor]) -> Normed:
    model = Normed(torch.nn.BatchNorm1d).train()
    model.load_state_dict(state)
    return model


def test_rows_that_batch_norm_should_not_see() -> None:
    """Those that pad uneven tasks have no label."""
    patched = fm.patch(Normed(torch.nn.BatchNorm1d).train(), fm.Params("head"))
    learner = fm.MAML(patched, steps=1)
    sets = {"x": torch.randn(2, 4, 4), "labels": torch.tensor([[0, 1, 0, 1], [1, 0, 1, -100]])}
    with pytest.warns(UserWarning, match="there are rows without a label"):
        learner.adapt(sets)
    learner.adapt({k: v[:, :3] for k, v in sets.items()})
    learner.eval()
    learner.adapt(sets)


def test_a_buffer_that_is_replaced() -> None:
    model = Normed(torch.nn.BatchNorm1d).eval()
    patched = fm.patch(model, fm.Params("head"))
    x = torch.randn(2, 5, 4)
    patched(patched.init(2), x=x)
    model.norm.running_mean.add_(1)  # in place: seen
    torch.testing.assert_close(patched(patched.init(2), x=x)[1], model(x[1]))
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"buffer 'norm.running_mean' of the model was replaced"):
        patched(patched.init(2), x=x)


def test_lora_of_a_module_with_two_names() -> None:
    model = Normed(torch.nn.BatchNorm1d)
    model.again = model.body
    with pytest.raises(ValueError, match="'body' and 'again' are one module, which LoRA would"):
        fm.patch(model, fm.LoRA(r=2, targets="body"))


def bound(module: torch.nn.Module) -> Callable:
    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(self).forward(self, x)

    return MethodType(forward, module)


def around(module: torch.nn.Module) -> Callable:
    original = module.forward
    return lambda x: 2 * original(x)


def by_argument(module: torch.nn.Module) -> Callable:
    return lambda x, module=module: 2 * type(module).forward(module, x)


def partly(module: torch.nn.Module) -> Callable:
    module.before = module.forward
    found = partial(lambda module, *args: 2 * module.before(*args), module)
    return update_wrapper(found, module.before)


def compiled(module: torch.nn.Module) -> Callable:
    return torch.compile(around(module), backend="eager")


def whole(module: torch.nn.Module) -> Callable:
    original = module.forward
    return lambda **inputs: original(**inputs)


LAYER = "bert.encoder.layer.0"
OWN = [(f"{LAYER}.attention.self.query", make) for make in (bound, around, partly, compiled)]
OWN += [(f"{LAYER}.intermediate", make) for make in (bound, by_argument)] + [("", whole)]


@pytest.mark.parametrize(("name", "make"), OWN)
def test_a_forward_of_ones_own(name: str, make: Callable) -> None:
    """As libraries put on a module: it reads each task's weights."""
    model = oracle.tiny_bert()
    module = model.get_submodule(name)
    module.forward = make(module)
    patched = fm.patch(model, fm.Params("*"))
    inputs = {k: v for k, v in BATCH.support.items() if k != "labels"}
    packed = patched.init(2).packed.detach()
    packed = packed + 0.1 * torch.randn(packed.shape, generator=torch.manual_seed(1)).to(packed)
    params = fm.TaskParams(patched.layout, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        found = patched(params, **inputs).logits
    for task in range(2):
        own = {n: params[n][task] for n in patched.layout.names}
        mine = {k: v[task] for k, v in inputs.items()}
        expected = torch.func.functional_call(model, own, (), mine).logits
        torch.testing.assert_close(found[task], expected, rtol=1e-9, atol=1e-12)


def test_hidden_states_that_were_never_asked_for() -> None:
    """transformers shows them by hooks that a model gets when it needs them."""

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.share = oracle.tiny_bert().bert, torch.nn.Parameter(torch.rand(1))

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            *_, a, b = self.bert(**inputs, output_hidden_states=True).hidden_states
            return self.share * a[:, 0] + (1 - self.share) * b[:, 0]

    model = Mixed().double()
    patched = fm.patch(model, fm.Params("share", "*layer.0*"))
    inputs = {k: v for k, v in BATCH.support.items() if k != "labels"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        found = patched(patched.init(2), **inputs)
    expected = model(**{k: v[0] for k, v in inputs.items()})
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
    patched.init(2)  # no change of the model


@pytest.mark.filterwarnings("ignore:module 'bert.embeddings' .* runs one task after another")
@pytest.mark.parametrize("settings", [{}, {"memory": "recompute"}, {"compile": True}])
@pytest.mark.parametrize("spec", [fm.Params("*"), fm.LoRA(r=2) + fm.Head()], ids=["all", "lora"])
def test_multiple_choice(spec: fm.Spec, settings: dict) -> None:
    """A row is several texts, and the choices are the classes."""
    config = oracle.tiny_bert().config
    torch.manual_seed(0)
    model = BertForMultipleChoice(config).double().eval()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (2, 2, 3, 4, 6), generator=g)  # sets, T, N, choices
    mask = (torch.arange(6) < torch.randint(2, 7, (2, 2, 3, 4, 1), generator=g)).long()
    labels = torch.randint(0, 4, (2, 2, 3), generator=g)
    sets = [
        {"input_ids": i * m, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]
    learner = fm.MAML(fm.patch(model, spec), lr=0.1, steps=2, **settings)
    out = learner(fm.TaskBatch(*sets))
    tasks = [(*({k: v[t] for k, v in s.items()} for s in sets), None) for t in range(2)]
    expected = oracle.loop(learner, tasks)
    torch.testing.assert_close(out.task_losses, torch.stack(expected.losses), rtol=1e-9, atol=1e-12)
    oracle.assert_close(oracle.gradients(learner, out.loss), expected.gradients())
    with pytest.raises(ValueError, match=r"input_ids must have shape \[T, N, choices, L\]"):
        learner.predict(out.params, input_ids=ids[0, :, :, 0])
