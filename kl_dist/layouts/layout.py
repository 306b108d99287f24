"""A layout: how parameters of one kind lie over the ranks, as a few functions (docs/adding-a-layout.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kl_dist.planning.boxes import Box, Sharding
from kl_dist.ranks import Ranks


class LocalSharding(NamedTuple):
    """Where one rank stands in a parameter's sharding."""

    row: tuple[int, ...]  # the ranks that hold this rank's replica, in the order of their shards
    boxes: tuple[Box, ...]  # what this rank holds, in the order of its memory
    flat: bool = False  # the shard is flat memory, the boxes end to end; False: it is the one box, and has its shape


class Layout(NamedTuple):
    """What the engine asks of a parameter."""

    local_sharding: Callable[[Any, Ranks], LocalSharding | None]
    """(parameter, ranks) -> where this rank stands, None for what is whole on every rank.

    Raises ValueError for what gives no boxes or lies over other ranks, in words that follow the parameter's name.
    """
    local_shard: Callable[[Any], Tensor]
    """(parameter or gradient) -> what this rank holds, detached: of the box's shape, or 1-D where the shard is flat."""
    local_gradient: Callable[[Any, Any], Tensor]
    """(parameter, its gradient) -> the gradient of what this rank holds, shaped as `local_shard`."""
    sharding: Callable[[Any, Ranks], Sharding | None] | None = None
    """(parameter, ranks) -> who holds what on all ranks, where this rank can tell by arithmetic; None where it cannot.

    Where any rank cannot, all tell each other what `local_sharding` gives; that takes the longer the more ranks there
    are. What ranks have found by themselves is compared all the same. Raises as `local_sharding`.
    """
    place_of_gradient: Callable[[Any, Any], str] | None = None
    """(parameter, its gradient) -> how the gradient lies, "" for as its parameter does; None: it always does.

    Where it lies otherwise `local_gradient` may be a collective of the parameter's ranks, which all of them begin in
    one order, and only where all have such a gradient: [Note: redistribution] in kl_dist/step/redistribution.py.
    """
