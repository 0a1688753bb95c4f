"""Learners and patched models inside other modules: torch's own ways of walking a tree."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastmeta as fm


def classifier() -> fm.models.SentenceClassifier:
    torch.manual_seed(0)
    bert, _ = fm.data.tiny_bert(hidden_size=16, num_layers=1)
    return fm.models.SentenceClassifier(bert.bert, num_labels=3)


def lora(model: nn.Module) -> fm.Patched:
    return fm.patch(model, fm.LoRA(r=2) + fm.Head())


MAKERS = {
    "patched": lora,
    "maml": lambda m: fm.MAML(fm.patch(m, fm.Params("*")), steps=1),
    "learned": lambda m: fm.MAML(
        lora(m), lr=fm.LearnedRate("layer"), optimizer=fm.LearnedOptimizer(), steps=1
    ),
    "hypernetwork": lambda m: fm.HyperNetwork(lora(m), train_encoder=True),
    "protonet": lambda m: fm.ProtoNet(m.encoder, temperature="learned", projection=4),
    "relationnet": lambda m: fm.RelationNet(m.encoder, hidden=4),
    "protomaml of an encoder": lambda m: fm.ProtoMAML(m.encoder, ways=3, steps=1, projection=4),
    "truncated": lambda m: fm.TruncatedUnroll(MAKERS["learned"](m), horizon=2, truncation=1),
    "protomaml": lambda m: fm.ProtoMAML(lora(m), temperature="learned", steps=1),
}


class Around(nn.Module):
    """As a Lightning module holds a learner, beside a layer of its own."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_module_around_sees_the_meta_parameters_and_no_others(kind):
    model = classifier()
    model.encoder.embeddings.requires_grad_(False)
    learner = MAKERS[kind](model)
    around = Around(learner)
    own = dict(learner.named_parameters())
    assert own
    seen = {n.removeprefix("learner."): p for n, p in around.named_parameters()}
    seen = {n: p for n, p in seen.items() if not n.startswith("layer.")}
    assert {n: id(p) for n, p in seen.items()} == {n: id(p) for n, p in own.items()}
    assert [id(p) for p in learner.parameters()] == [id(p) for p in own.values()]
    state = learner.state_dict()
    # of an unroll, whose optimizer alone learns, also where it starts
    assert state.keys() > own.keys() if kind == "truncated" else state.keys() == own.keys()
    expected = {f"learner.{n}" for n in state} | {"layer.weight", "layer.bias"}
    assert around.state_dict().keys() == expected


@pytest.mark.parametrize("kind", MAKERS)
def test_a_module_around_saves_and_loads_them(kind):
    model = classifier()
    around = Around(MAKERS[kind](model))
    pointers = {n: p.data_ptr() for n, p in around.named_parameters()}
    other = {n: torch.randn_like(t) for n, t in around.state_dict().items()}
    around.load_state_dict(other)
    for name, parameter in around.named_parameters():
        assert torch.equal(parameter, other[name]) and parameter.data_ptr() == pointers[name]
    name = next(n for n in other if n.startswith("learner."))
    with pytest.raises(RuntimeError, match="Missing key"):
        around.load_state_dict({n: t for n, t in other.items() if n != name})
    with pytest.raises(RuntimeError, match="expected shape"):
        around.load_state_dict({**other, name: torch.zeros(7, 7, 7)})


def test_what_is_frozen_later_no_longer_learns():
    model = classifier()
    around = Around(lora(model))
    before = dict(around.named_parameters())
    model.encoder.requires_grad_(False)
    after = dict(around.named_parameters())
    assert {n for n in before if n not in after} == {
        f"learner.{n}" for n, _ in model.named_parameters() if n.startswith("encoder.")
    }
    assert any("lora" in n for n in after)


def test_modes_reach_what_a_learner_holds_but_never_the_users_model():
    model = classifier().train()
    learner = fm.HyperNetwork(lora(model))
    held = [learner, learner.patched, learner.encoder, learner.net]
    around = Around(learner)
    around.eval()
    assert not any(m.training for m in held)
    around.train()
    assert all(m.training for m in held)
    learner.training = False  # as Lightning does
    assert not any(m.training for m in held)
    learner.training = True
    assert all(m.training for m in held)
    model.eval()
    with pytest.warns(UserWarning, match="mode"):
        learner.patched(learner.patched.init(1), input_ids=torch.ones(1, 2, 3, dtype=torch.int64))
    around.eval()
    assert not any(m.training for m in model.modules())
    around.train()
    assert not any(m.training for m in model.modules())


def test_dropout_follows_a_mode_that_is_set_as_an_attribute():
    torch.manual_seed(0)
    bert, _ = fm.data.tiny_bert(hidden_size=16, num_layers=1, dropout=0.5)
    model = fm.models.SentenceClassifier(bert.bert, num_labels=3)
    nn.init.normal_(model.classifier.weight)
    patched = lora(model).eval()
    params, ids = patched.init(2), torch.randint(5, 50, (2, 3, 4))
    with torch.no_grad():
        first = patched(params, input_ids=ids).logits
        patched.training = True
        other = patched(params, input_ids=ids).logits
        patched.training = False
        again = patched(params, input_ids=ids).logits
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_state_is_copied_never_assigned():
    learner = fm.MAML(lora(classifier()), steps=1)
    state = learner.state_dict()
    name = next(iter(state))
    rest = {n: t for n, t in state.items() if n != name}
    found = learner.load_state_dict({**rest, "other": torch.ones(1)}, strict=False)
    assert found == ([name], ["other"])
    with pytest.raises(ValueError, match="assign=False"):
        learner.load_state_dict(learner.state_dict(), assign=True)


def batch(tasks: int = 2) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (2, tasks, 6, 4), generator=generator)
    labels = torch.arange(6).remainder(3).expand(tasks, 6)
    return fm.TaskBatch(*({"input_ids": i, "labels": labels} for i in ids))


def gradients(learner: nn.Module) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    learner(batch()).loss.backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", [k for k in MAKERS if k not in ("patched", "truncated")])
def test_copies_take_the_model_with_them(kind, how):
    model = classifier()
    nn.init.normal_(model.classifier.weight)
    learner = MAKERS[kind](model)
    want = gradients(learner)
    other = how(learner)
    found = gradients(other)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[n], want[n]) for n in want)
    learner.load_state_dict(other.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert all(torch.equal(g, want[n]) for n, g in gradients(learner).items())
    assert any(not torch.equal(g, want[n]) for n, g in gradients(other).items())


@pytest.mark.parametrize("kind", MAKERS)
def test_shared_weights_are_not_converted(kind):
    learner = MAKERS[kind](classifier())
    dtypes = [p.dtype for p in learner.parameters()]
    for around in (learner, Around(learner)):
        with pytest.raises(RuntimeError, match="shares its weights with the user's model"):
            around.double()
    assert [p.dtype for p in learner.parameters()] == dtypes
    learner.to("cpu", torch.float32)  # as they are


def test_parameters_are_not_replaced():
    net = nn.Linear(4, 3)
    learner = fm.MAML(fm.patch(net, fm.Params("*")), steps=1)
    with pytest.raises(TypeError, match=r"'weight' is not replaced: .* copy into them"):
        torch.func.functional_call(learner, {"weight": torch.zeros(3, 4)}, (batch(),))
    with pytest.raises(TypeError, match=r"override meta_parameters\(\) to add some"):
        learner.register_parameter("gate", nn.Parameter(torch.ones(1)))


class Gated(fm.MAML):
    """A subclass that learns more."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self.gate = nn.Linear(1, 1)

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        own = {f"gate.{n}": p for n, p in self.gate.named_parameters()}
        return super().meta_parameters() | own


def test_a_subclass_may_learn_more():
    learner = Gated(lora(classifier()), steps=1)
    assert {"gate.weight", "gate.bias"} < learner.state_dict().keys()
    assert {"gate.weight", "gate.bias"} < dict(learner.named_parameters()).keys()
    del learner.gate
    with pytest.raises(RuntimeError, match=r"Gated\.meta_parameters failed: .*gate"):
        list(learner.parameters())


def test_names_of_the_model_and_of_the_learner_differ():
    net = nn.Sequential()
    net.inner_lr = nn.Module()
    net.inner_lr.values = nn.Parameter(torch.ones(2))
    learner = fm.MAML(fm.patch(net, fm.Params("*")), lr=fm.LearnedRate("step"))
    with pytest.raises(ValueError, match=r"names that learners use: \['inner_lr.values'\]"):
        learner.state_dict()


def test_a_copy_of_a_captured_learner_captures_its_own():
    learner = fm.MAML(lora(classifier()), steps=2, compile=True)
    want = gradients(learner)
    other = copy.deepcopy(learner)
    assert other.capture is not learner.capture and not other.capture.steps
    found = gradients(other)
    for name in want:
        torch.testing.assert_close(found[name], want[name])
    assert other.capture.steps


def test_averaged_weights():
    learner = fm.MAML(lora(classifier()), steps=1)
    average = torch.optim.swa_utils.AveragedModel(learner)
    before = {n: p.detach().clone() for n, p in learner.named_parameters()}
    average.update_parameters(learner)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1.0)
    average.update_parameters(learner)
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.5)
    assert torch.isfinite(average(batch()).loss)


@pytest.mark.parametrize("kind", ["maml", "protonet", "hypernetwork"])
def test_torch_compile_leaves_learners_alone(kind):
    learner = MAKERS[kind](classifier())
    want = gradients(learner)
    learner.zero_grad()
    torch.compile(learner, backend="eager")(batch()).loss.backward()
    learner.compile(backend="eager")
    learner(batch())
    for name, parameter in learner.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, want[name])


def test_torch_compile_of_code_that_adapts():
    patched = lora(classifier())

    def adapted(support):
        return fm.adapt(patched, support, steps=1, lr=0.1).params.packed * 2

    support = batch().support
    assert torch.equal(torch.compile(adapted, backend="eager")(support), adapted(support))


def test_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = classifier()
    with pytest.raises(ValueError, match=r"weights are whole and loaded, but 'enc.* meta device"):
        fm.patch(model, fm.Head())
