"""The way of one bucket on this rank: what is packed, sent, and found again at the other end. No maths, no decisions.

Three buffers: `near` has what belongs to this rank's shards, laid out as its outgoing cargo; `far` what belongs to its
units, laid out as its incoming cargo, and later what all replicas sent; `own` its units' updates end to end. Where a
row is this rank alone, near and own are one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from kl_dist.layouts.local import LocalShards
from kl_dist.planning.plan import Plan
from kl_dist.planning.traffic import Cargo, Parcel, rooms_of, traffic_of
from kl_dist.ranks import Exchange, Ranks


class Room(NamedTuple):
    """Memory that buckets travel through, allocated once: a step must not find that there is none left."""

    near: Tensor  # bytes
    far: Tensor  # bytes
    own: Tensor  # bytes


class Trips:
    """A bucket's trips from this rank's point of view."""

    def __init__(self, plan: Plan, number: int, ranks: Ranks) -> None:
        bucket = plan.buckets[number]
        self.dtype = bucket.dtype
        self.units = [plan.units[index] for index in bucket.units[ranks.rank]]
        self.parameter_of = {i: unit.parameter for i, unit in enumerate(plan.units)}
        self.traffic = traffic_of(plan.units, plan.parameters, bucket, ranks.rank)
        self.row = ranks.team(bucket.row(ranks.rank))
        self.column = ranks.team(bucket.column(ranks.rank))
        self.sharded = self.row.size > 1
        self.replicated = self.column.size > 1
        self.numel = sum(unit.numel for unit in self.units)
        self._shapes = {index: plan.units[index].block.shape for index in bucket.units[ranks.rank]}
        self._parcels: dict[int, list[Parcel]] = defaultdict(list)
        for parcel in self.traffic.incoming.parcels:
            self._parcels[parcel.unit].append(parcel)
        # on the device: a list of positions would be copied there, and waited for, in every step
        self._flags = torch.tensor(self._leaving.flags, device=ranks.device)

    @property
    def _leaving(self) -> Cargo:
        """The cargo that this rank's updates leave in."""
        return self.traffic.incoming if self.sharded else self.traffic.outgoing

    # -- gradients to the owners --------------------------------------------------------------------------------------

    def pack_gradients(self, shards: LocalShards, room: Room) -> None:
        """Lay out what this rank has of the bucket's gradients; zero where it has none."""
        with record_function("kl_shampoo::pack"):
            near = self._view(room.near, self.traffic.outgoing.numel)
            for parcel in self.traffic.outgoing.parcels:
                target = near[parcel.start : parcel.stop]
                gradient = shards.gradient(self.parameter_of[parcel.unit], parcel.piece)
                if gradient is None:
                    target.zero_()
                else:
                    target.view(gradient.shape).copy_(gradient)

    def send_gradients(self, room: Room) -> Exchange:
        out, into = self.traffic.outgoing, self.traffic.incoming
        near, far = self._view(room.near, out.numel), self._view(room.far, into.numel)
        return self.row.swap(near, out.lengths, far, into.lengths)

    def read_gradient(self, index: int, out: Tensor, shards: LocalShards, room: Room) -> None:
        """Write the gradient of one of this rank's units, once it has arrived, into a tensor shaped as the unit."""
        parcels = self._parcels[index]
        if not self.sharded:
            (parcel,) = parcels
            found = shards.gradient(self.parameter_of[index], parcel.piece)
            assert found is not None, "a unit whose owner has no gradient takes no part"
            out.copy_(found)
            return
        far = self._view(room.far, self.traffic.incoming.numel)
        for parcel in parcels:
            piece = parcel.piece
            piece.of_block(out).copy_(far[parcel.start : parcel.stop].view(piece.shape))

    # -- updates to the shards ----------------------------------------------------------------------------------------

    def updates(self, room: Room) -> Tensor:
        """Where this rank's updates are written, its units end to end; zero."""
        return self._view(room.own if self.sharded else room.near, self.numel).zero_()

    def pack_updates(self, room: Room, failed: bool) -> None:
        """Lay out this rank's updates for those who hold the shards, and tell them whether to trust them."""
        with record_function("kl_shampoo::pack"):
            if not self.sharded:
                self._view(room.near, self.traffic.chunk).index_fill_(0, self._flags, float(failed))
                return
            far, own = self._view(room.far, self.traffic.incoming.numel), self._view(room.own, self.numel)
            offsets = iter(own.split([unit.numel for unit in self.units]))
            blocks = {index: next(offsets).view(shape) for index, shape in self._shapes.items()}
            for parcel in self.traffic.incoming.parcels:
                piece = parcel.piece.of_block(blocks[parcel.unit])
                far[parcel.start : parcel.stop].view(piece.shape).copy_(piece)
            far.index_fill_(0, self._flags, float(failed))

    def send_updates(self, room: Room) -> Exchange:
        """Launch the second trip where there is one, else the third."""
        if not self.sharded:
            return self.spread_updates(room)
        out, into = self.traffic.outgoing, self.traffic.incoming
        near, far = self._view(room.near, out.numel), self._view(room.far, into.numel)
        return self.row.swap(far, into.lengths, near, out.lengths)

    def spread_updates(self, room: Room) -> Exchange:
        """Launch the third trip, to the other replicas."""
        return self.column.gather(self._view(room.near, self.traffic.chunk), room.far)

    def arrived(self, buffer: Tensor) -> Iterator[tuple[Parcel, Tensor]]:
        """What has come back for this rank's shards, from the owners of all replicas."""
        for chunk, cargo in zip(buffer, self.traffic.replicas, strict=True):
            for parcel in cargo.parcels:
                yield parcel, chunk[parcel.start : parcel.stop]

    def failed(self, buffer: Tensor) -> bool:
        """Whether an owner says so of itself; waits for the device."""
        pairs = zip(buffer, self.traffic.replicas, strict=True)
        return any(bool(chunk[cargo.flags].any()) for chunk, cargo in pairs)

    def _view(self, room: Tensor, numel: int) -> Tensor:
        return room[: numel * self.dtype.itemsize].view(self.dtype)


def make_rooms(of_buckets: Sequence[Trips], device: torch.device) -> list[Room]:
    """The rooms that a rank's buckets travel through, allocated."""
    sizes = rooms_of([trips.traffic for trips in of_buckets], [trips.dtype for trips in of_buckets])
    return [Room(*(torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in room)) for room in sizes]
