"""The processes that torchrun started, of which this may be one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fastmeta.cli.errors import UserError
from fastmeta.training.processes import Processes


@contextmanager
def launched(device: str) -> Iterator[Processes]:
    """The processes of a launch by torchrun, each with a GPU of its own; else this one alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes()
        return
    cuda = device.startswith("cuda")
    if cuda and device != "cuda":
        raise UserError(f"every process has a GPU of its own: expected device cuda, got {device}")
    if cuda and torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
    dist.init_process_group("nccl" if cuda else "gloo")
    yield Processes.running()
    # Not after an error: the others may wait for this one elsewhere, until torchrun ends them.
    dist.barrier()
    dist.destroy_process_group()
