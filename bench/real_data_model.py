"""Model-based meta-learning on real data: hypernetwork, LSTM meta-learner, learned optimizer.

    python -m bench.real_data_model --model PATH --data PATH --out FOLDER

The protocol of `bench/real_data.py` (its encoder, stored states, episodes and baseline): split 01,
60 outer steps of 4 one-shot tasks that learn the last two layers, then 5-way 1-shot and 5-shot
episodes of the test classes. ``optimizers`` freezes the encoder: inner optimizers of a linear head
from zero on its features, K steps, by the query loss of held-out tasks; the rates of SGD and Adam
are those of a grid with the lowest query loss on training tasks, the learned one is meta-trained on
training tasks. Every run writes its own file, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm
from bench.real_data import QUERIES, WAYS, LastLayers, Trunk, class_means, evaluate, interval

METHODS = ("none", "protonet", "maml", "hypernet", "lstmmeta", "learnedopt", "optimizers")
STEPS = 5  # inner steps
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


class Features(nn.Module):
    """The features that the head reads, as an encoder."""

    def __init__(self, model: LastLayers) -> None:
        super().__init__()
        self.inner, self.width = model, model.config.hidden_size

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner.embed(states, attention_mask)


def build(method: str, model: LastLayers) -> nn.Module:
    """The learner of one method."""
    common = {"steps": STEPS, "memory": "unroll"}
    if method == "protonet":
        return fm.ProtoNet(Features(model), normalize=True, temperature=0.1)
    if method == "maml":
        spec = fm.Params("layers.1.output.*") + fm.Head()
        return fm.MAML(fm.patch(model, spec), lr=0.05, order=2, **common)
    if method == "hypernet":
        patched = fm.patch(model, fm.LoRA(r=4, targets="all-linear") + fm.Head())
        return fm.HyperNetwork(
            patched, encoder=Features(model), train_encoder=True, lr=0.01, memory="unroll"
        )
    patched = fm.patch(model, fm.Params("layers.1.output.LayerNorm.*") + fm.Head())
    if method == "lstmmeta":
        return fm.LSTMMetaLearner(patched, rate=0.05, forget=0.9999, **common)
    rule = fm.LearnedOptimizer(hidden=20, layers=1)
    return fm.MAML(patched, optimizer=rule, lr=0.03, order=1, **common)


def train(learner: nn.Module, batches, steps: int, outer_lr: float) -> list[float]:
    """Meta-train; the model's weights at `outer_lr`, a method's own at rates of their own."""
    rates = {"inner_lr.": 20 * outer_lr, "metric.": 1e-3, "hypernet.": 1e-3, "optimizer.": 1e-2}
    groups = [
        {"params": [p], "lr": next((r for k, r in rates.items() if n.startswith(k)), outer_lr)}
        for n, p in learner.named_parameters()
        if p.requires_grad
    ]
    outer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        outer, lambda s: min(1.0, (s + 1) / min(20, steps)) * (1 - s / steps)
    )
    losses = []
    for _, batch in zip(range(steps), batches, strict=False):
        outer.zero_grad()
        out = learner(batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        outer.step()
        schedule.step()
        losses.append(float(out.loss.detach()))
        if len(losses) % 20 == 0:
            print(f"  step {len(losses)}: {sum(losses[-20:]) / 20:.4f}", flush=True)
    return losses


def accuracies(dataset: str, method: str, parts, args) -> dict:
    """Meta-train one method and evaluate it at both shots."""
    train_texts, test_texts, trunk, tokenizer, encoder = parts
    model = LastLayers(encoder, 2, 30.0).eval()
    judges, result = {}, {}
    if method == "none":
        judges["no training"] = lambda batch: class_means(model, batch)
    else:
        learner = build(method, model)
        batches = fm.data.Episodes(
            train_texts, tokenizer, ways=WAYS, shots=1, queries=QUERIES, tasks=4, seed=0, bucket=4,
            num_batches=args.steps,
        )  # fmt: skip
        start = time.perf_counter()
        result["losses"] = train(learner, map(trunk.of, batches), args.steps, 5e-5)
        result["train_seconds"] = time.perf_counter() - start
        learner.eval()
        for steps in (0, STEPS) if method == "hypernet" else (None,):
            given = {} if steps is None else {"steps": steps}

            def judge(batch, given=given):
                with torch.no_grad():
                    return learner(batch, **given).accuracy

            judges[method if steps is None else f"{method}, {steps} steps"] = judge
    for name, judge in judges.items():
        for shots in (1, 5):
            count = args.refined_episodes if f"{STEPS} steps" in name else args.episodes
            if not count:
                continue
            scores = evaluate(judge, trunk, test_texts, tokenizer, shots, count, seed=1000)
            mean, half = interval(scores)
            result[f"{name}, {shots}-shot"] = [mean, half, len(scores)]
            print(f"{dataset} {name} {shots}-shot: {mean:.2f} +- {half:.2f}", flush=True)
    return result


@torch.no_grad()
def features_of(model: LastLayers, trunk: Trunk) -> dict[tuple[int, ...], Tensor]:
    """The head's features of every text, shortest texts first so that little is padded."""
    keys, found = sorted(trunk.states, key=len), {}
    for i in range(0, len(keys), 64):
        chunk = keys[i : i + 64]
        states = torch.zeros(len(chunk), len(chunk[-1]), model.config.hidden_size)
        mask = torch.zeros(states.shape[:2], dtype=torch.int64)
        for j, key in enumerate(chunk):
            states[j, : len(key)], mask[j, : len(key)] = trunk.states[key], 1
        found |= dict(zip(chunk, model.embed(states, mask), strict=True))
    return found


class Linear(nn.Module):
    """A head at zero on features ``[B, D]``."""

    base_model_prefix = "body"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.classifier = nn.Linear(width, WAYS)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.classifier(self.body(features)))


def optimizers(dataset: str, _: str, parts, args) -> dict:
    """Query losses after K steps of a head, of SGD and Adam at tuned rates and of learned rules."""
    train_texts, test_texts, trunk, tokenizer, encoder = parts
    model = LastLayers(encoder, 2, 30.0).eval()

    features = features_of(model, trunk)

    def featured(batch: fm.TaskBatch) -> fm.TaskBatch:
        sets = []
        for s in (batch.support, batch.query):
            rows = zip(s["input_ids"].flatten(0, 1), s["attention_mask"].flatten(0, 1), strict=True)
            found = torch.stack([features[tuple(i[: int(m.sum())].tolist())] for i, m in rows])
            shape = s["labels"].shape
            sets.append({"features": found.unflatten(0, shape), "labels": s["labels"]})
        return fm.TaskBatch(*sets)

    def episodes(texts, shots: int, count: int, seed: int) -> list[fm.TaskBatch]:
        found = fm.data.Episodes(
            texts, tokenizer, ways=WAYS, shots=shots, queries=QUERIES, tasks=8, seed=seed, bucket=4,
            num_batches=math.ceil(count / 8),
        )  # fmt: skip
        return [featured(b) for b in found]

    patched = fm.patch(Linear(model.config.hidden_size), fm.Head())
    tasks = {s: episodes(train_texts, s, args.meta_tasks // 2, s) for s in (1, 5)}
    held_out = {s: episodes(test_texts, s, args.episodes, 1000) for s in (1, 5)}

    @torch.no_grad()
    def losses(rule, lr: float, batches) -> tuple[Tensor, Tensor]:
        judge = fm.MAML(patched, optimizer=rule, lr=lr, steps=STEPS, memory="unroll")
        outs = [judge(b) for b in batches]
        return torch.cat([o.task_losses for o in outs]), torch.cat([o.accuracy for o in outs])

    def tuned(name: str, rate: float, shots: int) -> float:
        found, _ = losses(name, rate, tasks[shots])
        return float(found.nan_to_num(math.inf).mean())

    rules: dict = {}
    for name in ("sgd", "adam"):
        for shots in (1, 5):
            best = min(GRID, key=lambda r: tuned(name, r, shots))
            rules[name, shots] = (name, best)
    for kind in ("lstm", "mlp"):
        rule = fm.LearnedOptimizer(kind, hidden=20, layers=1)
        learner = fm.MAML(patched, optimizer=rule, lr=0.03, steps=STEPS, order=1, memory="unroll")
        patched.model.requires_grad_(False)
        mixed = [b for pair in zip(tasks[1], tasks[5], strict=True) for b in pair]
        start = time.perf_counter()
        train(_RuleOnly(learner), mixed * args.epochs, len(mixed) * args.epochs, 0.0)
        print(f"{dataset} {kind}: meta-trained in {time.perf_counter() - start:.0f} s", flush=True)
        rules |= {(f"learned, {kind}", shots): (rule, 0.03) for shots in (1, 5)}
    result, found = {}, {}
    for (name, shots), (rule, lr) in rules.items():
        loss, scores = found[name, shots] = losses(rule, lr, held_out[shots])
        mean, half = (v / 100 for v in interval(loss))
        row = {"lr": lr, "query_loss": mean, "interval": half, "accuracy": interval(scores)[0]}
        if name.startswith("learned"):  # task by task against the better of both
            other = min([found[n, shots][0] for n in ("sgd", "adam")], key=torch.mean)
            row["difference"], row["its interval"] = (v / 100 for v in interval(loss - other))
        result[f"{name}, {shots}-shot"] = row
        print(f"{dataset} {name} {shots}-shot: {result[f'{name}, {shots}-shot']}", flush=True)
    return result


class _RuleOnly(nn.Module):
    """A learner of which the optimizer alone learns: the head starts at zero for all."""

    def __init__(self, learner: fm.MAML) -> None:
        super().__init__()
        self.learner = learner

    def named_parameters(self, *args, **kwargs):
        yield from ((f"optimizer.{n}", p) for n, p in self.learner.rule.named_parameters())

    def forward(self, batch: fm.TaskBatch):
        return self.learner(batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with clinc150/ and hwu64/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/trunk"))
    parser.add_argument("--datasets", nargs="+", default=["clinc", "hwu"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--refined-episodes", type=int, default=600, help="of hypernet's 5 steps")
    parser.add_argument("--meta-tasks", type=int, default=800, help="of optimizers")
    parser.add_argument("--epochs", type=int, default=3, help="of optimizers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for method in args.methods:
        for dataset in args.datasets:
            file = args.out / f"{dataset}-{method}.json"
            if file.is_file():
                continue
            torch.manual_seed(0)
            folder = Path(args.data, {"clinc": "clinc150", "hwu": "hwu64"}[dataset])
            load = {"clinc": fm.data.clinc, "hwu": fm.data.hwu}[dataset]
            texts = [load(folder, split=1, part=part) for part in ("train", "test")]
            encoder = AutoModel.from_pretrained(args.model, add_pooling_layer=False).eval()
            trunk = Trunk(encoder, 2, args.cache / f"{dataset}.safetensors")
            trunk.add([*texts[0].texts, *texts[1].texts], tokenizer)
            run = optimizers if method == "optimizers" else accuracies
            result = run(dataset, method, (*texts, trunk, tokenizer, encoder), args)
            file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
