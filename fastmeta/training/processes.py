"""Several processes, one meta-step: each takes some of a batch's tasks, gradients are summed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmeta.batch import TaskBatch


class Processes:
    """Processes that share meta-steps, by torch's default group; by default this one alone.

    What is not said to be local is a collective: all processes call it, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    @classmethod
    def running(cls) -> Processes:
        """Those of the default group, where one was initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: TaskBatch) -> TaskBatch | None:
        """Every `count`-th task, from the rank's on; None where there are fewer. Local."""
        if self.count == 1:
            return batch
        index = range(self.rank, batch.num_tasks, self.count)
        return batch.select(torch.tensor(index)) if index else None

    def merge(self, own: Tensor) -> Tensor:
        """What there is for each task of a batch, ``[T, ...]`` on the CPU, from the shares'."""
        if self.count == 1:
            return own.cpu()
        parts = self.gather(own.cpu())
        shape = sum(len(p) for p in parts), *own.shape[1:]
        whole = torch.empty(shape, dtype=own.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.count] = part
        return whole

    def gather(self, own: Any) -> list[Any]:
        """What every process gives, by rank."""
        if self.count == 1:
            return [own]
        parts = [None] * self.count
        dist.all_gather_object(parts, own)
        return parts

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)))

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The sum of all processes' gradients in each of them; None where none has one."""
        if self.count == 1:
            return
        own = _each_once(parameters)
        used = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
        used = [p for p, count in zip(own, self.sum(used).tolist(), strict=True) if count]
        for dtype in sorted({p.dtype for p in used}, key=str):
            some = [p for p in used if p.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            total = self.sum(torch.cat([g.flatten() for g in gradients]))
            for p, part in zip(some, total.split([p.numel() for p in some]), strict=True):
                p.grad = part.view_as(p)

    @torch.no_grad()
    def start_alike(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first."""
        if self.count == 1:
            return
        for tensor in _each_once(tensors):
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def _each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
