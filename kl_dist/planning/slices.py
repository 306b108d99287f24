"""AdamW's work, which can be cut anywhere: a rank's part of it is found by arithmetic, and nobody lists the others'.

What is whole on every rank is laid end to end, dtype by dtype, in a *stream*. A bucket is a range of it in equal
chunks, one a rank, so that what an all-gather brings back is that range, in order, and one piece of it a parameter.
What is sharded is updated in place: each rank has its own rows, and nothing travels.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from kl_dist.planning.boxes import Box, Range, Sharding, boxes_of_range, joined, volume
from kl_dist.planning.matrices import near_equal
from kl_dist.planning.units import Unit


@dataclass(frozen=True)
class Stream:
    """Flat parameters of one dtype, end to end, in chunks: the i-th is rank i mod W's, in bucket i div W."""

    units: tuple[int, ...]  # into Plan.units
    starts: tuple[int, ...]  # where each begins, and after them where the last one ends
    chunk: int  # elements
    world_size: int

    @property
    def buckets(self) -> int:
        return math.ceil(self.starts[-1] / (self.chunk * self.world_size))

    def bucket(self, number: int) -> Range:
        """The elements of a bucket."""
        length = self.chunk * self.world_size
        return number * length, min((number + 1) * length, self.starts[-1])

    def share(self, number: int, rank: int) -> Range:
        """What of a bucket is a rank's; empty at the end of the stream."""
        start, stop = self.bucket(number)
        first = min(start + rank * self.chunk, stop)
        return first, min(first + self.chunk, stop)

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, Range]]:
        """The units that lie in a range of the stream, each with what of it does."""
        if start >= stop:
            return
        for place in range(bisect_right(self.starts, start) - 1, len(self.units)):
            begin, end = self.starts[place], self.starts[place + 1]
            if begin >= stop:
                return
            yield self.units[place], (max(start, begin) - begin, min(stop, end) - begin)

    def held(self, place: int, rank: int) -> Iterator[Range]:
        """What a rank has of a unit, bucket by bucket."""
        begin, end = self.starts[place], self.starts[place + 1]
        length = self.chunk * self.world_size
        for number in range(begin // length, -(-end // length)):
            start, stop = self.share(number, rank)
            if max(start, begin) < min(stop, end):
                yield max(start, begin) - begin, min(stop, end) - begin

    def holders(self, place: int) -> list[int]:
        """The ranks that have a part of a unit."""
        first, last = self.starts[place] // self.chunk, -(-self.starts[place + 1] // self.chunk)
        if last - first >= self.world_size:
            return list(range(self.world_size))
        return sorted(number % self.world_size for number in range(first, last))


def make_stream(indices: Sequence[int], units: Sequence[Unit], world_size: int, bucket_bytes: int) -> Stream:
    """Units of one dtype as a stream, in buckets of `bucket_bytes` at most; chunks begin at multiples of 16 bytes."""
    starts = (0, *accumulate(units[i].numel for i in indices))
    itemsize = units[indices[0]].dtype.itemsize
    buckets = math.ceil(starts[-1] * itemsize / bucket_bytes)
    line = 16 // itemsize
    chunk = math.ceil(starts[-1] / (buckets * world_size * line)) * line
    return Stream(tuple(indices), starts, chunk, world_size)


def flat_boxes(ranges: Iterator[Range], shape: Sequence[int]) -> list[Box]:
    """Ranges of a tensor's elements as boxes of it, neighbours as one."""
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return [box for start, stop in merged for box in boxes_of_range(shape, start, stop)]


# -- in place ----------------------------------------------------------------------------------------------------------


def rows_of(sharding: Sharding, rank: int, most: float) -> list[list[Box]]:
    """A rank's shard in parts, each of as many rows as have `most` elements together, or of one: their updates take as
    much memory at a time. End to end they are the shard."""
    parts: list[list[Box]] = []
    taken = 0
    for rows in (rows for box, _ in sharding.held(rank) if volume(box) for rows in _rows(box, most)):
        if not parts or taken + volume(rows) > most:
            parts.append([])
            taken = 0
        parts[-1].append(rows)
        taken += volume(rows)
    return parts


@lru_cache(maxsize=64)
def rows_volumes(sharding: Sharding, most: float) -> tuple[tuple[int, ...], ...]:
    """By position in a row of the grid, how many elements the parts of `rows_of` have."""
    parts = (rows_of(sharding, rank, most) for rank in sharding.grid[0])
    return tuple(tuple(sum(map(volume, part)) for part in there) for there in parts)


def shard_boxes(sharding: Sharding, rank: int) -> list[Box]:
    """A rank's shard as a checkpoint has it: what has no dimensions is one element there."""
    return joined([box or ((0, 1),) for box, _ in sharding.held(rank) if volume(box)])


def _rows(box: Box, most: float) -> Iterator[Box]:
    """A box cut along its first axis into boxes of `most` elements, or of one row; end to end they are the box."""
    if not box:
        yield box
        return
    (first, last), *others = box
    count = min(math.ceil(volume(box) / most), last - first)
    for start, stop in near_equal(last - first, count):
        yield ((first + start, first + stop), *others)
