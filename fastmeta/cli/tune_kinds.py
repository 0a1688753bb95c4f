"""What ``fastmeta tune`` fine-tunes: classifiers, or language models."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import fastmeta as fm
from fastmeta.batch import IGNORE_INDEX
from fastmeta.cli import checkpointed
from fastmeta.cli import config as configs
from fastmeta.cli.adapt import predict
from fastmeta.cli.build import Parts, build_parts
from fastmeta.cli.config import METRIC, Config
from fastmeta.cli.errors import UserError
from fastmeta.data import LabelledTexts, Minibatch, Minibatches, hold_out, prompts_from_jsonl
from fastmeta.data.prompts import Prompted
from fastmeta.training.evaluation import evaluating
from fastmeta.training.export import names_all

Texts = LabelledTexts | Sequence[str | Prompted]
_LENGTH = 512
"""Tokens of a language model's texts, at most, unless told."""


class Classes:
    """Texts of classes: each customer has a head of their own.

    Attributes:
        loss: As `fm.FineTuner` calls it.
        header: Of the columns that tell a customer's texts apart, and of what is said of those
            that were held out.
    """

    loss = "classification"
    header = "classes  texts", "accuracy of held-out texts"

    def read(self, file: str, keys: Config) -> LabelledTexts:
        return fm.data.from_jsonl(file, text=keys.text_key, label=keys.label_key)

    def hold_out(self, texts: LabelledTexts, share: float, seed: int) -> tuple[LabelledTexts, list]:
        """The texts to train on, and those held out."""
        return texts.hold_out(share, seed=seed)

    def checked(self, name: str, held: list, parts: Parts, batch_size: int) -> list:
        """Texts held out, as :meth:`judge` takes them."""
        return held

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
        self, parts: Parts, tuner: fm.FineTuner, name: str, texts: LabelledTexts, held: list
    ) -> tuple[dict[str, Any], str]:
        """What is noted, and said, of a customer's texts that were held out."""
        rows = [{"text": text, "label": label} for text, label in held]
        found = predict(parts, tuner.task(name), rows, list(texts.classes))
        right = sum(row["predicted"] == row["label"] for row in found) / len(found)
        return {"held_out_accuracy": round(right, 6)}, f"{100 * right:.1f} % of {len(found)}"

    def named(self, parts: Parts) -> bool:
        """Whether the model as it was named holds all that does not adapt: not what it has learned,
        nor a new head that does not adapt, nor a pooling that it does not say."""
        named = not parts.config.model.startswith("builtin")
        head = {request.name for request in fm.Head().resolve(parts.model)}
        return (
            named
            and not parts.patched.shared_parameters()
            and head <= set(parts.patched.layout.names)
            and names_all(parts.model, parts.config.model)
        )


class Words:
    """Texts of a language model, or prompts and what is to follow them; methods as of `Classes`."""

    loss = "causal_lm"
    header = "texts", "perplexity of held-out texts, before and after"

    def read(self, file: str, keys: Config) -> list:
        return prompts_from_jsonl(file, text=keys.text_key or "text")

    def hold_out(self, texts: list, share: float, seed: int) -> tuple[list, list]:
        return hold_out(texts, share, seed=seed)

    def checked(self, name: str, held: list, parts: Parts, batch_size: int) -> list[Minibatch]:
        if not held:
            return []
        length = parts.config.max_length
        return list(Minibatches({name: held}, parts.tokenizer, batch_size, max_length=length))

    def parts(
        self, arguments: argparse.Namespace, given: dict[str, Any], texts: Mapping[str, Any]
    ) -> Parts:
        if arguments.checkpoint is not None:
            raise UserError("--checkpoint holds a classifier; --loss causal_lm takes a --model")
        fixed = [key for key in ("pooling", "pooling_scale", "label_key") if key in given]
        if fixed:
            raise UserError(f"{fixed[0]} is of classifiers and cannot be given with causal_lm")
        own = {"spec": given.get("spec") or "lora:r=8"}
        own["max_length"] = given.get("max_length", _LENGTH)
        parts = build_parts(configs.make_config(given, own), words=True)
        if not _is_causal(parts):
            raise UserError(
                f"model {parts.config.model!r} sees words that come later: it is no language model "
                "that continues texts"
            )
        return parts

    def about(self, parts: Parts) -> dict[str, Any]:
        return {}

    def labels(self, texts: list) -> list[str]:
        return []

    def columns(self, texts: list) -> str:
        return f"{len(texts):5}"

    def judge(
        self, parts: Parts, tuner: fm.FineTuner, name: str, texts: list, held: list[Minibatch]
    ) -> tuple[dict[str, Any], str]:
        same = {"loss_fn": self.loss, "compute_dtype": tuner.compute_dtype}
        untuned = fm.FineTuner(parts.patched, [name], lr=1.0, **same)
        with evaluating(parts.patched):
            before, after = (_loss(t, held, parts.device) for t in (untuned, tuner))
        noted = {"held_out_loss_before": round(before, 6), "held_out_loss": round(after, 6)}
        said = " -> ".join(f"{math.exp(min(loss, 700)):.4g}" for loss in (before, after))
        count = sum(batch.inputs["labels"].shape[1] for batch in held)
        return noted, f"{said}, {count} texts"

    def named(self, parts: Parts) -> bool:
        return True


def _loss(tuner: fm.FineTuner, batches: list[Minibatch], device: torch.device) -> float:
    """Mean loss of the words that count."""
    total, count = 0.0, 0
    for batch in batches:
        words = int((batch.inputs["labels"][:, :, 1:] != IGNORE_INDEX).sum())
        total += words * float(tuner.losses(batch.to(device).inputs, batch.tasks))
        count += words
    return total / count


def _is_causal(parts: Parts) -> bool:
    """Whether what a model says of a word does not depend on the one after it."""
    words = torch.zeros(2, 2, dtype=torch.int64, device=parts.device)
    words[1, 1] = 1
    with evaluating(parts.model):
        first = parts.model(input_ids=words).logits[:, 0]
    return torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-5)


KINDS: dict[str, Classes | Words] = {kind.loss: kind for kind in (Classes(), Words())}
