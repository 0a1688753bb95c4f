"""`fm.FineTuner`: many tasks fine-tuned at once, batch after batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta._dtypes import wide_dtype
from fastmeta._settings import is_integer
from fastmeta.batch import TaskBatch, check_set, ways_of
from fastmeta.engine.adaptation import plain_loop
from fastmeta.engine.checks import check_sets, compute_dtype_of, setting_of
from fastmeta.engine.chunks import split
from fastmeta.engine.conditions import computing
from fastmeta.engine.episode import support_of, with_ways
from fastmeta.engine.inner import InnerLoop, inner_step, task_losses
from fastmeta.engine.losses import LossFn
from fastmeta.engine.memory import MemoryPlan
from fastmeta.engine.memory_plans import MemoryPlans
from fastmeta.engine.meter import PeakMemory
from fastmeta.engine.places import Place, part_of, place_of, size, write
from fastmeta.engine.prediction import Need
from fastmeta.engine.rates import Rates
from fastmeta.engine.update_rule import State, UpdateRule
from fastmeta.patching import ParamLayout, Patched, TaskParams


class FineTuner:
    """Fine-tunes T tasks at once, each on batches of its own data.

    ``phi_t <- U_t(phi_t, dL(phi_t; batch_t)/dphi_t)`` for every task t of a batch, with U an update
    rule whose state goes on from step to step. Tasks may come and go, and need not take part in
    every step: one that joins late takes the steps that it would have taken alone.

    Example::

        batches = fm.data.Minibatches(texts, tokenizer, batch_size=8, epochs=3)
        tuner = fm.FineTuner(patched, batches.names, lr=1e-3, ways=batches.ways)
        for batch in batches:
            losses = tuner.step(batch.inputs, batch.tasks)
        fm.training.export_task(patched, tuner.task("acme"), "adapters/acme")

    Args:
        patched: The model, from `fm.patch`. Its weights do not change; its mode decides whether
            dropout is active.
        tasks: Names of T tasks, or how many: then they are called 0 to T - 1.
        lr: Learning rate, positive: a number, or one for each task.
        optimizer: A name or a rule object, as for `fm.adapt`. Default ``"adamw"``.
        loss_fn: As for `fm.adapt`. Default ``"classification"``.
        clip_norm: Bound on each task's gradient norm, positive, or None.
        params: Fast weights of T tasks to start from; default the model's own initial values.
        ways: Number of classes of each task, or one for all, when fewer than the head has.
        task_chunk: Tasks whose graph is held at once: None (all), an integer of at least 1, or
            ``"auto"``: as many as the free memory has room for, measured where batches grow.
        compute_dtype, compile, compile_cache: As for `fm.adapt`.

    Attributes:
        names: Of the tasks, in their order.
        params: Their fast weights, `fm.TaskParams` ``[T, ...]``, which every step overwrites.
        steps: Steps that each has taken, int64 ``[T]``.
        diverged: bool ``[T]``: tasks whose loss or gradient became NaN or Inf. They keep the fast
            weights from before that step; the others go on.
        lr: Learning rates ``[T]``; may be set before a step, as in
            ``tuner.lr = 1e-3 * (1 - tuner.steps / 500).clamp(min=0)``.

    Raises:
        TypeError: `patched` is no patched model, a setting of another type.
        ValueError: A name given twice, no task, a setting out of its range.

    A task's numbers are those of tuning it alone. Memory: fast weights and the rule's state
    (``"adamw"``: two more of their size) of all tasks.
    """

    def __init__(
        self,
        patched: Patched,
        tasks: int | Iterable[Hashable],
        *,
        lr: float | Sequence[float] | Tensor,
        optimizer: str | UpdateRule = "adamw",
        loss_fn: str | LossFn = "classification",
        clip_norm: float | None = None,
        params: TaskParams | None = None,
        ways: Tensor | Sequence[int] | int | None = None,
        task_chunk: int | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        compile: bool | str = False,
        compile_cache: str | Path | None = None,
    ) -> None:
        self._loop = plain_loop(
            patched,
            steps=1,
            lr=1.0,  # others in every step
            optimizer=optimizer,
            loss_fn=loss_fn,
            clip_norm=clip_norm,
            compile=compile,
            compile_cache=compile_cache,
        )
        self.patched = patched
        self._plans = {  # of adjacent tasks, whose rows are not copied, and of others
            adjacent: MemoryPlans("unroll", task_chunk, predict=partial(self._need, adjacent))
            for adjacent in (True, False)
        }
        self.compute_dtype = compute_dtype_of(compute_dtype, patched.dtype)
        rule = self._loop.rule
        if not rule.steps_apart:
            raise ValueError(
                f"a FineTuner's tasks take steps of their own, which {type(rule).__name__} does "
                "not know (fm.rules.UpdateRule.steps_apart); fm.adapt takes any rule"
            )
        self.names: tuple[Hashable, ...] = ()
        start = patched.init(1).packed.detach()
        self._packed = start.new_empty(0, start.shape[1])
        self._state = rule.init(self._packed)
        self.steps = torch.zeros(0, dtype=torch.int64, device=start.device)
        self.diverged = torch.zeros(0, dtype=torch.bool, device=start.device)
        wide = wide_dtype(start.dtype)
        self._lr = torch.zeros(0, dtype=wide, device=start.device)
        self._ways: Tensor | None = None
        if is_integer(tasks):
            tasks = range(tasks)
        self.add(tasks, lr=lr, params=params, ways=ways)

    # -- tasks -------------------------------------------------------------------------------

    @property
    def params(self) -> TaskParams:
        return TaskParams(self.patched.layout, self._packed)

    @property
    def lr(self) -> Tensor:
        return self._lr

    @lr.setter
    def lr(self, lr: float | Sequence[float] | Tensor) -> None:
        self._lr = _rates(lr, len(self.names), self._lr)

    def task(self, name: Hashable) -> TaskParams:
        """A copy of one task's fast weights, ``[1, ...]``."""
        return TaskParams(self.patched.layout, self._packed[self._place([name])].clone())

    def add(
        self,
        tasks: Iterable[Hashable],
        *,
        lr: float | Sequence[float] | Tensor,
        params: TaskParams | None = None,
        ways: Tensor | Sequence[int] | int | None = None,
    ) -> None:
        """Take in tasks, which come last and have taken no step.

        Args:
            tasks: Their names, at least one, new.
            lr, params, ways: As for the class, of these tasks.

        Raises:
            ValueError: A name that is there or given twice, `params` of another number of tasks,
                `ways` where other tasks have none or the other way round.
        """
        names, seen = _names(tasks), set(self.names)
        for name in names:
            if name in seen:
                raise ValueError(f"every task needs a name of its own, got {name!r} twice")
            seen.add(name)
        if not names:
            raise ValueError("expected at least one task, got none")
        if self.names and (ways is None) != (self._ways is None):
            raise ValueError("ways must be given for all tasks or for none")
        count, device = len(names), self._packed.device
        rates = _rates(lr, count, self._lr)
        if not bool((rates > 0).all()):
            raise ValueError(f"lr must be positive, got {lr!r}")
        if params is None:
            packed = self.patched.init(count).packed.detach()
        else:
            self.patched.check_params(params)
            if params.num_tasks != count:
                raise ValueError(f"params hold {params.num_tasks} tasks, but {count} were named")
            packed = params.packed.detach()
        new_ways = None if ways is None else ways_of(ways, count, device).to(device)
        most = setting_of(self.patched, "num_labels")
        if new_ways is not None and not 1 <= int(new_ways.min()) <= int(new_ways.max()) <= (
            most or math.inf
        ):
            raise ValueError(f"ways must be in 1..{most or 'C'}, got {new_ways.tolist()}")
        with torch.no_grad():
            state = self._loop.rule.init(packed)
            self._packed = torch.cat([self._packed, packed])
            self._state = tuple(map(torch.cat, zip(self._state, state, strict=True)))
        self.steps = torch.cat([self.steps, self.steps.new_zeros(count)])
        self.diverged = torch.cat([self.diverged, self.diverged.new_zeros(count)])
        self._lr = torch.cat([self._lr, rates])
        if new_ways is not None:
            self._ways = new_ways if self._ways is None else torch.cat([self._ways, new_ways])
        self.names += names

    def remove(self, tasks: Iterable[Hashable]) -> TaskParams:
        """Let tasks go and return their fast weights, in the order named.

        Raises:
            ValueError: A name that is not there, or twice, or none.
        """
        gone = _names(tasks)
        place = self._place(gone)
        params = TaskParams(self.patched.layout, self._packed[place].clone())
        left = set(self.names).difference(gone)
        kept = [i for i, name in enumerate(self.names) if name in left]
        self.names = tuple(self.names[i] for i in kept)
        self._packed, self.steps, self.diverged, self._lr = (
            t[kept] for t in (self._packed, self.steps, self.diverged, self._lr)
        )
        self._state = tuple(t[kept] for t in self._state)
        self._ways = None if self._ways is None or not kept else self._ways[kept]
        return params

    def _place(self, names: Sequence[Hashable]) -> Place:
        return place_of(names, self.names, self._packed.device)

    # -- steps -------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Tensor], tasks: Sequence[Hashable] | None = None) -> Tensor:
        """One update of the tasks that the batch is of.

        Args:
            batch: Model inputs and ``labels``, each ``[A, N, ...]``; of tasks with fewer rows, see
                `fm.TaskBatch.collate`.
            tasks: The names of these A tasks, in the batch's order; None: all T. Adjacent tasks in
                their order (as `fm.data.Minibatches` has them) are updated where they lie, others
                are copied.

        Returns:
            Losses before the step, ``[A]``.

        An error in the middle, as where memory runs out for a `task_chunk` that is a number, leaves
        the tasks of the chunks before it one step ahead, as `steps` tells: go on with the others by
        name.

        Raises:
            ValueError: A name that is not there, another number of tasks in the batch, labels out
                of range or none that counts, tensors on another device.
        """
        return self._run(self._step, batch, tasks)

    def losses(
        self, batch: Mapping[str, Tensor], tasks: Sequence[Hashable] | None = None
    ) -> Tensor:
        """Losses of a batch by the present weights, ``[A]``, without a step; as for :meth:`step`.

        Dropout is active where the patched model is in training mode.
        """
        return self._run(self._losses, batch, tasks)

    def _run(
        self,
        of: Callable[[Place, Mapping[str, Tensor]], Tensor],
        batch: Mapping[str, Tensor],
        tasks: Sequence[Hashable] | None,
    ) -> Tensor:
        """A checked batch, as many tasks at a time as have room."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                "expected model inputs and labels by name, such as the inputs of a "
                f"fm.data.Minibatch, got {type(batch).__name__}"
            )
        place = slice(0, len(self.names)) if tasks is None else self._place(_names(tasks))
        count = size(place)
        given = check_set("batch", batch)
        if given != count:
            raise ValueError(f"expected a batch of {count} tasks, got {given}")
        both = TaskBatch(batch, batch, None if self._ways is None else self._ways[place])
        inputs = with_ways(both)[0]
        check_sets(self.patched, self._loop.loss_fn, {"batch": inputs})
        losses = []

        def go_on(plan: MemoryPlan) -> Tensor:
            """From where an earlier plan ran out of memory."""
            for part in split(slice(sum(map(len, losses)), count), plan.task_chunk):
                own = {k: v[part] for k, v in inputs.items()}
                losses.append(of(part_of(place, part), own))
            return torch.cat(losses)

        with torch.no_grad(), computing(self._packed.device, self.compute_dtype):
            return self._plans[isinstance(place, slice)].run(self._loop, both, go_on)

    def _losses(self, place: Place, inputs: Mapping[str, Tensor]) -> Tensor:
        params = TaskParams(self.patched.layout, self._packed[place])
        return task_losses(self._loop, params, inputs, only_tasks=True)[0]

    def _step(self, place: Place, inputs: Mapping[str, Tensor]) -> Tensor:
        """One pass and one update; see :meth:`step`."""
        rates = self._lr[place]
        if rates.device.type == "cpu" and not bool((rates >= 0).all()):
            raise ValueError(f"lr must be at least 0, got {rates.tolist()}")
        packed, state, active, losses = self._updated(self._loop, place, *self._rows(place), inputs)
        for whole, part in zip((self._packed, *self._state), (packed, *state), strict=True):
            write(whole, place, part)
        self.steps[place] += active
        self.diverged[place] = ~active
        return losses

    def _rows(self, place: Place) -> tuple[Tensor, State]:
        """Fast weights and the rule's state of tasks: views of adjacent ones, else copies."""
        return self._packed[place], tuple(t[place] for t in self._state)

    def _updated(
        self,
        loop: InnerLoop,
        place: Place,
        packed: Tensor,
        state: State,
        inputs: Mapping[str, Tensor],
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        """Rows of tasks after a step, where they lie if that can be; who goes on; losses."""
        loop = replace(loop, rates=Rates.of_tasks(self._lr[place], self.patched.layout))
        support = support_of(loop, TaskParams(self.patched.layout, packed), inputs, None)
        return inner_step(
            loop, self.steps[place], packed, state, support, ~self.diverged[place],
            create_graph=False, in_place=True,
        )  # fmt: skip

    def _need(self, adjacent: bool, loop: InnerLoop, batch: TaskBatch, mode: str) -> Need:
        """What a step takes, by those of one task and of two, which are taken on copies."""
        loop, peaks = replace(loop, capture=None), []
        for tasks in range(1, min(batch.num_tasks, 2) + 1):
            place = torch.arange(tasks, device=self._packed.device)
            inputs, rows = with_ways(batch[:tasks])[0], self._rows(place)
            devices = [place.device] if place.is_cuda else []
            with torch.random.fork_rng(devices=devices), PeakMemory() as meter:
                self._updated(loop, place, *(rows if adjacent else self._rows(place)), inputs)
            peaks.append(meter.peak)
        per_task = peaks[-1] - peaks[0] if len(peaks) > 1 else peaks[0]
        return Need(peaks[0] - per_task, per_task)

    # -- keeping -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, and tensors that are not copied: what :meth:`load_state_dict` goes on
        from."""
        layout = self.patched.layout
        kept = {"names": list(self.names), "params": self._packed, "state": list(self._state)}
        kept |= {"steps": self.steps, "diverged": self.diverged, "lr": self._lr}
        kept |= {"ways": self._ways, "optimizer": repr(self._loop.rule)}
        shapes = [list(shape) for shape in layout.shapes]
        return kept | {"layout": [list(layout.names), shapes, dict(layout.scales)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the tasks of a :meth:`state_dict`, in place of those here.

        Raises:
            ValueError: It is of another specification, model, dtype or update rule; nothing is
                changed.
        """
        missing = [k for k in self.state_dict() if k not in state]
        if missing:
            raise ValueError(f"expected the state of a FineTuner, which has {missing[0]!r}")
        difference = self.patched.layout.difference(ParamLayout(*state["layout"]))
        if difference:
            raise ValueError(f"the state is of another model or specification: {difference}")
        for what, found, expected in (
            ("optimizer", state["optimizer"], repr(self._loop.rule)),
            ("dtype", state["params"].dtype, self._packed.dtype),
        ):
            if found != expected:
                raise ValueError(
                    f"the state is of another {what}: expected {expected}, got {found}"
                )

        def own(t: Tensor, like: Tensor) -> Tensor:
            return t.to(like.device, like.dtype, copy=True)

        self.names = tuple(state["names"])
        self._packed = own(state["params"], self._packed)
        self._state = tuple(own(t, self._packed) for t in state["state"])
        self.steps, self.diverged, self._lr = (
            own(state[k], getattr(self, k)) for k in ("steps", "diverged", "lr")
        )
        self._ways = None if state["ways"] is None else own(state["ways"], self.steps)


def _names(tasks: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """Names of tasks; a text would be one letter each."""
    if isinstance(tasks, str):
        raise TypeError(f"expected a list of names, such as [{tasks!r}], got {tasks!r}")
    return tuple(tasks)


def _rates(lr: float | Sequence[float] | Tensor, count: int, like: Tensor) -> Tensor:
    """Learning rates ``[count]``, finite."""
    rates = torch.as_tensor(lr, dtype=like.dtype, device=like.device).detach()
    if rates.dim() > 1 or (rates.dim() == 1 and len(rates) != count):
        raise ValueError(f"lr must be a number or one for each of {count} tasks, got {lr!r}")
    if not bool(rates.isfinite().all()):
        raise ValueError(f"lr must be finite, got {lr!r}")
    return rates.expand(count).clone()
