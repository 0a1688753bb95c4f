"""Every mode, rule and rate of the engine against the per-task loop, in float64."""

from __future__ import annotations

import threading

import episode_oracle as oracle
import pytest
import torch

import fastmeta as fm
from fastmeta import rules
from fastmeta.engine.episode import run_episode
from fastmeta.engine.memory import MemoryPlan

EVERYTHING = fm.Params("*")


def check(learner: fm.MAML, tasks: list, rtol: float = 1e-9, **kwargs) -> None:
    out = learner(oracle.as_batch(tasks))
    oracle.assert_same(learner, out, oracle.loop(learner, tasks, **kwargs), tasks, rtol)


MODES = {
    "unroll": {"memory": "unroll"},
    "recompute": {"memory": "recompute"},
    "auto": {"memory": "auto"},
    "unroll-chunk1": {"memory": "unroll", "task_chunk": 1},
    "unroll-chunk2": {"memory": "unroll", "task_chunk": 2},
    "recompute-chunk2": {"memory": "recompute", "task_chunk": 2},
    "auto-auto": {"memory": "auto", "task_chunk": "auto"},
}

# eps is large enough that no coordinate's gradient of 1e-18 is amplified into the tenth digit.
RULES = {
    "sgd": (rules.SGD(), oracle.sgd, {}),
    "sgd-decay": (rules.SGD(weight_decay=0.1), oracle.sgd, {"weight_decay": 0.1}),
    "momentum": (rules.Momentum(), oracle.momentum, {}),
    "dampened": (
        rules.Momentum(momentum=0.7, dampening=0.4, weight_decay=0.1),
        oracle.momentum,
        {"mu": 0.7, "dampening": 0.4, "weight_decay": 0.1},
    ),
    "nesterov": (
        rules.Momentum(momentum=0.8, nesterov=True),
        oracle.momentum,
        {"mu": 0.8, "nesterov": True},
    ),
    "adam": (rules.Adam(eps=1e-3), oracle.adam, {"eps": 1e-3}),
    "adam-decay": (
        rules.Adam(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
        oracle.adam,
        {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adamw": (
        rules.AdamW(eps=1e-3),
        oracle.adam,
        {"eps": 1e-3, "weight_decay": 1e-2, "decoupled": True},
    ),
    "rmsprop": (
        rules.RMSprop(alpha=0.9, eps=1e-3, weight_decay=0.1),
        oracle.rmsprop,
        {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    ),
}


def with_rule(name: str):
    rule, formula, settings = RULES[name]
    return rule, lambda *args: formula(*args, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
def test_modes(mode: str, order: int) -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    check(fm.MAML(patched, lr=0.1, steps=3, order=order, **MODES[mode]), oracle.make_tasks())


@pytest.mark.parametrize("mode", ["unroll", "recompute", "recompute-chunk2"])
@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, mode: str) -> None:
    rule, formula = with_rule(name)
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    learner = fm.MAML(patched, lr=0.03, steps=3, optimizer=rule, **MODES[mode])
    check(learner, oracle.make_tasks(), rule=formula)


PER = ["step", "task", "layer", "param", (), ("layer", "step"), ("task", "param", "step")]


@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk2"])
@pytest.mark.parametrize("per", PER, ids=str)
def test_learned_rates(per, mode: str) -> None:
    """Initial values, shared weights and rates learn together."""
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    rate = fm.LearnedRate(per=per, init=0.1, num_tasks=3)
    learner = fm.MAML(patched, lr=rate, steps=3, **MODES[mode])
    check(oracle.with_varied_rates(learner), oracle.make_tasks())


@pytest.mark.parametrize("per", [(), "task", ("layer", "step")], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_learned_rates_of_rules_with_state(name: str, order: int, per) -> None:
    rule, formula = with_rule(name)
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    rate = fm.LearnedRate(per=per, init=0.05, num_tasks=3)
    for mode in ("unroll", "recompute"):
        learner = fm.MAML(patched, lr=rate, steps=3, order=order, optimizer=rule, **MODES[mode])
        check(oracle.with_varied_rates(learner), oracle.make_tasks(), rule=formula)


@pytest.mark.parametrize("mode", ["unroll", "recompute", "recompute-chunk2"])
@pytest.mark.parametrize("clip_norm", [0.3, 100.0])
def test_clipping(clip_norm: float, mode: str) -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    learner = fm.MAML(patched, lr=0.1, steps=3, clip_norm=clip_norm, **MODES[mode])
    check(learner, oracle.make_tasks())


@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk2"])
@pytest.mark.parametrize("truncate", [0, 1, 2])
def test_truncation(truncate: int, mode: str) -> None:
    rule, formula = with_rule("momentum")
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    learner = fm.MAML(
        patched,
        lr=fm.LearnedRate(per="step", init=0.1),
        steps=3,
        optimizer=rule,
        truncate=truncate,
        **MODES[mode],
    )
    check(learner, oracle.make_tasks(), rule=formula)


@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk2", "recompute-chunk2"])
@pytest.mark.parametrize("backbone", ["frozen", "partly frozen", "meta-learned"])
@pytest.mark.parametrize("order", [1, 2])
def test_prefix(order: int, backbone: str, mode: str) -> None:
    """Embeddings and the first layer lie before everything adapted."""
    model = oracle.tiny_bert(layers=2)
    model.requires_grad_(backbone == "meta-learned")
    if backbone == "partly frozen":
        model.bert.encoder.layer[0].requires_grad_(True)
    spec = fm.Params("bert.encoder.layer.1.output", "bert.pooler", "classifier")
    patched = fm.patch(model, spec)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    check(fm.MAML(patched, lr=0.1, steps=3, order=order, **MODES[mode]), oracle.make_tasks())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("mode", ["unroll", "recompute"])
def test_lora_with_head(mode: str) -> None:
    model = oracle.tiny_bert()
    model.requires_grad_(False)
    patched = fm.patch(model, fm.LoRA(r=2, alpha=4, targets=("query", "value")) + fm.Head())
    learner = fm.MAML(patched, lr=0.3, steps=3, **MODES[mode])
    check(learner, oracle.make_tasks())


_LAST = "bert.encoder.layer.1.attention.self."


@pytest.mark.parametrize("mode", ["unroll", "recompute"])
@pytest.mark.parametrize("backbone", ["frozen", "meta-learned"])
@pytest.mark.parametrize(
    "spec",
    [
        fm.Params(_LAST + "key.*"),
        fm.Params(_LAST + "value.*"),
        fm.Params(_LAST + "value.bias", _LAST + "key.bias"),
        fm.LoRA(r=2, alpha=4, targets=("key", "value")),
        fm.LoRA(r=2, targets=("key", "value")) + fm.Bias(),
        fm.Head(),
    ],
    ids=repr,
)
def test_keys_and_values_of_the_last_layer(spec: fm.Spec, backbone: str, mode: str) -> None:
    """Where only one token asks, they are never computed; whoever adapts or learns them."""
    model = oracle.tiny_bert(layers=2)
    model.requires_grad_(backbone == "meta-learned")
    learner = fm.MAML(fm.patch(model, spec), lr=0.3, steps=2, **MODES[mode])
    check(learner, oracle.make_tasks())


@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk1", "recompute-chunk2"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_ragged_tasks(name: str, mode: str) -> None:
    """Tasks of different N, Q, L and ways give what each gives alone."""
    rule, formula = with_rule(name)
    patched = fm.patch(oracle.tiny_bert(classes=4), EVERYTHING)
    learner = fm.MAML(patched, lr=0.03, steps=2, optimizer=rule, **MODES[mode])
    tasks = oracle.make_tasks(4, ragged=True, classes=4)
    assert len({t[0]["labels"].shape for t in tasks}) > 1
    assert len({t[2] for t in tasks}) > 1
    check(learner, tasks, rule=formula)


@pytest.mark.parametrize("mode", ["unroll", "recompute", "unroll-chunk2"])
def test_each_tasks_share_of_the_meta_gradient(mode: str) -> None:
    """The gradient of one task's loss is that of a batch that holds only this task."""
    patched = fm.patch(oracle.tiny_bert(classes=4), fm.Head() + fm.Bias())
    rate = fm.LearnedRate(per="layer", init=0.1)
    learner = oracle.with_varied_rates(fm.MAML(patched, lr=rate, steps=2, **MODES[mode]))
    tasks = oracle.make_tasks(3, ragged=True, classes=4)
    out = learner(oracle.as_batch(tasks))
    for t, task in enumerate(tasks):
        share = oracle.gradients(learner, out.task_losses[t], retain_graph=True)
        alone = oracle.loop(learner, [task])
        oracle.assert_close(share, alone.gradients())
        oracle.assert_close(out.params.task(t), alone.fast[0])


def test_a_result_does_not_depend_on_the_other_tasks() -> None:
    patched = fm.patch(oracle.tiny_bert(), EVERYTHING)
    learner = fm.MAML(patched, lr=0.1, steps=3)
    tasks, others = oracle.make_tasks(3), oracle.make_tasks(4, seed=1)
    one = learner(oracle.as_batch(tasks))
    two = learner(oracle.as_batch([*others[:2], *reversed(tasks), *others[2:]]))
    torch.testing.assert_close(two.task_losses[2:5].flip(0), one.task_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        two.params.packed[2:5].flip(0), one.params.packed, rtol=1e-11, atol=1e-14
    )


def test_gradient_through_params_and_logits() -> None:
    """Losses of the caller's own, on adapted weights and logits, in every mode."""
    patched = fm.patch(oracle.tiny_bert(), fm.Head() + fm.Bias())
    found = {}
    for mode in ("unroll", "recompute", "unroll-chunk2", "recompute-chunk2"):
        learner = fm.MAML(patched, lr=0.1, steps=2, **MODES[mode])
        out = learner(oracle.as_batch(oracle.make_tasks()))
        loss = out.logits.sin().sum() + out.params.packed.square().sum()
        found[mode] = oracle.gradients(learner, loss)
    for mode in found:
        oracle.assert_close(found[mode], found["unroll"])


@pytest.mark.parametrize("keep", [0, 1])
def test_backward_twice_through_steps_that_are_kept(keep: int) -> None:
    batch, patched = oracle.as_batch(oracle.make_tasks()), fm.patch(oracle.tiny_bert(), EVERYTHING)
    learner = fm.MAML(patched, lr=0.1, steps=2)
    plan = MemoryPlan("recompute", keep=keep)
    out = run_episode(learner.inner_loop(), patched.initial(3), batch, plan)
    first = oracle.gradients(learner, out.loss, retain_graph=True)
    oracle.assert_close(oracle.gradients(learner, out.loss), first)
    oracle.assert_close(first, oracle.loop(learner, oracle.make_tasks()).gradients())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unroll", "recompute", "recompute-chunk2"])
@pytest.mark.parametrize("per", [None, "param", ("layer", "step")], ids=str)
@pytest.mark.parametrize("truncate", [None, 1])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_everything_together(name: str, clip_norm, truncate, per, mode: str) -> None:
    rule, formula = with_rule(name)
    patched = fm.patch(oracle.tiny_bert(classes=4), fm.Head() + fm.Norm())
    learner = fm.MAML(
        patched,
        lr=0.05 if per is None else fm.LearnedRate(per=per, init=0.05),
        steps=3,
        optimizer=rule,
        clip_norm=clip_norm,
        truncate=truncate,
        **MODES[mode],
    )
    if per is not None:
        oracle.with_varied_rates(learner)
    check(learner, oracle.make_tasks(3, ragged=True, classes=4), rule=formula)


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_support_losses_carry_no_gradient(memory: str) -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    learner = fm.MAML(patched, steps=2, memory=memory, clip_norm=1.0)
    out = learner(oracle.as_batch(oracle.make_tasks(2)))
    assert not out.support_losses.requires_grad and not out.diverged.requires_grad


def test_weights_of_chunks_serve() -> None:
    batch = oracle.as_batch(oracle.make_tasks(4))
    patched = fm.patch(oracle.tiny_bert(words=200), fm.Params("*"))
    out = fm.MAML(patched, lr=0.1, steps=2, memory="unroll", task_chunk=2)(batch)
    assert (out.params.device, out.params.dtype) == (patched.device, torch.float64)
    given = {k: v for k, v in batch.query.items() if k != "labels"}
    torch.testing.assert_close(patched(out.params, **given).logits, out.logits)
    kept = out.params.detach()
    assert not kept.packed.requires_grad
    both = fm.TaskParams.joined([out.params, kept])
    assert torch.equal(both.packed[:4], both.packed[4:])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{"memory": "recompute"}, {"task_chunk": 2}], ids=str)
def test_another_thread_that_draws(settings: dict, dropout: float) -> None:
    """Masks that cannot be drawn again raise; numbers that are nobody's masks change nothing."""
    generator, calls = torch.Generator(), []

    def draw(*_) -> None:
        calls.append(None)  # more from call to call, so never the same twice
        options = {"generator": generator}
        thread = threading.Thread(target=torch.rand, args=(len(calls),), kwargs=options)
        thread.start()
        thread.join()

    def run() -> dict:
        torch.manual_seed(0)
        return oracle.gradients(learner, oracle.weighted(learner(batch)))

    model = oracle.tiny_bert(dropout=dropout)
    model.get_submodule("bert.encoder").register_forward_pre_hook(draw)
    patched = fm.patch(model, fm.Params("*"))
    learner = fm.MAML(patched, **{"lr": 0.1, "steps": 2, "memory": "unroll", **settings})
    batch = oracle.as_batch(oracle.make_tasks(3))
    expected = run()
    assert calls
    oracle.assert_close(run(), expected)
    generator = None
    if dropout:
        with pytest.raises(RuntimeError, match="another thread drew from torch's random generator"):
            run()
    else:
        oracle.assert_close(run(), expected)
