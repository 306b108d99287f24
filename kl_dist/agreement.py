"""What ranks must know of each other before a step changes anything.

[Note: agreement] A step opens with one small all-reduce (MAX) of a number per unit, written by the unit's owner, a
fingerprint of the options (and its negative, so that the maximum tells whether all are equal), and one number for
trouble. It is the only synchronisation with the host, and it comes before any state changes: what is
wrong on one rank is raised on all, a gradient that is missing or not finite is treated alike everywhere, and the
owner's view decides when only some ranks lack a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kl_dist import costs
from kl_dist.methods.kronecker import smallest_scale
from kl_dist.units import Unit


class Gradient(IntEnum):
    """What an owner says of a unit's gradient; the others say MISSING, and the largest number wins."""

    MISSING = 0
    ZERO = 1
    PRESENT = 2
    FIRST = 3  # spent on the start of a recipe whose first call makes no update
    NONFINITE = 4

    def steps(self, unit: Unit) -> bool:
        """Whether the unit takes part; an entry of a declared batch (an expert) does not with a zero gradient."""
        return self is not Gradient.MISSING and not (self is Gradient.ZERO and is_batched(unit))

    def moves(self, unit: Unit) -> bool:
        """Whether the unit's weights change."""
        return self.steps(unit) and self is not Gradient.FIRST


class Trouble(IntEnum):
    """The last number of the agreement."""

    NONE = 0
    REPLAN = 1  # a parameter was frozen, unfrozen, moved or cast on some rank
    ERROR = 2


class Sight(NamedTuple):
    """A unit this rank owns, its gradient where it has one, and whether its start would take up the whole step."""

    number: int  # into Plan.units
    unit: Unit
    gradient: Tensor | None
    waits: bool


def describe_gradients(seen: Sequence[Sight], out: Tensor) -> None:
    """Write a `Gradient` for every unit seen into `out` (units + 1,), on its device and without a synchronisation.

    By the largest magnitude: up to `smallest_scale` is zero, beyond `largest_gradient` or NaN is not finite.
    """
    gradients: list[Tensor] = []
    rows: list[list[float]] = []
    for number, unit, gradient, waits in seen:
        if gradient is not None:
            dtype = costs.state_dtype(unit.dtype)
            when_zero = Gradient.FIRST if waits and not is_batched(unit) else Gradient.ZERO
            otherwise = Gradient.FIRST if waits else Gradient.PRESENT
            gradients.append(gradient)
            rows.append([number, smallest_scale(dtype), largest_gradient(dtype), when_zero, otherwise])
    if not rows:
        return
    numbers, tiny, huge, zero, other = torch.tensor(rows, dtype=torch.float64).to(out.device).unbind(1)
    norms = torch._foreach_norm(gradients, float("inf"))
    largest = torch.stack([norm.double() for norm in norms])
    said = torch.where(largest > tiny, other, zero)
    said = torch.where(largest < huge, said, float(Gradient.NONFINITE))  # NaN compares false
    out[numbers.long()] = said.to(out.dtype)


def is_batched(unit: Unit) -> bool:
    """Whether the unit is one entry of a declared batch (an expert, a head)."""
    return unit.method != "adamw" and unit.reading.shape[0] > 1


def largest_gradient(dtype: torch.dtype) -> float:
    """A gradient beyond this is treated as not finite: whitened and squared it would overflow."""
    return 1e100 if dtype == torch.float64 else 1e12
