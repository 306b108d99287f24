"""Logical matrices: how a stored tensor is read as matrices, and how a large one is cut into blocks.

A *reading* turns a parameter of any shape into a batch (B, d_1..d_K), one preconditioner per batch entry. Which axes
are batch, rows or columns is declared by the group's `matrices` option, never guessed from names:

    {"parts": {0: 3}}                                    a fused qkv weight (3d, d): three matrices (d, d)
    {"parts": {0: 3 * heads}}                            the same per head
    {"batch": (0,), "rows": (1,), "columns": (2,)}       stacked experts (E, m, n): E matrices
    {"batch": (0,), "parts": {1: 2}}                     the same with gate and up fused, (E, 2m, n): 2E matrices (m, n)
    {"batch": (0,), "interleaved": {1: 2}}               the same where their rows take turns: gate, up, gate, up, ..
    {"rows": (0,), "columns": (1, 2, 3)}                 a conv weight as one matrix (the same as merge_dims=True)

One declaration is for all parameters of the group. A dict of parameters' names with a declaration each is for these
alone: {"experts.down_proj": {"batch": (0,)}, ..}.

A *block* is what one preconditioner serves: one batch entry of a reading, or a part of it where a side was cut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from kl_dist.methods.state import Side

SMALL_DIM = 16  # trailing dimensions up to this size are merged into columns under merge_dims (kernel sizes)
SHORTEST_PART = 64  # square blocking cuts no side into shorter parts

Declaration = Mapping[str, Any]
"""How one tensor is read."""

_AXES = ("batch", "rows", "columns")
_SPLITS = ("parts", "interleaved")


@dataclass(frozen=True)
class Reading:
    """A stored tensor as a batch of logical tensors: reshape to `split`, permute by `order`, reshape to `shape`."""

    stored: tuple[int, ...]
    split: tuple[
        int, ...
    ]  # the stored axes, some of them as (parts, rest), or (rest, parts) where they are interleaved
    origin: tuple[int, ...]  # the stored axis that each axis of the split came from
    batch: tuple[int, ...]  # axes of the split that count entries
    sides: tuple[tuple[int, ...], ...]  # axes of the split that make each side, the last running fastest
    of_batch: bool = False  # entries are independent (experts): one with a zero gradient sits the step out

    @cached_property
    def order(self) -> tuple[int, ...]:
        return (*self.batch, *(axis for side in self.sides for axis in side))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(B, d_1..d_K)."""
        return tuple(math.prod(self.split[axis] for axis in axes) for axes in (self.batch, *self.sides))

    def view(self, tensor: Tensor) -> Tensor:
        """`tensor` (stored) as (B, d_1..d_K): a view where its strides allow, else a copy."""
        return tensor.reshape(self.split).permute(self.order).reshape(self.shape)

    def restore(self, read: Tensor) -> Tensor:
        """The inverse of `view`: (B, d_1..d_K) as the stored shape."""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return read.reshape([self.split[axis] for axis in self.order]).permute(inverse).reshape(self.stored)


@dataclass(frozen=True)
class Block:
    """One block of a reading: batch entry `entry`, and a range [start, stop) of every side."""

    entry: int
    ranges: tuple[tuple[int, int], ...]
    sides: tuple[Side, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, read: Tensor) -> Tensor:
        """This block of a reading's view, (d_1..d_K) of the block."""
        part = read[self.entry]
        for axis, (start, stop) in enumerate(self.ranges):
            part = part.narrow(axis, start, stop - start)
        return part

    def suffix(self, reading: Reading) -> str:
        """What distinguishes it from the other blocks of its parameter: `[entry]`, `[0:768, :]`, or nothing."""
        entry = f"[{self.entry}]" if reading.shape[0] > 1 else ""
        whole = [(0, d) for d in reading.shape[1:]]
        if list(self.ranges) == whole:
            return entry
        parts = (":" if r == w else f"{r[0]}:{r[1]}" for r, w in zip(self.ranges, whole, strict=True))
        return f"{entry}[{', '.join(parts)}]"


def flat_reading(shape: Sequence[int]) -> Reading:
    """A tensor as one vector, (1, numel), for methods that work elementwise."""
    axes = tuple(range(len(shape)))
    return Reading(tuple(shape), tuple(shape), axes, (), (axes,))


def plain_reading(shape: Sequence[int]) -> Reading:
    """A tensor as it is, every axis a side, for methods that work elementwise on a shard of it."""
    axes = tuple(range(len(shape)))
    return Reading(tuple(shape), tuple(shape), axes, (), tuple((axis,) for axis in axes))


def names_of(matrices: Mapping[str, Any] | None) -> Collection[str]:
    """The names of parameters in an option `matrices`; none where it is one declaration for all."""
    keys = (*_AXES, *_SPLITS)
    by_name = matrices and all(key not in keys and isinstance(x, Mapping) for key, x in matrices.items())
    return matrices.keys() if matrices and by_name else ()


def declaration_of(name: str, matrices: Mapping[str, Any] | None) -> Declaration | None:
    """What the option `matrices` says of a parameter."""
    return matrices.get(name) if matrices and names_of(matrices) else matrices


def read_matrices(shape: Sequence[int], group: Mapping[str, Any], name: str = "") -> Reading:
    """How a parameter of `shape` (two dimensions or more) is read, by the options `matrices` and `merge_dims`.

    Raises:
        ValueError: a declaration that does not fit the shape; the message says what does.
    """
    declared = declaration_of(name, group["matrices"])
    if declared is not None:
        return _declared(tuple(shape), declared)
    axes = tuple(range(len(shape)))
    sides: list[tuple[int, ...]] = [(axis,) for axis in axes]
    if group["merge_dims"]:
        kept = next((axis for axis in range(len(shape) - 1, 1, -1) if shape[axis] > SMALL_DIM), 1)
        sides[kept:] = [axes[kept:]]
    if len(sides) > 2:
        sides = [side for side in sides if math.prod(shape[axis] for axis in side) > 1]
    sides += [()] * (2 - len(sides))
    of_length_one = tuple(axis for axis in axes if not any(axis in side for side in sides))
    return Reading(tuple(shape), tuple(shape), axes, of_length_one, tuple(sides))


def cut(reading: Reading, group: Mapping[str, Any]) -> Iterator[Block]:
    """The blocks of a reading, by the options `blocking`, `max_preconditioner_dim` and `long_side`.

    "square" cuts a matrix along its long side into round(long / short) near-equal parts, none shorter than 64. A side
    above `max_preconditioner_dim` is cut further, or keeps a diagonal or nothing ("diagonal", "identity").
    """
    sides = reading.shape[1:]
    counts = [1] * len(sides)
    if group["blocking"] == "square" and len(sides) == 2:
        short, long = sorted(sides)
        axis = sides.index(long)
        counts[axis] = max(1, min((2 * long + short) // (2 * short), long // SHORTEST_PART))
    kinds: list[Side] = ["full"] * len(sides)
    for axis, d in enumerate(sides):
        limit = group["max_preconditioner_dim"]
        if math.ceil(d / counts[axis]) > limit:
            if group["long_side"] == "cut":
                counts[axis] = math.ceil(d / limit)
            else:
                kinds[axis] = group["long_side"]
    ranges = [near_equal(d, count) for d, count in zip(sides, counts, strict=True)]
    for entry in range(reading.shape[0]):
        for chosen in product(*ranges):
            yield Block(entry, chosen, tuple(kinds))


def near_equal(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) as `parts` ranges whose lengths differ by one at most, the longer ones first."""
    short, longer = divmod(length, parts)
    stops = [short * (i + 1) + min(i + 1, longer) for i in range(parts)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _declared(shape: tuple[int, ...], declared: Declaration) -> Reading:
    """The reading a declaration asks for. Axes count in the stored tensor; parts come before the batch."""
    _check_keys(declared)
    counts = {kind: {_axis(axis, shape): n for axis, n in declared.get(kind, {}).items()} for kind in _SPLITS}
    parts, interleaved = counts["parts"], counts["interleaved"]
    for axis, count in (*parts.items(), *interleaved.items()):
        if not isinstance(count, int) or count < 1 or shape[axis] % count:
            raise ValueError(f"matrices: axis {axis} of size {shape[axis]} does not divide into {count!r} equal parts")
    if both := parts.keys() & interleaved.keys():
        raise ValueError(f"matrices: axis {min(both)} is either in 'parts' or 'interleaved', not both")
    batch = [_axis(axis, shape) for axis in declared.get("batch", ())]
    sides = [[_axis(axis, shape) for axis in declared[key]] for key in ("rows", "columns") if key in declared]
    if not sides:
        sides = [[axis] for axis in range(len(shape)) if axis not in batch]
    used = sorted([*batch, *(axis for side in sides for axis in side)])
    if used != list(range(len(shape))) or len(sides) < 2:
        raise ValueError(
            f"matrices: every axis of a tensor of shape {shape} belongs to exactly one of 'batch', 'rows' and"
            f" 'columns' (or name none of the last two), not {dict(declared)!r}"
        )
    split: list[int] = []
    origin: list[int] = []
    part_axis: dict[int, int] = {}
    kept_axis: dict[int, int] = {}
    for axis, d in enumerate(shape):
        count = parts.get(axis) or interleaved.get(axis) or 1
        lengths = [(kept_axis, d // count)]
        if axis in parts:
            lengths.insert(0, (part_axis, count))
        elif axis in interleaved:
            lengths.append((part_axis, count))
        for place, length in lengths:
            place[axis] = len(split)
            split.append(length)
            origin.append(axis)
    entries = (*(kept_axis[axis] for axis in batch), *part_axis.values())
    made_of = tuple(tuple(kept_axis[axis] for axis in side) for side in sides)
    return Reading(shape, tuple(split), tuple(origin), entries, made_of, of_batch=bool(batch))


def _check_keys(declared: Declaration) -> None:
    for key, value in declared.items():
        if key not in (*_AXES, *_SPLITS):
            known = ", ".join(map(repr, (*_AXES, *_SPLITS)))
            raise ValueError(f"matrices has no key {key!r}; there are {known}, or names of parameters alone")
        if not isinstance(value, Mapping if key in _SPLITS else (tuple, list)):
            kind = "a dict {axis: number of parts}" if key in _SPLITS else "a tuple of axes"
            raise ValueError(f"matrices: {key!r} is {kind}, not {value!r}")


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise ValueError(f"matrices: a tensor of shape {shape} has no axis {axis!r}")
    return axis % len(shape)
