"""What a bucket carries, seen from one rank: which piece travels to whom, and where in its buffers it lies.

The owner of a matrix is in one replica of it, and only that replica's gradient is sent to it; so a bucket takes up to
three trips (see `kl_dist.planning.buckets.Bucket.grid` for rows and columns):

    gradients   all-to-all in the row        outgoing -> incoming    not where a row is one rank, which has all of it
    updates     all-to-all in the row        incoming -> outgoing    as above
    updates     all-gather in the column     outgoing -> all rows    not where there is one replica

A *segment* is what travels between two ranks of a row: the pieces of one rank's shards that belong to units of the
other, in the units' order, and at its end one number that says whether the owner failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kl_dist.planning.boxes import Piece, pieces, whole
from kl_dist.planning.buckets import Bucket, aligned
from kl_dist.planning.units import Parameter, Unit


class Parcel(NamedTuple):
    """A piece on its way."""

    unit: int  # into Plan.units
    piece: Piece
    start: int  # of its values in the buffer

    @property
    def stop(self) -> int:
        return self.start + self.piece.numel


@dataclass(frozen=True)
class Cargo:
    """Segments end to end: all that a rank exchanges with its row, in one direction or the other."""

    segments: tuple[tuple[Parcel, ...], ...]  # by position in the row
    lengths: tuple[int, ...]  # of the segments, the flag at the end of each included

    @property
    def numel(self) -> int:
        return sum(self.lengths)

    @property
    def parcels(self) -> Iterator[Parcel]:
        return (parcel for segment in self.segments for parcel in segment)

    @cached_property
    def flags(self) -> list[int]:
        """Where the segments' flags lie."""
        ends, end = [], 0
        for length in self.lengths:
            end += length
            ends.append(end - 1)
        return ends


@dataclass(frozen=True)
class Traffic:
    """One rank's part in a bucket."""

    position: int  # of the rank in its row
    outgoing: Cargo  # pieces of this rank's shards, by the owner of their unit
    incoming: Cargo  # pieces of this rank's units, by the holder of the shard
    replicas: tuple[Cargo, ...]  # the outgoing cargo of each rank in the column, this one among them
    chunk: int  # elements of the all-gather in the column, padding included


def traffic_of(units: Sequence[Unit], parameters: Sequence[Parameter], bucket: Bucket, rank: int) -> Traffic:
    """What `rank` sends and receives of `bucket`."""
    row, column = bucket.row(rank), bucket.column(rank)
    replicas = tuple(
        _cargo(units, parameters, [bucket.units[owner] for owner in bucket.row(one)], [rank] * len(row))
        for one in column
    )
    incoming = _cargo(units, parameters, [bucket.units[rank]] * len(row), row)
    chunk = aligned(max(cargo.numel for cargo in replicas), bucket.dtype)
    return Traffic(row.index(rank), replicas[column.index(rank)], incoming, replicas, chunk)


def _cargo(
    units: Sequence[Unit], parameters: Sequence[Parameter], members: Sequence[Sequence[int]], holders: Sequence[int]
) -> Cargo:
    """Segments of the pieces of some units in what one rank holds.

    Args:
        members: by segment, the units.
        holders: by segment, the rank whose shards hold the pieces.
    """
    segments, lengths, start = [], [], 0
    for indices, holder in zip(members, holders, strict=True):
        first, segment = start, []
        for index in indices:
            for piece in pieces_in(units[index], parameters[units[index].parameter], holder):
                segment.append(Parcel(index, piece, start))
                start += piece.numel
        start += 1
        segments.append(tuple(segment))
        lengths.append(start - first)
    return Cargo(tuple(segments), tuple(lengths))


def pieces_in(unit: Unit, parameter: Parameter, rank: int) -> tuple[Piece, ...]:
    """What `rank` holds of a unit of a parameter."""
    if parameter.sharding is None:
        return pieces(unit.reading, unit.block, whole(parameter.shape))
    held = parameter.sharding.held(rank)
    return tuple(piece for box, start in held for piece in pieces(unit.reading, unit.block, box, start))


def home_of(unit: Unit, parameter: Parameter) -> int | None:
    """The rank that holds more than half of a unit, if any does; of replicas, in the first."""
    if parameter.sharding is None or unit.elementwise or len(parameter.sharding.grid[0]) == 1:
        return None
    for rank in parameter.sharding.grid[0]:
        if 2 * sum(piece.numel for piece in pieces_in(unit, parameter, rank)) > unit.numel:
            return rank
    return None


class RoomBytes(NamedTuple):
    """Bytes that a bucket needs of the three buffers it travels through (see `kl_dist.step.trips`)."""

    near: int
    far: int
    own: int


def room_bytes(traffic: Traffic, dtype: torch.dtype) -> RoomBytes:
    sharded, replicas = len(traffic.outgoing.segments) > 1, len(traffic.replicas)
    far = traffic.incoming.numel if sharded else 0
    spread = replicas * traffic.chunk if replicas > 1 else 0
    own = traffic.incoming.numel - len(traffic.incoming.segments) if sharded else 0
    return RoomBytes(*(n * dtype.itemsize for n in (traffic.chunk, max(far, spread), own)))


def trip_count(traffic: Traffic) -> int:
    """How often something of a bucket is on its way."""
    return 2 * (len(traffic.outgoing.segments) > 1) + (len(traffic.replicas) > 1)


def rooms_of(traffics: Sequence[Traffic], dtypes: Sequence[torch.dtype]) -> list[RoomBytes]:
    """As many rooms as there are buckets under way at a time, each large enough for any."""
    if not traffics:
        return []
    under_way = 1 + max(map(trip_count, traffics))
    sizes = zip(*(room_bytes(traffic, dtype) for traffic, dtype in zip(traffics, dtypes, strict=True)), strict=True)
    return [RoomBytes(*map(max, sizes))] * min(under_way, len(traffics))


class Bytes(NamedTuple):
    """Bytes that one rank sends and receives in a step, by the trip; what it keeps to itself does not count."""

    gradients_sent: int
    gradients_received: int
    updates_sent: int
    updates_received: int
    padding: int  # in what it sends: flags and the ends of chunks


def bytes_by_rank(
    units: Sequence[Unit], parameters: Sequence[Parameter], buckets: Sequence[Bucket], world_size: int
) -> tuple[Bytes, ...]:
    """The bytes of a step's buckets, with all-gathers counted as rings."""
    totals = [Bytes(0, 0, 0, 0, 0)] * world_size
    for bucket in buckets:
        if bucket.grid is None:
            continue
        for rank, found in enumerate(_bytes_of(units, parameters, bucket, world_size)):
            totals[rank] = Bytes(*map(sum, zip(totals[rank], found, strict=True)))
    return tuple(totals)


def _bytes_of(
    units: Sequence[Unit], parameters: Sequence[Parameter], bucket: Bucket, world_size: int
) -> Iterator[Bytes]:
    size = bucket.dtype.itemsize
    rows = [bucket.row(rank) for rank in range(world_size)]
    payload = {
        (owner, holder): sum(
            piece.numel
            for i in bucket.units[owner]
            for piece in pieces_in(units[i], parameters[units[i].parameter], holder)
        )
        for owner in range(world_size)
        for holder in rows[owner]
    }
    for rank, row in enumerate(rows):
        column = bucket.column(rank)
        others = [other for other in row if other != rank]
        sent = sum(payload[owner, rank] + 1 for owner in others)
        received = sum(payload[rank, holder] + 1 for holder in others)
        cargo = {one: sum(payload[owner, one] + 1 for owner in rows[one]) for one in column}
        spread = (len(column) - 1) * aligned(max(cargo.values()), bucket.dtype)
        useful = sum(payload[owner, one] for one in column if one != rank for owner in rows[one])
        padding = 2 * len(others) + spread - useful
        yield Bytes(*(size * n for n in (sent, received, received + spread, sent + spread, padding)))
