"""The processes of a job: which one this is, the device it computes on, and the few things they tell each other.

A job started by `torchrun` has a process group; `python launch/train.py` has none and is its own only rank. A process
that is in one already, and calls a job's main, trains in that one. The rest of the job does not ask which: every method
here does the right thing, often nothing, for a single rank.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from kl_dist.ranks import start_of_torchrun
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

    def gather(self, value: Any) -> list[Any]:
        """What every rank has to say, in rank order."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def tell(self, value: Any) -> Any:
        """What the first rank has to say, on all of them."""
        return self.gather(value)[0]

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next measures its work and not only its launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group `torchrun` announces, if any, and leave it at the end; one that is there is left alone."""
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
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    store = _store_of_this_start()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Not in a `finally`: a rank that fails must not wait here for the others; torchrun ends them when it exits.
    dist.destroy_process_group()


def _store_of_this_start() -> dist.Store:
    """Where the ranks find each other, apart from what they left there before `torchrun --max-restarts` began anew.

    A rank that reads a dead one's address there waits for it in vain. The number of the start sets them apart where one
    torchrun counts for all; with several machines, start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"start-{start_of_torchrun()}", store)


def leave(status: int) -> NoReturn:
    """End the process, under a launcher without taking the interpreter apart.

    Threads of gloo's may run until then: destroy_process_group leaves those of a group that anything still holds, an
    optimizer or DeepSpeed (findings/torch_gloo_threads.sh). One that lets go of a tensor while the interpreter ends
    aborts a process that has done all it had to.
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    if status == 0 and dist.is_initialized():  # a rank that failed must not wait for the others
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
