"""`fm.adapt`: what a learner adapts, without gradients, for services."""

from __future__ import annotations

import threading

import episode_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine.meter import PeakMemory

TASKS = oracle.make_tasks(4, ragged=True, classes=4)
BATCH = oracle.as_batch(TASKS)
EVERYTHING = fm.Params("*")
RULES = ["sgd", "momentum", "adam", "adamw", rules.RMSprop(eps=1e-4), rules.Momentum(nesterov=True)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("optimizer", RULES, ids=str)
def test_a_learners_weights(optimizer, chunk: int | None) -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    settings = {"lr": 0.01, "steps": 3, "optimizer": optimizer, "clip_norm": 1.0}
    expected = fm.MAML(patched, memory="unroll", **settings)(BATCH)
    found = fm.adapt(patched, BATCH.support, ways=BATCH.ways, task_chunk=chunk, **settings)
    close(found.params.packed, expected.params.packed)
    close(found.support_losses, expected.support_losses)
    assert not found.diverged.any() and not found.params.packed.requires_grad
    inputs = {k: v for k, v in BATCH.query.items() if k != "labels"}
    with torch.no_grad():
        close(patched(found.params, **inputs).logits, expected.logits)


def test_a_task_alone() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    together = fm.adapt(patched, BATCH.support, ways=BATCH.ways, lr=0.1, steps=3)
    for t, task in enumerate(TASKS):
        one = oracle.as_batch([task])
        alone = fm.adapt(patched, one.support, ways=one.ways, lr=0.1, steps=3)
        close(together.params.packed[t], alone.params.packed[0])


def test_going_on_from_adapted_weights() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), fm.Head())
    half = fm.adapt(patched, BATCH.support, lr=0.1, steps=2)
    kept = half.params.packed.clone()
    whole = fm.adapt(patched, BATCH.support, lr=0.1, steps=2, params=half.params)
    close(whole.params.packed, fm.adapt(patched, BATCH.support, lr=0.1, steps=4).params.packed)
    assert torch.equal(half.params.packed, kept)


def test_the_model_stays_as_it_is() -> None:
    model = oracle.tiny_bert(classes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    patched = fm.patch(model, EVERYTHING)
    fm.adapt(patched, BATCH.support, lr=0.1, steps=2)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_memory_does_not_grow_with_the_steps() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)

    def peak(steps: int) -> int:
        fm.adapt(patched, BATCH.support, lr=0.1, steps=1)
        with PeakMemory() as meter:
            fm.adapt(patched, BATCH.support, lr=0.1, steps=steps)
        return meter.peak

    assert peak(8) <= peak(3) + 1024


def test_threads_share_a_model() -> None:
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    supports = [oracle.as_batch(oracle.make_tasks(2, seed=i)).support for i in range(4)]
    expected = [fm.adapt(patched, s, lr=0.1, steps=2).params.packed for s in supports]
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = fm.adapt(patched, supports[i], lr=0.1, steps=2).params.packed

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        close(got, want)


# -- language models -------------------------------------------------------------------------


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
