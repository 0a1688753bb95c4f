"""Few-shot intent classification with a real sentence encoder: accuracy, time and memory.

    python bench/real_data.py --model PATH --data PATH --dataset clinc --method maml --out FILE

Meta-trains on the training classes of one split, then evaluates 5-way 1-shot and 5-shot episodes
of its test classes. ``--method none`` is the baseline: nearest class mean of the frozen encoder's
mean-pooled states.

The outer loop learns the encoder's last two layers and the head; the layers below are frozen, so
their states are computed once for every text of the data set and kept in ``--cache``. The inner
loop adapts the last layer's feed-forward output and the head (ANIL: the head alone).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm

QUERIES, WAYS = 5, 5


class LastLayers(nn.Module):
    """The last layers of a BERT encoder, mean pooling and a linear head, on stored states.

    ``logits = W s e / |e| + b`` with e the mean of the token states. The head starts at zero.
    """

    base_model_prefix = "layers"

    def __init__(self, encoder: nn.Module, count: int, scale: float) -> None:
        super().__init__()
        self.config = encoder.config
        self.config.num_labels = WAYS
        self.config._attn_implementation = "eager"
        self.layers = nn.ModuleList(encoder.encoder.layer[-count:])
        self.classifier = nn.Linear(encoder.config.hidden_size, WAYS)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.scale = scale

    def embed(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, L, D]`` below the last layers -> features ``[B, D]`` of norm `scale`."""
        additive = (1 - attention_mask.to(states.dtype))[:, None, None, :] * -1e9
        for layer in self.layers:
            states = layer(states, additive)
        weight = attention_mask.to(states.dtype).unsqueeze(-1)
        pooled = (states * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1) * self.scale

    def forward(self, states: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.classifier(self.embed(states, attention_mask)))


class Trunk:
    """States below the last layers of every text, ``[L, D]`` each, computed once."""

    def __init__(self, encoder: nn.Module, count: int, path: Path) -> None:
        self.encoder, self.count, self.path = encoder, count, path
        self.states: dict[tuple[int, ...], Tensor] = {}
        if path.is_file():
            saved = load_file(path)
            ends = saved["lengths"].cumsum(0).tolist()
            for ids, states in zip(
                saved["ids"].tensor_split(ends[:-1]),
                saved["states"].tensor_split(ends[:-1]),
                strict=True,
            ):
                self.states[tuple(ids.tolist())] = states

    @torch.no_grad()
    def add(self, texts: list[str], tokenizer) -> None:
        """Compute what is not there yet, shortest texts first so that little is padded."""
        rows = sorted({tuple(r) for r in tokenizer(texts, truncation=True)["input_ids"]}, key=len)
        rows = [r for r in rows if r not in self.states]
        for i in tqdm(range(0, len(rows), 64), desc="frozen layers", mininterval=20):
            chunk = rows[i : i + 64]
            ids = torch.zeros(len(chunk), len(chunk[-1]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for j, r in enumerate(chunk):
                ids[j, : len(r)], mask[j, : len(r)] = torch.tensor(r), 1
            out = self.encoder(ids, mask, output_hidden_states=True)
            for j, r in enumerate(chunk):
                self.states[r] = out.hidden_states[-1 - self.count][j, : len(r)].clone()
        if rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keys = list(self.states)
            save_file(
                {
                    "lengths": torch.tensor([len(k) for k in keys]),
                    "ids": torch.tensor([t for k in keys for t in k]),
                    "states": torch.cat([self.states[k] for k in keys]),
                },
                self.path,
            )

    def of(self, batch: fm.TaskBatch) -> fm.TaskBatch:
        """The batch with stored states ``[T, N, L, D]`` in place of token ids."""
        return fm.TaskBatch(self._of(batch.support), self._of(batch.query))

    def _of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        states = torch.zeros(*ids.shape, self.encoder.config.hidden_size)
        for t, n in itertools.product(*map(range, ids.shape[:2])):
            key = tuple(ids[t, n, : int(mask[t, n].sum())].tolist())
            states[t, n, : len(key)] = self.states[key]
        return {"states": states, "attention_mask": mask, "labels": batch["labels"]}


def build(method: str, model: LastLayers, args: argparse.Namespace):
    """The learner of one method."""
    spec = fm.Params("layers.1.output.*") + fm.Head()
    common = {"lr": args.lr, "steps": args.inner_steps, "memory": "unroll"}
    if method == "maml":
        return fm.MAML(fm.patch(model, spec), order=2, **common)
    if method == "fomaml":
        return fm.MAML(fm.patch(model, spec), order=1, **common)
    if method == "anil":
        return fm.ANIL(fm.patch(model, fm.Head()), **common)
    if method == "metasgd":
        return fm.MetaSGD(fm.patch(model, spec), **common)
    if method == "reptile":  # learns only what it adapts: all of it
        return fm.Reptile(fm.patch(model, fm.Params("*")), **common)
    raise ValueError(f"unknown method {method!r}")


def interval(scores: torch.Tensor) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval, in per cent."""
    half = 1.96 * float(scores.std()) / math.sqrt(len(scores))
    return 100 * float(scores.mean()), 100 * half


@torch.no_grad()
def class_means(model: LastLayers, batch: fm.TaskBatch) -> torch.Tensor:
    """Accuracy ``[T]`` of the nearest class mean, by cosine, with no training."""
    tasks = batch.num_tasks
    sets = []
    for s in (batch.support, batch.query):
        inputs = {k: v.flatten(0, 1) for k, v in s.items() if k != "labels"}
        sets.append(
            F.normalize(model.embed(**inputs), dim=-1).view(tasks, -1, model.config.hidden_size)
        )
    one_hot = F.one_hot(batch.support["labels"], WAYS).to(sets[0].dtype)
    means = F.normalize(one_hot.transpose(1, 2) @ sets[0], dim=-1)
    predicted = (sets[1] @ means.transpose(1, 2)).argmax(-1)
    return (predicted == batch.query["labels"]).float().mean(1)


def evaluate(judge, trunk, data, tokenizer, shots: int, episodes: int, seed: int) -> torch.Tensor:
    """Accuracy of every episode ``[E]``."""
    tasks = 4  # few, so that little is padded
    batches = fm.data.Episodes(
        data, tokenizer, ways=WAYS, shots=shots, queries=QUERIES, tasks=tasks, seed=seed, bucket=4,
        num_batches=episodes // tasks,
    )  # fmt: skip
    bar = tqdm(batches, desc=f"{shots}-shot", total=episodes // tasks, mininterval=20)
    return torch.cat([judge(trunk.of(b)) for b in bar])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with clinc150/ and hwu64/")
    parser.add_argument("--dataset", choices=["clinc", "hwu"], default="clinc")
    parser.add_argument("--method", default="maml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/trunk"))
    parser.add_argument("--steps", type=int, default=60)
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
    encoder = AutoModel.from_pretrained(args.model, add_pooling_layer=False).eval()
    folder = Path(args.data, {"clinc": "clinc150", "hwu": "hwu64"}[args.dataset])
    load = {"clinc": fm.data.clinc, "hwu": fm.data.hwu}[args.dataset]
    train, test = (load(folder, split=1, part=part) for part in ("train", "test"))
    trunk = Trunk(encoder, 2, args.cache / f"{args.dataset}.safetensors")
    trunk.add([*train.texts, *test.texts], tokenizer)
    model = LastLayers(encoder, 2, args.scale).eval()

    result: dict = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result["torch"] = torch.__version__
    if args.method == "none":
        judge = lambda batch: class_means(model, batch)  # noqa: E731
    else:
        learner = build(args.method, model, args)
        outer_lr = args.outer_lr
        groups = [
            {"params": list(learner.patched.parameters())},
            {"params": list(learner.rates.parameters()), "lr": 20 * outer_lr},
        ]
        outer = torch.optim.Adam([g for g in groups if g["params"]], lr=outer_lr)
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
            out = learner(trunk.of(batch))
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
        scores = evaluate(
            judge, trunk, test, tokenizer, shots, args.episodes, seed=1000 + args.seed
        )
        mean, half = interval(scores)
        result[f"{shots}-shot"] = {"accuracy": mean, "interval95": half, "episodes": len(scores)}
        print(f"{args.dataset} {args.method} {shots}-shot: {mean:.2f} +- {half:.2f}", flush=True)
    result["eval_seconds"] = time.perf_counter() - start
    result["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
