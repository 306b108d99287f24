"""What travels together: units in buckets, every rank's in an order that batches well.

A bucket belongs to one *grid* of ranks (see `kl_dist.planning.boxes.Sharding`): along its rows and columns gradients
reach their owners, and updates come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kl_dist.planning.boxes import Grid
from kl_dist.planning.units import Parameter, Unit


@dataclass(frozen=True)
class Bucket:
    """What one exchange carries: from each rank its units, in order."""

    dtype: torch.dtype
    units: tuple[tuple[int, ...], ...]  # by rank: indices into Plan.units
    grid: Grid | None  # rows of ranks that share a replica, columns of ranks that hold the same; None: nothing travels

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold what `rank` has a part of, where something travels."""
        return (rank,) if self.grid is None else next(row for row in self.grid if rank in row)

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same as `rank`, where something travels."""
        if self.grid is None:
            return (rank,)
        position = self.row(rank).index(rank)
        return tuple(row[position] for row in self.grid)


def turn(unit: Unit, groups: Sequence[Mapping[str, Any]]) -> int:
    """In which of the T steps of a cycle a unit is refreshed."""
    group = groups[unit.group]
    return unit.phase % group["precondition_frequency"] if group["stagger"] else 0


def fill_buckets(
    units: Sequence[Unit],
    keepers: Sequence[Sequence[int]],
    parameters: Sequence[Parameter],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
    bucket_bytes: int,
) -> Iterable[Bucket]:
    """Every rank's units in order of kind and turn, in buckets.

    Matrices and slices do not share a bucket: slices divide to the element, so theirs need no padding.

    Args:
        keepers: by unit, the ranks that hold its state.
        bucket_bytes: of a bucket, over all ranks; exceeded where one unit per rank is more.
    """
    everywhere: Grid = tuple((rank,) for rank in range(world_size))
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, unit in enumerate(units):
        sharding, elementwise = parameters[unit.parameter].sharding, unit.elementwise
        grid = everywhere if sharding is None else None if elementwise else sharding.grid
        kinds.setdefault((elementwise, str(unit.dtype), grid), []).append(i)
    for (elementwise, _, grid), members in sorted(kinds.items(), key=lambda kind: (kind[0][0], kind[1][0])):
        queues: list[list[int]] = [[] for _ in range(world_size)]
        for i in members:
            for rank in keepers[i]:
                queues[rank].append(i)
        if not elementwise:
            queues = [sorted(q, key=lambda i: (units[i].kind, turn(units[i], groups), i)) for q in queues]
        for chosen in _fill(queues, units, bucket_bytes / world_size):
            yield Bucket(units[members[0]].dtype, chosen, grid)


def _fill(
    queues: Sequence[Sequence[int]], units: Sequence[Unit], share: float
) -> Iterable[tuple[tuple[int, ...], ...]]:
    """Walk all ranks' queues together; each bucket takes from each as many units as fit.

    A rank has room for its share of bytes, or for the largest unit; evened out over the buckets that needs.
    """
    largest = max((units[i].nbytes for queue in queues for i in queue), default=0)
    longest = max((sum(units[i].nbytes for i in queue) for queue in queues), default=0)
    count = math.ceil(longest / max(share, largest, 1))
    room = max(math.ceil(longest / max(count, 1)) + 16, largest)  # slices differ by one element
    taken_up_to = [0] * len(queues)
    while any(first < len(queue) for first, queue in zip(taken_up_to, queues, strict=True)):
        members = []
        for rank, queue in enumerate(queues):
            first, taken = taken_up_to[rank], 0
            while taken_up_to[rank] < len(queue) and taken + units[queue[taken_up_to[rank]]].nbytes <= room:
                taken += units[queue[taken_up_to[rank]]].nbytes
                taken_up_to[rank] += 1
            members.append(tuple(queue[first : taken_up_to[rank]]))
        yield tuple(members)


def aligned(numel: int, dtype: torch.dtype) -> int:
    """Up to a multiple of 16 bytes, so that every rank's chunk begins where vector instructions can."""
    per_line = 16 // dtype.itemsize
    return -(-numel // per_line) * per_line
