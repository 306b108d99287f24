"""The processes of a job: which one this is, the device it computes on, and the few things they tell each other.

A job started by `torchrun` has a process group; `python launch/train.py` has none and is its own only rank. A process
that is in one already, and calls a job's main, trains in that one. The rest of the job does not ask which: every method
here does the right thing, often nothing, for a single rank.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kl_dist.ranks import start_of_torchrun
from kl_dist.watch import Watch
from launch import endings
from launch.options import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among all: its `rank` of `size`, and its `device`."""

    rank: int
    size: int
    device: torch.device
    watch: Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over the ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(torch.tensor(float(here), device=self.device)).item() > 0

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

    def doing(self, what: str, unhurried: bool = False) -> None:
        """Say what this rank is at, for the words about one that has stopped; see kl_dist.watch."""
        if self.watch:
            self.watch.doing(what, unhurried)

    def peak_memory(self) -> int:
        """Bytes that this rank had at most so far: on its device, or on a CPU of all of its process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next measures its work and not only its launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def joined_ranks(patience: float = 0.0) -> Iterator[Ranks]:
    """Join the process group `torchrun` announces, if any, and leave it at the end; one that is there is left alone.

    Args:
        patience: seconds after which a rank that has stopped ends the job; 0 to wait for it as long as torch does.
    """
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
    watch = Watch(store, rank, size, patience, endings.record, endings.LOST) if patience else None
    if watch:
        watch.start()
    if device.type == "cuda":
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield Ranks(rank, size, device, watch)
    if watch:
        watch.stop()
    # Not in a `finally`: a rank that fails must not wait here for the others; torchrun ends them when it exits.
    dist.destroy_process_group()


@contextlib.contextmanager
def watched(patience: float) -> Iterator[Watch | None]:
    """Watch the ranks of a process group that is there already, for a job whose library has made it."""
    watch = None
    if patience and dist.is_initialized() and dist.get_world_size() > 1:
        watch = Watch.of_the_job(patience, last_words=endings.record, status=endings.LOST)
        watch.start()
    yield watch
    if watch:
        watch.stop()


def _store_of_this_start() -> dist.Store:
    """Where the ranks find each other, apart from what they left there before `torchrun --max-restarts` began anew.

    A rank that reads a dead one's address there waits for it in vain. The number of the start sets them apart where one
    torchrun counts for all; with several machines, start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"start-{start_of_torchrun()}", store)
