"""The plan: what the units of work are, who owns each, and what is sent when. Frozen data, made before the first step.

A *unit* is the smallest thing that steps or rests as a whole: a block of a matrix with its preconditioner, which has
an owner, or a parameter under AdamW. The same inputs give the same plan on every rank, so ranks compare one hash and
need no talk. Nothing here is ever timed: costs come from a fixed table of flops and bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from kl_dist.methods import rule
from kl_dist.options import STRUCTURAL
from kl_dist.planning.boxes import Box, Sharding
from kl_dist.planning.buckets import Bucket, Member, RowsBucket, StreamBucket, everywhere
from kl_dist.planning.costs import adamw_cost, adamw_state_bytes
from kl_dist.planning.slices import Stream, flat_boxes, rows_volumes, shard_boxes
from kl_dist.planning.traffic import Bytes, Traffic, bytes_of, rooms_of, traffic_of
from kl_dist.planning.units import Parameter, Unit, stack_bytes, stack_key

ROWS = 32
"""Ranks that a printed plan lists, at most."""


@dataclass(frozen=True)
class Plan:
    """Who owns what, and which collectives a step makes. Printing it shows a table."""

    world_size: int
    partition_size: int  # of these ranks share state and work; the others do the same again, so many at a time
    parameters: tuple[Parameter, ...]  # as they lie within the first of these groups
    units: tuple[Unit, ...]
    owners: tuple[int | None, ...]  # by unit, within a group; None: under AdamW, where all ranks have a part
    streams: tuple[Stream, ...]  # of what AdamW has whole on every rank
    buckets: tuple[Bucket, ...]
    options: tuple[str, ...]  # one line per parameter group, to compare across ranks
    structure: tuple[str, ...]  # those options, by group, that must stay as they are

    # -- one rank's part -----------------------------------------------------------------------------------------------

    def place(self, rank: int) -> int:
        """A rank's number within its group."""
        return rank % self.partition_size

    def members(self, rank: int) -> list[tuple[Member, ...]]:
        """What a rank computes, by bucket."""
        return [bucket.members(self.units, self.parameters, self.place(rank)) for bucket in self.buckets]

    def traffic(self, number: int, rank: int) -> Traffic:
        """What a rank sends and receives of a bucket."""
        return traffic_of(self.units, self.parameters, self.buckets[number], self.place(rank))

    def room_bytes(self, rank: int) -> int:
        """Bytes of the buffers that buckets travel through on a rank."""
        return sum(map(sum, rooms_of(*self.travelling(rank))))

    def working_bytes(self, rank: int) -> int:
        """Bytes that a step allocates at its peak on a rank, and gives back."""
        needed = [0]
        for members in self.members(rank):
            for _, stacked in groupby((member.unit for member in members), key=stack_key):
                needed.append(stack_bytes(list(stacked)))
        return max(needed)

    def bytes_of(self, rank: int) -> Bytes:
        """Bytes a rank sends and receives in the buckets of a step, by the trip."""
        return bytes_of(*self.travelling(rank))

    def sent_bytes(self, rank: int) -> int:
        """Bytes a rank sends per step, padding and all-reduces included; all-gathers counted as rings.

        The all-reduces are the agreement that opens a step and, on the CPU, the number that ends it.
        """
        return self._sent(self.bytes_of(rank))

    def _sent(self, found: Bytes) -> int:
        agreement = round((self.world_size - 1) * 2 * 4 * (self.agreement_size + 1) / self.world_size)
        return found.gradients_sent + found.updates_sent + agreement

    def travelling(self, rank: int) -> tuple[list[Traffic], list[Any]]:
        """What a rank sends and receives, by bucket, and in which dtype."""
        traffics = [self.traffic(number, rank) for number in range(len(self.buckets))]
        return traffics, [bucket.dtype for bucket in self.buckets]

    def held_boxes(self, index: int, rank: int) -> list[Box]:
        """What a rank has of the state of a unit under AdamW, as boxes of its parameter, in the order of memory."""
        parameter = self.parameters[self.units[index].parameter]
        if parameter.sharding is not None:
            return shard_boxes(parameter.sharding, self.place(rank))
        stream, number = self._places[index]
        return flat_boxes(stream.held(number, self.place(rank)), parameter.shape or (1,))

    def keepers(self, index: int) -> Sequence[int]:
        """The ranks that hold a unit's state: its owner in each group, or under AdamW all that have a part of it."""
        owner, sharding = self.owners[index], self.parameters[self.units[index].parameter].sharding
        if owner is not None:
            within = [owner]
        elif sharding is None:
            stream, number = self._places[index]
            within = stream.holders(number)
        else:
            held = (zip(row, sharding.volumes, strict=True) for row in sharding.grid)
            within = sorted(rank for row in held for rank, numel in row if numel)
        return [first + rank for first in range(0, self.world_size, self.partition_size) for rank in within]

    def is_computed_twice(self, index: int) -> bool:
        """Whether several ranks compute the same of a unit's update, each for itself, and must come to the same."""
        sharding = self.parameters[self.units[index].parameter].sharding
        replicas = len(sharding.grid) if sharding is not None and self.owners[index] is None else 1
        return self._copies * replicas > 1

    def columns(self, parameter: Parameter) -> list[list[int]]:
        """All ranks, those together that hold the same of a parameter."""
        grid = everywhere(self.partition_size) if parameter.sharding is None else parameter.sharding.grid
        firsts = range(0, self.world_size, self.partition_size)
        return [[first + rank for first in firsts for rank in column] for column in zip(*grid, strict=True)]

    @cached_property
    def _places(self) -> dict[int, tuple[Stream, int]]:
        """Of what is in a stream, where."""
        return {index: (stream, place) for stream in self.streams for place, index in enumerate(stream.units)}

    def lines_of_exchange(self) -> list[tuple[int, ...]]:
        """The ranks that have updates of buckets for each other, line by line, in all groups; the same on all ranks."""
        lines: dict[tuple[int, ...], None] = {}
        for bucket in {(bucket.grid, bucket.on_node): bucket for bucket in self.buckets}.values():
            for column in zip(*(bucket.grid or ()), strict=True):
                lines |= dict.fromkeys(bucket.levels(column))
        firsts = range(0, self.world_size, self.partition_size)
        return [tuple(first + rank for rank in line) for first in firsts for line in lines]

    # -- all ranks' ----------------------------------------------------------------------------------------------------

    @cached_property
    def owner(self) -> dict[str, int]:
        """Owner rank of every matrix, block or slice, by name: of groups, and of replicas under AdamW, in the first."""
        found: dict[str, int] = {}
        for bucket in self.buckets:
            for rank in range(self.partition_size):
                for member in bucket.members(self.units, self.parameters, rank):
                    found.setdefault(member.unit.name, rank)
        return found

    @cached_property
    def state_bytes(self) -> tuple[int, ...]:
        """Bytes of optimizer state each rank holds."""
        return self._copies * tuple(map(int, self._in_group(lambda unit: unit.state_bytes, adamw_state_bytes)))

    @cached_property
    def cost(self) -> tuple[float, ...]:
        """Flops per step of each rank, refreshes amortised, with bytes of memory traffic counted as flops."""
        return self._copies * tuple(self._in_group(lambda unit: unit.cost, adamw_cost))

    @cached_property
    def traffic_bytes(self) -> tuple[Bytes, ...]:
        """`bytes_of` every rank."""
        return self._copies * tuple(map(self.bytes_of, range(self.partition_size)))

    @cached_property
    def temporary_bytes(self) -> tuple[int, ...]:
        """Bytes each rank needs beside parameters, gradients and state: room for buckets, and a step's working set.

        The room is allocated once, at construction; the working set is what the largest stack of equal matrices needs
        while it is updated or refreshed, the larger of the two.
        """
        here = (self.room_bytes(rank) + self.working_bytes(rank) for rank in range(self.partition_size))
        return self._copies * tuple(here)

    @property
    def comm_bytes(self) -> tuple[int, ...]:
        """`sent_bytes` of every rank."""
        return self._copies * tuple(map(self.sent_bytes, range(self.partition_size)))

    @property
    def padding_bytes(self) -> int:
        """Bytes in the buckets of one step, over all ranks, that carry nothing."""
        return sum(one.padding for one in self.traffic_bytes)

    @property
    def balance(self) -> float:
        """Largest cost of a rank over the mean; 1 is perfect."""
        mean = sum(self.cost) / self.world_size
        return max(self.cost) / mean if mean else 1.0

    @property
    def _copies(self) -> int:
        """How many groups there are, that do the same."""
        return self.world_size // self.partition_size

    def _in_group(self, of_matrix: Callable[[Unit], float], of_slice: Callable[[int, Any], float]) -> list[float]:
        """Sums over what each rank of a group computes."""
        totals = [0.0] * self.partition_size
        for unit, owner in zip(self.units, self.owners, strict=True):
            if owner is not None:
                totals[owner] += of_matrix(unit)
        for bucket in self.buckets:
            if isinstance(bucket, StreamBucket):
                for rank in range(self.partition_size):
                    for _, (start, stop) in bucket.stream.parts(*bucket.stream.share(bucket.number, rank)):
                        totals[rank] += of_slice(stop - start, bucket.dtype)
            elif isinstance(bucket, RowsBucket):
                for i, part in bucket.parts:
                    sharding = self.parameters[self.units[i].parameter].sharding
                    assert sharding is not None
                    volumes = rows_volumes(sharding, bucket.most / bucket.dtype.itemsize)
                    values = [of_slice(there[part], bucket.dtype) if part < len(there) else 0.0 for there in volumes]
                    for row in sharding.grid:
                        for rank, value in zip(row, values, strict=True):
                            totals[rank] += value
        return totals

    # -- what is agreed, and compared ----------------------------------------------------------------------------------

    @cached_property
    def waiting(self) -> tuple[int, ...]:
        """Indices of the units whose owner must say whether the next gradient is spent on their start alone."""
        return tuple(
            i
            for i, unit in enumerate(self.units)
            if not unit.elementwise and rule(unit.method, unit.recipe).starts_without_update
        )

    @property
    def agreement_size(self) -> int:
        """Numbers in the all-reduce that opens a step: for every unit, two to compare options, one for trouble."""
        return len(self.units) + len(self.waiting) + 3

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words, a line per fact, so that two ranks can name their first difference."""
        return tuple(self._facts(str))

    def digest(self) -> str:
        """A hash of all of it, to compare across ranks."""
        return hashlib.sha256("\n".join(self._facts(lambda sharding: sharding.digest)).encode()).hexdigest()

    def _facts(self, said: Callable[[Sharding], str]) -> Iterator[str]:
        yield f"world size {self.world_size}, in groups of {self.partition_size}"
        for i, p in enumerate(self.parameters):
            lies = "not sharded" if p.sharding is None else said(p.sharding)
            yield f"parameter {i}: {p.name!r}, shape {p.shape}, {p.dtype}, group {p.group}, {lies}"
        for i, line in enumerate(self.options):
            yield f"options of parameter group {i}: {line}"
        for unit, owner in zip(self.units, self.owners, strict=True):
            whose = "divided over the ranks" if owner is None else f"owned by rank {owner}"
            yield f"{unit.name!r} ({unit.method}) is {whose}"
        for i, bucket in enumerate(self.buckets):
            levels = f", two levels, {bucket.on_node} ranks on a node" if bucket.on_node > 1 else ""
            yield f"bucket {i}: {bucket.dtype}, {bucket.said}{levels}"

    def __str__(self) -> str:
        mb = 1 / 2**20
        rows = ["rank  matrices  slices  cost (Gflop/step)  state (MiB)  sends (MiB/step)"]
        shown = min(self.partition_size, ROWS)
        padding = 0
        for rank in range(shown):
            sent = self.bytes_of(rank)
            padding += sent.padding
            owned = [member.unit for members in self.members(rank) for member in members]
            slices = sum(unit.elementwise for unit in owned)
            rows.append(
                f"{rank:4d}  {len(owned) - slices:8d}  {slices:6d}  {self.cost[rank] / 1e9:17.3f}"
                f"  {self.state_bytes[rank] * mb:11.2f}  {self._sent(sent) * mb:16.2f}"
            )
        if shown < self.partition_size:
            rows.append(
                f"and so on, to rank {self.partition_size - 1}; what follows of padding is that of these {shown}"
            )
        on_node = max((bucket.on_node for bucket in self.buckets), default=1)
        if on_node > 1:
            rows.append(f"updates travel between nodes, then among the {on_node} ranks of a column on each")
        if self._copies > 1:
            rows.append(f"{self._copies} groups of {self.partition_size} ranks do this, each all of it")
        rows.append(
            f"balance (max / mean of cost) {self.balance:.3f}; {len(self.buckets)} buckets, "
            f"padding {padding * self._copies * mb:.2f} MiB of {sum(u.nbytes for u in self.units) * mb:.2f} MiB"
        )
        return "\n".join(rows)


def structure(groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The options that shape a plan and its state, a line per group."""
    return tuple(repr([group[key] for key in STRUCTURAL]) for group in groups)
