"""The collectives, and nothing else: what ranks tell each other, and when they wait.

Every function is one exchange that all ranks of the group make together; at world size 1 each is the identity, so the
callers have one path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter  # bound here: a program that replaces the clock counts its own looks
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import functional
from torch.profiler import record_function

# torch 2.13 calls it all_gather_single, and the name that came before is deprecated there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# [Note: groups end with destroy_process_group] gloo's threads end with the C++ object of a process group, so whatever
# holds a group leaves them running. They let go of a collective's tensors some time after it was waited for, and before
# Python 3.14 one that does so while the interpreter ends aborts the process. So torch's tables alone hold a group here.


def _let_go_of_default_groups() -> None:
    """Have torch's functional collectives mean the default process group of when they are called.

    Their `group=group.WORLD` is that of their import, which comes with the first optimizer that is made: kept for good.
    """
    for function in vars(functional).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            given = (None if isinstance(value, dist.ProcessGroup) else value for value in function.__defaults__)
            function.__defaults__ = tuple(given)


_let_go_of_default_groups()


def start_of_torchrun() -> int:
    """How often `torchrun --max-restarts` has begun anew, where one torchrun counts for all ranks; elsewhere 0.

    It keeps one store for all starts. What is put there must have this in its keys, or ranks wait for those of before.
    """
    counts_for_all = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if counts_for_all else 0


@dataclass
class Exchange:
    """A collective under way, or none where there is nobody to exchange with."""

    buffer: Tensor  # what this rank receives
    works: tuple[Any, ...]  # torch.distributed.Work: what to wait for
    launched: float = field(default_factory=perf_counter)

    def wait(self) -> Tensor:
        with record_function("kl_shampoo::exchange"):
            for work in self.works:
                work.wait()
        return self.buffer


class Team:
    """Some of the ranks, and the exchanges that buckets travel by. Alone, each is the identity.

    Without a process group of their own they talk within a larger one, point to point, or all of its teams in the same
    all-to-all at once, past each other. Making a group would be safe only where all ranks of the job make it, and they
    may not all be here.
    """

    def __init__(self, group: dist.ProcessGroup | None, members: Sequence[int], whole: bool) -> None:
        self._group = None if group is None else ref(group)  # [Note: groups end with destroy_process_group]
        self.members = members  # as ranks of `group`, ascending
        self.size = len(members)
        self._whole = whole  # all of `group`

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, None for this process alone.

        Raises:
            RuntimeError: it was destroyed.
        """
        if self._group is None:
            return None
        if not dist.is_initialized() or (group := self._group()) is None:  # something else may hold a destroyed one
            raise RuntimeError(
                "the process group of this KLShampoo was destroyed (torch.distributed.destroy_process_group): step and"
                " save before that, or construct KLShampoo anew after init_process_group"
            )
        return group

    def gather(self, chunk: Tensor, room: Tensor) -> Exchange:
        """Launch an all-gather of equal chunks into a room, and do not wait: (size, chunk), a row a rank."""
        if self.size == 1:
            return Exchange(chunk[None], ())
        buffer = room[: self.size * chunk.nbytes].view(chunk.dtype)
        with record_function("kl_shampoo::exchange"):
            if self._whole:
                works = (_all_gather(buffer, chunk, group=self.group, async_op=True),)
            else:
                works = self._gather_point_to_point(buffer.view(self.size, -1), chunk)
        return Exchange(buffer.view(self.size, -1), works)

    def broadcast(self, sent: Sequence[tuple[int, Tensor]]) -> Exchange:
        """Launch broadcasts and do not wait: from each of some members a tensor, contiguous, that the others receive.

        Args:
            sent: members by their place, each with what it sends, or where this rank receives it.
        """
        works: list[Any] = []
        with record_function("kl_shampoo::exchange"):
            for place, tensor in sent if self._whole else ():
                works.append(dist.broadcast(tensor, group=self.group, group_src=self.members[place], async_op=True))
            if not self._whole:
                works += self._broadcast_point_to_point(sent)
        return Exchange(sent[0][1], tuple(works))

    def swap(self, out: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Exchange:
        """Launch an all-to-all of segments of any length, one for each member, and do not wait."""
        coming, going = self._spread(received), self._spread(sent)
        with record_function("kl_shampoo::exchange"):
            work = dist.all_to_all_single(into, out, coming, going, group=self.group, async_op=True)
        return Exchange(into, (work,))

    def _spread(self, lengths: Sequence[int]) -> list[int]:
        """Lengths by member as lengths by rank of the group, with nothing for those who do not belong."""
        found = [0] * dist.get_world_size(self.group)
        for rank, length in zip(self.members, lengths, strict=True):
            found[rank] = length
        return found

    def _broadcast_point_to_point(self, sent: Sequence[tuple[int, Tensor]]) -> list[Any]:
        me = dist.get_rank(self.group)
        operations = []
        for place, tensor in sent:
            if self.members[place] != me:
                operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=self.members[place]))
            else:
                others = (rank for rank in self.members if rank != me)
                operations += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=rank) for rank in others]
        return list(dist.batch_isend_irecv(operations))

    def _gather_point_to_point(self, buffer: Tensor, chunk: Tensor) -> tuple[Any, ...]:
        me = dist.get_rank(self.group)
        operations = []
        for row, rank in zip(buffer, self.members, strict=True):
            if rank == me:
                row.copy_(chunk)
            else:
                operations.append(dist.P2POp(dist.isend, chunk, group=self.group, group_peer=rank))
                operations.append(dist.P2POp(dist.irecv, row, group=self.group, group_peer=rank))
        return tuple(dist.batch_isend_irecv(operations))


class Ranks(Team):
    """The ranks that share the optimizer's state: a process group, or this process alone."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if process_group is not None and not initialized:
            raise RuntimeError("a process_group was given but torch.distributed is not initialised")
        if not initialized and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) but torch.distributed is not"
                " initialised: call torch.distributed.init_process_group before constructing KLShampoo (transformers'"
                " TrainingArguments and accelerate's Accelerator do)"
            )
        group = process_group if process_group is not None or not initialized else dist.group.WORLD
        self.rank = dist.get_rank(group) if group is not None else 0
        if self.rank < 0:
            raise ValueError("this process does not belong to the process_group it gave to KLShampoo")
        super().__init__(group, range(dist.get_world_size(group) if group is not None else 1), whole=True)
        self.device = torch.device("cpu")  # of the parameters, once they are known
        self._groups: WeakValueDictionary[tuple[int, ...], dist.ProcessGroup] = WeakValueDictionary()
        self._made: set[tuple[int, ...]] = set()  # lines of all ranks, this one in them or not

    def __deepcopy__(self, _: dict[int, Any]) -> Ranks:
        """Itself: a connection is not data."""
        return self

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

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks; `value` is mutated."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def from_rank(self, source: int, tensor: Tensor) -> Tensor:
        """What `source` has, on every rank; `tensor` is contiguous and receives it."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def hand_over(self, tensor: Tensor, source: int, target: int) -> None:
        """Send what `source` has to `target`, which receives it in `tensor`, contiguous; the others do nothing."""
        if source == target:
            return
        if self.rank == source:
            dist.send(tensor, group=self.group, group_dst=target)
        elif self.rank == target:
            dist.recv(tensor, group=self.group, group_src=source)

    def get_to_know(self, group: dist.ProcessGroup) -> None:
        """Take note of a process group that some of these ranks have among them: one dimension of a device mesh.

        Raises:
            ValueError: it goes beyond these ranks.
        """
        if group not in self._groups.values():
            self._groups[tuple(map(self.group_rank, dist.get_process_group_ranks(group)))] = group

    def group_rank(self, global_rank: int) -> int:
        """What a rank of the whole job is called here.

        Raises:
            ValueError: it does not belong.
        """
        if self.group is None:
            return 0
        if global_rank not in self._numbers:
            raise ValueError(f"its device mesh goes beyond the process group of KLShampoo, to rank {global_rank}")
        return self._numbers[global_rank]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """By rank of the whole job, what it is called here."""
        return {rank: number for number, rank in enumerate(dist.get_process_group_ranks(self.group))}

    @property
    def is_everyone(self) -> bool:
        """Whether these are all ranks of the job, which may then make process groups."""
        return self.group is None or self.size == dist.get_world_size()

    def make_groups(self, lines: Iterable[tuple[int, ...]]) -> None:
        """Have a process group for each of some lines of ranks, the same on all of them; a collective of everyone.

        They have the backend of this one, which may be another than the job's.
        """
        # whether one is made may not hang on what this rank knows: the others would wait for it
        wanted = [line for line in lines if 1 < len(line) < self.size and line not in self._made]
        assert self.is_everyone or not wanted
        names, backend = dist.get_process_group_ranks(self.group), dist.get_backend_config(self.group)
        other = backend if backend != dist.get_backend_config() else None  # None: the job's, with its timeout
        for line in wanted:
            made = dist.new_group([names[rank] for rank in line], backend=other)
            self._made.add(line)
            if self.rank in line:
                self._groups[line] = made

    def team(self, members: Sequence[int]) -> Team:
        """Some of these ranks, this one among them; in a process group of their own where one is known."""
        if len(members) == 1:
            return Team(None, members, whole=True)
        if tuple(members) == tuple(range(self.size)):
            return self
        group = self._groups.get(tuple(members))
        if group is not None:
            return Team(group, range(len(members)), whole=True)
        return Team(self.group, members, whole=False)

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank has to say, in rank order; pickled, so for set-up and errors alone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _current(self.device):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def per_node(self, otherwise: int) -> int:
        """Ranks on a node, by torchrun's LOCAL_WORLD_SIZE: the fewest of any; a collective.

        Raises:
            ValueError: it is no count on one of them; on all ranks.
        """
        said = os.environ.get("LOCAL_WORLD_SIZE", "").strip() or str(otherwise)
        with self.together():
            if not (said.isdecimal() and int(said)):
                raise ValueError(
                    f"the environment's LOCAL_WORLD_SIZE is {said!r}: leave it out, or have it say how many ranks share"
                    " a node"
                )
        return round(-self.largest(torch.tensor([-float(said)], device=self._meeting_place))[0])

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; a collective of one number."""
        return bool(self.largest(torch.tensor([float(here)], device=self._meeting_place))[0])

    @property
    def _meeting_place(self) -> torch.device:
        """Where what ranks tell each other lies, also before the parameters' device is known to all."""
        if self.size == 1 or self.device.type == "cuda" or dist.get_backend(self.group) != "nccl":
            return self.device
        return torch.device("cuda", torch.cuda.current_device())

    def raise_together(self, problem: Exception | None) -> None:
        """Raise on every rank when any rank has a problem: its own where it has one, else the first other's.

        Raises:
            ValueError, TypeError or RuntimeError, as the rank that has the problem would.
        """
        if not self.any(problem is not None):
            return
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

    def check_same(self, digest: str, lines: Callable[[], Sequence[str]], what: str) -> None:
        """Raise on every rank when their digests differ, naming the first of their lines that does.

        Args:
            digest: of the lines, or at least of what they say.
            lines: makes them, where they are wanted.

        Raises:
            ValueError: on all ranks.
        """
        words = hashlib.sha256(digest.encode()).digest()
        numbers = [int.from_bytes(words[i : i + 7], "little") for i in range(0, 28, 7)]  # whole and positive in 64 bits
        told = torch.tensor([*numbers, *(-x for x in numbers)], dtype=torch.int64, device=self._meeting_place)
        largest = self.largest(told)
        if largest[:4] == [-x for x in largest[4:]]:
            return
        digests = self.gather_objects(digest)
        odd = next(rank for rank, other in enumerate(digests) if other != digests[0])
        theirs = self.gather_objects(tuple(lines()) if self.rank in (0, odd) else None)
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
