"""The units of work: blocks of matrices with a preconditioner each, and slices of flat parameters under AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from kl_dist.methods import ELEMENTWISE
from kl_dist.planning import costs
from kl_dist.planning.boxes import Box, Sharding, volume
from kl_dist.planning.matrices import Block, Reading, cut, flat_reading, near_equal, plain_reading, read_matrices


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
    """One block of a matrix, or one slice of a flat parameter under AdamW."""

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
    return max(update, costs.refresh_bytes(first.method, first.recipe, first.block, first.dtype, len(units)))


def recast(unit: Unit, number: int, parameter: Parameter, group: Mapping[str, Any]) -> Unit:
    """The unit of a parameter that has another number, dtype or group than before."""
    dtype = parameter.dtype
    if unit.elementwise:
        cost, held = costs.adamw_cost(unit.numel, dtype), costs.adamw_state_bytes(unit.numel, dtype)
        working = costs.adamw_update_bytes(unit.numel, dtype)
    else:
        cost = costs.matrix_cost(
            unit.method, unit.recipe, unit.block, dtype, group["precondition_frequency"], group["polar"]
        )
        held = costs.state_bytes(unit.method, unit.recipe, unit.block.shape, unit.block.sides, dtype)
        working = costs.update_bytes(unit.method, unit.recipe, unit.block, dtype, group["polar"])
    unit = replace(unit, parameter=number, group=parameter.group, dtype=dtype)
    return replace(unit, cost=cost, state_bytes=held, update_bytes=working)


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
            costs.update_bytes(method, recipe, block, parameter.dtype, group["polar"]),
        )
        seen[kind] += 1


def adamw_units(
    indices: Sequence[int], parameters: Sequence[Parameter], world_size: int, bucket_bytes: int
) -> Iterator[tuple[Unit, int]]:
    """Flat parameters laid end to end, dtype by dtype, and cut into equal slices: one per rank and bucket.

    Yields:
        A slice and the rank that owns it; a rank's slices come in the order of the buckets.
    """
    for dtype in dict.fromkeys(parameters[i].dtype for i in indices):
        stream = [i for i in indices if parameters[i].dtype == dtype]
        lengths = [parameters[i].numel for i in stream]
        starts = [0, *accumulate(lengths)]
        buckets = math.ceil(starts[-1] * dtype.itemsize / bucket_bytes)
        for number, (start, stop) in enumerate(near_equal(starts[-1], buckets * world_size)):
            for i, offset, length in zip(stream, starts, lengths, strict=False):
                first, last = max(start - offset, 0), min(stop - offset, length)
                if first < last:
                    yield _adamw_slice(i, parameters[i], first, last), number % world_size


def sharded_adamw_units(
    indices: Sequence[int], parameters: Sequence[Parameter], most: float
) -> Iterator[tuple[Unit, int]]:
    """Flat parameters that are sharded already: each rank has units of its own for what it holds, which never travel.

    They are rows of a shard, of `most` bytes together if they can be: their updates take as much memory at a time.

    Yields:
        A unit and the first of the ranks that hold it.
    """
    for i in indices:
        parameter = parameters[i]
        sharding = parameter.sharding
        assert sharding is not None
        reading = plain_reading(parameter.shape)
        for rank in sharding.grid[0]:
            boxes = (rows for box, _ in sharding.held(rank) for rows in _rows_of(box, most / parameter.dtype.itemsize))
            for box in boxes:
                block = Block(0, box, tuple("identity" for _ in box))
                if math.prod(block.shape):
                    yield _adamw_unit(i, parameter, reading, block, block.suffix(reading)), rank


def _rows_of(box: Box, most: float) -> Iterator[Box]:
    """A box cut along its first axis into boxes of `most` elements, or of one row; end to end they are the box."""
    if not box:
        yield box
        return
    (first, last), *others = box
    count = min(math.ceil(volume(box) / most), last - first)
    for start, stop in near_equal(last - first, max(count, 1)):
        yield ((first + start, first + stop), *others)


def keepers_of(unit: Unit, parameter: Parameter, owner: int) -> tuple[int, ...]:
    """The ranks that hold a unit's state: all that have the shard where AdamW updates it in place, else its owner."""
    if not unit.elementwise or parameter.sharding is None:
        return (owner,)
    return parameter.sharding.column(owner)


def _adamw_slice(index: int, parameter: Parameter, start: int, stop: int) -> Unit:
    suffix = "" if stop - start == parameter.numel else f"[flat {start}:{stop}]"
    block = Block(0, ((start, stop),), ("identity",))
    return _adamw_unit(index, parameter, flat_reading(parameter.shape), block, suffix)


def _adamw_unit(index: int, parameter: Parameter, reading: Reading, block: Block, suffix: str) -> Unit:
    numel = math.prod(block.shape)
    return Unit(
        parameter.name + suffix,
        index,
        parameter.group,
        ELEMENTWISE,
        "",
        reading,
        block,
        parameter.dtype,
        0,
        costs.adamw_cost(numel, parameter.dtype),
        costs.adamw_state_bytes(numel, parameter.dtype),
        costs.adamw_update_bytes(numel, parameter.dtype),
    )
