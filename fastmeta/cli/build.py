"""From a configuration to objects: model, learner, optimizer, trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastmeta as fm
from fastmeta.cli.config import METRIC, Config
from fastmeta.cli.data import build_episodes
from fastmeta.cli.errors import UserError, as_user_errors
from fastmeta.cli.specs import options, parse_spec
from fastmeta.training import Trainer
from fastmeta.training.export import quiet_transformers

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass
class Parts:
    """What a configuration describes."""

    config: Config
    model: nn.Module
    tokenizer: Any
    patched: fm.Patched | None
    learner: nn.Module

    @property
    def device(self) -> torch.device:
        return self.learner.device

    def precision(self) -> AbstractContextManager:
        """Within, models compute as they do in training."""
        if self.config.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def build_parts(config: Config, *, words: bool = False) -> Parts:
    """Load the model, patch it and make the learner; of a language model the patched model itself.

    Args:
        words: A language model, not a classifier.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    spec = None if config.spec is None else parse_spec(config.spec)
    model, tokenizer = load_model(config, words)
    model.to(device=device, dtype=_DTYPES[config.dtype])
    model.requires_grad_(config.train == "all")
    model.train(config.dropout)
    with as_user_errors():
        patched = None if spec is None else fm.patch(model, spec, seed=config.seed)
        learner = patched if words else _learner(config, model if patched is None else patched)
    return Parts(config, model, tokenizer, patched, learner)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason})") from None
    return device


# -- model ---------------------------------------------------------------------------------------


def load_model(config: Config, words: bool = False) -> tuple[nn.Module, Any]:
    """Return the classifier with one output per way, or a language model; and its tokenizer."""
    with _seeded(config.seed):  # a new head's weights
        if config.model == "builtin" or config.model.startswith("builtin:"):
            if words:
                raise UserError("model: none that is built in is a language model; give --model")
            return _builtin_model(config)
        with quiet_transformers():
            return _pretrained(config, words)


def _builtin_model(config: Config) -> tuple[nn.Module, Any]:
    given = options(config.model.partition(":")[2], ("hidden", "layers", "dropout"), "model")
    names = {"hidden": ("hidden_size", int), "layers": ("num_layers", int)}
    names["dropout"] = ("dropout", float)
    with as_user_errors("model: "):
        sizes = {names[k][0]: names[k][1](v) for k, v in given.items()}
        model, tokenizer = fm.data.tiny_bert(config.ways, seed=config.seed, **sizes)
        if config.pooling == "mean" and config.spec is not None:
            from fastmeta.models import SentenceClassifier

            return SentenceClassifier(model.bert, config.ways, config.pooling_scale), tokenizer
    return model, tokenizer


def _pretrained(config: Config, words: bool) -> tuple[nn.Module, Any]:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    name, dtype = config.model, _DTYPES[config.dtype]
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"model {name!r}: no such folder")
    source = str(path) if path.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: nn.Module
        if words:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        elif config.spec is None or config.method in METRIC:  # features, no head
            from fastmeta.models import load_encoder

            model = load_encoder(source, dtype=dtype)
        elif config.pooling == "mean":
            from fastmeta.models import SentenceClassifier

            model = SentenceClassifier.from_pretrained(
                source, config.ways, config.pooling_scale, dtype=dtype
            )
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=config.ways, dtype=dtype, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise UserError(f"model {name!r} cannot be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model {name!r}: its tokenizer has no padding token and no end token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from torch's generator as seeded, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# -- learner -------------------------------------------------------------------------------------


def _learner(config: Config, model: fm.Patched | nn.Module) -> nn.Module:
    """The learner, on a patched model, or where there is no spec on the model itself."""
    if config.method in METRIC:
        return _metric_learner(config, model)
    lr: float | fm.LearnedRate = config.inner_lr
    if config.learn_lr is not None:
        axes = () if config.learn_lr == "global" else tuple(config.learn_lr.split("+"))
        if "task" in axes:
            raise UserError("learn_lr: expected global, layer, param or step, got 'task'")
        lr = fm.LearnedRate(per=axes, init=config.inner_lr)
    settings: dict[str, Any] = {
        "lr": lr,
        "steps": config.inner_steps,
        "order": config.order,
        "optimizer": _inner_rule(config),
        "memory": config.memory,
        "task_chunk": config.task_chunk,
        "clip_norm": config.inner_clip,
        "truncate": config.truncate,
        "memory_budget": config.memory_budget,
        "compile": config.compile,
    }
    if config.method == "imaml":
        settings |= {"lam": config.lam, "cg_steps": config.cg_steps}
        settings = {k: v for k, v in settings.items() if k not in ("order", "truncate")}
    if config.method == "protomaml":
        settings |= _temperature(config)
        if not isinstance(model, fm.Patched):
            settings |= {"ways": config.ways} | _features(config)
    if config.inner_optimizer == "learned":
        settings["optimizer"] = fm.LearnedOptimizer(
            config.learned_kind,
            hidden=config.learned_hidden,
            layers=config.learned_layers,
            seed=config.seed,
        ).to(model.device)
    if config.method == "lstmmeta":
        return _lstm_meta_learner(config, model, settings)
    if config.method == "learnedopt":
        return _unrolled(config, fm.MAML(model, **settings))
    if config.method == "hypernet":
        return fm.HyperNetwork(
            model,
            train_encoder=config.train_encoder,
            latent=config.hyper_latent,
            hidden=config.hyper_hidden,
            seed=config.seed,
            **settings | {"steps": config.refine_steps},
        )
    methods = {"maml": fm.MAML, "fomaml": fm.MAML, "anil": fm.ANIL, "reptile": fm.Reptile}
    methods |= {"metasgd": fm.MetaSGD, "imaml": fm.IMAML, "protomaml": fm.ProtoMAML}
    return methods[config.method](model, **settings)


def _lstm_meta_learner(config: Config, model: fm.Patched, settings: dict) -> fm.LSTMMetaLearner:
    """Its input gate starts at the inner rate; a learned rate is a factor that starts at 1."""
    lr, _ = settings.pop("lr"), settings.pop("optimizer")
    lr = fm.LearnedRate(per=lr.per, init=1.0) if isinstance(lr, fm.LearnedRate) else 1.0
    hidden = config.learned_hidden or 20
    return fm.LSTMMetaLearner(
        model, hidden=hidden, rate=config.inner_lr, lr=lr, seed=config.seed, **settings
    )


def _unrolled(config: Config, learner: fm.MAML) -> nn.Module:
    window = {"horizon": config.horizon, "truncation": config.truncation}
    if config.unroll == "truncated":
        return fm.TruncatedUnroll(learner, **window)
    if config.unroll == "pes":
        draws = {"pairs": config.pes_pairs, "std": config.pes_std, "seed": config.seed}
        return fm.PES(learner, **window, **draws)
    return learner


def _inner_rule(config: Config) -> str | fm.rules.UpdateRule:
    if config.inner_weight_decay is None:
        return config.inner_optimizer
    if config.inner_optimizer == "learned":
        raise UserError("inner_weight_decay: a learned optimizer has none")
    return fm.rules.RULES[config.inner_optimizer](weight_decay=config.inner_weight_decay)


def _metric_learner(config: Config, model: fm.Patched | nn.Module) -> nn.Module:
    settings = _features(config)
    if config.method == "relationnet":
        return fm.RelationNet(
            model, hidden=config.relation_hidden, loss=config.relation_loss, **settings
        )
    settings |= _temperature(config) | {
        "metric": config.metric,
        "p": config.metric_p,
        "precision": config.precision,
    }
    if config.method == "protonet":
        return fm.ProtoNet(model, **settings)
    return fm.MatchingNet(
        model, full_context=config.full_context, fce_steps=config.fce_steps, **settings
    )


def _features(config: Config) -> dict[str, Any]:
    settings = {k: getattr(config, k) for k in ("normalize", "projection", "seed")}
    return settings | {"pooling": config.pooling or "mean"}


def _temperature(config: Config) -> dict[str, Any]:
    if config.learn_temperature:
        return {"temperature": "learned", "initial_temperature": config.temperature}
    return {"temperature": config.temperature}


# -- outer loop ----------------------------------------------------------------------------------


def build_trainer(config: Config, parts: Parts, *, progress: bool = True) -> Trainer:
    """Put the training run together; nothing is written yet."""
    outer = _outer(config, parts.learner)
    valid = build_episodes(config, parts.tokenizer, "valid") if config.eval_every else None
    episodes = build_episodes(config, parts.tokenizer, "train")
    with as_user_errors():
        return Trainer(
            parts.learner,
            episodes,
            outer,
            schedule=_schedule(config, outer),
            clip_norm=config.outer_clip,
            autocast=torch.bfloat16 if config.dtype == "bfloat16" else None,
            valid=valid,
            eval_every=config.eval_every,
            eval_episodes=config.eval_episodes,
            out=config.out,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            config=config.to_dict(),
            progress=progress,
        )


def _outer(config: Config, learner: nn.Module) -> torch.optim.Optimizer:
    rates, values = [], []
    for name, parameter in learner.named_parameters():
        added = name.startswith(("inner_lr.", "metric.", "optimizer.", "hypernet."))
        (rates if added else values).append(parameter)
    if not rates and not values:
        raise UserError(
            f"nothing would learn: with train={config.train} and no spec, {config.method} has no "
            "parameters of its own; use train=all, or a spec"
        )
    groups: list[dict[str, Any]] = []
    if values:
        groups.append({"params": values, "weight_decay": config.weight_decay})
    if rates:
        lr = config.rates_lr or config.outer_lr
        groups.append({"params": rates, "lr": lr, "weight_decay": 0.0})
    if config.outer == "sgd":
        return torch.optim.SGD(groups, lr=config.outer_lr, momentum=config.momentum)
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.outer]
    return make(groups, lr=config.outer_lr)


def _schedule(
    config: Config, outer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if config.schedule == "constant" and not config.warmup:
        return None

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        done = min(done, 1.0)
        return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(outer, factor)
