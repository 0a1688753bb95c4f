"""The outer loop as a program: trainer, evaluation, metrics, checkpoints, tasks' weights."""

from fastmeta.training.checkpoint import find_checkpoint, load_learner, read_checkpoint
from fastmeta.training.errors import CheckpointError, Interrupted, TrainingError
from fastmeta.training.evaluation import (
    Evaluation,
    evaluate,
    evaluate_unadapted,
    nearest_class_mean,
)
from fastmeta.training.export import export_task
from fastmeta.training.imports import import_task
from fastmeta.training.metrics import read_metrics
from fastmeta.training.plot import plot_metrics
from fastmeta.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Interrupted",
    "Trainer",
    "TrainingError",
    "evaluate",
    "evaluate_unadapted",
    "export_task",
    "find_checkpoint",
    "import_task",
    "load_learner",
    "nearest_class_mean",
    "plot_metrics",
    "read_checkpoint",
    "read_metrics",
]
