"""The plan: what the units of work are, who owns each, and what is sent when. Frozen data, made before the first step.

A *unit* is the smallest thing with an owner: a block of a matrix with its preconditioner, or a slice of a flat
parameter under AdamW. The same inputs give the same plan on every rank, so ranks compare one hash and need no talk.
Nothing here is ever timed: costs come from a fixed table of flops and bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from kl_dist.methods import ELEMENTWISE, rule
from kl_dist.options import STRUCTURAL, describe
from kl_dist.planning.buckets import Bucket, fill_buckets
from kl_dist.planning.ownership import assign
from kl_dist.planning.traffic import Bytes, bytes_by_rank, rooms_of, traffic_of
from kl_dist.planning.units import (
    Parameter,
    Unit,
    adamw_units,
    keepers_of,
    matrix_units,
    method_of,
    recast,
    shape_class,
    sharded_adamw_units,
    stack_bytes,
    stack_key,
)

BUCKET_BYTES = 64 << 20
"""Size of a bucket over all ranks: large enough to fill a link, small enough to overlap with compute. It is exceeded
where one unit per rank is more than that."""
SMALLEST_ROWS = 4 << 20
"""Bytes of a part of a shard under AdamW, at least: every unit costs the host time in every step."""


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

    @cached_property
    def keepers(self) -> tuple[tuple[int, ...], ...]:
        """By unit, the ranks that hold its state and update it: its owner, or each replica of a shard under AdamW."""
        pairs = zip(self.units, self.owners, strict=True)
        return tuple(keepers_of(unit, self.parameters[unit.parameter], owner) for unit, owner in pairs)

    @cached_property
    def traffic_bytes(self) -> tuple[Bytes, ...]:
        """Bytes each rank sends and receives in the buckets of a step, by the trip."""
        return bytes_by_rank(self.units, self.parameters, self.buckets, self.world_size)

    @cached_property
    def temporary_bytes(self) -> tuple[int, ...]:
        """Bytes each rank needs beside parameters, gradients and state: room for buckets, and a step's working set.

        The room is allocated once, at construction; the working set is what the largest stack of equal matrices needs
        while it is updated or refreshed, the larger of the two.
        """
        return tuple(self.room_bytes(rank) + self.working_bytes(rank) for rank in range(self.world_size))

    def room_bytes(self, rank: int) -> int:
        """Bytes of the buffers that buckets travel through on a rank."""
        traffics = [traffic_of(self.units, self.parameters, bucket, rank) for bucket in self.buckets]
        return sum(map(sum, rooms_of(traffics, [bucket.dtype for bucket in self.buckets])))

    def working_bytes(self, rank: int) -> int:
        """Bytes that a step allocates at its peak on a rank, and gives back."""
        needed = [0]
        for bucket in self.buckets:
            for _, members in groupby((self.units[i] for i in bucket.units[rank]), key=stack_key):
                needed.append(stack_bytes(list(members)))
        return max(needed)

    @property
    def comm_bytes(self) -> tuple[int, ...]:
        """Bytes each rank sends per step, padding and the agreement included; all-gathers counted as rings."""
        agreement = round((self.world_size - 1) * 2 * 4 * self.agreement_size / self.world_size)
        return tuple(one.gradients_sent + one.updates_sent + agreement for one in self.traffic_bytes)

    @property
    def padding_bytes(self) -> int:
        """Bytes in the buckets of one step, over all ranks, that carry nothing."""
        return sum(one.padding for one in self.traffic_bytes)

    @cached_property
    def waiting(self) -> tuple[int, ...]:
        """Indices of the units whose owner must say whether the next gradient is spent on their start alone."""
        return tuple(
            i
            for i, unit in enumerate(self.units)
            if not unit.elementwise and rule(unit.method, unit.recipe).starts_without_update
        )

    @cached_property
    def slices(self) -> tuple[int, ...]:
        """Indices of the units under AdamW."""
        return tuple(i for i, unit in enumerate(self.units) if unit.elementwise)

    @property
    def agreement_size(self) -> int:
        """Numbers in the all-reduce that opens a step: for every unit, two to compare options, one for trouble."""
        return len(self.units) + len(self.waiting) + 3

    @property
    def balance(self) -> float:
        """Largest cost of a rank over the mean; 1 is perfect."""
        mean = sum(self.cost) / self.world_size
        return max(self.cost) / mean if mean else 1.0

    def owned(self, rank: int) -> tuple[int, ...]:
        """Indices of the units that `rank` holds the state of."""
        return tuple(i for i, keepers in enumerate(self.keepers) if rank in keepers)

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """The plan in words, a line per fact, so that two ranks can name their first difference."""
        groups = (f"options of parameter group {i}: {line}" for i, line in enumerate(self.options))
        parameters = (
            f"parameter {i}: {p.name!r}, shape {p.shape}, {p.dtype}, group {p.group}, {p.sharding or 'not sharded'}"
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
            slices = sum(unit.elementwise for unit in owned)
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
        for keepers, value in zip(self.keepers, values, strict=True):
            for rank in keepers:
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
        ValueError: a `matrices` declaration that does not fit, or a parameter that is there twice, by name.
    """
    counts = Counter(parameter.name for parameter in parameters)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"parameter {name!r} stands in param_groups {count} times: each belongs to one group, once"
            )
    units, owners = ([], []) if previous is None else _carried_over(previous, parameters, groups)
    known = {parameters[unit.parameter].name for unit in units}
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    for unit in units:
        seen[shape_class(unit.method, unit.block)] += 1
    elementwise = []
    for i, parameter in enumerate(parameters):
        group = groups[parameter.group]
        if parameter.name in known or parameter.numel == 0:
            continue
        if method_of(parameter, group) == ELEMENTWISE:
            elementwise.append(i)
        else:
            units += matrix_units(i, parameter, group, seen)
    owners += [None] * (len(units) - len(owners))
    assigned = assign(units, parameters, owners, groups, world_size)
    flat = [i for i in elementwise if parameters[i].sharding is None]
    sharded = [i for i in elementwise if parameters[i].sharding is not None]
    for unit, rank in (
        *adamw_units(flat, parameters, world_size, BUCKET_BYTES),
        *sharded_adamw_units(sharded, parameters, max(BUCKET_BYTES / world_size, SMALLEST_ROWS)),
    ):
        units.append(unit)
        assigned.append(rank)
    keepers = [keepers_of(unit, parameters[unit.parameter], rank) for unit, rank in zip(units, assigned, strict=True)]
    buckets = tuple(fill_buckets(units, keepers, parameters, groups, world_size, BUCKET_BYTES))
    return Plan(
        world_size,
        tuple(parameters),
        tuple(units),
        tuple(assigned),
        buckets,
        tuple(map(describe, groups)),
        structure(groups),
    )


def _carried_over(
    previous: Plan, parameters: Sequence[Parameter], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Unit], list[int | None]]:
    """The units of a plan whose parameters are still there and lie as they did, as they are now, with their owners."""
    shaped = structure(groups)
    alike = {(p.name, p.shape, p.sharding, shaped[p.group]): i for i, p in enumerate(parameters)}
    numbers = {
        p.name: alike.get((p.name, p.shape, p.sharding, previous.structure[p.group])) for p in previous.parameters
    }
    units: list[Unit] = []
    owners: list[int | None] = []
    for unit, owner in zip(previous.units, previous.owners, strict=True):
        number = numbers.get(previous.parameters[unit.parameter].name)
        if number is not None:
            units.append(recast(unit, number, parameters[number], groups[parameters[number].group]))
            owners.append(owner)
    return units, owners


def structure(groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The options that shape a plan and its state, a line per group."""
    return tuple(repr([group[key] for key in STRUCTURAL]) for group in groups)
