"""What ``fastmeta tune`` fine-tunes: classifiers, or language models."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import fastmeta as fm
from fastmeta.batch import IGNORE_INDEX
from fastmeta.cli import checkpointed
from fastmeta.cli import config as configs
from fastmeta.cli.adapt import predict
from fastmeta.cli.build import Parts, build_parts
from fastmeta.cli.config import METRIC, Config
from fastmeta.cli.errors import UserError
from fastmeta.data import LabelledTexts, Minibatches, prompts_from_jsonl
from fastmeta.data.prompts import Prompted
from fastmeta.training.evaluation import evaluating

Texts = LabelledTexts | Sequence[str | Prompted]
_ROWS = 16
"""Held-out texts that a language model reads at once."""


class Classes:
    """Texts of classes: each customer has a head of their own.

    Attributes:
        loss: As `fm.FineTuner` calls it.
        header: Of the columns that tell a customer's texts apart, and of what is said of those
            that were held out.
    """

    loss = "classification"
    header = "classes  texts", "accuracy of held-out texts"

    def read(self, file: str, keys: Config, share: float) -> tuple[LabelledTexts, list]:
        """The texts to train on, and those held out."""
        found = fm.data.from_jsonl(file, text=keys.text_key, label=keys.label_key)
        return found.hold_out(share, seed=keys.seed)

    def parts(
        self, arguments: argparse.Namespace, given: dict[str, Any], texts: Mapping[str, Any]
    ) -> Parts:
        """The patched model: as it comes, or as meta-trained."""
        classes = max(len(t.classes) for t in texts.values())
        if arguments.checkpoint is None:
            spec = given.get("spec") or "lora:r=8 + head"
            return build_parts(configs.make_config(given, {"spec": spec, "ways": max(classes, 2)}))
        fixed = [key for key in ("pooling", "pooling_scale", "spec") if key in given]
        if fixed:
            raise UserError(f"{fixed[0]} comes with the checkpoint and cannot be given with it")
        parts = checkpointed.load(arguments)
        config = parts.config
        if parts.patched is None or config.method in (*METRIC, "protomaml", "hypernet"):
            raise UserError(f"a checkpoint of {config.method} has no initial weights to tune from")
        if classes > config.ways:
            raise UserError(
                f"the checkpoint was trained with ways={config.ways}, but a file has {classes} "
                "classes"
            )
        return parts

    def about(self, parts: Parts) -> dict[str, Any]:
        """What a folder says of its model."""
        return {k: getattr(parts.config, k) for k in ("ways", "pooling", "pooling_scale")}

    def labels(self, texts: LabelledTexts) -> list[str]:
        return list(texts.classes)

    def columns(self, texts: LabelledTexts) -> str:
        return f"{len(texts.classes):7}  {len(texts):5}"

    def judge(
        self, parts: Parts, params: fm.TaskParams, texts: LabelledTexts, held: list
    ) -> tuple[dict[str, Any], str]:
        """What is noted, and said, of texts that were held out."""
        rows = [{"text": text, "label": label} for text, label in held]
        found = predict(parts, params, rows, list(texts.classes))
        right = sum(row["predicted"] == row["label"] for row in found) / len(found)
        return {"held_out_accuracy": round(right, 6)}, f"{100 * right:.1f} % of {len(found)}"

    def named(self, parts: Parts) -> bool:
        """Whether the model as it was named holds all that does not adapt: not what it has learned,
        nor a new head that does not adapt."""
        named = not parts.config.model.startswith("builtin")
        head = {request.name for request in fm.Head().resolve(parts.model)}
        return (
            named
            and not parts.patched.shared_parameters()
            and head <= set(parts.patched.layout.names)
        )


class Words:
    """Texts of a language model, or prompts and what is to follow them; methods as of `Classes`."""

    loss = "causal_lm"
    header = "texts", "perplexity of held-out texts, before and after"

    def read(self, file: str, keys: Config, share: float) -> tuple[list, list]:
        texts = prompts_from_jsonl(file, text=keys.text_key or "text")
        if not 0 <= share < 1:
            raise ValueError(f"expected a share of at least 0 and below 1, got {share}")
        held = set(
            Random(f"hold out {keys.seed}").sample(range(len(texts)), int(share * len(texts)))
        )
        return (
            [text for i, text in enumerate(texts) if i not in held],
            [texts[i] for i in sorted(held)],
        )

    def parts(
        self, arguments: argparse.Namespace, given: dict[str, Any], texts: Mapping[str, Any]
    ) -> Parts:
        if arguments.checkpoint is not None:
            raise UserError("--checkpoint holds a classifier; --loss causal_lm takes a --model")
        fixed = [key for key in ("pooling", "pooling_scale", "label_key") if key in given]
        if fixed:
            raise UserError(f"{fixed[0]} is of classifiers and cannot be given with causal_lm")
        spec = given.get("spec") or "lora:r=8"
        return build_parts(configs.make_config(given, {"spec": spec}), words=True)

    def about(self, parts: Parts) -> dict[str, Any]:
        return {}

    def labels(self, texts: list) -> list[str]:
        return []

    def columns(self, texts: list) -> str:
        return f"{len(texts):5}"

    def judge(
        self, parts: Parts, params: fm.TaskParams, texts: list, held: list
    ) -> tuple[dict[str, Any], str]:
        before, after = (_loss(parts, p, held) for p in (parts.patched.init(1), params))
        noted = {"held_out_loss_before": round(before, 6), "held_out_loss": round(after, 6)}
        said = " -> ".join(f"{math.exp(min(loss, 700)):.4g}" for loss in (before, after))
        return noted, f"{said}, {len(held)} texts"

    def named(self, parts: Parts) -> bool:
        return True


def _loss(parts: Parts, params: fm.TaskParams, texts: list) -> float:
    """Mean loss of the words that count."""
    batches = Minibatches(
        {"held out": texts}, parts.tokenizer, _ROWS, max_length=parts.config.max_length, prefetch=0
    )
    total, count = 0.0, 0
    with evaluating(parts.patched):
        for batch in batches:
            inputs = batch.to(parts.device).inputs
            logits = parts.patched(params, **inputs).logits[:, :, :-1]
            labels = inputs["labels"][:, :, 1:]
            total += float(fm.ops.cross_entropy(logits.contiguous(), labels.contiguous()).sum())
            count += int((labels != IGNORE_INDEX).sum())
    return total / count


KINDS: dict[str, Classes | Words] = {kind.loss: kind for kind in (Classes(), Words())}
