"""Learners and patched models inside other modules: torch's own ways of walking a tree."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmeta as fm

ROOT = Path(__file__).resolve().parents[1]


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


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist, fastmeta as fm
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
from test_meta_module import classifier, lora
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
tokenizer = fm.data.tiny_bert(hidden_size=16, num_layers=1)[1]
patched = fm.patch(classifier(), fm.Params("*")).eval()
learner = fm.MAML(patched, lr=0.1, steps=2, compile=sys.argv[1] == "captured")
data = fm.data.builtin("train")
batches = list(fm.data.Episodes(data, tokenizer, ways=3, shots=1, tasks=4, num_batches=4, seed=5))
if sys.argv[1] == "alone":
    parallel, mine = learner, [batches[0:2], batches[2:4]]
else:
    parallel, mine = DistributedDataParallel(learner), [batches[rank::2][:1], batches[rank::2][1:]]
outer = torch.optim.SGD(parallel.parameters(), lr=0.1)
for step in mine:
    outer.zero_grad()
    for batch in step:
        (parallel(batch).loss / len(step)).backward()
    outer.step()
torch.save(learner.state_dict(), sys.argv[2] + str(rank))
dist.barrier()
os._exit(0)  # gloo's threads may wait for the interpreter while it waits for them
"""


@pytest.mark.slow
def test_the_distributed_example_runs():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *command, "examples/distributed.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 x 16 tasks: loss" in done.stdout


def run(how: str, processes: int, folder: Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = str(folder / how)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, how, path],
            env=env | {"RANK": str(rank), "WORLD_SIZE": str(processes)},
            cwd=ROOT,
        )
        for rank in range(processes)
    ]
    try:
        assert [p.wait(120) for p in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
    return [torch.load(f"{path}{rank}") for rank in range(processes)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_processes_take_the_steps_of_one_with_all_tasks(tmp_path):
    (alone,) = run("alone", 1, tmp_path)
    start = classifier().state_dict()
    assert any(not torch.equal(start[n], t) for n, t in alone.items())
    for how in ("parallel", "captured"):
        first, second = run(how, 2, tmp_path)
        for name, want in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], want, rtol=1e-5, atol=1e-6)
