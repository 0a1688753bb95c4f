"""64 candidates in one batch against a loop over them: MiniLM-sized encoder, few-shot tasks.

    python -m bench.compare_search [--model PATH] [--out FILE]

The loop evaluates one candidate after another by the ordinary library, each on a model that is
physically pruned to its shape and patched for its rank before the clock starts: `fm.adapt` (which
computes a candidate's frozen layers once for all its steps) and one pass over the query set. The
batch evaluates all candidates by `fm.search.Evaluator`, nothing remembered from call to call. Both
are run in turn in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertModel

import fastmeta as fm
from bench.comparison import machine

S = fm.search


@dataclass(frozen=True)
class Case:
    """64 candidates of a space on T tasks.

    Attributes:
        space: Arguments of the space.
        tasks, shots, queries: Of the batch; 5 ways, 16 tokens.
        fixed: Decisions that are the same for all candidates.
    """

    space: dict
    tasks: int
    shots: int
    queries: int
    fixed: dict


LORA = {
    "lora": {"query": [2, 4, 8, 16], "value": [2, 4, 8, 16]},
    "lr": S.Range(1e-3, 1e-1, log=True),
    "steps": [1, 2, 5, 10],
}
SHAPES = {
    "layers": "each",
    "widths": [1.0, 0.75, 0.5],
    "heads": [12, 9],
    "uniform": False,
    "lr": S.Range(1e-3, 1e-1, log=True),
    "steps": 10,
}
LOWER = {f"layer.{i}": True for i in range(3)}
LOWER |= {f"heads.{i}": 12 for i in range(3)} | {f"width.{i}": 1536 for i in range(3)}
CASES = {
    "LoRA rank, lr, steps; top layer, T=1, 1-shot, 5 queries": Case(
        LORA | {"adapted_layers": 1}, 1, 1, 5, {}
    ),
    "LoRA rank, lr, steps; top 2 layers, T=1, 1-shot, 5 queries": Case(
        LORA | {"adapted_layers": 2}, 1, 1, 5, {}
    ),
    "LoRA rank, lr, steps; top layer, T=2, 1-shot, 5 queries": Case(
        LORA | {"adapted_layers": 1}, 2, 1, 5, {}
    ),
    "architectures that differ in the upper 3 layers, T=1, 1-shot, 5 queries": Case(
        SHAPES, 1, 1, 5, LOWER
    ),
    "architectures that differ in all 6 layers, T=1, 1-shot, 5 queries": Case(SHAPES, 1, 1, 5, {}),
    "architectures that differ in the upper 3 layers, T=2, 5-shot, 5 queries": Case(
        SHAPES, 2, 5, 5, LOWER
    ),
}


def encoder(path: Path | None) -> torch.nn.Module:
    if path is not None:
        return fm.models.load_encoder(path)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def random_batch(case: Case) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> dict[str, torch.Tensor]:
        shape = (case.tasks, 5 * count, 16)
        ids = torch.randint(1000, 20000, shape, generator=generator)
        labels = torch.arange(5).repeat(case.tasks, count)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return fm.TaskBatch(rows(case.shots), rows(case.queries))


def ways(case: Case, model: fm.models.SentenceClassifier) -> dict[str, Callable[[], list[float]]]:
    """The batch and the loop; both return every candidate's query loss."""
    space = S.Space(model, **case.space)
    evaluator = S.Evaluator(space)
    batch = random_batch(case)
    drawn = space.sample(64, seed=0)
    candidates = [space.proposal({**p.decisions, **case.fixed}) for p in drawn]
    prepared = [prepare(evaluator, c) for c in candidates]
    query = {k: v for k, v in batch.query.items() if k != "labels"}

    def together() -> list[float]:
        evaluator._features.clear()
        return [sum(s.losses) / case.tasks for s in evaluator.evaluate(candidates, batch)]

    def loop() -> list[float]:
        found = []
        for c, (patched, start) in zip(candidates, prepared, strict=True):
            params = fm.TaskParams(patched.layout, start.expand(case.tasks, -1))
            fast = fm.adapt(patched, batch.support, steps=c.steps, lr=c.lr, params=params)
            with torch.no_grad():
                logits = patched(fast.params, **query).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.query["labels"].flatten()
            )
            found.append(float(loss))
        return found

    return {"one batch": together, "loop over candidates": loop}


def prepare(evaluator: S.Evaluator, c: S.Proposal) -> tuple[fm.Patched, torch.Tensor]:
    """A candidate's own patched model, and its initial fast weights ``[1, P]``."""
    space, net = evaluator.space, evaluator.net
    pruned = S.prune(net.model, space.anatomy, c)
    kept = [i for i, k in enumerate(c.kept) if k]
    spec: fm.Spec = fm.Head()
    places = {}
    for target, modules in space.targets.items():
        for m in modules:
            layer = space.layer_of(m)
            if c.ranks[target] and layer in c.adapted:
                stack = space.anatomy.stack
                own = m.replace(f"{stack}.{layer}.", f"{stack}.{kept.index(layer)}.")
                places[own] = m
                alpha = space.lora_scale * c.ranks[target]
                spec = fm.LoRA(c.ranks[target], alpha, own) + spec
    patched = fm.patch(pruned, spec)
    whole = net.start([c], 1)
    pieces = []
    for name, shape in zip(patched.layout.names, patched.layout.shapes, strict=True):
        module, _, attribute = name.rpartition(".")
        view = whole[f"{places.get(module, module)}.{attribute}"][0]
        pieces.append(view[tuple(slice(n) for n in shape)])
    return patched, patched.layout.pack(pieces).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of the encoder [random weights]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = fm.models.SentenceClassifier(encoder(args.model), 5).eval()
    result = {"machine": machine("cpu"), "threads": args.threads, "cases": {}}
    if args.out and args.out.is_file():
        result = json.loads(args.out.read_text())
    for title, case in CASES.items():
        if args.only not in title or title in result["cases"]:
            continue
        both = ways(case, model)
        first, second = (torch.tensor(way()) for way in both.values())  # warm: plans, caches
        error = float((first - second).abs().max() / second.abs().max())
        times: dict[str, list[float]] = {label: [] for label in both}
        for _ in range(args.rounds):
            for label, way in both.items():
                start = time.perf_counter()
                way()
                times[label].append(time.perf_counter() - start)
        ratio = median(b / a for a, b in zip(*times.values(), strict=True))
        result["cases"][title] = {
            "seconds": {label: median(t) for label, t in times.items()},
            "ratio": ratio,
            "largest relative difference of losses": error,
        }
        shown = ", ".join(f"{label} {median(t):.2f} s" for label, t in times.items())
        print(f"{title}: {shown}, {ratio:.2f} x, losses differ by {error:.1e}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
