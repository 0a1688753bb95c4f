"""Several processes: DistributedDataParallel around learners, and trainers that share batches."""

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_meta_module import classifier, lora
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm
from fastmeta.data.loader import Loader
from fastmeta.training import Trainer
from fastmeta.training.processes import Processes

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found in all that they do together, by name."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    code = "import sys, test_processes; test_processes.in_group(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, cwd=TESTS) for rank in range(2)
    ]
    try:
        assert [p.wait(240) for p in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / str(rank)) for rank in range(2)]


def in_group(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = (folder + "/{}").format
    found = {
        "eager": averaged(),
        "captured": averaged(compile=True),
        "static": averaged(static_graph=True),
        "warned": warned(),
        "trained": trained(run("run")),
        "half": trained(run("half"), 3),
        "whole": trained(run("whole"), dropout=0.5),
        "first": trained(run("parts"), 3, dropout=0.5),
        "rest": trained(run("parts"), dropout=0.5, resume=True),
        "stopped": trained(run("stopped"), stop=dist.get_rank() == 1),
        "alike": alike(),
        "refused": refused(),
        "folder": folder,
    }
    torch.save(found, run(dist.get_rank()))
    dist.barrier()
    os._exit(0)  # gloo's threads may wait for the interpreter while it waits for them


# -- DistributedDataParallel ---------------------------------------------------------------------


def averaged(compile: bool = False, **settings: Any) -> dict[str, Any]:
    rank, count = Processes.running().rank, Processes.running().count
    patched = fm.patch(classifier(), fm.Params("*"))
    learner = fm.MAML(patched, lr=0.1, steps=2, compile=compile)
    parallel = learner if count == 1 else DistributedDataParallel(learner, **settings)
    tokenizer = fm.data.tiny_bert(hidden_size=16, num_layers=1)[1]
    train, sizes = fm.data.builtin("train"), {"ways": 3, "shots": 1, "tasks": 4}
    batches = fm.data.Episodes(train, tokenizer, **sizes, num_batches=4, seed=5)
    outer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in (0, 2):
        outer.zero_grad()
        for i in range(step + rank, step + 2, count):
            (parallel(batches.batch(i)).loss * count / 2).backward()
        outer.step()
    return learner.state_dict()


@pytest.mark.parametrize("how", ["eager", "captured", "static"])
def test_averaged_gradients_are_those_of_all_tasks(together, how):
    alone, start = averaged(), classifier().state_dict()
    assert any(not torch.equal(start[n], t) for n, t in alone.items())
    first, second = (found[how] for found in together)
    for name, want in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], want, rtol=1e-5, atol=1e-6)


def warned() -> dict[bool, int]:
    """Number of warnings, of a model that is frozen or not, inside of a module."""
    found = {}
    ids = torch.ones(2, 3, 4, dtype=torch.int64)
    batch = fm.TaskBatch(*[{"input_ids": ids, "labels": torch.arange(3).expand(2, 3)}] * 2)
    for frozen in (False, True):
        learner = fm.MAML(lora(classifier().requires_grad_(not frozen)), steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                learner(batch)
        found[frozen] = sum("2 tensors that adapt are frozen" in str(w.message) for w in caught)
    return found


def test_frozen_weights_that_adapt_are_warned_of(together):
    assert [found["warned"] for found in together] == [{False: 0, True: 1}] * 2


# -- trainers ------------------------------------------------------------------------------------


class Points(Loader):
    """Five tasks of three classes of points; one task of batch 1 has none that are finite."""

    def __init__(self, seed: int) -> None:
        super().__init__(
            tasks=5, seed=seed, num_batches=None, start=0, prefetch=0, pin_memory=False
        )

    def _make(self, index: int) -> fm.TaskBatch:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        labels = torch.arange(3).repeat(2).expand(5, 6)
        points = torch.randn(2, 5, 6, 4, generator=generator, dtype=torch.float64)
        points += 2 * torch.eye(3, 4, dtype=torch.float64)[labels]
        if index == 1:
            points[0, 3] = torch.nan
        return fm.TaskBatch(*({"points": p, "labels": labels.clone()} for p in points))

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.dropout = nn.Linear(4, 8), nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)

    def forward(self, points: torch.Tensor) -> SequenceClassifierOutput:
        hidden = self.dropout(self.first(points).tanh())
        return SequenceClassifierOutput(logits=self.last(hidden))


def trainer(out: str | Path, dropout: float = 0.0, **settings: Any) -> Trainer:
    rank = Processes.running().rank
    torch.manual_seed(rank)  # the first one's start is everyone's
    learner = fm.MAML(fm.patch(Net(dropout).double(), fm.Params("*")), lr=0.1, steps=3)
    torch.manual_seed(10 + rank)
    return Trainer(
        learner,
        Points(0),
        torch.optim.SGD(learner.parameters(), lr=0.5, momentum=0.9),
        **{"clip_norm": 1.0, "valid": Points(1), "eval_every": 2, "eval_episodes": 8}
        | {"out": out, "checkpoint_every": 2, "progress": False}
        | settings,
    )


def trained(
    out: str | Path,
    steps: int = 6,
    *,
    dropout: float = 0.0,
    resume: bool = False,
    stop: bool = False,
) -> dict[str, Any]:
    trains = trainer(out, dropout)
    if resume:
        trains.resume()
    if stop:
        trains.stop()
    stopped = False
    try:
        trains.fit(steps)
    except fm.training.Interrupted:
        stopped = True
    state = {n: t.clone() for n, t in trains.learner.state_dict().items()}
    files = sorted(p.name for p in Path(out, "checkpoints").iterdir())
    return {"state": state, "metrics": trains.metrics, "stopped": stopped, "files": files}


def assert_same_training(found: dict[str, Any], want: dict[str, Any]) -> None:
    for name, tensor in want["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-10, atol=1e-12)
    assert len(found["metrics"]) == len(want["metrics"])
    for mine, other in zip(found["metrics"], want["metrics"], strict=True):
        for key in mine.keys() - {"tasks_per_s", "peak_memory_mb"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-10), key


def test_trainers_share_batches_and_take_the_same_steps(together, tmp_path):
    alone = trained(tmp_path / "run")
    assert [r["diverged"] for r in alone["metrics"]] == [0, 1, 0, 0, 0, 0]
    first, second = (found["trained"] for found in together)
    assert_same_training(first, alone)
    assert_same_training(second, alone)
    assert all(torch.equal(second["state"][n], t) for n, t in first["state"].items())
    run = Path(together[0]["folder"], "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (run / "curve.png").exists()


def test_a_run_goes_on_with_another_number_of_processes(together, tmp_path):
    assert together[0]["half"]["metrics"][-1]["step"] == 3
    shutil.copytree(Path(together[0]["folder"], "half"), tmp_path / "run")
    assert_same_training(trained(tmp_path / "run", resume=True), trained(tmp_path / "whole"))


def test_a_resumed_run_goes_on_with_the_masks_of_every_process(together):
    for found in together:
        assert [r["step"] for r in found["rest"]["metrics"]] == [1, 2, 3, 4, 5, 6]
        evaluated = [r.get("valid_loss") for r in found["rest"]["metrics"]]
        assert evaluated == [r.get("valid_loss") for r in together[0]["rest"]["metrics"]]
        for name, want in found["whole"]["state"].items():
            assert torch.equal(found["rest"]["state"][name], want)


def test_one_that_is_asked_to_stop_stops_all(together):
    for found in together:
        assert found["stopped"]["stopped"] and found["stopped"]["files"] == ["step-00000000"]


def alike() -> dict[str, torch.Tensor]:
    """Weights after two steps from other starts: frozen ones, buffers, of a loss's own."""
    trains = trainer(None, valid=None)
    net, own = trains.learner.model, nn.Parameter(torch.randn(8, 8)[:, ::2].double())
    net.register_buffer("noise", torch.randn(3))
    net.last.requires_grad_(False)
    learner = fm.MAML(
        fm.patch(net, fm.LoRA(r=2, targets="first")),
        loss_fn=lambda out, batch: out.logits.square().mean((1, 2)) * own.sum(),
    )
    outer = torch.optim.SGD([*learner.parameters(), own], lr=0.01)
    Trainer(learner, Points(0), outer, progress=False).fit(2)
    return {n: t.detach().clone() for n, t in {**net.state_dict(), "own": own}.items()}


def test_all_weights_start_alike_and_stay_so(together):
    first, second = (found["alike"] for found in together)
    assert first.keys() == second.keys() and {"noise", "own", "last.weight"} <= first.keys()
    assert all(torch.equal(second[n], t) for n, t in first.items())


def refused() -> dict[str, str]:
    learned = fm.MAML(
        fm.patch(Net(0.0).double(), fm.Params("*")), optimizer=fm.LearnedOptimizer(), order=1
    )
    unrolls = fm.TruncatedUnroll(learned, horizon=2, truncation=1)
    rates = fm.MAML(learned.patched, lr=fm.LearnedRate("task", num_tasks=5))
    few = trainer(None, valid=None)
    few.episodes.batch = lambda index: Points(0).batch(0)[:1]
    cases = {
        "unrolls": lambda: Trainer(
            unrolls, Points(0), torch.optim.SGD(unrolls.parameters(), lr=0.1)
        ),
        "tasks": lambda: few.fit(1),
        "rates": lambda: Trainer(
            rates, Points(0), torch.optim.SGD(rates.parameters(), lr=0.1), progress=False
        ),
    }
    found = {}
    for name, case in cases.items():
        with pytest.raises((ValueError, fm.training.TrainingError)) as caught:
            case()
        found[name] = str(caught.value)
    return found


def test_what_processes_cannot_share_is_refused(together):
    for found in together:
        assert found["refused"] == {
            "unrolls": "TruncatedUnroll trains in one process",
            "rates": "rates learned per task are trained in one process",
            "tasks": "expected a task for each of 2 processes, got 1 a step",
        }


def test_alone_nothing_is_shared():
    alone = Processes.running()
    batch = Points(0).batch(0)
    assert (alone.rank, alone.count, alone.leads) == (0, 1, True)
    assert alone.share(batch) is batch and alone.any(True, torch.device("cpu"))
    assert [len(p) for p in alone.gather([1, 2])] == [2]


# -- by torchrun ---------------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *arguments], cwd=TESTS.parent, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_the_example_runs():
    done = torchrun("examples/distributed.py")
    assert done.returncode == 0, done.stderr
    assert "2 x 16 tasks: loss" in done.stdout


def test_the_command_line_trains(tmp_path):
    given = ["train", "--model", "builtin:hidden=16,layers=1", "--data", "builtin", "--spec", "all"]
    given += ["--steps", "3", "--tasks", "3", "--inner-steps", "2", "--quiet"]
    done = torchrun("-m", "fastmeta", *given, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps done, loss") == 1
    one = [sys.executable, "-m", "fastmeta", *given, "--out", str(tmp_path / "one")]
    subprocess.run(one, cwd=TESTS.parent, check=True, capture_output=True, timeout=240)
    both = [
        [r["loss"] for r in fm.training.read_metrics(tmp_path / n / "metrics.jsonl")]
        for n in ("one", "two")
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
