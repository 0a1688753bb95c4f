"""`fm.search.run`: controller, evaluation, budget and state put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmeta._settings import integers
from fastmeta.batch import TaskBatch
from fastmeta.search.budget import Budget, by_cost, check_weights, cost_model
from fastmeta.search.controller import Controller, Evolution, RandomSearch
from fastmeta.search.cost import CostModel
from fastmeta.search.differentiable import DifferentiableController
from fastmeta.search.errors import SearchError, SearchInterrupted
from fastmeta.search.evaluation import Evaluator, Score, as_batches
from fastmeta.search.export import export
from fastmeta.search.lstm import LSTMController
from fastmeta.search.optuna import OptunaController
from fastmeta.search.pareto import pareto_front
from fastmeta.search.proposal import Proposal
from fastmeta.search.report import plot_front, table
from fastmeta.search.space import Space
from fastmeta.search.state import NAME, checksum, load_state, save_state
from fastmeta.training.files import check_writable

CONTROLLERS: dict[str, type[Controller]] = {
    "random": RandomSearch,
    "evolution": Evolution,
    "lstm": LSTMController,
    "differentiable": DifferentiableController,
    "optuna": OptunaController,
}


@dataclass
class Result:
    """What a search found.

    Attributes:
        scores: Every candidate in the order of its first evaluation.
        rewards: Of each of them, as the controller saw it.
        best: The candidate of the largest reward among those evaluated on all tasks, or of the
            largest reward on the validation tasks among the finalists.
        baseline: The whole model with the default recipe, on the same tasks.
        cost: What candidates cost.
        evaluator: What evaluated them.
        finalists: Scores on the validation tasks, best first; empty without such tasks.
    """

    scores: list[Score]
    rewards: list[float]
    best: Score
    baseline: Score
    cost: CostModel
    evaluator: Evaluator
    finalists: list[Score]

    def finished(self) -> list[Score]:
        """Scores of candidates that were evaluated on all tasks."""
        return [s for s in self.scores if not s.stopped]

    def front(self, cost: str = "relative_flops") -> list[Score]:
        """Candidates that none beats in both accuracy and a cost, cheapest first."""
        done = self.finished()
        return [
            done[i] for i in reversed(pareto_front([(-s.cost[cost], s.accuracy) for s in done]))
        ]

    def table(self, count: int = 5) -> str:
        """The whole model, the winner and the front, as text."""
        rows = [("whole model", self.baseline), ("winner", self.best)]
        rows += [("front", s) for s in self.front()[-count:]]
        return table(rows)

    def plot(self, path: str | Path, *, cost: str | None = None) -> None:
        """Draw accuracy over a cost; default the latency where it was measured."""
        known = "relative_latency" if "relative_latency" in self.best.cost else "relative_flops"
        plot_front(self.finished(), Path(path), cost=cost or known, baseline=self.baseline)

    def export(self, folder: str | Path, **settings: Any) -> Path:
        """Write the winner; see `fm.search.export` for the settings."""
        return export(self.evaluator, self.best.proposal, folder, **settings)


def run(
    space: Space,
    tasks: TaskBatch | Sequence[TaskBatch],
    *,
    controller: str | Controller = "lstm",
    evaluations: int = 256,
    population: int = 32,
    budget: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    keep: float | None = None,
    valid: TaskBatch | Sequence[TaskBatch] | None = None,
    finalists: int = 8,
    cost: CostModel | None = None,
    evaluator: Evaluator | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Result:
    """Search a space for the candidate that adapts best to many tasks.

    In every step the controller proposes a population, which is evaluated on all tasks in one
    batch, and learns from its rewards: ``accuracy - sum_k weights[k] cost[k]``. The accuracy of a
    candidate that `keep` stopped is that of the whole model on all tasks, plus what it is better
    than the whole model on the tasks it saw, so that easier or harder tasks later on say nothing.

    Args:
        space: What may be proposed.
        tasks: What candidates are judged on, fixed for the whole search; each batch is a rung.
        controller: ``"lstm"``, ``"random"``, ``"evolution"``, ``"differentiable"``, ``"optuna"`` or
            a `Controller` of this space.
        evaluations: Candidates evaluated in all, at least 1. One proposed again counts, but is not
            computed again.
        population: Candidates of a step, at least 1.
        budget: Name of a cost (``"relative_latency"``, ``"parameters"``, ...) -> its largest value.
        weights: Name of a cost -> its weight in the reward.
        keep: Successive halving from batch to batch, see `Evaluator.evaluate`.
        valid: Other tasks; on them the finalists are compared, and the winner is chosen.
        finalists: How many of the best candidates go there, at least 1.
        cost: What candidates cost; default a `CostModel` that measures latency only where the
            budget or the weights name it.
        evaluator: Of this space; default a new one of this seed, with importance measured on the
            first batch's support sets.
        seed: Of the controller, the LoRA terms and smaller batches.
        out: Folder of the state, which is written after every step.
        resume: Go on with the state in `out`.
        overwrite: Whether the state of another search in `out` is replaced, with the first step.
        progress: Show a bar.
        stop: Asked after every step; True ends the search.
        **settings: Of the controller, where it is given by name; those that have a name of this
            function (`population` of `Evolution`) need the controller itself.

    Returns:
        A `Result`.

    Raises:
        SearchError: A budget that nothing can meet, a state that is missing, damaged or of another
            search, a folder that holds another search.
        SearchInterrupted: `stop` asked for it.
        TypeError: A budget or weights that name no costs, something else than batches of tasks.
        ValueError: Numbers out of range, an unknown controller, inputs or labels that do not fit.
    """
    integers(1, evaluations=evaluations, population=population, finalists=finalists)
    batches = as_batches(tasks)
    bounds, weights = by_cost("budget", budget), by_cost("weights", weights)
    if cost is None:
        cost = cost_model(space, bounds, weights)
    check_weights(cost, weights)
    folder = None if out is None else check_writable(out)
    facts: dict[str, Any] = {}
    if folder is not None:
        facts = {
            "space": str(space),
            "lora_scale": space.lora_scale,
            "model": checksum(space.model.state_dict().values()),
            "controller": controller if isinstance(controller, str) else type(controller).__name__,
            "settings": {k: _plain(v) for k, v in sorted(settings.items())},
            "population": population,
            "budget": bounds,
            "weights": weights,
            "keep": keep,
            "seed": seed,
            "tasks": [f"{b.num_tasks} tasks {checksum(b.tensors())}" for b in batches],
        }
    state = None
    if resume:
        if folder is None:
            raise ValueError("resume needs the folder out")
        if overwrite:
            raise ValueError("resume and overwrite exclude each other")
        state = load_state(folder, facts)
        cost.load_state_dict(state["cost"])
    elif not overwrite and folder is not None and (folder / NAME).exists():
        raise SearchError(f"{folder} already holds a search: resume it, or choose another folder")
    within = Budget(space, cost, bounds)
    pilot = make_controller(controller, space, seed=seed, allowed=within, **settings)
    if evaluator is None:
        evaluator = Evaluator(space, seed=seed, calibration=batches[0].support)
    records: list[Score] = []
    if state is not None:
        records = [_score(space, r) for r in state["records"]]
        pilot.load_state_dict(state["controller"])

    def priced(score: Score) -> Score:
        score.cost = cost(score.proposal)
        return score

    baseline = priced(evaluator.evaluate([whole_model(space)], batches)[0])

    def reward(score: Score) -> float:
        same = baseline.accuracies[: len(score.accuracies)]
        return score.reward(weights) + (baseline.accuracy - sum(same) / len(same))

    known = {s.proposal.key: s for s in records}
    bar = tqdm(total=evaluations, initial=len(records), disable=not progress, desc="candidates")
    with bar:
        while len(records) < evaluations:
            pilot.learn(evaluator, batches[(len(records) // population) % len(batches)])
            proposals = pilot.propose(min(population, evaluations - len(records)))
            new = {p.key: p for p in proposals if p.key not in known}
            found = evaluator.evaluate(list(new.values()), batches, keep=keep) if new else []
            known |= {s.proposal.key: priced(s) for s in found}
            scores = [known[p.key] for p in proposals]
            pilot.observe(proposals, [reward(s) for s in scores])
            records += scores
            best = max(records, key=reward)
            bar.update(len(scores))
            bar.set_postfix(best=f"{100 * best.accuracy:.2f} %", refresh=False)
            if folder is not None:
                save_state(
                    folder,
                    {
                        "settings": facts,
                        "records": [_record(s) for s in records],
                        "controller": pilot.state_dict(),
                        "cost": cost.state_dict(),
                    },
                )
            if stop() and len(records) < evaluations:
                raise SearchInterrupted(len(records), None if folder is None else folder / NAME)
    scores = list({s.proposal.key: s for s in records}.values())
    done = sorted((s for s in scores if not s.stopped), key=reward, reverse=True)
    last: list[Score] = []
    if valid is not None:
        chosen = [s.proposal for s in done[:finalists]]
        last = [priced(s) for s in evaluator.evaluate(chosen, valid)]
        last.sort(key=lambda s: s.reward(weights), reverse=True)
    best = known[last[0].proposal.key] if last else done[0]
    return Result(scores, [reward(s) for s in scores], best, baseline, cost, evaluator, last)


def make_controller(controller: str | Controller, space: Space, **settings: Any) -> Controller:
    """The controller of that name, or the object itself with what is allowed.

    Raises:
        ValueError: An unknown name, settings that it does not have, or one of another space.
    """
    if isinstance(controller, Controller):
        if controller.space is not space:
            raise ValueError("the controller was made for another space")
        controller.allowed = settings["allowed"]
        return controller
    if controller not in CONTROLLERS:
        raise ValueError(
            f"controller must be a Controller or one of {', '.join(CONTROLLERS)}, "
            f"got {controller!r}"
        )
    return CONTROLLERS[controller](space, **settings)


def whole_model(space: Space) -> Proposal:
    """The unpruned model with the default recipe, which the space itself may not propose."""
    layers = space.anatomy.layers
    own: dict[str, Any] = {"layers": len(layers), "pooling": space.anatomy.poolings[0]}
    own |= {"heads": layers[0].heads, "width": layers[0].width}
    for i, layer in enumerate(layers):
        own |= {f"layer.{i}": True, f"heads.{i}": layer.heads, f"width.{i}": layer.width}
    return space.resolve({n: own.get(n, v) for n, v in space.proposal().decisions.items()})


def _plain(setting: Any) -> Any:
    """A setting as a state can hold it: of an object its class."""
    if isinstance(setting, list | tuple):
        return [_plain(each) for each in setting]
    return setting if isinstance(setting, int | float | str | None) else type(setting).__name__


def _record(score: Score) -> dict[str, Any]:
    keys = ("accuracies", "losses", "diverged", "stopped", "cost")
    return {"decisions": dict(score.proposal.decisions)} | {k: getattr(score, k) for k in keys}


def _score(space: Space, record: dict[str, Any]) -> Score:
    record = dict(record)
    try:
        return Score(space.proposal(record.pop("decisions")), **record)
    except (KeyError, TypeError, ValueError) as error:
        raise SearchError(f"the state is of another space ({error})") from error
