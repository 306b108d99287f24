"""The units of work: blocks of matrices with a preconditioner each, and parameters under AdamW.

What AdamW serves can be cut anywhere, so it is one unit whole, of which every rank has a part: see
`kl_dist.planning.slices`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kl_dist.methods import ELEMENTWISE
from kl_dist.planning import costs
from kl_dist.planning.boxes import Box, Sharding, joined, volume, whole
from kl_dist.planning.matrices import Block, Reading, cut, flat_reading, plain_reading, read_matrices


@dataclass(frozen=True)
class Parameter:
    """What the plan needs to know of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    sharding: Sharding | None = None  # None: whole on every rank

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """One block of a matrix, or a parameter under AdamW, or what one rank has of it."""

    name: str
    parameter: int
    group: int
    method: str
    recipe: str
    reading: Reading
    block: Block
    dtype: torch.dtype
    phase: int  # its number among the matrices of its shape; refreshes fall where (step + phase) % T == 0
    cost: float  # flops per step, refreshes amortised, with bytes counted as flops
    state_bytes: int
    update_bytes: int  # of memory, at the peak of its update
    polar_bytes: tuple[int, ...]  # of the places beside these that orthogonalising the update takes

    @cached_property
    def numel(self) -> int:
        return self.block.numel

    @property
    def elementwise(self) -> bool:
        """It can be cut anywhere and has no refreshes: it is under AdamW, and no matrix."""
        return self.method == ELEMENTWISE

    @property
    def nbytes(self) -> int:
        """Bytes of its update, which travels in the parameter's dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def kind(self) -> tuple[Any, ...]:
        """Units of one kind are equal in all that the maths sees, and run as one batch."""
        return (not self.elementwise, self.group, self.method, self.block.shape, self.block.sides, str(self.dtype))


def stack_key(unit: Unit) -> tuple[Any, ...]:
    """Neighbours of one key in a bucket run as one stack: slices of any length too, for AdamW is elementwise."""
    return (unit.method, unit.group) if unit.elementwise else unit.kind


def stack_bytes(units: Sequence[Unit]) -> int:
    """Bytes that a step of units in one stack holds at its peak, the larger of their update and their refresh."""
    update, first = sum(unit.update_bytes for unit in units), units[0]
    if first.elementwise:
        return update
    update += sum(first.polar_bytes[len(units) - 1 :])  # each other matrix has one place
    stack = first.method, first.recipe, first.block, first.dtype
    refresh = costs.refresh_bytes(*stack, len(units))
    refreshed = costs.refreshed_at_once(len(units))
    return max(update + costs.wide_bytes(*stack, len(units)), refresh + costs.wide_bytes(*stack, refreshed))


def recast(unit: Unit, number: int, parameter: Parameter, group: Mapping[str, Any]) -> Unit:
    """The matrix of a parameter that has another number, dtype or group than before."""
    dtype = parameter.dtype
    cost = costs.matrix_cost(
        unit.method, unit.recipe, unit.block, dtype, group["precondition_frequency"], group["polar"]
    )
    held = costs.state_bytes(unit.method, unit.recipe, unit.block.shape, unit.block.sides, dtype)
    working = costs.update_bytes(unit.method, unit.recipe, unit.block, dtype)
    beside = costs.polar_bytes(unit.method, unit.recipe, unit.block, dtype, group["polar"])
    unit = replace(unit, parameter=number, group=parameter.group, dtype=dtype)
    return replace(unit, cost=cost, state_bytes=held, update_bytes=working, polar_bytes=beside)


def method_of(parameter: Parameter, group: Mapping[str, Any]) -> str:
    """The method that serves a parameter: two dimensions or more get the group's, others and those named AdamW."""
    is_matrix = len(parameter.shape) >= 2 and parameter.name not in (group["adamw_names"] or ())
    return group["method"] if is_matrix else ELEMENTWISE


def shape_class(method: str, block: Block) -> tuple[Any, ...]:
    """Matrices of one class take turns in refreshing; the class knows nothing of ranks or groups."""
    return (method, block.shape, block.sides)


def matrix_units(
    index: int, parameter: Parameter, group: Mapping[str, Any], seen: dict[tuple[Any, ...], int]
) -> Iterator[Unit]:
    """The blocks of one parameter. `seen` counts matrices by `shape_class`, and is counted on here.

    Raises:
        ValueError: a `matrices` declaration that does not fit, naming the parameter.
    """
    method, recipe = group["method"], group["recipe"]
    try:
        reading = read_matrices(parameter.shape, group, parameter.name)
    except ValueError as problem:
        raise ValueError(f"parameter {parameter.name!r}: {problem}") from None
    for block in cut(reading, group):
        kind = shape_class(method, block)
        cost = costs.matrix_cost(
            method, recipe, block, parameter.dtype, group["precondition_frequency"], group["polar"]
        )
        yield Unit(
            parameter.name + block.suffix(reading),
            index,
            parameter.group,
            method,
            recipe,
            reading,
            block,
            parameter.dtype,
            seen[kind],
            cost,
            costs.state_bytes(method, recipe, block.shape, block.sides, parameter.dtype),
            costs.update_bytes(method, recipe, block, parameter.dtype),
            costs.polar_bytes(method, recipe, block, parameter.dtype, group["polar"]),
        )
        seen[kind] += 1


def adamw_unit(index: int, parameter: Parameter) -> Unit:
    """A parameter under AdamW; flat where it is whole on every rank."""
    reading, ranges = plain_reading(parameter.shape), whole(parameter.shape)
    if parameter.sharding is None:
        reading, ranges = flat_reading(parameter.shape), ((0, parameter.numel),)
    return Unit(
        parameter.name,
        index,
        parameter.group,
        ELEMENTWISE,
        "",
        reading,
        Block(0, ranges, tuple("identity" for _ in ranges)),
        parameter.dtype,
        0,
        costs.adamw_cost(parameter.numel, parameter.dtype),
        costs.adamw_state_bytes(parameter.numel, parameter.dtype),
        costs.adamw_update_bytes(parameter.numel, parameter.dtype),
        (),
    )


def part_of(unit: Unit, parameter: Parameter, boxes: Sequence[Box]) -> Unit:
    """What a rank has of a unit under AdamW, as one that is flat: boxes of it, end to end."""
    numel = sum(map(volume, boxes))
    if numel == unit.numel:
        return unit
    if parameter.sharding is None:
        ((start, stop),) = boxes[0]
        name = f"{unit.name}[flat {start}:{stop}]"
    else:
        name = unit.name + "".join(Block(0, box, unit.block.sides).suffix(unit.reading) for box in joined(boxes))
    return replace(
        unit,
        name=name,
        block=Block(0, ((0, numel),), ("identity",)),
        cost=costs.adamw_cost(numel, unit.dtype),
        state_bytes=costs.adamw_state_bytes(numel, unit.dtype),
        update_bytes=costs.adamw_update_bytes(numel, unit.dtype),
    )
