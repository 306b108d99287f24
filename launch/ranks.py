"""The processes of a job: which one this is, the device it computes on, and the few things they tell each other.

A job started by `torchrun` has a process group; `python launch/train.py` has none and is its own only rank. The rest of
the job does not ask which: every method here does the right thing, often nothing, for a single rank.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launch.options import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among all: its `rank` of `size`, and its `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over the ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if dist.is_initialized():
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next measures its work and not only its launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group `torchrun` announces, if any, and leave it at the end."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"more processes than GPUs on this machine; start at most {torch.cuda.device_count()}, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Not in a `finally`: a rank that fails must not wait here for the others; torchrun ends them when it exits.
    dist.destroy_process_group()
