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
