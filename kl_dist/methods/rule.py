"""What a method is to everything else: its functions under each recipe, and the few facts that a plan is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.linalg import QR_SLOWNESS
from kl_dist.methods.state import Side


class Flops(NamedTuple):
    """Of one block, counted as flops of a matrix product: what runs slower weighs more."""

    update: float  # in every step
    refresh: float  # in every T-th


def flops_in_eigenbasis(shape: Sequence[int], sides: Sequence[Side]) -> Flops:
    """Of a method that is resident in the eigenbasis, for a block of N elements; a sum over its full sides of size d.

    update     project, gram, project back                                 6 N d
    refresh    QR 8/3 d^3 (QR_SLOWNESS), P O and Q O 4 d^3, momentum       .. + 2 N d
    """
    numel = math.prod(shape)
    full = [d for d, side in zip(shape, sides, strict=True) if side == "full"]
    refresh = sum((8 / 3 * QR_SLOWNESS + 4) * d**3 + 2 * numel * d for d in full)
    return Flops(sum(6.0 * numel * d for d in full), refresh)


class Rule(NamedTuple):
    """One method under one recipe. `start`, `update` and `refresh` mutate the state they are given.

    `update` has the gradients' memory and a spare tensor like it to itself: [Note: two buffers] in kronecker.py.
    """

    allocate: Callable[[Sequence[int], Sequence[Side], int, Tensor], Any]  # (shape, sides, batch, like)
    start: Callable[[Any, Tensor, Hyper], None]  # at the first non-zero gradient
    update: Callable[[Any, Tensor, Hyper, Tensor], Tensor]  # every step; returns U, before the learning rate
    refresh: Callable[[Any, Hyper], None] | None  # every T steps, after the update; None: there is nothing to refresh
    starts_without_update: bool = False  # the released codes spend their first call on the start
    decays_last: bool = False  # W <- (W - lr U)(1 - lr wd) instead of W (1 - lr wd) - lr U
    flops: Callable[[Sequence[int], Sequence[Side]], Flops] = flops_in_eigenbasis  # (shape, sides)
    polar: bool = False  # whether its update can be orthogonalised, as option `polar` says
    working_copies: int = 2  # tensors as large as its gradients that an update holds at its peak, its two included
    wide_at_once: int | None = None  # elements of gradients whose state is float32 at a time, where less of it is kept
    defaults: Mapping[str, Any] = MappingProxyType({})  # of options, where not the recipe's
    form: str | None = (
        None  # the recipe that its saved state is of, where not its own: checkpoints go from one to the other
    )


def as_released(allocate: Any, start: Any, update: Any, refresh: Any, **facts: Any) -> Rule:
    """A rule of recipe "paper": the released codes spend their first call on the start, and decay after the update."""
    return Rule(allocate, start, update, refresh, starts_without_update=True, decays_last=True, **facts)


@dataclass(frozen=True)
class Transfer:
    """What matrices are trained at where AdamW's peak learning rate is a:

        lr = a min(ratio, max(1, ceiling / a))

    A method's best rate is about `ratio` times AdamW's while that is small; where a task lets AdamW go high, the
    method's own best hardly moves: so nothing is lifted beyond `ceiling`, and what is above it already stays as it is.
    lr is continuous in a and never falls as a grows.
    """

    ratio: float = 1.0
    ceiling: float = math.inf

    def factor(self, peak: float) -> float:
        """lr / a; of a peak of 0, one that is not known, the ratio."""
        return min(self.ratio, max(1.0, self.ceiling / peak)) if peak else self.ratio


MEASURED = Transfer(ratio=5.0, ceiling=2e-2)
"""Of the methods whose updates have an RMS of 0.2 to 1 by themselves, whatever the gradient: docs/learning.md."""


@dataclass(frozen=True)
class Method:
    """A method under all its recipes."""

    title: str  # as people write it; without its hyphens, what a DeepSpeed config calls it
    rules: Mapping[str, Rule]  # by recipe
    from_adamw: Transfer = Transfer()  # of learning rates; AdamW's own until another was measured

    @property
    def called(self) -> str:
        """What it is called where optimizers of torch and DeepSpeed are called too: the title as one small word."""
        return self.title.lower().replace("-", "_")
