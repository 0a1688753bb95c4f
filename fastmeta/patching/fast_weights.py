"""Fast weights of linear layers and embeddings as the steps that made them.

Where tasks descend by plain SGD from weights that all share, a weight need not be a segment of the
packed buffer: it is that of all tasks, and what each step's rows add
(`fastmeta.patching.adapted_linear`). The first step then reads one weight for all tasks. Later ones
apply the rows as low-rank factors where they are few, and read each task's own weight, written out,
where they are many.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.ops.batched_linear import affine
from fastmeta.patching.adapted_linear import Descent, Gate, Gathering, adapted_linear, descend
from fastmeta.patching.words import Words, are_few, collect, take


class FastMatrix:
    """The weight of a linear layer for T tasks, after some steps.

    Args:
        weight: ``[out, in]`` (``[in, out]`` of a transformers Conv1D), shared by all tasks.
        tasks: T.
        steps: How many steps there will be.
        gate: Tells the inner loss's backward pass from others.
        alike: Whether all steps after the first are to be alike: rows that are kept have room for
            those of all steps from the first on, zeros before them.

    Attributes:
        last: Input and output of the last call, where `recording`.
    """

    def __init__(
        self, weight: Tensor, tasks: int, steps: int, gate: Gate, alike: bool = False
    ) -> None:
        self.shape, self.tasks, self.steps, self.gate = weight.shape, tasks, steps, gate
        self.alike = alike
        self.weight = weight.unsqueeze(0)  # [H, ., .], or written out [T * H, ., .]
        self.own: Gathering | None = None
        # [T * H, r, .]: b^T a is added to the weight
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.descent: Descent | None = None  # of the last call
        self.recording = self.with_bias = False
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def __call__(self, x: Tensor, base: Tensor | None, *, nt: bool, heads: int = 1) -> Tensor:
        """The layer on ``[T * heads, M, .]``; with heads, each part of the weight's first axis on
        its own rows.

        Args:
            base: ``[T, 1, out]``, ``[T, M, out]`` or None.
            nt: Whether the weight is applied transposed: ``x W^T``, or ``x W``.
        """
        weight, a, b = self.weight, self.a, self.b
        if self.gate.bf16:
            x, base = x.float(), None if base is None else base.float()
        if self.own is None and a is None:
            weight = weight.reshape(heads, -1, weight.shape[2])
        elif x.shape[0] != (weight if a is None else a).shape[0]:
            # other heads than when it was adapted
            weight, a, b = self.written_out().reshape(x.shape[0], -1, weight.shape[2]), None, None
        a, b = (a, b) if nt else (b, a)
        self.descent = None
        if self.recording and weight.shape[0] in (1, x.shape[0]) and not self._keeps_rows(x):
            self.descent = Descent(self.own)
        y = adapted_linear(
            x, weight, a, b, base, nt=nt, gate=self.gate, landing=self.own, descent=self.descent
        )
        if self.recording:
            self.weight = weight
            self.calls.append((x, y, nt))
        return y

    def descend(self, g: Tensor, second_order: bool) -> None:
        """Take a step: g is the output's gradient times the negative rate, ``[T * H, M, .]``."""
        ((x, _, nt),) = self.calls
        if self.descent is not None and self.descent.taken is not None:
            self.weight, self.own = self.descent.taken
            return
        x = x if second_order else x.detach()
        if self._keeps_rows(x):
            a, b = (x, g) if nt else (g, x)
            self.a, self.b = self._with_rows(self.a, a), self._with_rows(self.b, b)
        else:
            self.weight, self.own = descend(
                self.weight, x, g, nt=nt, gate=self.gate, landing=self.own
            )

    def _with_rows(self, before: Tensor | None, rows: Tensor) -> Tensor:
        count = rows.shape[1]
        if self.alike:
            room = rows.new_zeros(1, 1, 1).expand(
                rows.shape[0], count * (self.steps - 1), rows.shape[2]
            )
            before = room if before is None else before[:, count:]
        return rows if before is None else torch.cat([before, rows], 1)

    def _keeps_rows(self, x: Tensor) -> bool:
        """Whether the steps' rows stay factors, for an input ``[T * H, M, .]``: for all steps what
        the first decides, which may have been captured for other numbers of rows."""
        _, n, k = self.weight.shape
        few = self.a is not None or x.shape[1] * self.steps * (n + k) <= n * k
        return self.own is None and few

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a step writes anew, and what it reads besides, where all are alike."""
        if self.own is not None:
            return [self.weight], []
        return [t for t in (self.a, self.b) if t is not None], [self.weight]

    def finish(self) -> None:
        """After the last step."""
        self.recording = False

    def landings(self) -> list[Gathering | None]:
        """Where the gradients of what a step writes anew gather; None: autograd brings them."""
        return [self.own for _ in self.state()[0]]

    def at(self, written: Sequence[Tensor], read: Sequence[Tensor]) -> FastMatrix:
        """This matrix with other tensors in place of those of :meth:`state`."""
        other = copy.copy(self)
        other.calls, other.descent = [], None
        if self.own is not None:
            (other.weight,) = written
            other.own = Gathering(other.weight)
        else:
            (other.weight,) = read
            other.a, other.b = written or (None, None)
        return other

    def written_out(self) -> Tensor:
        """``[T, *shape]``."""
        weight = self.weight
        if self.own is None:
            weight = weight.expand(self.tasks, *weight.shape).flatten(0, 1)
            if self.a is not None:
                weight = affine(self.b.mT, self.a, weight, nt=False, exact=True)
        return weight.reshape(self.tasks, *self.shape)


class FastTable:
    """The weight ``[V, D]`` of an embedding for T tasks, after some steps on the same ids.

    A step adds its rows' gradients to the words of their ids. Where those are few, what is added is
    kept apart (`fastmeta.patching.words`); else every task has a table of its own.
    """

    def __init__(self, weight: Tensor, tasks: int, padding_idx: int | None) -> None:
        self.weight, self.tasks, self.padding_idx = weight, tasks, padding_idx
        self.own: Tensor | None = None
        self.words: Words | None = None
        self.added: Tensor | None = None  # [T, M + 1, D]
        self.recording = self.with_bias = False
        self.calls: list[tuple[Tensor, Tensor]] = []
        # where recording: rows of the weight, and of what is added
        self.base: Tensor | None = None
        self.rows: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of each task's table for task-major ids ``[T * N, ...]``."""
        mine = ids.reshape(self.tasks, -1)
        again = self.recording and not self.calls  # every step's first call is of the same ids
        if self.own is not None:
            y = self.own[self._task(), mine]
            if self.padding_idx is not None:
                y = torch.where((mine == self.padding_idx).unsqueeze(-1), y.detach(), y)
        else:
            if again and self.base is None:  # once: its gradient is as large as the table
                self.base = F.embedding(mine, self.weight, self.padding_idx)
            y = self.base if again else F.embedding(mine, self.weight, self.padding_idx)
            if self.added is not None:
                y = y + take(self.added, self.rows if again else self.words.rows(mine))
        if self.recording:
            self.calls.append((mine, y))
        return y.view(*ids.shape, -1)

    def descend(self, g: Tensor, second_order: bool) -> None:
        """Take a step: g is the output's gradient times the negative rate, ``[T, M, D]``."""
        ((ids, _),) = self.calls
        places = ids.shape[1]
        known = self.words is not None  # by the first step, perhaps captured for other texts
        if self.own is None and (known or are_few(places, self.weight.shape[0])):
            if self.words is None:
                self.words = Words.of(ids, self.padding_idx)
                self.rows = self.words.rows(ids)
            more = collect(g, self.rows, places)
            self.added = more if self.added is None else self.added + more
            return
        if self.padding_idx is not None:  # the padding word has no gradient
            g = g.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0.0)
        table = self.weight.expand(self.tasks, -1, -1) if self.own is None else self.own
        self.own = table.index_put((self._task(), ids), g, accumulate=True)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        """As that of :class:`FastMatrix`."""
        written = [t for t in (self.added, self.own) if t is not None]
        words = [] if self.words is None else self.words.tensors()
        return written, [self.weight, *(t for t in (self.base, self.rows) if t is not None), *words]

    def finish(self) -> None:
        """As that of :class:`FastMatrix`."""
        self.recording, self.base, self.rows = False, None, None

    def landings(self) -> list[Gathering | None]:
        """As those of :class:`FastMatrix`."""
        return [None for _ in self.state()[0]]

    def at(self, written: Sequence[Tensor], read: Sequence[Tensor]) -> FastTable:
        """This table with other tensors in place of those of :meth:`state`."""
        other, written, read = copy.copy(self), iter(written), iter(read)
        other.weight = next(read)
        other.added, other.own = (t if t is None else next(written) for t in (self.added, self.own))
        other.base, other.rows = (t if t is None else next(read) for t in (self.base, self.rows))
        if self.words is not None:
            other.words = Words(*read, self.padding_idx)
        other.calls = []
        return other

    def written_out(self) -> Tensor:
        """``[T, V, D]``."""
        if self.own is not None:
            return self.own
        if self.added is None:
            return self.weight.expand(self.tasks, -1, -1)
        return self.words.written_out(self.weight, self.added)

    def _task(self) -> Tensor:
        return torch.arange(self.tasks, device=self.weight.device).unsqueeze(1)


Leaf = FastMatrix | FastTable
