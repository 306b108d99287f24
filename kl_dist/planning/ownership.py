"""Who owns which matrix: work spread evenly, and near to where the matrix lies."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kl_dist.planning.buckets import turn
from kl_dist.planning.traffic import home_of
from kl_dist.planning.units import Parameter, Unit

UNEVENNESS = 0.1
"""By how much the largest share of work may exceed that of the evenest division, to spare communication."""


def assign(
    units: Sequence[Unit],
    parameters: Sequence[Parameter],
    fixed: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
) -> list[int]:
    """Owner of each unit: the rank that holds it, unless that costs more than `UNEVENNESS` of balance.

    Args:
        units: matrices alone.
        parameters: of the plan.
        fixed: by unit, the owner it has already, or None.
        groups: options as `options.resolve` leaves them.
        world_size: number of ranks.
    """
    homes = [home_of(unit, parameters[unit.parameter]) for unit in units]
    even = _longest_processing_time(units, fixed, [None] * len(units), groups, world_size, 0.0)
    if not any(home is not None for home in homes):
        return even
    limit = (1 + UNEVENNESS) * max(_loads(units, even, world_size))
    at_home = _longest_processing_time(units, fixed, homes, groups, world_size, limit)
    return at_home if max(_loads(units, at_home, world_size)) <= limit else even


SLICE_BYTES = 128
"""What the largest slice of a parameter may have over the mean, in state: its end, and a count of steps."""


class Evenest(NamedTuple):
    """What the evenest division of matrices would give."""

    balance: float  # largest cost of a rank over the mean
    state_bytes: float  # of the rank that has most


def evenest(
    units: Sequence[Unit],
    divided: Sequence[Unit],
    fixed: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
) -> Evenest:
    """The evenest division of matrices over so many ranks; `divided` are under AdamW, of which all have as much."""
    owners = _longest_processing_time(units, fixed, [None] * len(units), groups, world_size, 0.0)
    shared = sum(unit.cost for unit in divided) / world_size
    loads = [load + shared for load in _loads(units, owners, world_size)]
    slices = SLICE_BYTES * len(divided)
    state = [sum(unit.state_bytes for unit in divided) / world_size + slices] * world_size
    for unit, rank in zip(units, owners, strict=True):
        state[rank] += unit.state_bytes
    return Evenest(max(loads) * world_size / sum(loads) if sum(loads) else 1.0, max(state))


def _loads(units: Sequence[Unit], owners: Sequence[int], world_size: int) -> list[float]:
    loads = [0.0] * world_size
    for unit, rank in zip(units, owners, strict=True):
        loads[rank] += unit.cost
    return loads


def _longest_processing_time(
    units: Sequence[Unit],
    fixed: Sequence[int | None],
    homes: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
    world_size: int,
    limit: float,
) -> list[int]:
    """Owner of each unit: the most expensive first, each to its home while that has room, else to the least loaded.

    Among equals, those refreshed in the same step come together, so that every step's refreshes spread over the ranks.
    """
    loads = [0.0] * world_size
    for unit, rank in zip(units, fixed, strict=True):
        if rank is not None:
            loads[rank] += unit.cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0 if rank is None else rank for rank in fixed]
    free = [i for i, rank in enumerate(fixed) if rank is None]
    for i in sorted(free, key=lambda i: (-units[i].cost, turn(units[i], groups), i)):
        rank = homes[i]
        if rank is None or loads[rank] + units[i].cost > limit:
            while heap[0][0] != loads[heap[0][1]]:
                heapq.heappop(heap)  # of a rank that was given more since
            rank = heap[0][1]
        owners[i] = rank
        loads[rank] += units[i].cost
        heapq.heappush(heap, (loads[rank], rank))
    return owners
