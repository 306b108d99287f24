"""The collectives, and nothing else: what ranks tell each other, and when they wait.

Every function is one exchange that all ranks of the group make together; at world size 1 each is the identity, so the
callers have one path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 calls it all_gather_single, and the name that came before is deprecated there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Gathering(NamedTuple):
    """An all-gather under way."""

    buffer: Tensor  # (world size, chunk); row r is what rank r sent
    work: Any  # torch.distributed.Work, or None when there is nothing to wait for

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.buffer


class Room(NamedTuple):
    """Memory that buckets travel through, allocated once: a step must not find that there is none left."""

    send: Tensor  # bytes
    receive: Tensor  # bytes of all ranks' chunks; alone, the very bytes sent

    def chunk(self, numel: int, dtype: torch.dtype) -> Tensor:
        """This rank's chunk, (numel,), all zero."""
        return self.send[: numel * dtype.itemsize].view(dtype).zero_()


class Ranks:
    """The ranks that share the optimizer's state: a process group, or this process alone."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if process_group is not None and not initialized:
            raise RuntimeError("a process_group was given but torch.distributed is not initialised")
        if not initialized and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) but torch.distributed is not"
                " initialised: call torch.distributed.init_process_group before constructing KLShampoo"
            )
        self.device = torch.device("cpu")  # of the parameters, once they are known
        self.group = process_group if process_group is not None or not initialized else dist.group.WORLD
        self.size = dist.get_world_size(self.group) if self.group is not None else 1
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        if self.rank < 0:
            raise ValueError("this process does not belong to the process_group it gave to KLShampoo")

    def settle_on(self, device: torch.device) -> None:
        """Take note of where the parameters are.

        Raises:
            ValueError: the backend cannot exchange tensors that lie there.
        """
        if self.size > 1 and device.type != "cuda" and dist.get_backend(self.group) == "nccl":
            raise ValueError("the process group's backend is nccl, so the parameters must be on CUDA devices")
        self.device = device

    def largest(self, values: Tensor) -> list[float]:
        """Elementwise maximum over ranks, on the host: the one synchronisation of a step. `values` is mutated."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def room(self, nbytes: int, device: torch.device) -> Room:
        """Memory for chunks of up to `nbytes`, to send and to receive."""
        send = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return Room(send, send if self.size == 1 else send.new_empty(self.size * nbytes))

    def gather(self, chunk: Tensor, room: Room) -> Gathering:
        """Launch an all-gather of one chunk per rank into the room, and do not wait."""
        buffer = room.receive[: self.size * chunk.nbytes].view(chunk.dtype).view(self.size, -1)
        if self.size == 1:
            return Gathering(buffer, None)
        work = _all_gather(buffer.view(-1), chunk, group=self.group, async_op=True)
        return Gathering(buffer, work)

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank has to say, in rank order; pickled, so for set-up and errors alone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _current(self.device):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def raise_together(self, problem: Exception | None) -> None:
        """Raise on every rank when any rank has a problem: its own where it has one, else the first other's.

        Raises:
            ValueError, TypeError or RuntimeError, as the rank that has the problem would.
        """
        told = self.gather_objects(None if problem is None else (_public_type(problem), str(problem)))
        if problem is not None:
            raise problem
        for rank, problem_there in enumerate(told):
            if problem_there is not None:
                kind, text = problem_there
                raise kind(f"rank {rank}: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block, then raise on every rank when it failed on any: none is left waiting in what follows."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        self.raise_together(problem)

    def check_same(self, digest: str, lines: tuple[str, ...], what: str) -> None:
        """Raise on every rank when their digests differ, naming the first of their lines that does.

        Raises:
            ValueError: on all ranks.
        """
        digests = self.gather_objects(digest)
        if len(set(digests)) == 1:
            return
        odd = next(rank for rank, other in enumerate(digests) if other != digests[0])
        theirs = self.gather_objects(lines if self.rank in (0, odd) else None)
        raise ValueError(f"{what} differs between ranks: {_first_difference(theirs[0], theirs[odd], odd)}")


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """What torch pickles for NCCL goes through the current device, which a user may not have set."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _first_difference(ours: tuple[str, ...], theirs: tuple[str, ...], rank: int) -> str:
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            return f"rank 0 has «{a}», rank {rank} has «{b}»"
    longer, line = (0, ours[len(theirs)]) if len(ours) > len(theirs) else (rank, theirs[len(ours)])
    return f"only rank {longer} has «{line}»"


def _public_type(problem: Exception) -> type[Exception]:
    return next((kind for kind in (ValueError, TypeError) if isinstance(problem, kind)), RuntimeError)
