"""``fastmeta eval``: accuracy of a checkpoint on many episodes."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from fastmeta.cli import checkpointed
from fastmeta.cli.build import Parts
from fastmeta.cli.config import GRADIENT, METRIC, flag_values
from fastmeta.cli.data import (
    announce_overlap,
    announce_split,
    build_episodes,
    load_texts,
    source,
)
from fastmeta.cli.errors import UserError
from fastmeta.data.benchmarks import PARTS
from fastmeta.training import (
    Evaluation,
    evaluate,
    evaluate_unadapted,
    nearest_class_mean,
)
from fastmeta.training.files import check_writable, whole_file
from fastmeta.training.metrics import finite

SUMMARY = "Evaluate a checkpoint on episodes of classes it has not seen."
_KEYS = "model data split valid test shots queries tasks inner_steps refine_steps"
_KEYS += " device threads compile"
KEYS = tuple(_KEYS.split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpointed.add_arguments(parser, KEYS)
    parser.add_argument("--part", default="test", choices=PARTS, help="which classes [test]")
    parser.add_argument("--episodes", type=int, default=600, metavar="N", help="[600]")
    parser.add_argument("--episode-seed", type=int, metavar="N", help="[one fixed seed per part]")
    parser.add_argument("--no-baselines", action="store_true", help="the learner itself only")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    if arguments.episodes < 1:
        raise UserError(f"--episodes: expected at least 1, got {arguments.episodes}")
    if arguments.json:
        check_writable(Path(arguments.json).parent)
    given = flag_values(arguments)
    for part in ("valid", "test"):
        if part in given and part != arguments.part:
            raise UserError(
                f"--{part} is for --part {part}: expected no other, got {arguments.part}"
            )
    parts = checkpointed.load(arguments)
    config = parts.config
    seed = arguments.episode_seed
    episodes = build_episodes(config, parts.tokenizer, arguments.part, seed=seed)
    announce_split(config)
    here = config.data == "builtin" or Path(config.data).expanduser().exists()
    if here and source(config, arguments.part) != config.data:
        announce_overlap(config, load_texts(config, "train"), [arguments.part])
    start = time.perf_counter()
    taken = config.refine_steps if config.method == "hypernet" else config.inner_steps
    steps = "" if config.method in METRIC else f", {taken} inner steps"
    results = {
        f"{config.method}{steps}": adapted(
            parts, episodes, arguments.episodes, quiet=arguments.quiet
        )
    }
    seconds = time.perf_counter() - start
    if not arguments.no_baselines:
        results |= baselines(parts, episodes, arguments.episodes)
    print(
        f"{arguments.part} classes of {source(config, arguments.part)}: "
        f"{config.ways}-way {config.shots}-shot, {arguments.episodes} episodes, "
        f"{arguments.episodes / seconds:.1f} tasks/s"
    )
    print(table(results))
    if arguments.json:
        rows = {
            name: {
                "accuracy": r.accuracy,
                "interval": finite(r.interval),
                "diverged": r.diverged,
            }
            for name, r in results.items()
        }
        with whole_file(Path(arguments.json)) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def adapted(parts: Parts, episodes, count: int, *, quiet: bool = False) -> Evaluation:
    """The learner's accuracy, with a progress bar."""
    with tqdm(total=count, desc="evaluating", unit="task", disable=quiet, leave=False) as bar:
        with parts.precision():
            return evaluate(parts.learner, episodes, count, on_batch=bar.update)


def baselines(parts: Parts, episodes, count: int) -> dict[str, Evaluation]:
    """What the same weights do without adaptation; class means in the weights' own dtype."""
    rows = {}
    if parts.patched is not None and parts.config.method in GRADIENT:
        with parts.precision():
            rows["the same, not adapted"] = evaluate_unadapted(parts.patched, episodes, count)
    means = nearest_class_mean(parts.model, episodes, count)
    if means is not None:
        rows["nearest class mean of its features"] = means
    return rows


def table(results: dict[str, Evaluation]) -> str:
    """Rows of name, mean accuracy and 95 % interval."""
    width = max(len("learner"), *(len(name) for name in results))
    lines = [f"{'learner':<{width}}  accuracy, 95 % interval", "-" * (width + 25)]
    for name, result in results.items():
        note = f"  ({result.diverged} diverged)" if result.diverged else ""
        lines.append(f"{name:<{width}}  {result}{note}")
    return "\n".join(lines)
