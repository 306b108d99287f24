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
from kl_dist.planning.traffic import LEGS_AT_A_TIME, Leg, Parcel, half_way, rooms_of
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
        place = plan.place(ranks.rank)
        first = ranks.rank - place
        row, column = ([first + one for one in line] for line in (bucket.row(place), bucket.column(place)))
        self.row = ranks.team(row)
        self.levels = [ranks.team(line) for line in bucket.levels(column) if ranks.rank in line]
        self.sharded = self.row.size > 1
        self.replicated = self.traffic.replicas > 1
        self._longest = max(leg.numel for leg in self.traffic.legs)
        self.numel = sum(member.unit.numel for member in self.traffic.members)
        self._units = {member.number: member.unit for member in self.traffic.members}
        self._parcels: dict[int, list[Parcel]] = defaultdict(list)
        for parcel in self.traffic.incoming.parcels:
            self._parcels[parcel.unit].append(parcel)
        parcels = [parcel for leg in self.traffic.legs for parcel in (*leg.arrivals, *leg.kept)]
        self._of = {parcel.unit: plan.units[parcel.unit] for parcel in parcels}
        # of rooms, which stay where they are: making a view costs the host more than it does to use one
        self._near: dict[int, list[Tensor]] = {}  # by room, what is packed
        self._arrived: dict[tuple[int, int], dict[tuple[int, str], list[Update]]] = {}  # and, by leg, what comes back

    # -- gradients to the owners --------------------------------------------------------------------------------------

    def pack_gradients(self, shards: LocalShards, room: Room) -> None:
        """Lay out what this rank has of the bucket's gradients; zero where it has none."""
        with record_function("kl_shampoo::pack"):
            parcels = list(self.traffic.outgoing.parcels)
            places = self._near.get(id(room))
            if places is None:
                near = self._view(room.near, self.traffic.outgoing.numel)
                places = [near[parcel.start : parcel.stop].view(parcel.piece.shape) for parcel in parcels]
                self._near[id(room)] = places
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

    def read_gradients(self, indices: Sequence[int], into: Sequence[Tensor], shards: LocalShards, room: Room) -> None:
        """Write gradients of this rank's units, once they have arrived, into tensors shaped as the units, at once."""
        targets, sources = [], []
        far = self._view(room.far, self.traffic.incoming.numel) if self.sharded else None
        for index, out in zip(indices, into, strict=True):
            ends = out.view(-1)
            for parcel in self._parcels[index]:
                piece = parcel.piece
                if far is not None:
                    targets.append(piece.of_block(out))
                    sources.append(far[parcel.start : parcel.stop].view(piece.shape))
                    continue
                found = shards.gradient(self._units[index].parameter, piece)
                assert found is not None, "a unit whose owner has no gradient takes no part"
                targets.append(ends[: found.numel()].view(found.shape))
                sources.append(found)
                ends = ends[found.numel() :]
        if targets:
            torch._foreach_copy_(targets, sources)

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
        """Launch the second trip, to the shards."""
        out, into = self.traffic.outgoing, self.traffic.incoming
        leaving = self._view(room.own if self.traffic.is_laid_out else room.far, into.numel)
        return self.row.swap(leaving, into.lengths, self._view(room.near, out.numel), out.lengths)

    @property
    def legs(self) -> int:
        """In how many legs the third trip is made."""
        return len(self.traffic.legs)

    def spread_updates(self, room: Room, number: int) -> Exchange:
        """Launch a leg of the third trip, to the other replicas; `LEGS_AT_A_TIME` have room.

        Of two levels the first: to the ranks of the same number on other nodes.
        """
        leg, on_node = self.traffic.legs[number], self.traffic.on_node
        if leg.senders:
            here = self.traffic.place % on_node
            sent = [(place // on_node, x) for place, x in self._sent(room, number) if place % on_node == here]
            return self.levels[0].broadcast(sent) if sent else Exchange(room.near, ())
        chunk = self._view(room.near, leg.chunk)
        return self.levels[0].gather(chunk, room.far if on_node == 1 else self._half_way(room, leg))

    def spread_within(self, room: Room, number: int) -> list[Exchange]:
        """Launch what follows when a leg's first level has come in, if there are two: the second, within the node."""
        leg, on_node = self.traffic.legs[number], self.traffic.on_node
        if len(self.levels) == 1:
            return []
        within = self.levels[1]
        if leg.senders:
            return [within.broadcast([(place % on_node, x) for place, x in self._sent(room, number)])]
        came = self._view(self._half_way(room, leg), half_way(self.traffic, leg)).view(-1, leg.chunk)
        lands = room.far[: leg.numel * self.dtype.itemsize].view(len(came), -1)  # by node
        return [within.gather(chunk, place) for chunk, place in zip(came, lands, strict=True)]

    def _sent(self, room: Room, number: int) -> list[tuple[int, Tensor]]:
        """Of a leg of broadcasts the senders' places in the column, and where what they send is, or comes in."""
        buffer, near = self._landing(room, number), self._view(room.near, self.traffic.outgoing.numel)
        return [
            (place, near if place == self.traffic.place else buffer[start : start + numel])
            for place, start, numel in self.traffic.legs[number].senders
        ]

    def _half_way(self, room: Room, leg: Leg) -> Tensor:
        """Where an all-gather's chunks wait for the second level, in bytes: behind where they land."""
        return room.far[leg.numel * self.dtype.itemsize :]

    def arrived(self, room: Room, number: int) -> dict[tuple[int, str], list[Update]]:
        """What a leg has brought for this rank's shards, by group and method, from the owners of all replicas."""
        found = self._arrived.get((id(room), number))
        if found is None:
            found = self._arrived[id(room), number] = {}
            leg, near = self.traffic.legs[number], self._view(room.near, self.traffic.outgoing.numel)
            landing = self._landing(room, number) if self.replicated else near
            for buffer, parcels in ((landing, leg.arrivals), (near, leg.kept)):
                for index, piece, start in parcels:
                    unit = self._of[index]
                    values = buffer[start : start + piece.numel].view(piece.shape)
                    update = Update(index, unit.parameter, piece, values)
                    found.setdefault((unit.group, unit.method), []).append(update)
        return found

    def _landing(self, room: Room, number: int) -> Tensor:
        """Where a leg's buffer is."""
        first = number % LEGS_AT_A_TIME * self._longest
        return self._view(room.far, first + self.traffic.legs[number].numel)[first:]

    def _view(self, room: Tensor, numel: int) -> Tensor:
        return room[: numel * self.dtype.itemsize].view(self.dtype)


def make_rooms(of_buckets: Sequence[Trips], device: torch.device) -> list[Room]:
    """The rooms that a rank's buckets travel through, allocated."""
    sizes = rooms_of([trips.traffic for trips in of_buckets], [trips.dtype for trips in of_buckets])
    return [Room(*(torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in room)) for room in sizes]
