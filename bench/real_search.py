"""Architecture and recipe search on real tasks: MiniLM, CLINC150's domains, HWU64's scenarios.

    python -m bench.real_search --model PATH --clinc PATH --hwu PATH --out DIR

The ten domains of CLINC150 are ten 15-way tasks, on which candidates are judged: few-shot
adaptation of a linear head on the (pruned) encoder's pooled states. Stages, each written to
``DIR/results.json`` when it is done, and skipped when it is there:

0. ``cost``: the latency of a layer of each size (``--only-cost``: nothing else, with two threads
   and nothing beside it).
1. ``features``: the whole grid of architectures within the latency budget, in one call, so that all
   share their lower layers. Every controller then reads them.
2. ``controllers``: the LSTM controller, evolution and random search at equal evaluations, several
   seeds each, over architectures and recipes within the budget.
3. ``winner``: finalists on other draws of the same domains; the winner and the whole model on fresh
   draws of the domains and on HWU64's scenarios, which no search has seen, paired by task.
4. ``healed``: the winner after a short distillation from the whole model on CLINC150's texts, on
   fresh draws; HWU64 stays unseen.
5. ``recipe``: a search over recipes for the whole model, and the one found against the default
   recipe of ``fastmeta train`` on HWU64, paired by task.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import fastmeta as fm
from bench.comparison import machine
from bench.timing import interleave
from fastmeta.search.run import whole_model

S = fm.search
DEFAULT = {"lr": 0.05, "steps": 5, "optimizer": "sgd", "weight_decay": 0.0}  # `fastmeta train`'s
CONTROLLERS = {
    "lstm": ("lstm", {}),
    "random": ("random", {}),
    "evolution": ("evolution", {}),
}
RECIPES = {
    "lr": S.Range(1e-3, 1.0, log=True),
    "steps": [5, 3, 10, 20],
    "optimizer": ["sgd", "momentum", "adam"],
    "weight_decay": [0.0, 1e-3, 1e-2, 1e-1],
}


def batches(data, tokenizer, args, *, count: int, seed: int, tasks: int) -> list[fm.TaskBatch]:
    return list(
        fm.data.TaskDataset(
            data, tokenizer, args.shots, args.queries, tasks, num_batches=count, seed=seed,
            max_length=args.max_length, prefetch=0,
        )
    )  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval (Student's t for few values)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.inf
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(n, 1.96)
    return mean, t * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def paired(ours: S.Score, theirs: S.Score) -> dict:
    """Both accuracies and their difference over the same tasks."""
    pairs = zip(ours.accuracies, theirs.accuracies, strict=True)
    difference, half = interval([100 * (a - b) for a, b in pairs])
    return {
        "ours": 100 * ours.accuracy,
        "theirs": 100 * theirs.accuracy,
        "difference": difference,
        "interval": half,
        "tasks": len(ours.accuracies),
    }


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out / "results.json"
        args.out.mkdir(parents=True, exist_ok=True)
        self.results = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = fm.models.SentenceClassifier.from_pretrained(args.model, num_labels=15)
        self.clinc = fm.data.clinc_tasks(args.clinc)
        self.hwu = {n: t for n, t in fm.data.hwu_tasks(args.hwu).items() if len(t.classes) <= 15}
        self.judged = batches(self.clinc, self.tokenizer, args, count=1, seed=0, tasks=10)[0]
        self.space = S.Space(
            self.model,
            layers="each",
            heads=[12, 9],
            widths=[1536, 1152, 768],
            pooling=["mean", "cls"],
            constraint=lambda p: sum(p.kept) >= 4,
            **RECIPES,
        )
        self.cost = S.CostModel(self.space, tokens=16, rows=16, rounds=31)
        self.evaluator = S.Evaluator(self.space, calibration=self.judged.support)

    def save(self, name: str, value) -> None:
        self.results[name] = value
        self.path.write_text(json.dumps(self.results, indent=1))
        print(name, json.dumps(value)[:2000], flush=True)

    def cost_table(self) -> None:
        """The latency of every size, measured once: run this stage alone, on a quiet machine."""
        if "cost" not in self.results:
            for heads in (12, 9):
                for width in (1536, 1152, 768):
                    self.cost(self.space.proposal(heads=heads, width=width))
            state = self.cost.state_dict()
            table = {f"{h},{w}": v for (h, w), v in state["table"].items()}
            self.save("cost", {"table": table, "outside": state["outside"]})
        saved = self.results["cost"]
        table = {tuple(map(int, k.split(","))): v for k, v in saved["table"].items()}
        self.cost.load_state_dict({"table": table, "outside": saved["outside"]})

    def architectures(self) -> list[S.Proposal]:
        """Every architecture within the budget, and the whole model; both poolings."""
        found = {}
        for bits in range(64):
            for heads in (12, 9):
                for width in (1536, 1152, 768):
                    values = {f"layer.{i}": bool(bits >> i & 1) for i in range(6)}
                    for pooling in ("mean", "cls"):
                        p = self.space.proposal(
                            values | {"heads": heads, "width": width, "pooling": pooling}
                        )
                        if self.space.allows(p) and self.within(p):
                            found[p.key] = p
        return [whole_model(self.space), *found.values()]

    def within(self, p: S.Proposal) -> bool:
        return self.cost(p)["relative_latency"] <= self.args.budget

    def features(self) -> None:
        cache = self.args.out / "features.pt"
        known = self.evaluator._features.setdefault(self.judged, {})
        if cache.is_file():
            known |= torch.load(cache, weights_only=True)
            return
        start = time.perf_counter()
        grid = self.architectures()
        groups: dict[tuple, list[S.Proposal]] = {}
        for p in grid:  # layers of other sizes share nothing
            groups.setdefault((p.heads, p.widths), []).append(p)
        bound, self.evaluator.tokens = self.evaluator.tokens, 1 << 40
        for group in groups.values():
            self.evaluator.evaluate(group, self.judged)
            print(f"{len(known)} of {len(grid)}", time.perf_counter() - start, flush=True)
        self.evaluator.tokens = bound
        torch.save(dict(known), cache)
        self.save("features", {"grid": len(grid), "seconds": time.perf_counter() - start})

    def controllers(self) -> None:
        found = self.results.get("controllers", {})
        for seed in range(self.args.seeds):
            for name, (controller, settings) in CONTROLLERS.items():
                if f"{name} {seed}" in found:
                    continue
                start = time.perf_counter()
                result = S.run(
                    self.space, self.judged, controller=controller, cost=self.cost,
                    evaluations=self.args.evaluations, population=16, seed=seed, progress=False,
                    budget={"relative_latency": self.args.budget}, evaluator=self.evaluator,
                    **settings,
                )  # fmt: skip
                order = sorted(result.finished(), key=lambda s: (-s.accuracy, sum(s.losses)))
                found[f"{name} {seed}"] = {
                    "best": 100 * order[0].accuracy,
                    "mean of the last quarter": 100
                    * sum(s.accuracy for s in result.scores[-len(result.scores) // 4 :])
                    / len(result.scores[-len(result.scores) // 4 :]),
                    "seconds": time.perf_counter() - start,
                    "finalists": [dict(s.proposal.decisions) for s in order[:4]],
                }
                self.save("controllers", found)
        summary = {}
        for name in CONTROLLERS:
            best = [found[f"{name} {s}"]["best"] for s in range(self.args.seeds)]
            summary[name] = interval(best)
        for name in set(CONTROLLERS) - {"random"}:
            pairs = [
                found[f"{name} {s}"]["best"] - found[f"random {s}"]["best"]
                for s in range(self.args.seeds)
            ]
            summary[f"{name} - random"] = interval(pairs)
        self.save("summary", summary)

    def winner(self) -> None:
        if "winner" in self.results:
            return
        chosen, shapes = {}, set()
        runs = sorted(self.results["controllers"].values(), key=lambda run: -run["best"])
        for run in runs:
            p = self.space.proposal(run["finalists"][0])
            if p.shape in shapes or len(shapes) < 5:
                shapes.add(p.shape)
                chosen[p.key] = p
        other = batches(self.clinc, self.tokenizer, self.args, count=1, seed=1, tasks=10)
        scores = self.evaluator.evaluate(list(chosen.values()), [self.judged, *other])
        best = min(scores, key=lambda s: (-s.accuracy, sum(s.losses))).proposal
        whole = whole_model(self.space)
        same = S.Proposal(**{**vars(whole), **{k: getattr(best, k) for k in DEFAULT}})
        default = S.Proposal(**{**vars(whole), **DEFAULT})
        found = {"proposal": str(best), "decisions": dict(best.decisions), "cost": self.cost(best)}
        for name, data, tasks in (("clinc", self.clinc, 10), ("hwu", self.hwu, len(self.hwu))):
            fresh = batches(data, self.tokenizer, self.args, count=2, seed=2, tasks=tasks)
            a, b, c = self.evaluator.evaluate([best, same, default], fresh)
            found[f"{name}, whole model, same recipe"] = paired(a, b)
            found[f"{name}, whole model, default recipe"] = paired(a, c)
        folder = self.args.out / "winner"
        if not folder.exists():
            S.export(self.evaluator, best, folder, tokenizer=self.tokenizer)
        self.save("winner", found)

    def heal(self) -> None:
        """The winner after a short distillation from the whole model, on CLINC150's texts alone."""
        if "healed" in self.results:
            return
        p = self.space.proposal(self.results["winner"]["decisions"])
        small = S.prune(self.evaluator.net.model, self.space.anatomy, p)
        texts = [t for data in self.clinc.values() for t in data.texts]
        start, steps = time.perf_counter(), self.args.heal_steps
        S.heal(
            small, self.model, texts, self.tokenizer, steps=steps,
            max_length=self.args.max_length, progress=False,
        )  # fmt: skip
        found = {"steps": steps, "seconds": time.perf_counter() - start}
        recipe = {k: getattr(p, k) for k in DEFAULT}
        healed, whole = (S.Evaluator(S.Space(m, **recipe)) for m in (small.eval(), self.model))
        default = S.Evaluator(S.Space(self.model, **DEFAULT))
        for name, data, tasks in (("clinc", self.clinc, 10), ("hwu", self.hwu, len(self.hwu))):
            fresh = batches(data, self.tokenizer, self.args, count=6, seed=2, tasks=tasks)
            a, b, c = (e.evaluate([e.space.proposal()], fresh)[0] for e in (healed, whole, default))
            found[f"{name}, whole model, same recipe"] = paired(a, b)
            found[f"{name}, whole model, default recipe"] = paired(a, c)
        self.save("healed", found)

    def recipe(self) -> None:
        if "recipe" in self.results:
            return
        space = S.Space(self.model, **RECIPES)
        evaluator = S.Evaluator(space)
        rows = {"shots": self.args.recipe_shots, "queries": self.args.recipe_queries}
        args = argparse.Namespace(**vars(self.args) | rows)
        draws = batches(self.clinc, self.tokenizer, args, count=3, seed=3, tasks=10)
        result = S.run(
            space, draws, controller="lstm", evaluations=self.args.evaluations, population=16,
            progress=False, evaluator=evaluator,
        )  # fmt: skip
        best = min(result.finished(), key=lambda s: (-s.accuracy, sum(s.losses))).proposal
        default = S.Proposal(**{**vars(space.proposal()), **DEFAULT})
        fresh = batches(self.hwu, self.tokenizer, args, count=4, seed=4, tasks=len(self.hwu))
        a, b = evaluator.evaluate([best, default], fresh)
        self.save("recipe", {"shots": args.shots, "proposal": str(best), "hwu": paired(a, b)})

    def speed(self) -> None:
        """Latency and size of the exported winner beside the whole model's, interleaved."""
        folder = self.args.out / "winner"
        small = fm.models.SentenceClassifier.from_pretrained(folder, 15, trust_remote_code=True)
        models = {"winner": small.eval(), "whole model": self.model.eval()}
        found = {}
        for rows in (1, 16, 64):
            ids = torch.randint(1000, 20000, (rows, 16))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                calls = {n: lambda m=m: m(**inputs) for n, m in models.items()}  # noqa: B023
                times = interleave(calls, rounds=9)
            found[f"{rows} texts"] = {n: t["seconds"] for n, t in times.items()} | {
                "ratio": 1 / times["whole model"]["ratio"]
            }
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        self.save("speed", found | {"parameters": sizes})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clinc", type=Path, required=True)
    parser.add_argument("--hwu", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--recipe-shots", type=int, default=10)
    parser.add_argument("--recipe-queries", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.7, help="of the whole model's latency")
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--heal-steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-cost", action="store_true", help="only measure latencies")
    parser.add_argument("--speed", action="store_true", help="only time the exported winner")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args)
    run.save("machine", machine("cpu"))
    if args.speed:
        return run.speed()
    if args.only_cost:
        return run.cost_table()
    stages = (run.cost_table, run.features, run.controllers, run.winner, run.recipe, run.heal)
    for stage in stages:
        stage()


if __name__ == "__main__":
    main()
