"""A plan is made: parameters are read as units, these get owners and groups of ranks, and travel in buckets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kl_dist.methods import ELEMENTWISE
from kl_dist.options import describe
from kl_dist.planning.buckets import StreamBucket, everywhere, matrix_buckets, ranks_on_a_node, rows_buckets
from kl_dist.planning.ownership import assign, evenest
from kl_dist.planning.partition import CHOSEN, Partition, in_group
from kl_dist.planning.plan import Plan, structure
from kl_dist.planning.slices import Stream, make_stream
from kl_dist.planning.units import Parameter, Unit, adamw_unit, matrix_units, method_of, recast, shape_class

BUCKET_BYTES = 64 << 20
"""Size of a bucket over all ranks: large enough to fill a link, small enough to overlap with compute. It is exceeded
where one unit per rank is more than that."""
SMALLEST_ROWS = 4 << 20
"""Bytes of a part of a shard under AdamW, at least: every unit costs the host time in every step."""


def make_plan(
    parameters: Sequence[Parameter],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
    previous: Plan | None = None,
    partition: Partition = CHOSEN,
) -> Plan:
    """The plan for these parameters under these resolved group options.

    Args:
        parameters: in the order of the optimizer's groups; without those that are frozen.
        groups: options as `options.resolve` leaves them.
        world_size: any number of ranks, more than matrices included.
        previous: a plan whose units keep their owners (ownership is sticky: adding a group moves no state).
        partition: into which groups the ranks are to be divided, unless `previous` has divided them.

    Raises:
        ValueError: a `matrices` declaration or a partition that does not fit, or a parameter that is there twice.
    """
    _refuse_twice(parameters)
    if previous is not None:
        partition = partition._replace(size=previous.partition_size)
    sizes = partition.sizes(world_size, (parameter.sharding for parameter in parameters))
    # within the largest group, as long as there may be several
    everyone, parameters = parameters, in_group(parameters, world_size, sizes[-1])
    matrices, owners = ([], []) if previous is None else _carried_over(previous, parameters, groups)
    elementwise = _add_units(parameters, groups, matrices)
    owners += [None] * (len(matrices) - len(owners))
    size = partition.choose(sizes, lambda ranks: evenest(matrices, elementwise, owners, groups, ranks))
    parameters = in_group(everyone, world_size, size)
    units = [*matrices, *elementwise]
    assigned: list[int | None] = [*assign(matrices, parameters, owners, groups, size), *[None] * len(elementwise)]
    under_adamw = range(len(matrices), len(units))
    flat = [i for i in under_adamw if parameters[units[i].parameter].sharding is None]
    sharded = [i for i in under_adamw if parameters[units[i].parameter].sharding is not None]
    streams = _streams(previous, flat, units, parameters, size)
    whole = everywhere(size)
    per_node = partition.node_of_group(size, world_size)
    buckets = [
        *matrix_buckets(range(len(matrices)), units, assigned, parameters, groups, size, per_node, BUCKET_BYTES),
        *(
            StreamBucket(units[stream.units[0]].dtype, whole, ranks_on_a_node(whole, per_node), stream, number)
            for stream in streams
            for number in range(stream.buckets)
        ),
        *rows_buckets(sharded, units, parameters, max(BUCKET_BYTES // size, SMALLEST_ROWS)),
    ]
    return Plan(
        world_size,
        size,
        tuple(parameters),
        tuple(units),
        tuple(assigned),
        tuple(streams),
        tuple(buckets),
        tuple(map(describe, groups)),
        structure(groups),
    )


def _refuse_twice(parameters: Sequence[Parameter]) -> None:
    for name, count in Counter(parameter.name for parameter in parameters).items():
        if count > 1:
            raise ValueError(
                f"parameter {name!r} stands in param_groups {count} times: each belongs to one group, once"
            )


def _add_units(
    parameters: Sequence[Parameter], groups: Sequence[Mapping[str, Any]], matrices: list[Unit]
) -> list[Unit]:
    """Units of the parameters that have none yet: blocks are added to `matrices`; returns those under AdamW."""
    known = {parameters[unit.parameter].name for unit in matrices}
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    for unit in matrices:
        seen[shape_class(unit.method, unit.block)] += 1
    elementwise = []
    for i, parameter in enumerate(parameters):
        group = groups[parameter.group]
        if parameter.name in known or parameter.numel == 0:
            continue
        if method_of(parameter, group) == ELEMENTWISE:
            elementwise.append(adamw_unit(i, parameter))
        else:
            matrices += matrix_units(i, parameter, group, seen)
    return elementwise


def _streams(
    previous: Plan | None, indices: Sequence[int], units: Sequence[Unit], parameters: Sequence[Parameter], ranks: int
) -> list[Stream]:
    """Streams of the units under AdamW: first those of a previous plan of which nothing is gone or has changed."""
    numbers = {(parameters[units[i].parameter].name, units[i].numel, units[i].dtype): i for i in indices}
    streams: list[Stream] = []
    for stream in () if previous is None else previous.streams:
        were = [previous.units[i] for i in stream.units] if previous is not None else []
        now = [numbers.get((unit.name, unit.numel, unit.dtype)) for unit in were]
        if None not in now:
            streams.append(replace(stream, units=tuple(i for i in now if i is not None)))
    kept = {i for stream in streams for i in stream.units}
    rest = [i for i in indices if i not in kept]
    for dtype in dict.fromkeys(units[i].dtype for i in rest):
        streams.append(make_stream([i for i in rest if units[i].dtype == dtype], units, ranks, BUCKET_BYTES))
    return streams


def _carried_over(
    previous: Plan, parameters: Sequence[Parameter], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Unit], list[int | None]]:
    """The matrices, as they are now, of parameters that are still there and lie as they did, with their owners."""
    shaped = structure(groups)
    here = {p.name: i for i, p in enumerate(parameters)}
    numbers: dict[int, int] = {}
    for number, before in enumerate(previous.parameters):
        now = parameters[i] if (i := here.get(before.name)) is not None else None
        lay = (before.shape, before.sharding, previous.structure[before.group])
        if now is not None and (now.shape, now.sharding, shaped[now.group]) == lay:
            numbers[number] = here[before.name]
    units: list[Unit] = []
    owners: list[int | None] = []
    for unit, owner in zip(previous.units, previous.owners, strict=True):
        place = numbers.get(unit.parameter)
        if place is not None and owner is not None:
            units.append(recast(unit, place, parameters[place], groups[parameters[place].group]))
            owners.append(owner)
    return units, owners
