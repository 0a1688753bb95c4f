"""Models as users bring them: with checkpointed activations, or wrapped by `torch.compile`."""

from __future__ import annotations

import warnings

import episode_oracle as oracle
import pytest
import torch

import fastmeta as fm

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
