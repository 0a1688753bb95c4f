"""Compare meta-steps with other libraries, interleaved in one process; peak memory in its own.

    python -m bench.compare [--rounds 5] [--out results.json] [--device cpu]
                            [--cases full,training,lora,last2,deep,minilm-lora,texts-lora,memory]
                            [--ways "torch.func.vmap;fastmeta, bfloat16"]

On a GPU the cases are small-1, small-lora and small-5. Cases that are measured replace those of
the file; others stay.

`higher`, `torchopt` and `jax` take part where they are installed (``pip install fastmeta[bench]``).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastmeta as fm
from bench.baselines import BASELINES, math_attention, with_lora
from bench.cases import CASES, LR
from bench.comparison import machine, peak_bytes
from bench.flops import counted  # noqa: F401  (the products inside our operators)
from bench.jax_step import jax_step
from bench.timing import gemm_rate, synchronise

PEERS = {
    "full": ["per-task loop", "torch.func.vmap", "higher", "torchopt", "JAX jit(vmap)"],
    "training": ["per-task loop"],
    "lora": ["per-task loop"],
    "last2": ["per-task loop", "higher"],
    "deep": ["per-task loop", "JAX jit(vmap)"],
    "minilm-lora": ["per-task loop", "higher"],
    "texts-lora": ["per-task loop", "torch.func.vmap", "higher"],
    "small-1": ["per-task loop", "torch.func.vmap", "higher"],
    "small-lora": ["per-task loop", "higher"],
    "small-5": ["per-task loop", "torch.func.vmap", "higher"],
}

MODES = {
    "fastmeta": "unroll",
    "fastmeta, captured": "unroll:captured",
    "fastmeta, recompute": "recompute",
    "fastmeta, chunks of 2": "unroll:2",
    "fastmeta, captured chunks of 2": "unroll:captured:2",
    "fastmeta, bfloat16": "unroll:bf16",
    "fastmeta, captured, bfloat16": "unroll:captured:bf16",
}
GPU_MODES = {
    "fastmeta": "auto",
    "fastmeta, bfloat16": "auto:bf16",
    "fastmeta, CUDA graph": "auto:graph",
    "fastmeta, CUDA graph, bfloat16": "auto:graph:bf16",
}

ALL = {
    "cpu": "full,training,lora,last2,deep,minilm-lora,texts-lora,memory",
    "cuda": "small-1,small-lora,small-5",
}


def fastmeta_step(
    name: str, memory: str, steps: int | None = None, order: int = 2, device: str = "cpu"
):
    """`memory` may name more: a chunk of tasks as in ``"unroll:2"``, captured steps as in
    ``"unroll:captured"``, a CUDA graph as in ``"unroll:graph"``, products in bfloat16 as in
    ``"unroll:bf16"``."""
    case = CASES[name]
    model, batch = case.model(device), case.batch(device)
    patched = fm.patch(model, case.spec())
    mode, *more = memory.split(":")
    settings: dict = {"memory": mode}
    for word in more:
        if word == "captured":
            settings["compile"] = True
        elif word == "graph":
            settings["compile"] = "cudagraph"
        elif word == "bf16":
            settings["compute_dtype"] = torch.bfloat16
        else:
            settings["task_chunk"] = int(word)
    learner = fm.MAML(patched, lr=LR, steps=steps or case.steps, order=order, **settings)

    def step() -> float:
        for p in learner.parameters():
            p.grad = None
        out = learner(batch)
        out.loss.backward()
        return out.loss.item()

    return step


def peer_step(name: str, peer: str, device: str = "cpu"):
    case = CASES[name]
    model, batch = case.model(device), case.batch(device)
    if peer == "JAX jit(vmap)":
        return jax_step(model, batch, case.steps)
    patched = fm.patch(model, case.spec())
    names = with_lora(model, patched) if "lora" in name else list(patched.layout.names)

    def step() -> float:
        model.zero_grad()
        with math_attention():
            return BASELINES[peer](model, names, batch, case.steps)

    return step


def ways_of(name: str, ways: list[str], device: str) -> dict:
    """What takes part, by label: ours, and those of the others that are installed."""
    chunked = name == "deep"

    def wanted(label: str) -> bool:
        return not ways or label in ("fastmeta", *ways)

    if device == "cuda":
        # graphs keep the memory of a meta-step, which the largest case has but once
        modes = {k: m for k, m in GPU_MODES.items() if name != "small-5" or "graph" not in m}
    else:
        modes = {k: m for k, m in MODES.items() if chunked or not m.endswith(":2")}
    steps = {
        label: fastmeta_step(name, mode, device=device)
        for label, mode in modes.items()
        if wanted(label)
    }
    if name == "training" and wanted("fastmeta, evaluation mode"):
        steps["fastmeta, evaluation mode"] = fastmeta_step("full", "unroll")
    if name == "minilm-lora" and wanted("fastmeta, first order"):
        steps["fastmeta, first order"] = fastmeta_step(name, "unroll", order=1)
    for peer in filter(wanted, PEERS[name]):
        try:
            steps[peer] = peer_step(name, peer, device)
        except ImportError:
            continue
    return steps


def compare(name: str, rounds: int, ways: list[str], device: str = "cpu") -> dict:
    """`ways`: labels of those that take part beside ours; all where there are none."""
    chunked, steps = name == "deep", ways_of(name, ways, device)
    losses, times = {}, {k: [] for k in steps}
    for label, step in list(steps.items()):
        try:
            losses[label] = step()  # first run: plans, caches, page faults
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{label} is left out: {type(error).__name__}", file=sys.stderr)
            del steps[label], times[label]
    order = random.Random(0)
    for _ in range(rounds):
        # Another order every time: some ways slow down whichever comes next for a second or more.
        for label in order.sample(sorted(steps), len(steps)):
            step = steps[label]
            if device == "cpu":
                step()  # so that none pays for the heap and caches that another left
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            times[label].append(time.perf_counter() - start)
    with FlopCounterMode(display=False) as counter:
        steps["fastmeta"]()
    flops, rate = counter.get_total_flops(), gemm_rate(device)
    ours = median(times["fastmeta"])
    rows = {
        label: {
            "seconds": median(t),
            "ratio": median(a / b for a, b in zip(t, times["fastmeta"], strict=True)),
            "loss": losses[label],
            "all": t,
        }
        for label, t in times.items()
    }
    floor = flops / rate
    for label in rows.keys() & PEERS[name] if device == "cpu" else ():
        rows[label]["alone_seconds"] = alone(name, label)
    if chunked:
        for label in MODES.keys() & rows.keys():
            peak = peak_memory(name, MODES[label], CASES[name].steps)["peak_mib"]
            rows[label]["peak_mib"] = peak
    elif device == "cuda":
        for label, step in steps.items():
            rows[label]["peak_mib"] = peak_bytes(step, device) / 2**20
    print(f"\n{CASES[name].title}")
    for label, row in rows.items():
        peak = f"   {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
        print(f"  {label:30s} {row['seconds']:8.3f} s   {row['ratio']:5.2f} x fastmeta{peak}")
    print(f"  GEMM floor {floor:.3f} s ({flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s)")
    return {
        "title": CASES[name].title,
        "rows": rows,
        "gemm_flops": flops,
        "gemm_rate": rate,
        "floor_seconds": floor,
        "times_floor": ours / floor,
    }


def alone(name: str, peer: str) -> float:
    """Seconds of a peer's meta-step in a process without ours, whose heap is as its users have it:
    a learner of ours has the C library keep large blocks, which serves everyone in its process."""
    command = [sys.executable, "-m", "bench.compare", "--alone", name, peer]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure_alone(name: str, peer: str) -> None:
    """Child of :func:`alone`."""
    step, times = peer_step(name, peer), []
    for _ in range(4):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(json.dumps(median(times[1:])))


def peak_memory(name: str, mode: str, steps: int) -> dict:
    """Peak resident memory and time of one meta-step, in a process of its own."""
    command = [sys.executable, "-m", "bench.compare", "--measure", name, mode, str(steps)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure(name: str, mode: str, steps: int) -> None:
    """Child of :func:`peak_memory`."""
    step = fastmeta_step(name, mode, steps)
    step()  # what a process loads and finds out once is not a meta-step's
    release_freed_memory()
    peak = peak_bytes(step, "cpu")  # not ru_maxrss, which a child inherits from its parent
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_mib": peak / 2**20, "seconds": seconds}))


def release_freed_memory() -> None:
    """Give the heap's free pages back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_table() -> list[dict]:
    print(f"\n{CASES['memory'].title}: peak memory and time of one meta-step")
    rows = []
    for steps in (2, 5, 10, 20):
        for mode in ("unroll", "recompute"):
            if mode == "unroll" and steps == 20:
                continue  # about twice K=10: too much for a machine of 16 GiB
            row = {"K": steps, "memory": mode, **peak_memory("memory", mode, steps)}
            rows.append(row)
            print(f"  K={steps:2d} {mode:10s} {row['peak_mib']:8.0f} MiB {row['seconds']:7.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", help="names, separated by commas; default all of the device")
    parser.add_argument("--ways", help="only these beside ours, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        return measure(*args.measure[:2], int(args.measure[2]))
    if args.alone:
        return measure_alone(*args.alone)
    result: dict = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    result |= {
        "machine": machine(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    ways = args.ways.split(";") if args.ways else []
    for name in (args.cases or ALL[args.device]).split(","):
        if name == "memory":
            found = memory_table()
        else:
            found = compare(name, args.rounds, ways, args.device)
        result[name if not ways else f"{name}: {args.ways}"] = found
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
