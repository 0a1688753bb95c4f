"""Learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def plot_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over outer steps as a PNG; thick lines are running means.

    Args:
        records: From `Trainer.metrics` or `read_metrics`, at least one.
        path: The file to write.
    """
    # The object interface: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, key, valid, title in (
        (panels[0], "loss", "valid_loss", "query loss"),
        (panels[1], "accuracy", "valid_accuracy", "query accuracy"),
    ):
        drawn = _line(axes, records, key)
        evaluated = [r for r in records if r.get(valid) is not None]
        if evaluated:
            error = None
            if valid == "valid_accuracy":  # no interval of one episode
                error = [r["valid_interval"] or 0.0 for r in evaluated]
            axes.errorbar(
                [r["step"] for r in evaluated],
                [r[valid] for r in evaluated],
                yerr=error,
                color="C1",
                marker="o",
                markersize=3,
                capsize=2,
                label="validation classes",
            )
        axes.set_xlabel("outer step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if drawn or evaluated:
            axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def _line(axes: Any, records: list[dict[str, Any]], key: str) -> bool:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if not points:
        return False
    steps, values = np.array(points).T
    window = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    mean = (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)
    axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color="C0", linewidth=1.6, label="training classes")
    return True
