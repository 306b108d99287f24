"""What ranks must know of each other before a step changes anything.

[Note: agreement] A step opens with one small all-reduce (MAX) of a number per unit, written by the unit's owner (where
its parameter is sharded or under AdamW: by all that have a part of it), a fingerprint of the options (and its negative,
so that the maximum tells whether all are equal), and one number for trouble. It is the only synchronisation with the
host, and it comes before any state changes: what is wrong on one rank is raised on all, a gradient that is missing or
not finite is treated alike everywhere, and the owner's view decides when only some ranks lack a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_dist import options, ranges
from kl_dist.methods.averages import largest_gradient, smallest_scale
from kl_dist.methods.state import state_dtype
from kl_dist.planning.boxes import Piece
from kl_dist.planning.plan import Plan, structure
from kl_dist.planning.units import Unit


class Presence(IntEnum):
    """What is said of a unit's gradient; who has no say says MISSING, and the largest number wins."""

    MISSING = 0
    ZERO = 1
    PRESENT = 2
    FIRST = 3  # spent on the start of a recipe whose first call makes no update
    LACKING = 4  # said by one of several ranks that need the gradient and does not have it: then all rest
    NONFINITE = 5
    DAMAGED = 6  # not of the gradient, but of the state: the last update was not finite

    def steps(self, unit: Unit) -> bool:
        """Whether the unit takes part; an entry of a declared batch (an expert) does not with a zero gradient."""
        return self is not Presence.MISSING and not (self is Presence.ZERO and unit.reading.of_batch)

    def moves(self, unit: Unit) -> bool:
        """Whether the unit's weights change."""
        return self.steps(unit) and self is not Presence.FIRST


BY_VALUE = tuple(Presence)


class Trouble(IntEnum):
    """The last number of the agreement."""

    NONE = 0
    REDISTRIBUTE = 1  # a gradient lies otherwise than its parameter, which was not known: [Note: redistribution]
    REPLAN = 2  # a parameter was frozen, unfrozen, moved or cast on some rank
    ERROR = 3


def check_step(plan: Plan, planned: Sequence[tuple[str, Tensor, int]], groups: Sequence[Mapping[str, Any]]) -> None:
    """What is wrong on this rank before a step is raised, seen without touching the device.

    Args:
        plan: made for the parameters and options as they were.
        planned: (name, parameter, group) as they are now.
        groups: the parameter groups as they are now.

    Raises:
        ValueError, TypeError: an option, a parameter or a gradient is not what it may be.
    """
    if len(groups) != len(plan.structure):
        raise ValueError(
            f"param_groups has {len(groups)} groups, and {len(plan.structure)} are planned for: add one with"
            " add_param_group, or call follow_groups() on all ranks"
        )
    for number, group in enumerate(groups):
        gone = [key for key in options.KEPT if key not in group]
        if gone:
            raise ValueError(
                f"parameter group {number} has no option {gone[0]!r}: change options in the group that is there, or"
                " make groups by add_param_group, which fills them in"
            )
    if structure(groups) != plan.structure:
        raise ValueError(
            f"the options {', '.join(options.STRUCTURAL)} shape the state and cannot be changed after"
            " construction: construct a new KLShampoo"
        )
    for group in groups:
        ranges.check_numbers(group)
    shapes = {parameter.name: parameter.shape for parameter in plan.parameters}
    for name, parameter, _ in planned:
        if tuple(parameter.shape) != shapes.get(name, tuple(parameter.shape)):
            raise ValueError(
                f"parameter {name!r} had shape {shapes[name]} and now has {tuple(parameter.shape)}:"
                " construct a new KLShampoo"
            )
        if parameter.grad is not None:
            _check_gradient(name, parameter.grad)


def _check_gradient(name: str, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name!r} is sparse ({grad.layout}), which KLShampoo does not take:"
            " construct the layer with sparse=False"
        )
    if not grad.is_floating_point():
        raise TypeError(f"the gradient of {name!r} is {grad.dtype}; KLShampoo takes real floating-point gradients")


class Sight(NamedTuple):
    """What a rank sees of a unit's gradient: all of it or a piece, on the unit's owner or where a shard of it lies."""

    number: int  # into Plan.units
    unit: Unit
    piece: Piece
    shared: bool  # with other ranks that need the gradient as well: where one of them lacks it, the unit rests


def bounds_of(seen: Sequence[Sight], device: torch.device) -> Tensor:
    """(3, len(seen)) float64: units' numbers, and up to which magnitude a gradient is zero, from which not finite."""
    dtypes = {dtype: (smallest_scale(dtype), largest_gradient(dtype)) for dtype in (torch.float32, torch.float64)}
    rows = [(sight.number, *dtypes[state_dtype(sight.unit.dtype)]) for sight in seen]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3).T.contiguous().to(device)


def describe_gradients(seen: Sequence[Sight], gradients: Sequence[Tensor | None], bounds: Tensor, out: Tensor) -> None:
    """Write a `Presence` for every unit seen into `out`, on its device and without a synchronisation.

    By the largest magnitude: up to `smallest_scale` is zero, beyond `largest_gradient` or NaN is not finite.

    Args:
        seen: what this rank has a view of.
        gradients: of these, in their order.
        bounds: `bounds_of` them.
        out: by unit.
    """
    there = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if len(there) < len(seen):
        missing = (sight for sight, gradient in zip(seen, gradients, strict=True) if gradient is None)
        lacking = [sight.number for sight in missing if sight.shared]
        if lacking:
            out.index_fill_(0, torch.tensor(lacking).to(out.device, non_blocking=True), float(Presence.LACKING))
        if not there:
            return
        bounds = bounds.index_select(1, torch.tensor(there).to(bounds.device, non_blocking=True))
    if not there:
        return
    numbers, tiny, huge = bounds
    largest = _largest_magnitudes([gradient for gradient in gradients if gradient is not None]).double().to(out.device)
    presence = torch.where(largest > tiny, float(Presence.PRESENT), float(Presence.ZERO))
    presence = torch.where(largest < huge, presence, float(Presence.NONFINITE))  # NaN compares false
    out.scatter_reduce_(0, numbers.long(), presence.to(out.dtype), "amax")  # several pieces of one unit may lie here


def _largest_magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    """max |G| of each; NaN where there is one."""
    if gradients[0].device.type != "cpu":
        return torch.stack([norm.double() for norm in torch._foreach_norm(list(gradients), float("inf"))])
    # on CPUs this norm is computed an element at a time, and took 4 % of a step
    smallest, largest = zip(*map(torch.aminmax, gradients), strict=True)
    return torch.maximum(torch.stack(largest), torch.stack(smallest).neg())


def agreed(plan: Plan, values: Sequence[float]) -> list[Presence]:
    """The units' gradients from the largest that any rank said: a number a unit, then one for each that may wait.

    A parameter under AdamW steps as a whole, and a matrix in all partition groups: not where a rank that has a part of
    it, or owns it, lacks the gradient.
    """
    presences = [BY_VALUE[int(value)] for value in values[: len(plan.units)]]
    for index, presence in enumerate(presences):
        if presence is Presence.LACKING:
            presences[index] = Presence.MISSING
    for index, waits in zip(plan.waiting, values[len(plan.units) :], strict=True):
        rests = presences[index] is Presence.ZERO and plan.units[index].reading.of_batch
        if waits and not rests and presences[index] in (Presence.ZERO, Presence.PRESENT):
            presences[index] = Presence.FIRST
    return presences


def damaged(presences: Sequence[Presence]) -> list[int]:
    """The units whose last update was not finite."""
    return [i for i, presence in enumerate(presences) if presence is Presence.DAMAGED]


def describe_damage(plan: Plan, bad: Sequence[int]) -> str:
    """What to say of these, by the name of the first."""
    return (
        f"the last update of {plan.units[bad[0]].name!r}{_and_others(bad)} was not finite though the gradient was: the"
        " state was damaged, by memory that failed or by what was written into it; weights were left as they were, but"
        " for their decay"
    )


def not_finite(plan: Plan, presences: Sequence[Presence]) -> str | None:
    """What to say of the gradients that are not finite, by the name of the first; None where there are none."""
    bad = [i for i, presence in enumerate(presences) if presence is Presence.NONFINITE]
    if not bad:
        return None
    return f"the gradient of {plan.units[bad[0]].name!r}{_and_others(bad)} is NaN, infinite or too large to square"


def _and_others(bad: Sequence[int]) -> str:
    return f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
