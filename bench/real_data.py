"""Few-shot intent classification with a real sentence encoder: accuracy, time and memory.

    python bench/real_data.py --model PATH --data PATH --dataset clinc --method maml --out FILE

Meta-trains on the training classes of one split, then evaluates 5-way 1-shot and 5-shot episodes
of its test classes. ``--method none`` is the baseline: nearest class mean of the frozen encoder's
mean-pooled states.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer

import fastmeta as fm
from fastmeta.models import SentenceClassifier

QUERIES, WAYS = 5, 5


def build(method: str, model: SentenceClassifier, args: argparse.Namespace):
    """The learner of one method; the whole encoder is meta-learned, except for Reptile."""
    spec = fm.Params("encoder.encoder.layer.5.output.*") + fm.Head()
    common = {"lr": args.lr, "steps": args.inner_steps, "memory": "unroll"}
    if method == "maml":
        return fm.MAML(fm.patch(model, spec), order=2, **common)
    if method == "fomaml":
        return fm.MAML(fm.patch(model, spec), order=1, **common)
    if method == "anil":
        return fm.ANIL(fm.patch(model, fm.Head()), **common)
    if method == "metasgd":
        return fm.MetaSGD(fm.patch(model, spec), **common)
    if method == "reptile":
        return fm.Reptile(fm.patch(model, spec), **common)
    raise ValueError(f"unknown method {method!r}")


def interval(scores: torch.Tensor) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval, in per cent."""
    half = 1.96 * float(scores.std()) / math.sqrt(len(scores))
    return 100 * float(scores.mean()), 100 * half


@torch.no_grad()
def class_means(model: SentenceClassifier, batch: fm.TaskBatch) -> torch.Tensor:
    """Accuracy ``[T]`` of the nearest class mean, by cosine, with no training."""
    tasks = batch.num_tasks
    sets = []
    for s in (batch.support, batch.query):
        inputs = {k: v.flatten(0, 1) for k, v in s.items() if k != "labels"}
        sets.append(F.normalize(model.embed(**inputs), dim=-1).view(tasks, -1, model.config.hidden_size))
    one_hot = F.one_hot(batch.support["labels"], WAYS).to(sets[0].dtype)
    means = F.normalize(one_hot.transpose(1, 2) @ sets[0], dim=-1)
    predicted = (sets[1] @ means.transpose(1, 2)).argmax(-1)
    return (predicted == batch.query["labels"]).float().mean(1)


def evaluate(judge, data, tokenizer, shots: int, episodes: int, seed: int) -> torch.Tensor:
    """Accuracy of every episode ``[E]``."""
    tasks = 4  # few, so that little is padded
    batches = fm.data.Episodes(
        data, tokenizer, ways=WAYS, shots=shots, queries=QUERIES, tasks=tasks, seed=seed, bucket=4,
        num_batches=episodes // tasks,
    )  # fmt: skip
    return torch.cat([judge(b) for b in tqdm(batches, desc=f"{shots}-shot", total=episodes // tasks, mininterval=20)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with clinc150/ and hwu64/")
    parser.add_argument("--dataset", choices=["clinc", "hwu"], default="clinc")
    parser.add_argument("--method", default="maml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--outer-lr", type=float, default=5e-5)
    parser.add_argument("--scale", type=float, default=30.0)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = SentenceClassifier.from_pretrained(args.model, WAYS, args.scale).eval()
    folder = Path(args.data, {"clinc": "clinc150", "hwu": "hwu64"}[args.dataset])
    load = {"clinc": fm.data.clinc, "hwu": fm.data.hwu}[args.dataset]
    train, test = (load(folder, split=1, part=part) for part in ("train", "test"))

    result: dict = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result["torch"] = torch.__version__
    if args.method == "none":
        judge = lambda batch: class_means(model, batch)  # noqa: E731
    else:
        learner = build(args.method, model, args)
        outer_lr = args.outer_lr
        outer = torch.optim.Adam(learner.parameters(), lr=outer_lr)
        if args.method == "reptile":
            outer = torch.optim.SGD(learner.parameters(), lr=outer_lr)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            outer, lambda s: min(1.0, (s + 1) / 20) * (1 - s / args.steps)
        )
        batches = fm.data.Episodes(
            train, tokenizer, ways=WAYS, shots=1, queries=QUERIES, tasks=args.tasks,
            seed=args.seed, bucket=4, num_batches=args.steps,
        )  # fmt: skip
        start = time.perf_counter()
        history = []
        bar = tqdm(batches, total=args.steps, mininterval=20)
        for batch in bar:
            outer.zero_grad()
            out = learner(batch)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(
                learner.parameters(), math.inf if args.method == "reptile" else 1.0
            )
            outer.step()
            warmup.step()
            history.append((float(out.loss.detach()), float(out.accuracy.mean())))
            bar.set_postfix(loss=f"{history[-1][0]:.3f}", acc=f"{history[-1][1]:.3f}")
        result["train_seconds"] = time.perf_counter() - start
        result["history"] = history

        @torch.no_grad()
        def judge(batch: fm.TaskBatch) -> torch.Tensor:
            return learner(batch).accuracy

        learner.eval()
    start = time.perf_counter()
    for shots in (1, 5):
        scores = evaluate(judge, test, tokenizer, shots, args.episodes, seed=1000 + args.seed)
        mean, half = interval(scores)
        result[f"{shots}-shot"] = {"accuracy": mean, "interval95": half, "episodes": len(scores)}
        print(f"{args.dataset} {args.method} {shots}-shot: {mean:.2f} +- {half:.2f}", flush=True)
    result["eval_seconds"] = time.perf_counter() - start
    result["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
