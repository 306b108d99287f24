"""What travels together, or is computed together: units in buckets, every rank's in an order that batches well.

A bucket belongs to one *grid* of ranks (see `kl_dist.planning.boxes.Sharding`): along its rows and columns gradients
reach their owners, and updates come back. There are three kinds: matrices with an owner each, a range of a stream under
AdamW of which each rank has a chunk, and rows of shards that each rank updates in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch

from kl_dist.planning.boxes import Box, Grid, Range
from kl_dist.planning.slices import Stream, rows_of, rows_volumes
from kl_dist.planning.units import Parameter, Unit, part_of

FEW = 4
"""Rows of a grid that always exchange their updates in one all-gather."""
EVEN = 1.05
"""What an all-gather may take, over what is in it."""
GATHERED = 2
"""Buckets' bytes that one may take."""
LESS = 0.9
"""What two levels may send between nodes, over what one ring does."""


class Member(NamedTuple):
    """What a rank computes in a bucket."""

    number: int  # into Plan.units
    unit: Unit  # that unit, or under AdamW this rank's part of it
    boxes: tuple[Box, ...] = ()  # of rows of a shard, which these are, end to end


@dataclass(frozen=True)
class Bucket:
    """What one exchange carries: from each rank its units, in order."""

    dtype: torch.dtype
    grid: Grid | None  # rows of ranks that share a replica, columns of ranks that hold the same; None: nothing travels
    on_node: int  # ranks of a column on each node, where its updates travel in two levels; 1: in one

    def members(self, units: Sequence[Unit], parameters: Sequence[Parameter], rank: int) -> tuple[Member, ...]:
        """A rank's units, in order."""
        raise NotImplementedError

    @property
    def said(self) -> str:
        """What is in it, in words; its grid follows from the parameters'."""
        raise NotImplementedError

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold what `rank` has a part of, where something travels."""
        return (rank,) if self.grid is None else self.grid[self._places[rank][0]]

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same as `rank`, where something travels."""
        if self.grid is None:
            return (rank,)
        position = self._places[rank][1]
        return tuple(row[position] for row in self.grid)

    def levels(self, column: Sequence[int]) -> list[tuple[int, ...]]:
        """The lines of ranks within which the updates of a column travel: itself, or those of both levels."""
        if self.on_node == 1:
            return [tuple(column)]
        between = [tuple(column[k :: self.on_node]) for k in range(self.on_node)]
        return [*between, *zip(*between, strict=True)]

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """By rank its row and its position there."""
        return {rank: (i, k) for i, row in enumerate(self.grid or ()) for k, rank in enumerate(row)}


@dataclass(frozen=True)
class MatrixBucket(Bucket):
    """Matrices, by their owners."""

    owned: tuple[tuple[int, tuple[int, ...]], ...]  # owners, ascending, and their units: indices into Plan.units
    legs: tuple[
        Range, ...
    ]  # of the grid's rows, those whose updates are broadcast at a time; (): one all-gather for all

    def of(self, rank: int) -> tuple[int, ...]:
        return self._by_owner.get(rank, ())

    def members(self, units: Sequence[Unit], parameters: Sequence[Parameter], rank: int) -> tuple[Member, ...]:
        return tuple(Member(i, units[i]) for i in self.of(rank))

    @property
    def said(self) -> str:
        return f"matrices {self.owned}, legs {self.legs}"

    @cached_property
    def _by_owner(self) -> dict[int, tuple[int, ...]]:
        return dict(self.owned)


@dataclass(frozen=True)
class StreamBucket(Bucket):
    """A range of a stream, in one chunk a rank."""

    stream: Stream
    number: int  # among the stream's buckets

    @property
    def said(self) -> str:
        return f"slices of {self.stream.units}, {self.stream.bucket(self.number)} in chunks of {self.stream.chunk}"

    def members(self, units: Sequence[Unit], parameters: Sequence[Parameter], rank: int) -> tuple[Member, ...]:
        parts = self.stream.parts(*self.stream.share(self.number, rank))
        return tuple(Member(i, part_of(units[i], parameters[units[i].parameter], [(part,)])) for i, part in parts)


@dataclass(frozen=True)
class RowsBucket(Bucket):
    """Rows of shards under AdamW, updated in place."""

    parts: tuple[tuple[int, int], ...]  # units, and which of a rank's rows of each
    most: int  # bytes of rows together

    @property
    def said(self) -> str:
        return f"rows {self.parts}, {self.most} bytes at most"

    def members(self, units: Sequence[Unit], parameters: Sequence[Parameter], rank: int) -> tuple[Member, ...]:
        found = []
        for i, number in self.parts:
            parameter = parameters[units[i].parameter]
            assert parameter.sharding is not None
            parts = rows_of(parameter.sharding, rank, self.most / parameter.dtype.itemsize)
            if number < len(parts):
                found.append(Member(i, part_of(units[i], parameter, parts[number]), tuple(parts[number])))
        return tuple(found)


def turn(unit: Unit, groups: Sequence[Mapping[str, Any]]) -> int:
    """In which of the T steps of a cycle a unit is refreshed."""
    group = groups[unit.group]
    return unit.phase % group["precondition_frequency"] if group["stagger"] else 0


def everywhere(world_size: int) -> Grid:
    """The grid of what is whole on every rank."""
    return tuple((rank,) for rank in range(world_size))


def ranks_on_a_node(grid: Grid, ranks_per_node: int) -> int:
    """How many ranks of a column stand on each node, where its updates are to travel in two levels; 1: in one.

    [Note: two levels] In a ring of W ranks, what comes into a node is all but what the first rank there has, from the
    others of that node too: of L ranks' W - 1 parts. In two levels, between the ranks of one number on all nodes and
    then within each node, it is W - L, and every rank receives its share of that by its own link; all that a rank sends
    remains W - 1. So two levels it is where that is less by a tenth and more, as for up to eight nodes of eight.
    """
    columns = zip(*grid, strict=True)
    nodes = ([rank // ranks_per_node for rank in column] for column in columns)
    runs = {tuple(len(list(run)) for _, run in groupby(column)) for column in nodes}
    if len(runs) != 1 or len(set(lengths := runs.pop())) != 1:
        return 1
    on_node, size = lengths[0], sum(lengths)
    return on_node if len(lengths) > 1 and size - on_node <= LESS * (size - 1) else 1


def matrix_buckets(
    indices: Sequence[int],
    units: Sequence[Unit],
    owners: Sequence[int | None],
    parameters: Sequence[Parameter],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
    ranks_per_node: int,
    bucket_bytes: int,
) -> Iterator[MatrixBucket]:
    """Every rank's matrices in order of kind and turn, in buckets.

    Args:
        owners: by unit.
        bucket_bytes: of a bucket, over all ranks; exceeded where one unit per rank is more.
    """
    plain = everywhere(world_size)
    kinds: dict[tuple[str, Grid], list[int]] = {}
    for i in indices:
        sharding = parameters[units[i].parameter].sharding
        kinds.setdefault((str(units[i].dtype), plain if sharding is None else sharding.grid), []).append(i)
    for (_, grid), members in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        queues: dict[int, list[int]] = {}
        for i in sorted(members, key=lambda i: (units[i].kind, turn(units[i], groups), i)):
            owner = owners[i]
            assert owner is not None
            queues.setdefault(owner, []).append(i)
        on_node = ranks_on_a_node(grid, ranks_per_node)
        for chosen in _fill(dict(sorted(queues.items())), units, bucket_bytes / world_size):
            row_of = {rank: i for i, row in enumerate(grid) for rank in row}
            weights = [0.0] * len(grid)
            for owner, indices_there in chosen:
                weights[row_of[owner]] += sum(units[i].nbytes for i in indices_there) / len(grid[0])
            # one of several shards may have twice its share of a bucket's matrices: of blocks cut as the shards are
            most = bucket_bytes / min(len(grid[0]), 2)
            yield MatrixBucket(units[members[0]].dtype, grid, on_node, chosen, legs_of(weights, most))


def legs_of(weights: Sequence[float], bucket_bytes: float) -> tuple[Range, ...]:
    """How updates travel along the columns of a grid.

    An all-gather takes the largest row's room for every row, and all of them at once. So where rows are not alike, or
    have more than `GATHERED` buckets together, they are broadcast instead, as many at a time as a bucket has bytes;
    but for `FEW` rows, where a broadcast leaves links idle that an all-gather uses.

    Args:
        weights: by row of the grid, the bytes of its updates for one rank.

    Returns:
        Ranges of rows, in order; none where one all-gather does it.
    """
    total, padded = sum(weights), len(weights) * max(weights)
    if len(weights) <= FEW or (padded <= EVEN * total and padded <= GATHERED * bucket_bytes):
        return ()
    legs: list[Range] = []
    taken = math.inf
    for row, weight in enumerate(weights):
        if not weight:
            continue
        if taken + weight > bucket_bytes:
            legs.append((row, row + 1))
            taken = 0.0
        legs[-1] = legs[-1][0], row + 1
        taken += weight
    return tuple(legs)


def _fill(
    queues: Mapping[int, Sequence[int]], units: Sequence[Unit], share: float
) -> Iterator[tuple[tuple[int, tuple[int, ...]], ...]]:
    """Walk all ranks' queues together; each bucket takes from each as many units as fit.

    A rank has room for its share of bytes, or for the largest unit; evened out over the buckets that needs.
    """
    largest = max(units[i].nbytes for queue in queues.values() for i in queue)
    longest = max(sum(units[i].nbytes for i in queue) for queue in queues.values())
    count = math.ceil(longest / max(share, largest))
    room = max(math.ceil(longest / count), largest)
    taken_up_to = dict.fromkeys(queues, 0)
    while any(taken_up_to[rank] < len(queue) for rank, queue in queues.items()):
        members = []
        for rank, queue in queues.items():
            first, taken = taken_up_to[rank], 0
            while taken_up_to[rank] < len(queue) and taken + units[queue[taken_up_to[rank]]].nbytes <= room:
                taken += units[queue[taken_up_to[rank]]].nbytes
                taken_up_to[rank] += 1
            if taken_up_to[rank] > first:
                members.append((rank, tuple(queue[first : taken_up_to[rank]])))
        yield tuple(members)


def rows_buckets(
    indices: Sequence[int], units: Sequence[Unit], parameters: Sequence[Parameter], most: int
) -> Iterator[RowsBucket]:
    """Shards under AdamW, in buckets of `most` bytes on the rank that has the largest part."""
    for dtype in dict.fromkeys(units[i].dtype for i in indices):
        parts: list[tuple[int, int]] = []
        taken = 0.0
        for i in (i for i in indices if units[i].dtype == dtype):
            sharding = parameters[units[i].parameter].sharding
            assert sharding is not None
            count = max(map(len, rows_volumes(sharding, most / dtype.itemsize)))
            for number in range(count):
                nbytes = sharding.largest * dtype.itemsize / count
                if parts and taken + nbytes > most:
                    yield RowsBucket(dtype, None, 1, tuple(parts), most)
                    parts, taken = [], 0.0
                parts.append((i, number))
                taken += nbytes
        if parts:
            yield RowsBucket(dtype, None, 1, tuple(parts), most)


def aligned(numel: int, dtype: torch.dtype) -> int:
    """Up to a multiple of 16 bytes, so that every rank's chunk begins where vector instructions can."""
    per_line = 16 // dtype.itemsize
    return -(-numel // per_line) * per_line
