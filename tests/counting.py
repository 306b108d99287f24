"""Counts the bytes of collectives between torch.distributed and its process groups, and lets them pass."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# torch has renamed some; the later name second
GATHERS = ("_allgather_base", "all_gather_single")
SWAPS = ("alltoall_base", "all_to_all_single")
OTHERS = ("allgather", "barrier", "reduce", "gather", "scatter", "alltoall")


@dataclass
class Counter:
    """What this rank has sent and received; what it keeps to itself does not count.

    All-gathers and broadcasts count as rings: a rank hands on to the next all but what is the next one's own.
    """

    gathers: list[int] = field(default_factory=list)  # elements this rank gave to each all-gather
    reduces: list[int] = field(default_factory=list)  # to each all-reduce
    gathered: int = 0  # bytes sent, broadcasts and point to point included
    broadcasts: list[int] = field(default_factory=list)  # elements of each broadcast
    reduced: float = 0.0  # bytes sent
    swapped_out: list[int] = field(default_factory=list)  # bytes of each all-to-all
    swapped_in: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def counting(self) -> Iterator["Counter"]:
        """Any other collective within is an error."""
        counts: dict[str, Callable] = dict.fromkeys(GATHERS, self._gather) | dict.fromkeys(SWAPS, self._swap)
        with contextlib.ExitStack() as patches:
            for name, count in (
                counts | {"allreduce": self._reduce, "send": self._send, "broadcast": self._broadcast}
            ).items():
                if real := getattr(dist.ProcessGroup, name, None):
                    patches.enter_context(mock.patch.object(dist.ProcessGroup, name, _counted(real, count)))
            for name in OTHERS:
                error = AssertionError(f"a step calls {name}")
                patches.enter_context(mock.patch.object(dist.ProcessGroup, name, side_effect=error))
            yield self

    def _gather(self, group: Any, output: torch.Tensor, given: torch.Tensor, *options: Any) -> None:
        self.gathers.append(given.numel())
        self.gathered += (group.size() - 1) * given.nbytes

    def _broadcast(self, group: Any, given: list[torch.Tensor], options: Any) -> None:
        self.broadcasts += [x.numel() for x in given]
        self.gathered += sum(x.nbytes for x in given if options.rootRank != (group.rank() + 1) % group.size())

    def _send(self, group: Any, given: list[torch.Tensor], *options: Any) -> None:
        self.gathered += sum(x.nbytes for x in given)

    def _swap(
        self, group: Any, into: torch.Tensor, out: torch.Tensor, coming: list, going: list, *options: Any
    ) -> None:
        me = group.rank()
        self.swapped_out.append(out.element_size() * (sum(going) - going[me]))
        self.swapped_in.append(into.element_size() * (sum(coming) - coming[me]))

    def _reduce(self, group: Any, given: list[torch.Tensor], *options: Any) -> None:
        self.reduces += [x.numel() for x in given]
        self.reduced += 2 * (group.size() - 1) / group.size() * sum(x.nbytes for x in given)


def _counted(real: Callable, count: Callable) -> Callable:
    def call(process_group: Any, *args: Any, **kwargs: Any) -> Any:
        count(process_group, *args)
        return real(process_group, *args, **kwargs)

    return call
