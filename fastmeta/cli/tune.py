"""``fastmeta tune``: fine-tune one model for many customers at once."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastmeta as fm
from fastmeta.cli import INTERRUPTED
from fastmeta.cli import config as configs
from fastmeta.cli.build import Parts
from fastmeta.cli.errors import UserError, as_user_errors
from fastmeta.cli.signals import stopping
from fastmeta.cli.tune_kinds import KINDS, Classes, Texts, Words
from fastmeta.data import Minibatches
from fastmeta.training.errors import CheckpointError
from fastmeta.training.export import ABOUT, check_new, export_task, write_base
from fastmeta.training.files import check_writable, whole_file

SUMMARY = (
    "Fine-tune a model for many customers at once: a JSONL file of texts and labels of each, or of "
    "prompts and completions for a language model; a folder of adapted weights of each (PEFT's "
    "format where the spec has LoRA)."
)
KEYS = tuple(
    "model pooling pooling_scale spec dropout max_length text_key label_key task_chunk compile "
    "seed device dtype threads".split()
)
_STATE = "tuning.pt"
_FREE = ("device", "threads", "task_chunk", "compile")
"""Of the configuration, what may change when a run goes on."""
_OWN = (
    "loss",
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "optimizer",
    "clip_norm",
    "hold_out",
    "checkpoint",
)
"""Flags that are no keys of a configuration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL; its stem is the name")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder of all results")
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        help="start from what fastmeta train has learned [from --model, with a new head]",
    )
    parser.add_argument(
        "--loss",
        choices=sorted(KINDS, reverse=True),
        default="classification",
        help='lines {"text", "label"} [classification], or {"prompt", "completion"} or {"text"}',
    )
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of each's texts [3]")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of each [8]")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate at the start [1e-3]")
    parser.add_argument(
        "--schedule",
        choices=("linear", "constant"),
        default="linear",
        help="learning rate over each's steps: down to 0 [linear], or constant",
    )
    parser.add_argument(
        "--optimizer", choices=sorted(fm.rules.RULES), default="adamw", help="update rule [adamw]"
    )
    parser.add_argument("--clip-norm", type=float, help="bound on each's gradient norm")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, metavar="SHARE", help="of texts, to judge by [0]"
    )
    parser.add_argument(
        "--save-every", type=int, default=200, metavar="N", help="steps between states [200]"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what --out has begun")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    configs.add_flags(
        parser, KEYS, "model, texts and machine (--spec: [lora:r=8 + head], no head of words)"
    )


@dataclass
class Run:
    """One run of the command.

    Attributes:
        parts: Model and tokenizer.
        kind: What is fine-tuned.
        texts: Customer -> texts that train.
        held: Customer -> texts that judge, as `kind` takes them.
        batches, tuner: Of the customers in the order of `batches`.
        settings: What all of it depends on beside the texts.
        stopped: Whether somebody asked to stop.
    """

    parts: Parts
    kind: Classes | Words
    texts: dict[str, Texts]
    held: dict[str, list]
    batches: Minibatches
    tuner: fm.FineTuner
    settings: dict[str, Any]
    stopped: bool = field(default=False)

    def stop(self) -> None:
        self.stopped = True


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    check_writable(out if arguments.resume else check_new(out))
    if arguments.resume and not (out / _STATE).is_file():
        raise CheckpointError(f"{out} holds no state of an unfinished run to go on with")
    current = _prepare(arguments)
    if arguments.resume:
        _load(current, out)
    if not _train(current, out, arguments):
        print(
            f"fastmeta: stopped after {current.batches.position} of {len(current.batches)} steps; "
            "the same command with --resume goes on",
            file=sys.stderr,
        )
        return INTERRUPTED
    _finish(current, out)
    (out / _STATE).unlink(missing_ok=True)
    return 0


def _prepare(arguments: argparse.Namespace) -> Run:
    """Read everything and check it; nothing is written."""
    if arguments.save_every < 1:
        raise UserError(f"--save-every: expected at least 1, got {arguments.save_every}")
    given = configs.flag_values(arguments)
    kind = KINDS[arguments.loss]
    keys = configs.make_config(given)  # of the files; the run's own come with its checkpoint
    texts, held = {}, {}
    names = [Path(f).stem for f in arguments.files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"expected files of different stems, got {twice[0]!r} twice")
    for name, file in zip(names, arguments.files, strict=True):
        if name.startswith(".") or name.casefold() in ("base", _STATE):
            raise UserError(f"{file}: no customer can be called {name!r}; rename the file")
    for name, file in zip(names, arguments.files, strict=True):
        found = kind.read(file, keys)
        with as_user_errors("--hold-out: "):
            texts[name], held[name] = kind.hold_out(found, arguments.hold_out, keys.seed)
    parts = kind.parts(arguments, given, texts)
    config = parts.config
    parts.patched.train(config.dropout)
    torch.manual_seed(config.seed)  # of dropout
    with as_user_errors():
        batches = Minibatches(
            texts,
            parts.tokenizer,
            arguments.batch_size,
            epochs=arguments.epochs,
            seed=config.seed,
            max_length=config.max_length,
        )
        held = {n: kind.checked(n, t, parts, arguments.batch_size) for n, t in held.items()}
        tuner = fm.FineTuner(
            parts.patched,
            batches.names,
            lr=arguments.lr,
            optimizer=arguments.optimizer,
            loss_fn=kind.loss,
            clip_norm=arguments.clip_norm,
            ways=batches.ways,
            task_chunk=config.task_chunk,
            compute_dtype="bfloat16" if config.dtype == "bfloat16" else None,
            compile=config.compile,
        )
    settings = {k: v for k, v in config.to_dict().items() if k not in _FREE}
    settings |= {k: getattr(arguments, k) for k in _OWN}
    return Run(parts, kind, texts, held, batches, tuner, settings)


def _train(current: Run, out: Path, arguments: argparse.Namespace) -> bool:
    """All steps that are left; False where somebody asked to stop."""
    batches, tuner = current.batches, current.tuner
    if batches.position >= len(batches):
        return True  # only the folders were left to write
    device = current.parts.device
    totals = torch.tensor(batches.steps, device=device)
    bar = tqdm(
        total=len(batches),
        initial=batches.position,
        desc=f"{len(batches.names)} customers",
        unit="step",
        disable=arguments.quiet,
    )
    with bar, stopping(current.stop):
        for batch in batches:
            if arguments.schedule == "linear":
                tuner.lr = arguments.lr * (1 - tuner.steps / totals).clamp(min=0)
            losses = tuner.step(batch.to(device).inputs, batch.tasks)
            bar.update()
            if not arguments.quiet:
                bar.set_postfix(loss=f"{float(losses.nanmean()):.3f}", refresh=False)
            done = batches.position == len(batches)
            if current.stopped or done or batches.position % arguments.save_every == 0:
                _save(current, out)
            if current.stopped and not done:
                return False
    return True


def _save(current: Run, out: Path) -> None:
    state = {"tuner": current.tuner.state_dict(), "batches": current.batches.state_dict()}
    state |= {"settings": current.settings, "random": _random_state(current.parts.device)}
    with whole_file(out / _STATE) as temporary:
        torch.save(state, temporary)


def _load(current: Run, out: Path) -> None:
    file, device = out / _STATE, current.parts.device
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved = {"loss": "classification"} | state["settings"]  # older ones do not say
    except Exception as error:  # whatever a damaged file has to say
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    for key, value in current.settings.items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{file} is of a run with {key}={saved.get(key)!r}, got {value!r}: only "
                f"{', '.join(_FREE)} and save-every may change"
            )
    try:
        current.batches.load_state_dict(state["batches"])
        current.tuner.load_state_dict(state["tuner"])
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be gone on with: {error}") from None
    torch.set_rng_state(state["random"][0])
    if device.type == "cuda" and len(state["random"]) > 1:
        torch.cuda.set_rng_state(state["random"][1], device)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Of what dropout draws from."""
    own = [torch.cuda.get_rng_state(device).cpu()] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _finish(current: Run, out: Path) -> None:
    """A folder of each customer, and a table."""
    parts, tuner, kind = current.parts, current.tuner, current.kind
    base = _base(parts, kind, out)
    width = max(len("customer"), *map(len, tuner.names))
    columns, judged_by = kind.header
    print(f"{'customer':{width}}  {columns}  steps  {judged_by}")
    for place, name in enumerate(tuner.names):
        texts, held, params = current.texts[name], current.held[name], tuner.task(name)
        details = {"steps": int(tuner.steps[place]), "diverged": bool(tuner.diverged[place])}
        details |= kind.about(parts)
        judged = "none held out"
        if held:
            noted, judged = kind.judge(parts, tuner, name, texts, held)
            details |= noted
        if details["diverged"]:
            judged += "; diverged: its weights from before are kept"
        print(f"{name:{width}}  {kind.columns(texts)}  {details['steps']:5}  {judged}")
        if (out / name / ABOUT).is_file():  # of a run that ended while it wrote these
            shutil.rmtree(out / name)
        labels = kind.labels(texts)
        export_task(parts.patched, params, out / name, labels=labels, base=base, details=details)


def _base(parts: Parts, kind: Classes | Words, out: Path) -> str:
    """What all adapters are of: the model as it was named, or a copy where that lacks something."""
    if kind.named(parts):
        return parts.config.model
    write_base(parts.model, parts.tokenizer, out)
    return str(out / "base")
