"""Which part of a block lies in which shard: arithmetic on index ranges, before any tensor is touched.

A *box* is what one rank holds of a stored tensor, a range of every axis. FSDP2, tensor parallelism and both together
give boxes, all of them. A block (`kl_dist.planning.matrices`) is a range of every side of one entry of a reading. Where
box and block meet there is a *piece*, or several where a side is made of axes of which the box has only a part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kl_dist.planning.matrices import Block, Reading

Range = tuple[int, int]
Box = tuple[Range, ...]
Grid = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sharding:
    """Who holds what of a parameter: `grid[r][s]` is the rank that has box s in replica r.

    One process, DDP: W replicas of one box. FSDP2: one replica of W boxes. HSDP: both. ZeRO: one replica of W ranges of
    the elements, each a few boxes that lie end to end in flat memory.
    """

    grid: Grid
    boxes: tuple[tuple[Box, ...], ...]  # by position in a row, what is held there, in the order of memory
    flat: bool = False  # a shard is flat memory; False: it is the one box, and has its shape

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold the replica in which `rank` has a part."""
        return self.grid[self._places[rank][0]]

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same box as `rank`, itself included."""
        position = self._places[rank][1]
        return tuple(row[position] for row in self.grid)

    def held(self, rank: int) -> Iterator[tuple[Box, int | None]]:
        """The boxes of a rank, each with where it begins in flat memory, or None."""
        start = 0
        for box in self.boxes[self._places[rank][1]]:
            yield box, start if self.flat else None
            start += volume(box)

    @cached_property
    def volumes(self) -> tuple[int, ...]:
        """By position in a row, how many elements are held there."""
        return tuple(sum(map(volume, boxes)) for boxes in self.boxes)

    @cached_property
    def largest(self) -> int:
        """Elements that a rank holds at most."""
        return max(self.volumes, default=0)

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """By rank its row and its position there."""
        return {rank: (i, k) for i, row in enumerate(self.grid) for k, rank in enumerate(row)}

    @cached_property
    def digest(self) -> str:
        """A hash of all of it, to compare across ranks."""
        return hashlib.sha256(repr((self.grid, self.boxes, self.flat)).encode()).hexdigest()


@lru_cache(maxsize=256)
def fully_sharded(shape: tuple[int, ...], world_size: int, shard_size: int) -> Sharding | None:
    """As FSDP2 lays a parameter out over replicas of `shard_size` ranks each; None for what it does not shard.

    The first dimension in `shard_size` parts of ceil(d / shard_size), the last ones shorter or empty.
    """
    if not shape:
        return None
    ranks = range(world_size)
    part = -(-shape[0] // shard_size)
    rows = [(min(i * part, shape[0]), min((i + 1) * part, shape[0])) for i in range(shard_size)]
    return Sharding(
        tuple(tuple(ranks[start : start + shard_size]) for start in range(0, world_size, shard_size)),
        tuple(((row, *whole(shape[1:])),) for row in rows),
    )


class Run(NamedTuple):
    """Consecutive indices of a side: `start` to `stop`, which lie at `local` and after it in what a rank holds."""

    start: int
    stop: int
    local: int


class Stride(NamedTuple):
    """Indices of an axis: `start`, `start + step` and so on, below `stop`; steps above 1 are of interleaved parts."""

    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Piece:
    """A part of a block within a box."""

    cut: tuple[Stride, ...]  # of the shard, axis by axis: the entry, and what the box has of it
    order: tuple[int, ...]  # of the shard's axes, so that those of a side lie together
    held: tuple[int, ...]  # lengths of the sides of what was cut
    local: Box  # of what was cut, side by side
    ranges: Box  # of the block, side by side
    within: tuple[int, tuple[int, ...]] | None = None  # where the box begins in a flat shard, and the box's shape

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def box(self) -> Box | None:
        """The piece as a box of the shard, where it is one, axis by axis: whatever the strides, that is a view."""
        lengths = tuple(stop - start for start, stop, _ in self.cut)
        if self.within is not None or self.held != lengths or self.order != tuple(range(len(self.order))):
            return None
        if any(step != 1 for _, _, step in self.cut):
            return None
        starts = (start for start, _, _ in self.cut)
        return tuple((first + a, first + b) for first, (a, b) in zip(starts, self.local, strict=True))

    def of_shard(self, shard: Tensor) -> Tensor:
        """The piece, shaped as its ranges of the block: a view where the shard's strides allow, else a copy."""
        if self.box is not None:
            return narrowed(shard, self.box)
        held = self._held(shard)
        return narrowed(held if held.shape == self.held else held.reshape(self.held), self.local)

    def put(self, shard: Tensor, values: Tensor) -> None:
        """Write the piece into a shard."""
        target = self._held(shard)
        held = target.reshape(self.held)
        narrowed(held, self.local).copy_(values)
        if held.untyped_storage().data_ptr() != shard.untyped_storage().data_ptr():
            target.copy_(held.view(target.shape))

    def _held(self, shard: Tensor) -> Tensor:
        if self.within is not None:
            start, shape = self.within
            shard = shard[start : start + math.prod(shape)].view(shape)
        is_all = self.cut == tuple((0, d, 1) for d in shard.shape)  # every view that is made costs the host a while
        cut = shard if is_all else shard[tuple(slice(*indices) for indices in self.cut)]
        return cut.permute(self.order) if self.order != tuple(range(len(self.order))) else cut

    def of_block(self, block: Tensor) -> Tensor:
        """The piece as a view of its block."""
        return narrowed(block, self.ranges)


def narrowed(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """x[start:stop, ..] on every axis."""
    for axis, (start, stop) in enumerate(ranges):
        if stop - start != x.shape[axis]:
            x = x.narrow(axis, start, stop - start)
    return x


def in_boxes(held: Tensor, boxes: Sequence[Box]) -> Iterator[tuple[Box, Tensor]]:
    """Views of boxes that lie end to end in `held`, each in the box's shape."""
    flat, start = held.view(-1), 0
    for box in boxes:
        shape = torch.Size(stop - first for first, stop in box)
        yield box, flat[start : start + shape.numel()].view(shape)
        start += shape.numel()


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def tile(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes have every element of a tensor once: their volumes add up, and only the whole's corners are odd.

    A corner that is in an even number of boxes cancels out, as in a sum modulo 2 of the boxes' indicator functions.
    """
    corners: set[tuple[int, ...]] = set()
    held = 0
    for box in boxes:
        held += volume(box)
        for corner in product(*box) if volume(box) else ():
            corners ^= {corner}
    return held == volume(whole(shape)) and (not held or corners == set(product(*whole(shape))))


def whole(shape: Sequence[int]) -> Box:
    """The box of a tensor that is not sharded."""
    return tuple((0, d) for d in shape)


@lru_cache(maxsize=1 << 14)  # layers are alike
def pieces(reading: Reading, block: Block, box: Box, begins: int | None = None) -> tuple[Piece, ...]:
    """What `box` holds of `block`; empty where they do not meet.

    Args:
        begins: where the box begins in the flat shard it is a part of; None: the shard is the box.
    """
    cut: list[Stride] = []
    held: list[Range] = []  # of each stored axis, counted within the entry
    entry = _entry(reading, block.entry)
    for (start, stop), (first, last, step) in zip(box, entry, strict=True):
        low = max(0, -(-(start - first) // step))
        high = -(-(min(stop, last) - first) // step)
        if low >= high:
            return ()
        begin = first + low * step - start
        cut.append(Stride(begin, begin + (high - low - 1) * step + 1, step))
        held.append((low, high))
    sides = [tuple(reading.origin[axis] for axis in side) for side in reading.sides]
    runs = [_runs([held[axis] for axis in side], [_length(entry[axis]) for axis in side]) for side in sides]
    met = [_meet(have, wanted) for have, wanted in zip(runs, block.ranges, strict=True)]
    used = [axis for side in sides for axis in side]
    return tuple(
        Piece(
            tuple(cut),
            (*(axis for axis in range(len(box)) if axis not in used), *used),
            tuple(sum(run.stop - run.start for run in have) for have in runs),
            tuple((run.local, run.local + run.stop - run.start) for run in chosen),
            tuple((run.start - low, run.stop - low) for run, (low, _) in zip(chosen, block.ranges, strict=True)),
            None if begins is None else (begins, tuple(stop - first for first, stop in box)),
        )
        for chosen in product(*met)
    )


def _entry(reading: Reading, entry: int) -> list[Stride]:
    """Which indices of every stored axis belong to one entry of the batch."""
    found = [Stride(0, d) for d in reading.stored]
    # from the last, so that of an axis that was split its part is chosen before what is kept of the part
    for axis in reversed(reading.batch):
        count, stored = reading.split[axis], reading.origin[axis]
        entry, chosen = divmod(entry, count)
        start, _, step = found[stored]
        length = _length(found[stored]) // count
        if axis > 0 and reading.origin[axis - 1] == stored:  # it runs fastest: every count-th index
            first, step = start + chosen * step, step * count
        else:
            first = start + chosen * length * step
        found[stored] = Stride(first, first + (length - 1) * step + 1, step)
    return found


def _length(indices: Stride) -> int:
    return -(-(indices.stop - indices.start) // indices.step)


def _runs(held: Sequence[Range], lengths: Sequence[int]) -> list[Run]:
    """What is held of a side that is made of several axes, the last one running fastest."""
    spans: list[Range] = [(0, 1)]
    for (start, stop), d in zip(held, lengths, strict=True):
        if stop - start == d:
            spans = [(first * d, last * d) for first, last in spans]
        else:
            spans = [(i * d + start, i * d + stop) for first, last in spans for i in range(first, last)]
    local, runs = 0, []
    for first, last in spans:
        runs.append(Run(first, last, local))
        local += last - first
    return runs


def _meet(runs: Sequence[Run], wanted: Range) -> list[Run]:
    """The parts of the runs within a range of the side."""
    met = []
    for start, stop, local in runs:
        low, high = max(start, wanted[0]), min(stop, wanted[1])
        if low < high:
            met.append(Run(low, high, local + low - start))
    return met


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop` of a tensor, counted in C order, as boxes in that order.

    A range is a part of a first row, whole rows, and a part of a last one; the parts are cut in the same way.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = torch.Size(shape[1:]).numel()
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(first - 1, boxes_of_range(shape[1:], start - last * row, stop - last * row))
        return
    yield from _within(first - 1, boxes_of_range(shape[1:], start - (first - 1) * row, row) if start % row else ())
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    yield from _within(last, boxes_of_range(shape[1:], 0, stop - last * row))


def joined(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that lie end to end in memory, those that follow each other along the first axis as one."""
    found: list[Box] = []
    for box in boxes:
        if found and found[-1][0][1] == box[0][0] and found[-1][1:] == box[1:]:
            box = ((found.pop()[0][0], box[0][1]), *box[1:])
        found.append(box)
    return found


def _within(row: int, boxes: Iterator[Box] | tuple[()]) -> Iterator[Box]:
    return (((row, row + 1), *box) for box in boxes)
