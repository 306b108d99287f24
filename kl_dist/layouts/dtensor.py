"""What torch's DTensor says of where a parameter lies: FSDP2, HSDP, tensor parallelism and their combinations.

torch.distributed.tensor takes seconds to import, so it is looked at only where someone else has imported it already:
before that no parameter can be a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_dist.exchange import Ranks
from kl_dist.layouts.fragment import Fragment
from kl_dist.shards import Box, Grid, Sharding, boxes_of_range, volume


class Place(NamedTuple):
    """Where one rank stands in a parameter's sharding."""

    row: tuple[int, ...]  # the ranks that hold this rank's replica, in the order of their shards
    boxes: tuple[Box, ...]
    flat: bool = False  # see Sharding


def is_dtensor(tensor: Any) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def place_of(parameter: Any, ranks: Ranks) -> Place | None:
    """Where this rank stands; None for a tensor that is whole here.

    Raises:
        ValueError: it is laid out over ranks that do not share this optimizer, or in a way that gives no boxes.
    """
    if isinstance(parameter, Fragment):
        row = tuple(map(ranks.group_rank, parameter.ranks))
        stop = parameter.start + parameter.local.numel()
        return Place(row, tuple(boxes_of_range(parameter.shape, parameter.start, stop)), flat=True)
    if not is_dtensor(parameter):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError("it is a DTensor of partial sums; redistribute it to shards or replicas first")
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the device mesh of the DTensor")
    for axis in range(mesh.ndim):
        ranks.get_to_know(mesh.get_group(axis))
    across = tuple(
        at if placement.is_replicate() else slice(None) for placement, at in zip(placements, coordinate, strict=True)
    )
    row = tuple(ranks.group_rank(rank) for rank in mesh.mesh[across].flatten().tolist())
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    if tuple(shape) != tuple(parameter.to_local().shape):
        raise ValueError(f"its shards ({', '.join(map(str, placements))}) are not ranges of its dimensions")
    box = tuple((start, start + length) for start, length in zip(offset, shape, strict=True))
    return Place(row, (box,))


def sharding_of(places: Sequence[Place | None], shape: Sequence[int]) -> Sharding | None:
    """The sharding of a parameter from what every rank says of it, in rank order.

    Raises:
        ValueError: what the ranks say does not fit together.
    """
    if all(place is None for place in places):
        return None
    rows = {rank: place.row for rank, place in enumerate(places) if place is not None}
    grid: Grid = tuple(dict.fromkeys(rows.values()))
    everywhere = sorted(rank for row in grid for rank in row)
    if len(rows) < len(places) or everywhere != list(range(len(places))) or len({len(row) for row in grid}) > 1:
        raise ValueError(
            "its shards do not lie alike on all ranks of the process group: construct with the ranks of"
            " its device mesh as process_group"
        )
    if any(list(line) != sorted(line) for line in (*grid, *zip(*grid, strict=True))):
        raise ValueError("the ranks of its device mesh must ascend along each dimension")
    boxes = [tuple(place.boxes for rank in row if (place := places[rank]) is not None) for row in grid]
    if any(other != boxes[0] for other in boxes):
        raise ValueError("its replicas are not sharded alike")
    held = sum(volume(box) for there in boxes[0] for box in there)
    if held != torch.Size(shape).numel():
        raise ValueError("its shards overlap or leave a part out")
    return Sharding(grid, boxes[0], next(place.flat for place in places if place is not None))


def local_shard(parameter: Any) -> Tensor:
    """What this rank holds of a parameter, detached, sharing its memory."""
    if isinstance(parameter, Fragment):
        return parameter.local
    return parameter.to_local().detach() if is_dtensor(parameter) else parameter.detach()


def local_gradient(parameter: Any) -> Tensor | None:
    """The gradient of what this rank holds; None without one or where it is frozen.

    A gradient that lies otherwise than its parameter (partial sums of a norm under sequence parallelism, say) is
    brought there first, which is a collective of its device mesh.
    """
    gradient = parameter.grad
    if gradient is None or not parameter.requires_grad:
        return None
    if isinstance(gradient, Fragment):
        return gradient.local
    if not is_dtensor(gradient):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    local = gradient.to_local()
    return local.wait() if hasattr(local, "wait") else local
