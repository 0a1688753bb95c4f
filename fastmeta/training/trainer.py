"""The outer loop: meta-steps, metrics, evaluation, checkpoints and exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from fastmeta._settings import integers
from fastmeta.batch import TaskBatch
from fastmeta.data.loader import Loader, as_loader
from fastmeta.engine.episode import MetaOutput
from fastmeta.training.checkpoint import (
    find_checkpoint,
    holds_run,
    read_checkpoint,
    remove_later,
    write_checkpoint,
)
from fastmeta.training.errors import Interrupted, TrainingError
from fastmeta.training.evaluation import Evaluation, check_accuracy, check_episodes, evaluate
from fastmeta.training.files import check_writable, sweep, whole_file
from fastmeta.training.metrics import MetricsLog, finite, peak_memory
from fastmeta.training.outer import parameters_beside
from fastmeta.training.plot import plot_metrics
from fastmeta.training.processes import Processes
from fastmeta.training.run_state import load_state, state_of


class Trainer:
    """Meta-trains a learner: ``theta <- outer(theta, d mean_t L_query / d theta)`` per batch.

    Everything that later steps depend on is in its checkpoints (meta-parameters, optimizer,
    schedule, position in the episodes, random states), so a resumed run gives the same bits.

    Under an initialised ``torch.distributed`` (``torchrun``) the tasks of every batch are shared
    among the processes, which take the same steps; the first writes files and shows progress. All
    have the same arguments, each the learner on its own device, and call the same methods.

    Args:
        learner: A learner such as `fm.MAML`.
        episodes: Task batches, `fm.data.Episodes` or `fm.data.TaskDataset`, or a list of
            `fm.TaskBatch`, which are read in turn, over and over.
        outer: Optimizer over ``learner.parameters()``.
        schedule: Learning-rate schedule of `outer`, stepped once per outer step, or None.
        clip_norm: Bound on the norm of the gradients of all that learns, positive, or None.
        autocast: dtype in which the model computes (``torch.bfloat16``), or None.
        valid: Episodes or a list of task batches to evaluate on while training, or None.
        eval_every: Evaluate after every this many steps; 0 for never.
        eval_episodes: Episodes of each evaluation.
        out: Folder of this run alone: ``metrics.jsonl``, ``curve.png``, ``checkpoints/``. None
            keeps everything in memory.
        checkpoint_every: Write a checkpoint after every this many steps, and at the end; 0 for
            the end only.
        keep: Number of checkpoints kept, at least 1.
        config: JSON values to keep in every checkpoint, for example how the run was set up.
        progress: Whether to show a progress bar.

    Attributes:
        step: Outer steps done.
        metrics: One record per step: step, loss, accuracy, tasks_per_s, peak_memory_mb, lr,
            diverged, and after an evaluation valid_accuracy, valid_interval (None of one episode),
            valid_loss.

    Raises:
        TypeError: `episodes` or `valid` are no loader and no list of task batches.
        ValueError: A number out of its range, an optimizer without meta-parameters, episodes to
            evaluate on for a learner without accuracies, or long unrolls (`fm.TruncatedUnroll`,
            `fm.PES`) or rates of tasks in several processes.
        OSError: `out` cannot be written.
    """

    def __init__(
        self,
        learner: nn.Module,
        episodes: Loader | Sequence[TaskBatch],
        outer: Optimizer,
        *,
        schedule: LRScheduler | None = None,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        valid: Loader | Sequence[TaskBatch] | None = None,
        eval_every: int = 0,
        eval_episodes: int = 200,
        out: str | Path | None = None,
        checkpoint_every: int = 0,
        keep: int = 3,
        config: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        integers(0, eval_every=eval_every, checkpoint_every=checkpoint_every)
        integers(1, eval_episodes=eval_episodes, keep=keep)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {clip_norm}")
        own = {id(p) for p in learner.parameters()}
        if not any(id(p) in own for group in outer.param_groups for p in group["params"]):
            raise ValueError(
                "the outer optimizer holds none of the learner's meta-parameters: "
                "make it over learner.parameters()"
            )
        episodes = as_loader(episodes)
        if valid is not None:
            check_episodes(valid)
            if eval_every:
                check_accuracy(learner)
        self.processes = Processes.running()
        if self.processes.count > 1:
            if hasattr(learner, "progress"):
                raise ValueError(f"{type(learner).__name__} trains in one process")
            if "task" in getattr(getattr(learner, "rates", None), "axes", ()):
                raise ValueError("rates learned per task are trained in one process")
            learner.averaged = True
        self.learner = learner
        self.episodes = episodes
        self.outer = outer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.autocast = autocast
        self.valid = valid
        self.eval_every = eval_every
        self.eval_episodes = eval_episodes
        self.out = None if out is None else check_writable(out)
        self.checkpoint_every = checkpoint_every
        self.keep = keep
        self.config = config or {}
        self.progress = progress and self.processes.leads
        self.step = 0
        written = self.out is not None and self.processes.leads
        self._log = MetricsLog(self.out / "metrics.jsonl" if written else None)
        self._unfinished: dict[str, Any] | None = None  # a record whose evaluation was cut short
        self._stopping = False
        self._saved_step = -1
        self._owns_folder = False  # what it holds is of this run
        if self.processes.count > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where objects are exchanged

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._log.records

    @property
    def device(self) -> torch.device:
        return next(iter(self.learner.parameters())).device

    def stop(self) -> None:
        """End `fit` after the step in progress; safe to call from a signal handler or a thread."""
        self._stopping = True

    def is_done(self, steps: int) -> bool:
        """Whether nothing is left of so many steps, neither a step nor an evaluation."""
        return self.step >= steps and self._unfinished is None

    # -- the loop ----------------------------------------------------------------------------

    def fit(self, steps: int) -> list[dict[str, Any]]:
        """Train until `steps` outer steps have been done in all, earlier calls included.

        Returns:
            The metrics, one record per step.

        Raises:
            Interrupted: `stop` was called before the end; a checkpoint has been written.
            TrainingError: Every task of a batch diverged, or the meta-gradient is not finite.
            FileExistsError: `out` holds another run, which was not resumed.
            OSError: A file cannot be written.
        """
        self._take_folder()
        if self.processes.count > 1:
            self.processes.start_alike([*self.learner.shared_tensors(), *self._learning()])
        if self.out is not None and self.processes.leads:
            sweep(self.out)
            sweep(self.out / "checkpoints")
        with tqdm(
            total=steps,
            initial=self.step,
            desc="meta-training",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        ) as bar:
            if not self.is_done(steps):
                self._halt_if_asked()
            if self._unfinished is not None:
                self._finish_record(self._unfinished, bar)
                self._saved_step = -1  # without that evaluation
            batches = iter(self.episodes)
            try:
                while self.step < steps:
                    record = self._train_step(batches)
                    self._finish_record(record, bar)
                    bar.update()
                    every = self.checkpoint_every
                    if self.out is not None and every and self.step % every == 0:
                        self.save()
                    if not self.is_done(steps):
                        self._halt_if_asked()
            finally:
                batches.close()  # ends the thread that prepares batches
        self._stopping = False  # there was nothing left to stop
        if self.out is not None:
            self.save()
            self.plot()
        return self.metrics

    def _take_folder(self) -> None:
        """Raise where the folder holds a run that is not this one."""
        if self.out is None or self._owns_folder:
            return
        held = self.processes.leads and holds_run(self.out)
        if self.processes.any(held, self.device):
            raise FileExistsError(
                f"{self.out} already holds a run: resume() goes on with it, or give another out"
            )
        self._log.rewind(self.step)  # of a run that ended before its first checkpoint
        self._owns_folder = True

    def _train_step(self, batches: Any) -> dict[str, Any]:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # a finite set of episodes was seen to its end
            raise TrainingError(
                f"the episodes ended after {self.step} steps; give them num_batches=None"
            )
        if batch.num_tasks < self.processes.count:
            raise TrainingError(
                f"expected a task for each of {self.processes.count} processes, "
                f"got {batch.num_tasks} a step"
            )
        with self._precision():
            out = self.learner(self.processes.share(batch).to(self.device))
        sums = self._sums(out)
        self.outer.zero_grad(set_to_none=True)
        if self.processes.count == 1:
            out.loss.backward()
        else:  # the mean over the good tasks of all
            share = (~out.diverged).sum() / sums[0].clamp_min(1)
            (out.loss * share.to(out.loss.dtype)).backward()
            self.processes.sum_gradients(self._learning())
        moved = [p for p in self._learning() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in moved])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(moved, self.clip_norm, norm)
        # The one wait of a step for the device.
        good, loss, accuracy, norm = torch.stack([*sums, norm.to(sums)]).tolist()
        if not good:
            raise TrainingError(
                f"all {batch.num_tasks} tasks of step {self.step + 1} diverged (loss or gradient "
                "not finite); use a smaller inner or outer learning rate"
            )
        if not math.isfinite(norm):
            raise TrainingError(
                f"the meta-gradient of step {self.step + 1} is not finite, although "
                f"{int(good)} of {batch.num_tasks} tasks did not diverge; use a smaller inner or "
                "outer learning rate, or fewer inner steps"
            )
        lr = float(self.outer.param_groups[0]["lr"])
        self.outer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.out is not None and self.processes.leads:
            remove_later(self.out / "checkpoints", self.step)  # of a branch that ends here
        self.step += 1
        return {
            "step": self.step,
            "loss": loss / good,
            "accuracy": None if out.accuracy is None else accuracy / good,
            "lr": lr,
            "diverged": batch.num_tasks - int(good),
            "tasks_per_s": round(batch.num_tasks / (time.perf_counter() - start), 3),
            "peak_memory_mb": round(peak_memory(self.device), 1),
        }

    def _learning(self) -> list[nn.Parameter]:
        """The meta-parameters, and what else the outer optimizer moves."""
        return [*self.learner.parameters(), *parameters_beside(self.outer, self.learner)]

    def _sums(self, out: MetaOutput) -> Tensor:
        """Number of good tasks, and the sums of their losses and accuracies, of all processes."""
        count = (~out.diverged).sum().double()
        accuracy = torch.zeros_like(count)
        if out.accuracy is not None:
            accuracy = out.accuracy.double().masked_fill(out.diverged, 0).sum()
        own = torch.stack([count, out.loss.detach().double() * count, accuracy])
        return self.processes.sum(own)

    def _finish_record(self, record: dict[str, Any], bar: tqdm) -> None:
        """Evaluate where this step is due for it, and log."""
        if self.valid is not None and self.eval_every and self.step % self.eval_every == 0:
            self._unfinished = record
            result = self._evaluate(bar)
            record["valid_accuracy"] = result.accuracy
            record["valid_interval"] = finite(result.interval)
            record["valid_loss"] = result.loss
        self._unfinished = None
        self._log.append(record)
        shown = {"loss": f"{record['loss']:.3f}", "tasks/s": f"{record['tasks_per_s']:.1f}"}
        if record["accuracy"] is not None:
            shown["accuracy"] = f"{record['accuracy']:.3f}"
        evaluated = [r for r in self.metrics if "valid_accuracy" in r]
        if evaluated:
            shown["valid"] = f"{evaluated[-1]['valid_accuracy']:.3f}"
        bar.set_postfix(shown, refresh=False)

    def _evaluate(self, bar: tqdm) -> Evaluation:
        bar.set_description("evaluating", refresh=True)
        try:
            with self._precision():
                return evaluate(
                    self.learner,
                    self.valid,
                    self.eval_episodes,
                    on_batch=lambda _: self._halt_if_asked(),
                    processes=self.processes,
                )
        finally:
            bar.set_description("meta-training", refresh=False)

    def _precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _halt_if_asked(self) -> None:
        if not self.processes.any(self._stopping, self.device):
            return
        self._stopping = False
        raise Interrupted(self.step, None if self.out is None else self.save())

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, as tensors and JSON values; called by all."""
        return {**state_of(self), "unfinished": self._unfinished}

    def save(self) -> Path:
        """Write a checkpoint of this step, whole or not at all, and return its folder.

        Of several processes all call it.

        Raises:
            ValueError: The trainer has no folder.
            FileExistsError: The folder holds another run, which was not resumed.
            OSError: It cannot be written.
        """
        if self.out is None:
            raise ValueError("a trainer without a folder cannot save: give it out=...")
        self._take_folder()
        folder = self.out / "checkpoints"
        path = folder / f"step-{self.step:08d}"
        due = self._saved_step != self.step or not path.exists() or bool(self._unfinished)
        if self.processes.any(due and self.processes.leads, self.device):
            state = self.state_dict()
            if self.processes.leads:
                path = write_checkpoint(folder, self.step, state, keep=self.keep)
            self.processes.wait()
            self._saved_step = self.step
        return path

    def resume(self, checkpoint: str | Path | None = None) -> int:
        """Go on exactly where a checkpoint was written.

        What `out` has of later steps is done again: `fit` replaces their metrics and checkpoints.

        Args:
            checkpoint: Its folder, or a run's folder for the newest one; default: `out`.

        Returns:
            The number of steps done.

        Raises:
            CheckpointError: Missing, damaged, of another model, specification, optimizer or data.
        """
        if checkpoint is None and self.out is None:
            raise ValueError("a trainer without a folder needs the checkpoint to resume from")
        if self.out is not None and self.processes.leads:
            sweep(self.out / "checkpoints")
        self.processes.wait()
        folder = find_checkpoint(self.out if checkpoint is None else checkpoint)
        state = read_checkpoint(folder)
        load_state(self, state, folder)
        self.step = self._saved_step = state["step"]
        self._unfinished = state["unfinished"]
        done = self.step - (self._unfinished is not None)
        self._log.rewind(done)
        self._owns_folder = True
        self._log.records = self.processes.gather(self.metrics)[0]
        return self.step

    def plot(self) -> Path | None:
        """Write the learning curve to ``curve.png`` in the run's folder, where there is one."""
        if self.out is None or not self.metrics or not self.processes.leads:
            return None
        with whole_file(self.out / "curve.png") as temporary:
            plot_metrics(self.metrics, temporary)
        return self.out / "curve.png"
