"""What a bucket carries, seen from one rank: which piece travels to whom, and where in its buffers it lies.

The owner of a matrix is in one replica of it, and only that replica's gradient is sent to it; so a bucket takes up to
three trips (see `kl_dist.planning.buckets.Bucket.grid` for rows and columns):

    gradients   all-to-all in the row        outgoing -> incoming    not where a row is one rank, which has all of it
    updates     all-to-all in the row        incoming -> outgoing    as above
    updates     all-gather in the column,    outgoing -> all rows    not where there is one replica
                or broadcasts, in legs, in one or two levels

A *segment* is what travels between two ranks of a row: the pieces of one rank's shards that belong to units of the
other, in the units' order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kl_dist.planning.boxes import Box, Piece, pieces, volume, whole
from kl_dist.planning.buckets import Bucket, MatrixBucket, Member, RowsBucket, StreamBucket, aligned
from kl_dist.planning.matrices import Block
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
    lengths: tuple[int, ...]  # of the segments

    @property
    def numel(self) -> int:
        return sum(self.lengths)

    @property
    def parcels(self) -> Iterator[Parcel]:
        return (parcel for segment in self.segments for parcel in segment)


@dataclass(frozen=True)
class Leg:
    """What the ranks of a column give each other at a time: equal chunks of all, or what some of them broadcast."""

    senders: tuple[tuple[int, int, int], ...]  # place in the column, start in the buffer, elements; (): all, in chunks
    chunk: int  # elements that each gives to an all-gather, padding included
    numel: int  # of the buffer
    arrivals: tuple[Parcel, ...]  # pieces of this rank's shards in the buffer
    kept: tuple[Parcel, ...] = ()  # and in what this rank itself sends, which no broadcast brings it


LEGS_AT_A_TIME = 2
"""One is on its way while another is applied."""


@dataclass(frozen=True)
class Traffic:
    """One rank's part in a bucket."""

    members: tuple[Member, ...]  # this rank's units
    position: int  # of the rank in its row
    outgoing: Cargo  # pieces of this rank's shards, by the owner of their unit
    incoming: Cargo  # pieces of this rank's units, by the holder of the shard
    place: int  # of the rank in its column
    replicas: int  # ranks in the column
    legs: tuple[Leg, ...]
    on_node: int = 1  # ranks of the column on each node, where legs travel in two levels; 1: in one

    @property
    def sharded(self) -> bool:
        return len(self.outgoing.segments) > 1

    @cached_property
    def is_laid_out(self) -> bool:
        """Whether what comes in for this rank's units is those units end to end, each in C order."""
        offset, starts = 0, {}
        for number, unit, _ in self.members:
            starts[number] = offset, unit.block.shape
            offset += unit.numel
        for number, piece, start in self.incoming.parcels:
            first, shape = starts[number]
            row = piece.ranges[0][0] if piece.ranges else 0
            if start != first + row * volume(whole(shape[1:])):  # of two in one row, not both are where it begins
                return False
        return True


def traffic_of(units: Sequence[Unit], parameters: Sequence[Parameter], bucket: Bucket, rank: int) -> Traffic:
    """What `rank` sends and receives of `bucket`."""
    members = bucket.members(units, parameters, rank)
    if isinstance(bucket, MatrixBucket):
        return _of_matrices(units, parameters, bucket, members, rank)
    if isinstance(bucket, StreamBucket):
        start, stop = bucket.stream.share(bucket.number, rank)
        here = _cargo_of_stream(units, parameters, bucket, start, stop)
        all_of_it = _cargo_of_stream(units, parameters, bucket, *bucket.stream.bucket(bucket.number))
        world_size = len(bucket.column(rank))
        chunk = bucket.stream.chunk if world_size > 1 else here.numel
        leg = Leg((), chunk, world_size * chunk, tuple(all_of_it.parcels))
        place = bucket.column(rank).index(rank)
        return Traffic(members, 0, here, here, place, world_size, (leg,), bucket.on_node)
    assert isinstance(bucket, RowsBucket)
    here = _cargo_of_rows(units, parameters, members, rank)
    return Traffic(members, 0, here, here, 0, 1, (Leg((), here.numel, here.numel, tuple(here.parcels)),))


def _of_matrices(
    units: Sequence[Unit], parameters: Sequence[Parameter], bucket: MatrixBucket, members: tuple[Member, ...], rank: int
) -> Traffic:
    row, column = bucket.row(rank), bucket.column(rank)
    incoming = _cargo(units, parameters, [bucket.of(rank)] * len(row), row)
    replicas = [
        _cargo(units, parameters, [bucket.of(owner) for owner in bucket.row(one)], [rank] * len(row)) for one in column
    ]
    here = column.index(rank)
    if bucket.legs:
        legs = tuple(_broadcast(replicas, start, stop, here) for start, stop in bucket.legs)
    else:
        numel = max(cargo.numel for cargo in replicas)
        chunk = aligned(numel, bucket.dtype) if len(column) > 1 else numel
        parcels = (moved for place, cargo in enumerate(replicas) for moved in _moved(cargo, place * chunk))
        legs = (Leg((), chunk, len(column) * chunk, tuple(parcels)),)
    return Traffic(members, row.index(rank), replicas[here], incoming, here, len(column), legs, bucket.on_node)


def _broadcast(replicas: Sequence[Cargo], start: int, stop: int, here: int) -> Leg:
    """What the places `start` to `stop` of a column have, one after another."""
    senders, parcels, offset = [], [], 0
    for place in range(start, stop):
        if not replicas[place].numel:
            continue
        senders.append((place, offset, replicas[place].numel))
        if place != here:
            parcels += _moved(replicas[place], offset)
        offset += replicas[place].numel
    kept = tuple(replicas[here].parcels) if start <= here < stop else ()
    return Leg(tuple(senders), 0, offset, tuple(parcels), kept)


def _moved(cargo: Cargo, by: int) -> list[Parcel]:
    return [Parcel(unit, piece, start + by) for unit, piece, start in cargo.parcels]


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
        segments.append(tuple(segment))
        lengths.append(start - first)
    return Cargo(tuple(segments), tuple(lengths))


def _cargo_of_stream(
    units: Sequence[Unit], parameters: Sequence[Parameter], bucket: StreamBucket, start: int, stop: int
) -> Cargo:
    """A range of a stream, as pieces of the flat parameters that lie in it."""
    parcels, offset = [], 0
    for index, part in bucket.stream.parts(start, stop):
        parcels.append(Parcel(index, flat_piece(units[index], parameters[units[index].parameter], *part), offset))
        offset += part[1] - part[0]
    return Cargo((tuple(parcels),), (offset,))


def own_pieces(
    units: Sequence[Unit], parameters: Sequence[Parameter], bucket: Bucket, rank: int
) -> Iterator[tuple[int, Piece]]:
    """What of whole parameters a rank computes in a bucket: units' indices, and the pieces."""
    if isinstance(bucket, StreamBucket):
        here = _cargo_of_stream(units, parameters, bucket, *bucket.stream.share(bucket.number, rank))
        yield from ((index, piece) for index, piece, _ in here.parcels)
        return
    for index, unit, _ in bucket.members(units, parameters, rank):
        yield from ((index, piece) for piece in pieces_in(unit, parameters[unit.parameter], rank))


def _cargo_of_rows(
    units: Sequence[Unit], parameters: Sequence[Parameter], members: Sequence[Member], rank: int
) -> Cargo:
    """Rows of this rank's shards."""
    parcels, offset = [], 0
    for index, unit, boxes in members:
        for box in boxes:
            for piece in pieces_in(units[index], parameters[unit.parameter], rank, box):
                parcels.append(Parcel(index, piece, offset))
                offset += piece.numel
    return Cargo((tuple(parcels),), (offset,))


def flat_piece(unit: Unit, parameter: Parameter, start: int, stop: int) -> Piece:
    """A range of the elements of a parameter under AdamW that is whole on every rank."""
    (piece,) = pieces(unit.reading, Block(0, ((start, stop),), ("identity",)), whole(parameter.shape))
    return piece


def pieces_in(unit: Unit, parameter: Parameter, rank: int, box: Box | None = None) -> tuple[Piece, ...]:
    """What `rank` holds of a unit of a parameter, or of a box of one under AdamW."""
    block = unit.block if box is None else Block(0, box, unit.block.sides)
    if parameter.sharding is None:
        return pieces(unit.reading, block, whole(parameter.shape))
    held = parameter.sharding.held(rank)
    return tuple(piece for box, start in held for piece in pieces(unit.reading, block, box, start))


def home_of(unit: Unit, parameter: Parameter) -> int | None:
    """The rank that holds more than half of a unit, if any does; of replicas, in the first."""
    sharding = parameter.sharding
    if sharding is None or len(sharding.grid[0]) == 1 or 2 * sharding.largest <= unit.numel:
        return None
    for rank, held in zip(sharding.grid[0], sharding.volumes, strict=True):
        if 2 * held > unit.numel and 2 * sum(piece.numel for piece in pieces_in(unit, parameter, rank)) > unit.numel:
            return rank
    return None


class RoomBytes(NamedTuple):
    """Bytes that a bucket needs of the three buffers it travels through (see `kl_dist.step.trips`)."""

    near: int
    far: int
    own: int


def half_way(traffic: Traffic, leg: Leg) -> int:
    """Elements of the room in which an all-gather's chunks of the first of two levels wait for the second."""
    return 0 if traffic.on_node == 1 or leg.senders else traffic.replicas // traffic.on_node * leg.chunk


def room_bytes(traffic: Traffic, dtype: torch.dtype) -> RoomBytes:
    far = traffic.incoming.numel if traffic.sharded else 0
    near = max(traffic.outgoing.numel, *(leg.chunk for leg in traffic.legs))
    spread = min(len(traffic.legs), LEGS_AT_A_TIME) * max(leg.numel + half_way(traffic, leg) for leg in traffic.legs)
    return RoomBytes(*(n * dtype.itemsize for n in (near, max(far, spread if traffic.replicas > 1 else 0), far)))


def trip_count(traffic: Traffic) -> int:
    """How often something of a bucket is on its way."""
    return 2 * traffic.sharded + (traffic.replicas > 1)


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
    padding: int  # in what it sends: the ends of chunks


def bytes_of(traffics: Sequence[Traffic], dtypes: Sequence[torch.dtype]) -> Bytes:
    """A rank's bytes in a step's buckets, with all-gathers and broadcasts counted as rings.

    In a ring a rank hands on to the next what comes to it, and what it has itself; not what is the next one's own.
    """
    total = Bytes(0, 0, 0, 0, 0)
    for traffic, dtype in zip(traffics, dtypes, strict=True):
        here = traffic.position
        sent = traffic.outgoing.numel - traffic.outgoing.lengths[here]
        received = traffic.incoming.numel - traffic.incoming.lengths[here]
        along = along_the_column(traffic)
        found = (sent, received, received + along.sent, sent + along.received, along.padding)
        total = Bytes(*(a + dtype.itemsize * b for a, b in zip(total, found, strict=True)))
    return total


class Along(NamedTuple):
    """Elements that a rank sends and receives in its column."""

    sent: int
    received: int
    padding: int  # in what it sends
    first: int  # of what it sends, in the first of two levels, or in the only one


def along_the_column(traffic: Traffic) -> Along:
    """Of all legs, counted as rings: of the column, or of both levels ([Note: two levels] in planning/buckets.py)."""
    on_node, nodes = traffic.on_node, traffic.replicas // traffic.on_node
    node, here = divmod(traffic.place, on_node)
    sent = received = padding = first = 0
    for leg in traffic.legs if traffic.replicas > 1 else ():
        if not leg.senders:
            chunks = (traffic.replicas - 1) * leg.chunk
            useful = sum(parcel.piece.numel for parcel in leg.arrivals) - traffic.outgoing.numel
            sent, received, padding = sent + chunks, received + chunks, padding + chunks - useful
            first += (nodes - 1) * leg.chunk
        for place, _, numel in leg.senders:
            its_node, its_place = divmod(place, on_node)
            if its_place == here:
                onward = numel * (its_node != (node + 1) % nodes)
                sent, first, received = sent + onward, first + onward, received + numel * (its_node != node)
            sent += numel * (its_place != (here + 1) % on_node)
            received += numel * (its_place != here)
    return Along(sent, received, padding, first)
