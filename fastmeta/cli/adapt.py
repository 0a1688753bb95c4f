"""``fastmeta adapt``: adapt one task from labelled text and write its weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.cli import checkpointed
from fastmeta.cli.applies import why_not
from fastmeta.cli.build import Parts
from fastmeta.cli.config import METRIC
from fastmeta.cli.errors import UserError
from fastmeta.data import DataError, LabelledTexts
from fastmeta.data.readers import read_objects
from fastmeta.training.evaluation import evaluating
from fastmeta.training.export import check_new, export_state, export_task
from fastmeta.training.files import check_writable, whole_file

SUMMARY = "Adapt a checkpoint to one task from labelled JSONL; write its weights, predict."
KEYS = tuple(
    "model inner_steps refine_steps text_key label_key max_length device threads compile".split()
)
_COMPARISON = tuple(
    "metric metric_p precision temperature learn_temperature normalize projection full_context "
    "fce_steps relation_hidden relation_loss".split()
)
"""Keys that say how a written support set is compared with."""
_ROWS = 64  # texts predicted at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpointed.add_arguments(parser, KEYS)
    parser.add_argument(
        "--support", required=True, metavar="FILE", help="JSONL with a text and a label per line"
    )
    parser.add_argument(
        "--out",
        dest="folder",
        metavar="DIR",
        help="new folder for the adapted weights: PEFT's format where the spec has LoRA",
    )
    parser.add_argument(
        "--predict", metavar="FILE", help="JSONL with a text per line (a label is compared)"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="where predictions go as JSONL [standard output]"
    )


def run(arguments: argparse.Namespace) -> int:
    if not arguments.folder and not arguments.predict:
        raise UserError("expected --out DIR or --predict FILE, or both")
    if arguments.folder:
        check_writable(check_new(arguments.folder))
    if arguments.predictions:
        check_writable(Path(arguments.predictions).parent)
    parts = checkpointed.load(arguments)
    config = parts.config
    support = fm.data.from_jsonl(arguments.support, text=config.text_key, label=config.label_key)
    labels = _check_labels(support, arguments.support, config.ways)
    texts = _read_texts(arguments.predict, config.text_key, config.label_key, labels)
    params = adapt(parts, support)
    if arguments.folder:
        kind = _export(parts, params, arguments.folder, labels)
        print(
            f"{arguments.folder}: adapted weights of {len(labels)} classes ({kind})",
            file=sys.stderr,
        )
    if arguments.predict:
        _write_predictions(predict(parts, params, texts, labels), arguments.predictions)
    return 0


def _export(parts: Parts, params: fm.TaskParams, folder: str, labels: list[str]) -> str:
    config = parts.config
    details = {k: getattr(config, k) for k in ("method", "ways", "pooling", "pooling_scale")}
    own = {id(p) for p in parts.model.parameters()}
    if parts.patched is None or config.method in METRIC:
        state = parts.learner.state_dict(keep_vars=True)
        added = {n: t for n, t in state.items() if id(t) not in own}
        learned = len(added) < len(state)
        details |= {k: getattr(config, k) for k in _COMPARISON if why_not(config, k) is None}
        if config.learn_temperature:
            details.pop("temperature")  # it is among the tensors
        details |= {"pooling": config.pooling or "mean", "spec": config.spec}
        write, what = export_state, (parts.model, params, added)
    else:
        learned = bool(parts.patched.shared_parameters())
        write, what = export_task, (parts.patched, params)
    return write(
        *what,
        folder,
        labels=labels,
        base=None if learned or config.model.startswith("builtin") else config.model,
        tokenizer=parts.tokenizer,
        details=details,
    )


def adapt(parts: Parts, support: LabelledTexts) -> fm.TaskParams:
    """What the learner makes of one task's support set: fast weights or prototypes."""
    inputs = _inputs(parts, support.texts, parts.device)
    labels = torch.from_numpy(support.labels).to(parts.device)
    examples = {k: v.unsqueeze(0) for k, v in inputs.items()} | {"labels": labels.unsqueeze(0)}
    ways = torch.tensor([len(support.classes)], device=labels.device)
    with evaluating(parts.learner), parts.precision():
        out = parts.learner(fm.TaskBatch(examples, examples, ways))
    if bool(out.diverged[0]):
        raise UserError("the adaptation diverged: fewer --inner-steps may help")
    return out.params


def predict(
    parts: Parts, params: fm.TaskParams, texts: list[dict], labels: list[str]
) -> list[dict]:
    """The rows of `texts` with ``predicted`` and ``probability``."""
    rows = []
    metric = parts.patched is None or parts.config.method in METRIC
    run = parts.learner.predict if metric else lambda p, **x: parts.patched(p, **x).logits
    with evaluating(parts.learner), parts.precision():
        for begin in range(0, len(texts), _ROWS):
            chunk = texts[begin : begin + _ROWS]
            inputs = _inputs(parts, [row["text"] for row in chunk], parts.device)
            logits = run(params, **{k: v.unsqueeze(0) for k, v in inputs.items()})
            probabilities = logits[0, :, : len(labels)].float().softmax(-1)
            for row, p in zip(chunk, probabilities, strict=True):
                best = int(p.argmax())
                rows.append(
                    row | {"predicted": labels[best], "probability": round(float(p[best]), 6)}
                )
    return rows


def _inputs(parts: Parts, texts, device: torch.device) -> dict[str, Tensor]:
    tokens = fm.data.tokenize(list(texts), parts.tokenizer, max_length=parts.config.max_length)
    rows = tokens.rows(range(len(texts)))
    return {k: torch.from_numpy(v).to(device) for k, v in rows.items()}


def _check_labels(support: LabelledTexts, file: str, ways: int) -> list[str]:
    labels = list(support.classes)
    if not 2 <= len(labels) <= ways:
        raise UserError(
            f"{file}: expected 2 to {ways} classes, as the checkpoint was trained with "
            f"ways={ways}, got {len(labels)}"
        )
    return labels


def _read_texts(
    file: str | None, text_key: str | None, label_key: str, labels: list[str]
) -> list[dict]:
    """``text`` and, where given, ``label`` of every line."""
    rows = []
    for where, row in read_objects(Path(file)) if file else ():
        key = text_key or next((k for k in ("sentence", "text") if k in row), "text")
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: expected {key!r} to be a text, got {text!r}")
        rows.append({"text": text} | ({"label": str(row[label_key])} if label_key in row else {}))
    if file and not rows:
        raise DataError(f"{file}: expected lines of JSON, got an empty file")
    return rows


def _write_predictions(rows: list[dict], file: str | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file:
        with whole_file(Path(file)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    known = [row for row in rows if "label" in row]
    if known:
        right = sum(row["label"] == row["predicted"] for row in known)
        print(f"accuracy {100 * right / len(known):.2f} % of {len(known)}", file=sys.stderr)
