"""Meta-steps on texts of other lengths in every batch, as real data gives them.

    python -m bench.text_stream [--batches 40] [--out results.json]

All ways take every batch in turn. What is new in a batch costs: memory is measured, steps are
captured; the sum says what a run of so many meta-steps takes, the median what later ones do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import fastmeta as fm
from bench.baselines import math_attention, per_task_loop, with_lora
from bench.cases import CASES, CLINC_LENGTHS, LR, Case
from bench.comparison import machine

STREAMS = {
    "small": replace(
        CASES["full"], title="2-layer BERT h=128, T=32, 1-shot, K=5, all parameters",
        length=28, lengths=CLINC_LENGTHS,
    ),
    "minilm-lora": CASES["texts-lora"],
}  # fmt: skip


def ways_of(case: Case) -> tuple[dict, dict]:
    """What takes part, by label, and what is captured, by signature."""
    ways = {}
    for label, compile in (("fastmeta", False), ("fastmeta, captured", True)):
        learner = fm.MAML(
            fm.patch(case.model(), case.spec()), lr=LR, steps=case.steps, compile=compile
        )
        ways[label] = lambda batch, learner=learner: learner(batch).loss.backward()
    model = case.model()
    patched = fm.patch(model, case.spec())
    lora = case.spec is CASES["texts-lora"].spec
    names = with_lora(model, patched) if lora else list(patched.layout.names)

    def loop(batch: fm.TaskBatch) -> None:
        with math_attention():
            per_task_loop(model, names, batch, case.steps)

    return ways | {"per-task loop": loop}, learner.capture.steps  # of the last, which captures


def stream(case: Case, batches: int) -> dict:
    (ways, captured), order = ways_of(case), random.Random(0)
    times: dict[str, list[float]] = {label: [] for label in ways}
    shapes = set()
    for i in range(batches):
        batch = case.batch(seed=i)
        shapes.add(
            tuple(
                int((s["attention_mask"] != 0).flatten(1).sum(1).max())
                for s in (batch.support, batch.query)
            )
        )
        for label in order.sample(sorted(ways), len(ways)):
            start = time.perf_counter()
            ways[label](batch)
            times[label].append(time.perf_counter() - start)
    print(f"\n{case.title}: {batches} batches, {len(shapes)} pairs of numbers of tokens")
    for label, each in times.items():
        late = median(each[batches // 2 :])
        print(f"  {label:20s} {sum(each):8.1f} s in all, {late:7.3f} s each in the second half")
    print(f"  {len(captured)} steps captured")
    return {"title": case.title, "captured": len(captured), "shapes": len(shapes), "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--cases", default=",".join(STREAMS), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"machine": machine("cpu"), "torch": torch.__version__}
    for name in args.cases.split(","):
        result[name] = stream(STREAMS[name], args.batches)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
