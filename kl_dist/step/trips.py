"""The way of one bucket on this rank: what is packed, sent, and found again at the other end. No maths, no decisions.

Three buffers: `near` has what belongs to this rank's shards, laid out as its outgoing cargo; `far` what belongs to its
units, laid out as its incoming cargo, and later what all replicas sent; `own` its units' updates end to end. Where a
row is this rank alone, near and own are one; where the incoming cargo is the units end to end, updates leave from own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from kl_dist.layouts.local import LocalShards, Update
from kl_dist.planning.plan import Plan
from kl_dist.planning.traffic import Parcel, rooms_of
from kl_dist.ranks import Exchange, Ranks


class Room(NamedTuple):
    """Memory that buckets travel through, allocated once: a step must not find that there is none left."""

    near: Tensor  # bytes
    far: Tensor  # bytes
    own: Tensor  # bytes


class Trips:
    """A bucket's trips from this rank's point of view."""

    def __init__(self, plan: Plan, bucket_number: int, ranks: Ranks) -> None:
        bucket = plan.buckets[bucket_number]
        self.dtype = bucket.dtype
        self.traffic = plan.traffic(bucket_number, ranks.rank)
        self.row = ranks.team(bucket.row(ranks.rank))
        self.column = ranks.team(bucket.column(ranks.rank))
        self.sharded = self.row.size > 1
        self.replicated = self.column.size > 1
        self.numel = sum(member.unit.numel for member in self.traffic.members)
        self._units = {member.number: member.unit for member in self.traffic.members}
        self._parcels: dict[int, list[Parcel]] = defaultdict(list)
        for parcel in self.traffic.incoming.parcels:
            self._parcels[parcel.unit].append(parcel)
        self._of = {number: plan.units[number] for number, _, _ in self.traffic.arrivals}
        # of rooms, which stay where they are: making a view costs the host more than it does to use one
        self._near: dict[int, list[Tensor]] = {}  # by address, what is packed
        self._arrived: dict[int, dict[tuple[int, str], list[Update]]] = {}  # and what comes back

    # -- gradients to the owners --------------------------------------------------------------------------------------

    def pack_gradients(self, shards: LocalShards, room: Room) -> None:
        """Lay out what this rank has of the bucket's gradients; zero where it has none."""
        with record_function("kl_shampoo::pack"):
            parcels = list(self.traffic.outgoing.parcels)
            places = self._near.get(room.near.data_ptr())
            if places is None:
                near = self._view(room.near, self.traffic.outgoing.numel)
                places = [near[parcel.start : parcel.stop].view(parcel.piece.shape) for parcel in parcels]
                self._near[room.near.data_ptr()] = places
            targets, gradients = [], []
            for parcel, place in zip(parcels, places, strict=True):
                gradient = shards.gradient(self._of[parcel.unit].parameter, parcel.piece)
                if gradient is None:
                    place.zero_()
                else:
                    targets.append(place)
                    gradients.append(gradient)
            if targets:
                torch._foreach_copy_(targets, gradients)

    def send_gradients(self, room: Room) -> Exchange:
        out, into = self.traffic.outgoing, self.traffic.incoming
        near, far = self._view(room.near, out.numel), self._view(room.far, into.numel)
        return self.row.swap(near, out.lengths, far, into.lengths)

    def gradient(self, index: int, shards: LocalShards, room: Room) -> Tensor:
        """The gradient of one of this rank's units, once it has arrived."""
        parcels, unit = self._parcels[index], self._units[index]
        if not self.sharded:
            found = [shards.gradient(unit.parameter, parcel.piece) for parcel in parcels]
            values = [value.to(room.near.device) for value in found if value is not None]
            assert len(values) == len(found), "a unit whose owner has no gradient takes no part"
            return values[0] if len(values) == 1 else torch.cat([value.reshape(-1) for value in values])
        far = self._view(room.far, self.traffic.incoming.numel)
        if self.traffic.is_laid_out:
            first = parcels[0].start
            return far[first : first + unit.numel].view(unit.block.shape)
        assembled = far.new_empty(unit.block.shape)
        for parcel in parcels:
            piece = parcel.piece.of_block(assembled)
            piece.copy_(far[parcel.start : parcel.stop].view(piece.shape))
        return assembled

    # -- updates to the shards ----------------------------------------------------------------------------------------

    def updates(self, room: Room) -> Tensor:
        """Where this rank's updates are written, its units end to end; zero."""
        if not self.sharded:
            return self._view(room.near, self.numel).zero_()
        return self._view(room.own, self.numel).zero_()

    def pack_updates(self, room: Room) -> None:
        """Lay out this rank's updates for those who hold the shards."""
        if not self.sharded or self.traffic.is_laid_out:
            return
        with record_function("kl_shampoo::pack"):
            far, own = self._view(room.far, self.traffic.incoming.numel), self._view(room.own, self.numel)
            offsets = iter(own.split([unit.numel for unit in self._units.values()]))
            blocks = {index: next(offsets).view(unit.block.shape) for index, unit in self._units.items()}
            for parcel in self.traffic.incoming.parcels:
                piece = parcel.piece.of_block(blocks[parcel.unit])
                far[parcel.start : parcel.stop].view(piece.shape).copy_(piece)

    def send_updates(self, room: Room) -> Exchange:
        """Launch the second trip where there is one, else the third."""
        if not self.sharded:
            return self.spread_updates(room)
        out, into = self.traffic.outgoing, self.traffic.incoming
        leaving = self._view(room.own if self.traffic.is_laid_out else room.far, into.numel)
        return self.row.swap(leaving, into.lengths, self._view(room.near, out.numel), out.lengths)

    def spread_updates(self, room: Room) -> Exchange:
        """Launch the third trip, to the other replicas."""
        return self.column.gather(self._view(room.near, self.traffic.chunk), room.far)

    def arrived(self, buffer: Tensor) -> dict[tuple[int, str], list[Update]]:
        """What has come back for this rank's shards, by group and method, from the owners of all replicas."""
        found = self._arrived.get(buffer.data_ptr())
        if found is None:
            found = self._arrived[buffer.data_ptr()] = {}
            for number, piece, start in self.traffic.arrivals:
                unit = self._of[number]
                values = buffer[start : start + piece.numel].view(piece.shape)
                found.setdefault((unit.group, unit.method), []).append(Update(number, unit.parameter, piece, values))
        return found

    def _view(self, room: Tensor, numel: int) -> Tensor:
        return room[: numel * self.dtype.itemsize].view(self.dtype)


def make_rooms(of_buckets: Sequence[Trips], device: torch.device) -> list[Room]:
    """The rooms that a rank's buckets travel through, allocated."""
    sizes = rooms_of([trips.traffic for trips in of_buckets], [trips.dtype for trips in of_buckets])
    return [Room(*(torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in room)) for room in sizes]
