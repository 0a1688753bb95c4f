"""A run's configuration: one flat table of keys, from a YAML file and flags."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fastmeta._names import near
from fastmeta.algorithms.comparison import PRECISIONS
from fastmeta.algorithms.embedding import POOLINGS
from fastmeta.algorithms.relationnet import LOSSES
from fastmeta.cli.errors import UserError
from fastmeta.engine.capture import HOW
from fastmeta.engine.learned import KINDS
from fastmeta.engine.replays import CUDA_GRAPH
from fastmeta.ops.pairwise import METRICS

GRADIENT = ("maml", "fomaml", "anil", "reptile", "metasgd", "imaml", "lstmmeta", "learnedopt")
METRIC = ("protonet", "matchingnet", "relationnet")
METHODS = (*GRADIENT, *METRIC, "protomaml", "hypernet")


def _key(
    default: Any, help: str, *, choices: tuple = (), least: float | None = None, above=None
) -> Any:
    """A configuration key: `least` is the smallest value allowed, `above` a bound not allowed."""
    checks = {"help": help, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata=checks)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; see `fastmeta train --help`."""

    # model
    model: str = _key("builtin", "builtin, builtin:hidden=128,layers=2, a folder or a hub name")
    pooling: str | None = _key(
        None,
        "null: the model's own classification head; mean: mean-pooled token states under a "
        "linear head, for sentence encoders; metric methods and protomaml: the features, also cls "
        "or last, default mean",
        choices=POOLINGS,
    )
    pooling_scale: float = _key(30.0, "norm of the pooled features (with pooling: mean)", above=0)
    train: str | None = _key(
        None,
        "what the outer loop trains: adapted (the rest is frozen) or all; default: all for anil "
        "and for methods without a spec, else adapted",
        choices=("adapted", "all"),
    )
    dropout: bool = _key(False, "whether the model's own dropout is on while training")
    # data
    data: str = _key(
        "builtin",
        "builtin, a folder as of CLINC150/HWU64, a JSONL file or a hub name; the classes of the "
        "last two are split 60 : 20 : 20 at random, unless valid or test is given",
    )
    split: int = _key(1, "class split of a folder's splits/", least=1)
    valid: str | None = _key(None, "JSONL file of validation classes; default: those of data")
    test: str | None = _key(None, "JSONL file of test classes; default: those of data")
    text_key: str | None = _key(None, "key or column of the text; default: text or sentence")
    label_key: str = _key("label", "key or column of the label")
    max_length: int = _key(128, "longest text in tokens", least=1)
    ways: int = _key(5, "classes per task", least=2)
    shots: int = _key(1, "support texts per class", least=1)
    queries: int = _key(5, "query texts per class", least=1)
    tasks: int = _key(16, "tasks per outer step", least=1)
    # method
    method: str = _key("maml", "algorithm", choices=METHODS)
    spec: str | None = _key(
        None,
        "what a task may change: all, head, bias, norm, prefix:length=16, params:GLOB+GLOB, "
        "lora:r=8,alpha=16,targets=query+value, joined by ' + ' (or a YAML list); default: head "
        "for anil, lora:r=4 + head for hypernet, none for protomaml (a new head on the pooled "
        "features adapts) and for metric methods (where it says what learns), else all",
    )
    inner_steps: int = _key(5, "inner steps K", least=1)
    inner_lr: float = _key(0.05, "inner learning rate, or its initial value", above=0)
    learn_lr: str | None = _key(
        None, "learn the inner rate: global, or any of layer, param, step joined by '+'"
    )
    inner_optimizer: str = _key(
        "sgd",
        "inner update rule",
        choices=("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "learned"),
    )
    inner_weight_decay: float | None = _key(
        None, "weight decay of the inner update rule; default: the rule's own", least=0
    )
    inner_clip: float | None = _key(None, "bound on each task's inner gradient norm", above=0)
    order: int | None = _key(
        None,
        "1 or 2; default: 1 for fomaml, reptile, lstmmeta and learnedopt, else 2",
        choices=(1, 2),
    )
    memory: str = _key("auto", "memory mode", choices=("auto", "unroll", "recompute"))
    task_chunk: int | str | None = _key(
        None, "tasks differentiated at once: null (all), a number, or auto"
    )
    memory_budget: int | str | None = _key(
        None, "memory of an outer step beyond the model: bytes or a text such as 8GiB"
    )
    compile: bool | str = _key(
        False,
        "capture inner steps as graphs: true, trace or inductor; cudagraph: whole outer steps "
        "(gradient-based methods)",
        choices=(False, True, *HOW, CUDA_GRAPH),
    )
    truncate: int | None = _key(None, "differentiate the last this many inner steps", least=0)
    lam: float = _key(1.0, "imaml: strength of the pull to the initial values", above=0)
    cg_steps: int = _key(5, "imaml: iterations of conjugate gradients", least=1)
    # learned optimizers: inner_optimizer=learned, which method learnedopt implies, and lstmmeta
    learned_kind: str = _key("lstm", "network of the learned optimizer", choices=KINDS)
    learned_hidden: int | None = _key(None, "its width; default: 20, or 32 for mlp", least=1)
    learned_layers: int = _key(2, "its layers (lstmmeta has one)", least=1)
    unroll: str = _key(
        "whole",
        "learnedopt: differentiate all inner steps, windows of a longer unroll, or none (pes)",
        choices=("whole", "truncated", "pes"),
    )
    horizon: int = _key(100, "inner steps of a task with unroll: truncated or pes", least=1)
    truncation: int = _key(10, "inner steps of a window", least=1)
    pes_pairs: int = _key(4, "pes: pairs of particles", least=1)
    pes_std: float = _key(0.01, "pes: deviation of the draws", above=0)
    # hypernet
    refine_steps: int = _key(0, "hypernet: inner steps from the generated weights", least=0)
    hyper_latent: int = _key(64, "hypernet: length of a task's vector", least=1)
    hyper_hidden: int = _key(128, "hypernet: width of its networks", least=1)
    train_encoder: bool = _key(False, "hypernet: whether gradients flow through its encoder")
    # metric methods, and protomaml without a spec
    metric: str | None = _key(
        None, "distance; default: cosine for matchingnet, else sqeuclidean", choices=METRICS
    )
    metric_p: float | None = _key(None, "order of minkowski", above=0)
    precision: str = _key("diagonal", "form of mahalanobis' learned precision", choices=PRECISIONS)
    temperature: float = _key(1.0, "of the logits, or its initial value", above=0)
    learn_temperature: bool = _key(False, "whether the outer loop learns the temperature")
    normalize: bool = _key(False, "whether features are divided by their length")
    projection: int | None = _key(None, "outputs of a linear layer on the features", least=1)
    full_context: bool = _key(False, "matchingnet: features depend on the whole support set")
    fce_steps: int = _key(5, "matchingnet: steps of the query's LSTM over the support set", least=1)
    relation_hidden: int = _key(128, "relationnet: width of its hidden layer", least=1)
    relation_loss: str = _key("cross_entropy", "relationnet: loss", choices=LOSSES)
    # outer loop
    steps: int = _key(1000, "outer steps", least=1)
    outer: str = _key("adamw", "outer optimizer", choices=("adamw", "adam", "sgd"))
    outer_lr: float = _key(1e-3, "outer learning rate", above=0)
    rates_lr: float | None = _key(
        None, "outer rate of what the method itself adds: rates, metrics, networks", above=0
    )
    weight_decay: float = _key(0.0, "outer weight decay, not on those", least=0)
    momentum: float = _key(0.0, "momentum of outer sgd", least=0)
    outer_clip: float | None = _key(None, "bound on the norm of the meta-gradient", above=0)
    schedule: str = _key(
        "constant", "outer rate over the steps", choices=("constant", "linear", "cosine")
    )
    warmup: int = _key(0, "outer steps over which the rate rises linearly", least=0)
    # run
    eval_every: int = _key(0, "evaluate on validation classes every n steps; 0: never", least=0)
    eval_episodes: int = _key(200, "episodes per evaluation", least=1)
    checkpoint_every: int = _key(100, "write a checkpoint every n steps; 0: at the end", least=0)
    keep: int = _key(3, "checkpoints kept", least=1)
    seed: int = _key(0, "of new weights, episodes and dropout", least=0)
    device: str = _key("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = _key(
        "float32",
        "float32, float64, or bfloat16 (computes in bfloat16, weights and updates in float32)",
        choices=("float32", "float64", "bfloat16"),
    )
    threads: int | None = _key(None, "CPU threads; default: torch's", least=1)
    out: str = _key("fastmeta-run", "folder of the run")

    def resolved(self) -> Config:
        """The configuration with every default that depends on the method filled in."""
        anil = self.method == "anil"
        first = self.method in ("fomaml", "reptile")
        learned = self.method == "learnedopt"
        hyper = self.method == "hypernet"
        pooled = self.method in METRIC or self.method == "protomaml"
        if first and self.order == 2:
            raise UserError(f"{self.method} is first-order: expected order 1, got 2")
        if self.pooling not in (None, "mean") and not pooled:
            raise UserError(
                f"pooling: expected null or mean for {self.method}, got {self.pooling!r}"
            )
        if self.unroll != "whole" and not learned:
            raise UserError(f"unroll: expected whole for {self.method}, got {self.unroll!r}")
        if learned and self.inner_optimizer not in ("sgd", "learned"):  # sgd is the default
            raise UserError(
                f"inner_optimizer: expected learned for learnedopt, got {self.inner_optimizer!r}"
            )
        if self.inner_optimizer == "learned" and (hyper or self.method == "lstmmeta"):
            raise UserError(f"inner_optimizer: expected another for {self.method}, got 'learned'")
        default = "head" if anil else None if pooled else "lora:r=4 + head" if hyper else "all"
        spec = self.spec or default
        return replace(
            self,
            train=self.train or ("all" if anil or spec is None else "adapted"),
            spec=spec,
            order=self.order or (1 if first or learned or self.method == "lstmmeta" else 2),
            inner_optimizer="learned" if learned else self.inner_optimizer,
            pooling=self.pooling or ("mean" if hyper else None),
            metric=self.metric or ("cosine" if self.method == "matchingnet" else "sqeuclidean"),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


KEYS: dict[str, Field] = {f.name: f for f in fields(Config)}
_TYPES = get_type_hints(Config)

_WHERE_AND_HOW_LONG = "steps eval_every eval_episodes checkpoint_every keep out"
_HOW = "device threads memory task_chunk memory_budget compile"
FREE = frozenset(f"{_WHERE_AND_HOW_LONG} {_HOW}".split())
"""Keys that may change when a run is resumed: they change a step by rounding at most."""


def make_config(*tables: Mapping[str, Any]) -> Config:
    """Make a configuration from tables of keys; later tables win.

    Raises:
        UserError: An unknown key (with near matches), or a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            values[key] = _checked(key, value)
    return Config(**values).resolved()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file of a run.

    Raises:
        UserError: The file cannot be read, is no YAML table (names the line), or has keys or values
            that a run does not know.
    """
    table = read_table(path)
    try:
        for key, value in table.items():
            _checked(key, value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return table


def read_table(path: str | Path) -> dict[str, Any]:
    """Read a YAML table.

    Raises:
        UserError: The file cannot be read, or is no YAML table (names the line).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: malformed YAML ({problem})") from None
    if not isinstance(table, dict):
        got = "an empty file" if table is None else type(table).__name__
        raise UserError(f"{path}: expected a table of 'key: value' lines, got {got}")
    return table


def parse_value(text: str) -> Any:
    """What a flag gives, as YAML reads it; ``none`` is null, too."""
    if text in ("null", "none"):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def write_yaml(config: Config, path: Path) -> None:
    """Write the configuration as a file that `read_yaml` takes."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def add_flags(
    parser: argparse.ArgumentParser,
    keys: Iterable[str] = (),
    title: str = "configuration (also the keys of --config FILE)",
) -> None:
    """Give `parser` one flag per key (all, or `keys`); what was not given stays absent."""
    group = parser.add_argument_group(title)
    for name in keys or KEYS:
        key = KEYS[name]
        default = "" if keys or key.default is None else f" [{key.default}]"
        choices = f" ({', '.join(map(str, key.metadata['choices']))})"
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"key_{name}",
            default=argparse.SUPPRESS,
            metavar="X",
            help=key.metadata["help"].replace("%", "%%")
            + (choices if key.metadata["choices"] and name != "train" else "")
            + default,
        )


def flag_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys that flags gave, their values parsed as YAML."""
    found = {}
    for name, text in vars(arguments).items():
        if not name.startswith("key_"):
            continue
        key = name.removeprefix("key_")
        try:
            found[key] = text if _options(key)[0] is str else yaml.safe_load(text)
        except yaml.YAMLError:
            found[key] = text
        if text in ("null", "none") and type(None) in _options(key):
            found[key] = None
    return found


def _options(key: str) -> tuple[type, ...]:
    hint = _TYPES[key]
    return get_args(hint) or (hint,)


def _checked(key: Any, value: Any) -> Any:
    """The value in its key's type, or a UserError."""
    if key not in KEYS:
        raise UserError(f"unknown key {key!r}{near(str(key), KEYS)}")
    types, rules = _options(key), KEYS[key].metadata
    if key == "task_chunk":
        return _task_chunk(value)
    if key == "spec" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = " + ".join(value)
    if value is None and type(None) in types:
        return None
    value = _converted(key, value, types)
    if rules["choices"] and value not in rules["choices"]:
        allowed = ", ".join(map(str, rules["choices"]))
        hint = near(str(value), map(str, rules["choices"]))
        raise UserError(f"{key}: expected one of {allowed}, got {value!r}{hint}")
    if rules["least"] is not None and value < rules["least"]:
        raise UserError(f"{key}: expected at least {rules['least']}, got {value}")
    if rules["above"] is not None and not value > rules["above"]:
        raise UserError(f"{key}: expected a number above {rules['above']}, got {value}")
    return value


def _converted(key: str, value: Any, types: tuple[type, ...]) -> Any:
    if float in types:
        try:
            # A string, because YAML 1.1 reads 1e-3 as one.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{key}: expected a finite number, got {value!r}")
        return number
    wanted = {int: "an integer", bool: "true or false", str: "a text"}
    for kind in types:
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    names = " or ".join(wanted[t] for t in types if t in wanted)
    raise UserError(f"{key}: expected {names}, got {value!r}")


def _task_chunk(value: Any) -> int | str | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    good = value in (None, "auto") or (type(value) is int and value >= 1)
    if not good:
        raise UserError(
            f"task_chunk: expected null, 'auto' or an integer of at least 1, got {value!r}"
        )
    return value
