"""Time and peak memory of a second-order meta-step against T, K, L, rank and vocabulary.

    python -m bench.growth [--rounds 2] [--out results/growth]

Writes ``OUT.json`` and ``OUT.png``. Peak memory is that of tensors (`fastmeta.engine.meter`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import fastmeta as fm
from bench.baselines import math_attention, per_task_loop, with_lora
from bench.cases import LR, Case
from fastmeta.engine.meter import PeakMemory

BASE = Case("2-layer BERT h=128", 2, 128, 2, 8, 1, 16, 3, lambda: fm.Params("*"))
AXES = {
    "T, tasks": ("tasks", (1, 2, 4, 8, 16, 32)),
    "K, inner steps": ("steps", (1, 2, 4, 8)),
    "L, tokens": ("length", (8, 16, 32, 64)),
    "r, LoRA rank": ("rank", (1, 4, 16, 64)),
    "V, words": ("words", (1000, 4000, 16000, 64000)),
}
WAYS = ("unroll", "recompute", "per-task loop")


def case_at(field: str, value: int) -> Case:
    if field == "rank":
        return replace(BASE, spec=lambda: fm.LoRA(r=value) + fm.Params("classifier.*"))
    return replace(BASE, **{field: value})


def step_of(case: Case, way: str, lora: bool) -> Callable[[], None]:
    model, batch = case.model(), case.batch()
    patched = fm.patch(model, case.spec())
    learner = fm.MAML(
        patched, lr=LR, steps=case.steps, memory="unroll" if way == "per-task loop" else way
    )
    names = list(patched.layout.names)
    if way == "per-task loop" and lora:
        names = with_lora(model, patched)

    def step() -> None:
        model.zero_grad()
        if way == "per-task loop":
            with math_attention():
                per_task_loop(model, names, batch, case.steps)
        else:
            learner(batch).loss.backward()

    return step


def measured(rounds: int) -> Iterator[dict]:
    for title, (field, values) in AXES.items():
        for value in values:
            case = case_at(field, value)
            steps = {way: step_of(case, way, field == "rank") for way in WAYS}
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            peaks = {}
            for way, step in steps.items():
                step()  # plans, caches, page faults
                with PeakMemory() as meter:
                    step()
                peaks[way] = meter.peak
            for _ in range(rounds):
                for way, step in steps.items():
                    start = time.perf_counter()
                    step()
                    times[way].append(time.perf_counter() - start)
            yield {
                "axis": title,
                "value": value,
                "seconds": {way: median(t) for way, t in times.items()},
                "peak_bytes": peaks,
            }


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6), sharex="col")
    for column, title in enumerate(AXES):
        mine = [r for r in rows if r["axis"] == title]
        for row, (key, scale, label) in enumerate(
            (("seconds", 1.0, "seconds"), ("peak_bytes", 2.0**-20, "peak, MiB"))
        ):
            plane = axes[row][column]
            for way in WAYS:
                x, y = [r["value"] for r in mine], [scale * r[key][way] for r in mine]
                plane.plot(x, y, "o-", label=way)
            plane.set_xscale("log", base=2)
            plane.set_yscale("log")
            plane.set_ylabel(label)
            plane.set_xlabel(title if row else "")
    axes[0][0].legend()
    figure.suptitle(
        f"{BASE.title}, one second-order meta-step; else T=8, K=3, L=16, all parameters"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("growth"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for row in measured(args.rounds):
        rows.append(row)
        loop = row["seconds"]["per-task loop"]
        shown = ", ".join(
            f"{way} {s:.3f} s ({loop / s:.1f} x), {row['peak_bytes'][way] / 2**20:.0f} MiB"
            for way, s in row["seconds"].items()
        )
        print(f"{row['axis']} = {row['value']}: {shown}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(
            json.dumps(
                {"threads": args.threads, "torch": torch.__version__, "rows": rows}, indent=1
            )
        )
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
