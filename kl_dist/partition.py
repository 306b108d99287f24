"""The plan: what the units of work are, who owns each, and what is sent when. Frozen data, made before the first step.

A *unit* is the smallest thing with an owner: a block of a matrix with its preconditioner, or a slice of a flat
parameter under AdamW. The same inputs give the same plan on every rank, so ranks compare one hash and need no talk.
Nothing here is ever timed: costs come from a fixed table of flops and bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kl_dist.options import STRUCTURAL, describe
from kl_dist.units import Parameter, Unit, adamw_units, matrix_units, recast, route, shape_class

BUCKET_BYTES = 64 << 20
"""Size of a bucket over all ranks: large enough to fill a link, small enough to overlap with compute. It is exceeded
where one unit per rank is more than that."""


@dataclass(frozen=True)
class Bucket:
    """What one all-gather carries: from each rank its units, in order, padded to equal chunks."""

    dtype: torch.dtype
    units: tuple[tuple[int, ...], ...]  # by rank: indices into Plan.units
    chunk: int  # elements each rank sends: its units, padding, and a flag of failure at the end


@dataclass(frozen=True)
class Plan:
    """Who owns what, and which collectives a step makes. Printing it shows a table."""

    world_size: int
    parameters: tuple[Parameter, ...]
    units: tuple[Unit, ...]
    owners: tuple[int, ...]  # by unit
    buckets: tuple[Bucket, ...]
    options: tuple[str, ...]  # one line per parameter group, to compare across ranks
    structure: tuple[str, ...]  # those options, by group, that must stay as they are

    @cached_property
    def owner(self) -> dict[str, int]:
        """Owner rank of every matrix, block or slice, by name."""
        return {unit.name: rank for unit, rank in zip(self.units, self.owners, strict=True)}

    @cached_property
    def state_bytes(self) -> tuple[int, ...]:
        """Bytes of optimizer state each rank holds."""
        return tuple(int(total) for total in self._per_rank(unit.state_bytes for unit in self.units))

    @cached_property
    def cost(self) -> tuple[float, ...]:
        """Flops per step of each rank, refreshes amortised, with bytes of memory traffic counted as flops."""
        return tuple(self._per_rank(unit.cost for unit in self.units))

    @property
    def comm_bytes(self) -> tuple[int, ...]:
        """Bytes each rank sends per step: ring all-gathers of the updates, padding included, and the agreement."""
        gathered = sum(bucket.chunk * bucket.dtype.itemsize for bucket in self.buckets)
        agreement = 2 * 4 * self.agreement_size / self.world_size
        return (round((self.world_size - 1) * (gathered + agreement)),) * self.world_size

    @property
    def padding_bytes(self) -> int:
        """Bytes in the buckets of one step, over all ranks, that carry nothing."""
        sent = sum(b.chunk * b.dtype.itemsize for b in self.buckets) * self.world_size
        return sent - sum(unit.nbytes for unit in self.units)

    @property
    def agreement_size(self) -> int:
        """Numbers in the all-reduce that opens a step: one per unit, two to compare options, one for trouble."""
        return len(self.units) + 3

    @property
    def balance(self) -> float:
        """Largest cost of a rank over the mean; 1 is perfect."""
        mean = sum(self.cost) / self.world_size
        return max(self.cost) / mean if mean else 1.0

    def owned(self, rank: int) -> tuple[int, ...]:
        """Indices of the units that `rank` owns."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """The plan in words, a line per fact, so that two ranks can name their first difference."""
        groups = (f"options of parameter group {i}: {line}" for i, line in enumerate(self.options))
        parameters = (
            f"parameter {i}: {p.name!r}, shape {p.shape}, {p.dtype}, group {p.group}"
            for i, p in enumerate(self.parameters)
        )
        units = (f"{unit.name!r} ({unit.method}) is owned by rank {self.owner[unit.name]}" for unit in self.units)
        buckets = (f"bucket {i}: {bucket}" for i, bucket in enumerate(self.buckets))
        return (f"world size {self.world_size}", *parameters, *groups, *units, *buckets)

    def digest(self) -> str:
        """A hash of all of it, to compare across ranks."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def __str__(self) -> str:
        mb = 1 / 2**20
        rows = ["rank  matrices  slices  cost (Gflop/step)  state (MiB)  sends (MiB/step)"]
        for rank in range(self.world_size):
            owned = [self.units[i] for i in self.owned(rank)]
            slices = sum(unit.method == "adamw" for unit in owned)
            rows.append(
                f"{rank:4d}  {len(owned) - slices:8d}  {slices:6d}  {self.cost[rank] / 1e9:17.3f}"
                f"  {self.state_bytes[rank] * mb:11.2f}  {self.comm_bytes[rank] * mb:16.2f}"
            )
        rows.append(
            f"balance (max / mean of cost) {self.balance:.3f}; {len(self.buckets)} buckets, "
            f"padding {self.padding_bytes * mb:.2f} MiB of {sum(u.nbytes for u in self.units) * mb:.2f} MiB"
        )
        return "\n".join(rows)

    def _per_rank(self, values: Iterable[float]) -> list[float]:
        totals = [0.0] * self.world_size
        for rank, value in zip(self.owners, values, strict=True):
            totals[rank] += value
        return totals


def make_plan(
    parameters: Sequence[Parameter],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
    previous: Plan | None = None,
) -> Plan:
    """The plan for these parameters under these resolved group options.

    Args:
        parameters: in the order of the optimizer's groups; without those that are frozen.
        groups: options as `options.resolve` leaves them.
        world_size: any number of ranks, more than matrices included.
        previous: a plan whose units keep their owners (ownership is sticky: adding a group moves no state).

    Raises:
        ValueError: a `matrices` declaration that does not fit, naming the parameter.
    """
    numbers = {parameter.name: i for i, parameter in enumerate(parameters)}
    units: list[Unit] = []
    owners: list[int | None] = []
    known = set()
    if previous is not None:
        for unit, owner in zip(previous.units, previous.owners, strict=True):
            name = previous.parameters[unit.parameter].name
            if name in numbers:
                now = parameters[numbers[name]]
                units.append(recast(unit, numbers[name], now.dtype, groups[unit.group]))
                owners.append(owner)
                known.add(name)
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    for unit in units:
        seen[shape_class(unit.method, unit.block)] += 1
    elementwise = []
    for i, parameter in enumerate(parameters):
        group = groups[parameter.group]
        if parameter.name in known or parameter.numel == 0:
            continue
        if route(parameter.shape, group) == "adamw":
            elementwise.append(i)
        else:
            units += matrix_units(i, parameter, group, seen)
    owners += [None] * (len(units) - len(owners))
    assigned = _longest_processing_time(units, owners, groups, world_size)
    for unit, rank in adamw_units(elementwise, parameters, world_size, BUCKET_BYTES):
        units.append(unit)
        assigned.append(rank)
    buckets = tuple(_buckets(units, assigned, groups, world_size))
    return Plan(
        world_size,
        tuple(parameters),
        tuple(units),
        tuple(assigned),
        buckets,
        tuple(map(describe, groups)),
        structure(groups),
    )


def structure(groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The options that shape a plan and its state, a line per group."""
    return tuple(repr([group[key] for key in STRUCTURAL]) for group in groups)


def _longest_processing_time(
    units: Sequence[Unit], fixed: Sequence[int | None], groups: Sequence[Mapping[str, Any]], world_size: int
) -> list[int]:
    """Owner of each unit: the most expensive first, each to the least loaded rank.

    Among equals, those refreshed in the same step come together, so that every step's refreshes spread over the ranks.
    """
    loads = [0.0] * world_size
    for unit, rank in zip(units, fixed, strict=True):
        if rank is not None:
            loads[rank] += unit.cost if unit.method != "adamw" else 0.0
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0 if rank is None else rank for rank in fixed]
    free = [i for i, rank in enumerate(fixed) if rank is None]
    for i in sorted(free, key=lambda i: (-units[i].cost, _turn(units[i], groups), i)):
        load, rank = heapq.heappop(heap)
        owners[i] = rank
        heapq.heappush(heap, (load + units[i].cost, rank))
    return owners


def _turn(unit: Unit, groups: Sequence[Mapping[str, Any]]) -> int:
    group = groups[unit.group]
    return unit.phase % group["precondition_frequency"] if group["stagger"] else 0


def _buckets(
    units: Sequence[Unit], owners: Sequence[int], groups: Sequence[Mapping[str, Any]], world_size: int
) -> Iterable[Bucket]:
    """Every rank's units in order of kind and turn, in buckets.

    Matrices and slices do not share a bucket: slices divide to the element, so theirs need no padding.
    """
    for elementwise in (False, True):
        for dtype in dict.fromkeys(unit.dtype for unit in units):
            queues: list[list[int]] = [[] for _ in range(world_size)]
            for i, unit in enumerate(units):
                if unit.dtype == dtype and (unit.method == "adamw") == elementwise:
                    queues[owners[i]].append(i)
            if not elementwise:
                queues = [sorted(q, key=lambda i: (units[i].kind, _turn(units[i], groups), i)) for q in queues]
            for members in _fill(queues, units, world_size):
                payload = max(sum(units[i].numel for i in member) for member in members)
                yield Bucket(dtype, members, _aligned(payload + 1, dtype))


def _fill(
    queues: Sequence[Sequence[int]], units: Sequence[Unit], world_size: int
) -> Iterable[tuple[tuple[int, ...], ...]]:
    """Walk all ranks' queues together; each bucket takes from each as many units as fit.

    A chunk has room for its share of BUCKET_BYTES, or for the largest unit; evened out over the buckets that needs.
    """
    largest = max((units[i].nbytes for queue in queues for i in queue), default=0)
    longest = max((sum(units[i].nbytes for i in queue) for queue in queues), default=0)
    count = math.ceil(longest / max(BUCKET_BYTES / world_size, largest, 1))
    room = max(math.ceil(longest / max(count, 1)) + 16, largest)  # slices differ by one element
    places = [0] * world_size
    while any(place < len(queue) for place, queue in zip(places, queues, strict=True)):
        members = []
        for rank, queue in enumerate(queues):
            first, taken = places[rank], 0
            while places[rank] < len(queue) and taken + units[queue[places[rank]]].nbytes <= room:
                taken += units[queue[places[rank]]].nbytes
                places[rank] += 1
            members.append(tuple(queue[first : places[rank]]))
        yield tuple(members)


def _aligned(numel: int, dtype: torch.dtype) -> int:
    """Up to a multiple of 16 bytes, so that every rank's chunk begins where vector instructions can."""
    per_line = 16 // dtype.itemsize
    return -(-numel // per_line) * per_line
