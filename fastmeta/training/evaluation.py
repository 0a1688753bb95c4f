"""Accuracy over many episodes, with its 95 % interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmeta import ops
from fastmeta._settings import integer
from fastmeta.algorithms.learner import GradientLearner
from fastmeta.batch import TaskBatch
from fastmeta.data.loader import EXPECTED, Batches, Loader
from fastmeta.engine.episode import MetaOutput, with_ways
from fastmeta.engine.losses import accuracy, scores
from fastmeta.meta_module import MetaModule
from fastmeta.models import pooled
from fastmeta.patching import Patched
from fastmeta.patching.bind import resting
from fastmeta.patching.task_axes import is_input
from fastmeta.training.processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """Scores of E episodes.

    Attributes:
        accuracies: Share of right query answers of each episode, ``[E]``.
        losses: Mean query loss of each episode ``[E]``, NaN where a task diverged; None where
            there is no loss.
        diverged: Number of episodes whose adaptation diverged.
    """

    accuracies: Tensor
    losses: Tensor | None = None
    diverged: int = 0

    @property
    def accuracy(self) -> float:
        return float(self.accuracies.double().mean())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of the mean, ``1.96 s / sqrt(E)``; infinite for one
        episode."""
        return half_width(self.accuracies)

    @property
    def loss(self) -> float | None:
        """Mean loss of the tasks that did not diverge."""
        if self.losses is None or self.diverged == len(self.losses):
            return None
        return float(self.losses.double().nanmean())

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.interval:.2f} %"


def half_width(values: Tensor) -> float:
    """Half the width of the 95 % interval of the mean of independent values ``[E]``."""
    if len(values) < 2:
        return math.inf
    return 1.96 * float(values.double().std()) / math.sqrt(len(values))


def evaluate(
    learner: nn.Module,
    episodes: Loader | Sequence[TaskBatch],
    count: int = 600,
    *,
    steps: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Adapt to the first `count` episodes and judge each on its query set.

    Args:
        learner: A learner such as `fm.MAML`; it runs in evaluation mode, without meta-gradient.
        episodes: Where tasks come from, whose position is left alone, or a list of task batches.
        count: Number of episodes, at least 1; of a list, all there are where those are fewer.
        steps: Inner steps, when other than the learner's.
        on_batch: Called with the number of episodes of each batch done; may raise to stop.
        processes: Those that share the episodes, all of which call this; None for this one alone.
    """
    shared = processes or Processes()
    found = []
    settings = {} if steps is None else {"steps": steps}
    with evaluating(learner):
        for batch in take(episodes, count, device_of(learner)):
            share = shared.share(batch)
            none = torch.empty(0, 3, dtype=torch.float64)
            own = none if share is None else _scores(learner(share, **settings))
            found.append(shared.merge(own))
            if on_batch:
                on_batch(batch.num_tasks)
    accuracies, losses, diverged = torch.cat(found).unbind(1)
    return Evaluation(accuracies, losses, int(diverged.sum()))


_NO_ACCURACY = "evaluation needs accuracies, which this learner does not give"


def check_accuracy(learner: nn.Module) -> None:
    """Raise ValueError where a learner of ours has a loss that is not one of classes."""
    learner = getattr(learner, "learner", learner)  # of long unrolls
    loss_fn = learner.loss_fn if isinstance(learner, GradientLearner) else None
    one = torch.zeros(1, 1, 1)
    if loss_fn is not None and scores(loss_fn, one, {"labels": one[..., 0]}) is None:
        raise ValueError(_NO_ACCURACY)


def _scores(out: MetaOutput) -> Tensor:
    """Accuracy, loss and whether it diverged of every task, ``[T, 3]``."""
    if out.accuracy is None:
        raise ValueError(_NO_ACCURACY)
    return torch.stack([x.double() for x in (out.accuracy, out.task_losses, out.diverged)], 1)


def evaluate_unadapted(
    patched: Patched, episodes: Loader | Sequence[TaskBatch], count: int = 600
) -> Evaluation:
    """Accuracy at the initial values, before any inner step."""

    def predict(batch: TaskBatch) -> Tensor:
        return patched(patched.initial(batch.num_tasks), **inputs_of(batch.query)).logits

    with evaluating(patched):
        return _judge(predict, take(episodes, count, patched.device))


def nearest_class_mean(
    model: nn.Module, episodes: Loader | Sequence[TaskBatch], count: int = 600
) -> Evaluation | None:
    """Accuracy of a transformer without adaptation: the class whose mean feature is nearest.

    Features are mean-pooled token states, compared by cosine (Snell et al. 2017 without training);
    classes that a task has no support rows of are none of its.

    Returns:
        None for a model that has no token states to pool (an encoder-decoder, a vision model).
    """
    embed = getattr(model, "embed", None) or _mean_pooling(model)
    if embed is None:
        return None
    device = next(model.parameters()).device

    def features(inputs: dict[str, Tensor]) -> Tensor:
        tasks, rows = inputs["input_ids"].shape[:2]
        flat = {k: v.flatten(0, 1) for k, v in inputs_of(inputs).items()}
        return F.normalize(embed(**flat).float(), dim=-1).view(tasks, rows, -1)

    def predict(batch: TaskBatch) -> Tensor:
        labels = batch.support["labels"]
        means, counts = ops.class_means(features(batch.support), labels, int(labels.max()) + 1)
        cosines = features(batch.query) @ F.normalize(means, dim=-1).mT
        return cosines.masked_fill((counts == 0).unsqueeze(1), -torch.inf)

    with evaluating(model):
        return _judge(predict, take(episodes, count, device))


def _mean_pooling(model: nn.Module) -> Callable[..., Tensor] | None:
    backbone = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    if backbone is None or getattr(config, "is_encoder_decoder", True):
        return None

    def embed(attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        states = backbone(attention_mask=attention_mask, **inputs).last_hidden_state
        return pooled(states, attention_mask, "mean")

    return embed


def _judge(predict: Callable[[TaskBatch], Tensor], batches: Iterator[TaskBatch]) -> Evaluation:
    """The accuracy of logits ``[T, Q, C]``."""
    found = [accuracy(predict(batch), with_ways(batch)[1]).cpu() for batch in batches]
    return Evaluation(torch.cat(found))


def inputs_of(examples: dict[str, Tensor]) -> dict[str, Tensor]:
    """A task set without its labels."""
    return {k: v for k, v in examples.items() if is_input(k)}


def check_episodes(episodes: Loader | Sequence[TaskBatch]) -> None:
    """Raise TypeError unless these have batches by number, ValueError where there is none."""
    if isinstance(episodes, Sequence):
        Batches(episodes)
    elif not hasattr(episodes, "batch"):
        raise TypeError(f"expected {EXPECTED}, got {type(episodes).__name__}")


def take(
    episodes: Loader | Sequence[TaskBatch], count: int, device: torch.device
) -> Iterator[TaskBatch]:
    """The first `count` tasks of `episodes`, batch by batch."""
    integer("the number of episodes", count)
    check_episodes(episodes)
    listed = isinstance(episodes, Sequence)
    index = 0
    while count > 0 and not (listed and index == len(episodes)):
        batch = episodes[index] if listed else episodes.batch(index)
        yield batch[:count].to(device)
        count -= batch.num_tasks
        index += 1


def device_of(learner: nn.Module) -> torch.device:
    own = getattr(learner, "device", None)  # of a learner whose model is frozen, too
    return next(iter(learner.parameters())).device if own is None else own


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had."""
    _warn_of_unseen(module.model if isinstance(module, MetaModule) else module)
    before = _modes(module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in before:
            each.training = training


_warned: WeakSet[nn.Module] = WeakSet()
"""Models whose norms without statistics were told of."""


def _warn_of_unseen(model: nn.Module) -> None:
    """Warn, once, where evaluation would use the statistics that a BatchNorm was made with."""
    rest = resting(model, model.training)
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or name in rest:
            continue
        # A mean that is no zero came from somewhere: old checkpoints count no batches.
        if norm.num_batches_tracked != 0 or bool(norm.running_mean.any()) or model in _warned:
            continue
        _warned.add(model)
        warnings.warn(
            f"BatchNorm {name!r} has never seen data: in evaluation mode it uses running "
            "statistics, which meta-training does not move; build it with "
            "track_running_stats=False, so that each task's own rows count, or use GroupNorm",
            UserWarning,
            stacklevel=5,
        )


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The mode of every module below this one, those that learners hold included."""
    found = {id(module): module}
    left = [module]
    while left:
        one = left.pop()
        held = (value for value in vars(one).values() if isinstance(value, nn.Module))
        for below in (*one.children(), *held):
            if id(below) not in found:
                found[id(below)] = below
                left.append(below)
    # Of a learner the mode is passed on to what it holds: that comes later.
    order = sorted(found.values(), key=lambda m: not isinstance(m, MetaModule))
    return [(m, m.training) for m in order]
