"""A search's results as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmeta.search.evaluation import Score
from fastmeta.search.pareto import pareto_front


def table(rows: Sequence[tuple[str, Score]]) -> str:
    """Accuracy with its interval, relative costs, and what each candidate is.

    Args:
        rows: A name and a score each.
    """
    kinds = [k for k in ("latency", "flops", "parameters") if f"relative_{k}" in rows[0][1].cost]
    head = ["", "accuracy", *kinds, "candidate"]
    lines = [head]
    for name, score in rows:
        accuracy = f"{100 * score.accuracy:.2f} ± {100 * score.interval:.2f}"
        shares = [f"{100 * score.cost[f'relative_{k}']:.0f} %" for k in kinds]
        lines.append([name, accuracy, *shares, str(score.proposal)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def plot_front(
    scores: Sequence[Score], path: Path, *, cost: str, baseline: Score | None = None
) -> None:
    """Draw accuracy over a cost as a PNG, with the candidates that none beats in both.

    Args:
        scores: Of candidates that were evaluated on the same tasks, at least one.
        path: The file to write.
        cost: Name of the cost.
        baseline: The whole model, where it was evaluated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(-s.cost[cost], s.accuracy) for s in scores]
    front = pareto_front(points)
    axes.scatter(
        [-x for x, _ in points], [y for _, y in points], s=8, alpha=0.4, label="candidates"
    )
    line = sorted((-points[i][0], points[i][1]) for i in front)
    axes.plot([x for x, _ in line], [y for _, y in line], color="C1", marker="o", label="front")
    if baseline is not None:
        axes.scatter(
            [baseline.cost[cost]], [baseline.accuracy], marker="*", s=90, color="C3",
            label="whole model",
        )  # fmt: skip
    axes.set_xlabel(cost.replace("_", " "))
    axes.set_ylabel("query accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")
