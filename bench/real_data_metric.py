"""Metric-based few-shot intent classification with a real encoder, over five class splits.

    python -m bench.real_data_metric --model PATH --data PATH --out FILE

For every data set, split and method: meta-train on the training classes (one-shot and five-shot
batches in turn), then evaluate 600 5-way episodes of the test classes at both shots, beside the
nearest class mean without any training on the same episodes. Every finished run is written to
``--out`` at once and skipped by the next call, so an interrupted series goes on where it was.

As in `bench.real_data` the encoder's last two layers learn; the states below them are computed
once for every text and kept in ``--cache``. Evaluation embeds every test sentence once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

import fastmeta as fm
from bench.real_data import QUERIES, WAYS, Trunk, interval
from fastmeta._sampler import sample_episodes
from fastmeta.data.tokens import tokenize
from fastmeta.training.files import whole_file

SHOTS = (1, 5)
LAYERS = 2
FOLDERS = {"clinc": "clinc150", "hwu": "hwu64"}
EVALUATION_SEED = 1000  # the episodes of bench.real_data

Features = tuple[Tensor, Tensor]
"""Support ``[E, N, D]`` and query ``[E, Q, D]`` features of E episodes, rows sorted by class."""


class LastStates(nn.Module):
    """The last layers of a BERT encoder on stored states; its output has last_hidden_state."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.config = encoder.config
        self.config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(encoder.encoder.layer[-LAYERS:])

    def forward(self, states: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """``[B, L, D]`` to the same shape, worked off in four groups of similar length."""
        lengths = attention_mask.sum(1)
        out = []
        order = lengths.argsort()
        for rows in order.tensor_split(min(4, len(order))):
            length = int(lengths[rows[-1]])
            x, mask = states[rows, :length], attention_mask[rows, :length]
            additive = (1 - mask.to(x.dtype))[:, None, None, :] * -1e9
            for layer in self.layers:
                x = layer(x, additive)
            out.append(F.pad(x, (0, 0, 0, states.shape[1] - length)))
        return BaseModelOutput(last_hidden_state=torch.cat(out)[order.argsort()])


# -- methods -------------------------------------------------------------------------------------


def build(method: str, model: nn.Module, args: argparse.Namespace):
    """The learner of one method, on features of unit length."""
    unit = {"normalize": True}
    learned = {"temperature": "learned", "initial_temperature": args.temperature}
    if method == "protonet":
        return fm.ProtoNet(model, **unit, **learned)
    if method == "matchingnet":
        return fm.MatchingNet(model, **unit, **learned)
    if method == "relationnet":
        return fm.RelationNet(model, **unit)
    if method == "protomaml":
        inner = {"lr": args.inner_lr, "steps": args.inner_steps, "memory": "unroll"}
        return fm.ProtoMAML(model, ways=WAYS, **unit, **learned, **inner)
    raise ValueError(f"unknown method {method!r}")


def judge_of(learner) -> Callable[[Features], Tensor]:
    """Accuracy ``[E]`` of a metric method on features."""

    def judge(features: Features) -> Tensor:
        support, query = features
        if isinstance(learner, fm.ProtoMAML):
            head = learner.head.values(support, labels_of(support), WAYS)
            weight, bias = fm.ops.head_inner_loop(
                support, labels_of(support), *head, learner.rates.constant, learner.steps
            )
            logits = query @ weight.mT + bias.unsqueeze(1)
            return (logits.argmax(-1) == labels_of(query)).float().mean(1)
        state = learner.fit(support, labels_of(support), WAYS)
        predicted = learner.compare(state, query).argmax(-1)
        return (predicted == labels_of(query)).float().mean(1)

    return judge


def nearest_mean(features: Features) -> Tensor:
    """Accuracy ``[E]`` of the nearest class mean."""
    support, query = features
    means, _ = fm.ops.class_means(support, labels_of(support), WAYS)
    predicted = fm.ops.pairwise_distance(query, means).argmin(-1)
    return (predicted == labels_of(query)).float().mean(1)


def nearest_unit_mean(features: Features) -> Tensor:
    """The same on features of unit length."""
    return nearest_mean(tuple(F.normalize(f, dim=-1) for f in features))


class FeatureHead(nn.Module):
    """A linear classifier of stored features, starting at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, WAYS)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def select(texts: Texts, features: Tensor, episodes: int) -> dict[str, dict[str, dict]]:
    """How `fm.select_models` fares: linear heads of 9 candidates on features of norm 10."""
    features = 10 * F.normalize(features, dim=-1)
    patched = fm.patch(FeatureHead(features.shape[1]), fm.Params("classifier"))
    grid = fm.Candidate.grid(lr=[0.003, 0.03, 0.3], steps=20, seed=[0, 1, 2], noise=0.03)
    found: dict[str, dict] = {}
    for shots in SHOTS:
        scores: dict[str, list[Tensor]] = {}
        rows = texts.episodes(episodes, shots, EVALUATION_SEED)
        for s, q in zip(rows[0].split(50), rows[1].split(50), strict=True):
            support = {"x": features[s], "labels": labels_of(features[s])}
            query, labels = {"x": features[q]}, labels_of(features[q])
            for criterion in ("medoid", "farthest") + (("validation",) if shots > 1 else ()):
                out = fm.select_models(patched, support, grid, query=query, criterion=criterion)
                right = (out.predictions == labels).float().mean(1)
                scores.setdefault(criterion, []).append(right)
            each = (out.probabilities.argmax(-1) == labels.unsqueeze(1)).float().mean(2)
            scores.setdefault("a random candidate", []).append(each.mean(1))
            scores.setdefault("best single candidate in hindsight", []).append(each)
            ensemble = (out.ensemble.argmax(-1) == labels).float().mean(1)
            scores.setdefault("ensemble", []).append(ensemble)
        every = torch.cat(scores.pop("best single candidate in hindsight"))
        scores["best single candidate in hindsight"] = [every[:, every.mean(0).argmax()]]
        for name, parts in scores.items():
            mean, half = interval(torch.cat(parts))
            at = found.setdefault(name, {})
            at[f"{shots}-shot"] = {"accuracy": mean, "interval95": half}
    return found


def labels_of(features: Tensor) -> Tensor:
    each = features.shape[1] // WAYS
    return torch.arange(WAYS).repeat_interleave(each).expand(len(features), -1).contiguous()


# -- data ----------------------------------------------------------------------------------------


class Texts:
    """One part of a split: token ids and stored states of every text."""

    def __init__(self, data: fm.data.LabelledTexts, tokenizer, trunk: Trunk) -> None:
        self.data = data
        rows = tokenize(data, tokenizer, max_length=128).rows(range(len(data)))
        ids, mask = rows["input_ids"], rows["attention_mask"]
        self.states = [
            trunk.states[tuple(ids[i, : mask[i].sum()].tolist())] for i in range(len(data))
        ]
        self.lengths = torch.tensor([len(s) for s in self.states])

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Padded inputs ``[..., L, D]`` of the texts numbered `rows`."""
        flat = rows.flatten()
        length = int(self.lengths[flat].max())
        states = torch.zeros(len(flat), length, self.states[0].shape[1])
        mask = (torch.arange(length) < self.lengths[flat].unsqueeze(1)).long()
        for i, row in enumerate(flat.tolist()):
            states[i, : self.lengths[row]] = self.states[row]
        return {
            "states": states.view(*rows.shape, *states.shape[1:]),
            "attention_mask": mask.view(*rows.shape, length),
        }

    def episodes(self, count: int, shots: int, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Rows of support ``[E, N]`` and query ``[E, Q]``, sorted by class."""
        _, support, query = sample_episodes(
            self.data.starts, count, WAYS, shots, QUERIES, seed, first
        )
        return tuple(torch.from_numpy(r.reshape(count, -1)) for r in (support, query))

    def batch(self, tasks: int, shots: int, seed: int, first: int) -> fm.TaskBatch:
        rows = self.episodes(tasks, shots, seed, first)
        return fm.TaskBatch(*({**self.inputs(r), "labels": labels_of(r)} for r in rows))

    @torch.no_grad()
    def embed(self, embed: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Features ``[M, D]`` of every text."""
        order = self.lengths.argsort()
        found = [embed(self._one_task(rows))[0] for rows in order.split(256)]
        return torch.cat(found)[order.argsort()]

    def _one_task(self, rows: Tensor) -> dict[str, Tensor]:
        return self.inputs(rows.unsqueeze(0))


def evaluate(judge, texts: Texts, features: Tensor, episodes: int) -> dict[str, dict[str, float]]:
    """Accuracy and 95 % interval at every number of shots."""
    found = {}
    for shots in SHOTS:
        support, query = texts.episodes(episodes, shots, EVALUATION_SEED)
        scores = [
            judge((features[s], features[q]))
            for s, q in zip(support.split(100), query.split(100), strict=True)
        ]
        mean, half = interval(torch.cat(scores))
        found[f"{shots}-shot"] = {"accuracy": mean, "interval95": half}
    return found


# -- one run -------------------------------------------------------------------------------------


def train(learner, texts: Texts, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Meta-train; returns loss and accuracy of every step."""
    added = [p for n, p in learner.named_parameters() if n.startswith("metric.")]
    known = {id(p) for p in added}
    body = [p for p in learner.parameters() if id(p) not in known]
    groups = [{"params": body, "lr": args.outer_lr}]
    groups += [{"params": added, "lr": args.added_lr}] if added else []
    outer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        outer, lambda s: min(1.0, (s + 1) / 10) * (1 - s / args.steps)
    )
    history = []
    for step in tqdm(range(args.steps), mininterval=20):
        batch = texts.batch(args.tasks, SHOTS[step % 2], args.seed, step * args.tasks)
        out = learner(batch)
        outer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        outer.step()
        schedule.step()
        history.append((round(float(out.loss.detach()), 4), round(float(out.accuracy.mean()), 4)))
    return history


def one_run(method: str, encoder, train_texts: Texts, judged: Texts, args) -> dict:
    """Accuracies of one method, trained on one split's training classes."""
    torch.manual_seed(args.seed)
    model = LastStates(fresh(encoder)).eval()
    if method == "none":
        features = judged.embed(fm.ProtoNet(model).embed)
        return {
            "raw": evaluate(nearest_mean, judged, features, args.episodes),
            "unit length": evaluate(nearest_unit_mean, judged, features, args.episodes),
        }
    if method == "select":
        features = judged.embed(fm.ProtoNet(model).embed)
        return {"select": select(judged, features, args.episodes)}
    learner = build(method, model, args)
    start = time.perf_counter()
    history = train(learner, train_texts, args)
    seconds = time.perf_counter() - start
    learner.eval()
    start = time.perf_counter()
    with torch.no_grad():
        maml = isinstance(learner, fm.ProtoMAML)
        embed = learner.patched.model.embedding if maml else learner.embed
        features = judged.embed(embed)
        found: dict = evaluate(judge_of(learner), judged, features, args.episodes)
    found["train_seconds"] = round(seconds, 1)
    found["eval_seconds"] = round(time.perf_counter() - start, 1)
    found["history"] = history
    return found


def fresh(encoder: nn.Module) -> nn.Module:
    """The encoder with weights of its own, as they were loaded."""
    import copy

    return copy.deepcopy(encoder)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.is_file() else []


def write(path: Path, records: list[dict]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with clinc150/ and hwu64/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/trunk-metric"))
    parser.add_argument("--datasets", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--splits", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", default=["none", "protonet"])
    parser.add_argument("--part", choices=["test", "valid"], default="test")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--inner-lr", type=float, default=0.5, help="of protomaml")
    parser.add_argument("--inner-steps", type=int, default=5, help="of protomaml")
    parser.add_argument("--outer-lr", type=float, default=5e-5)
    parser.add_argument("--added-lr", type=float, default=1e-3)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = ("part", "steps", "tasks", "temperature", "outer_lr", "added_lr", "episodes", "seed")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = AutoModel.from_pretrained(args.model, add_pooling_layer=False).eval()
    for dataset in args.datasets:
        load = {"clinc": fm.data.clinc, "hwu": fm.data.hwu}[dataset]
        folder = Path(args.data, FOLDERS[dataset])
        trunk = Trunk(encoder, LAYERS, args.cache / f"{dataset}.safetensors")
        for split, method in itertools.product(args.splits, args.methods):
            key = {"dataset": dataset, "split": split, "method": method}
            key |= {k: getattr(args, k) for k in settings}
            if any(r.items() >= key.items() for r in read(args.out)):
                continue
            parts = [load(folder, split=split, part=p) for p in ("train", args.part)]
            trunk.add([t for p in parts for t in p.texts], tokenizer)
            texts = [Texts(p, tokenizer, trunk) for p in parts]
            record = key | one_run(method, encoder, *texts, args)
            record["peak_rss_gib"] = round(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
            )
            write(args.out, [*read(args.out), record])
            shown = {k: v for k, v in record.items() if k not in ("history", *settings)}
            print(json.dumps(shown), flush=True)
    print(table(read(args.out)), flush=True)


def table(records: list[dict]) -> str:
    """Mean over splits of accuracy and interval, a line per data set and method."""
    lines = []
    rows: dict[tuple[str, str], list[dict]] = {}
    for r in records:
        if r["method"] == "none":
            for name in ("raw", "unit length"):
                rows.setdefault((r["dataset"], f"no training, {name}"), []).append(r[name])
        elif r["method"] == "select":
            for name, scores in r["select"].items():
                rows.setdefault((r["dataset"], f"select: {name}"), []).append(scores)
        else:
            rows.setdefault((r["dataset"], r["method"]), []).append(r)
    for (dataset, method), found in sorted(rows.items()):
        cells = []
        for shots in SHOTS:
            if f"{shots}-shot" not in found[0]:
                continue
            scores = [f[f"{shots}-shot"]["accuracy"] for f in found]
            halves = [f[f"{shots}-shot"]["interval95"] for f in found]
            # of the mean of independent means
            half = math.sqrt(sum(h * h for h in halves)) / len(halves)
            cells.append(f"{shots}-shot {sum(scores) / len(scores):.2f} +- {half:.2f}")
        lines.append(f"{dataset:6} {method:36} {len(found)} splits  {'  '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
