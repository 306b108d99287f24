"""torch's DTensor: FSDP2, HSDP, tensor parallelism and their combinations.

torch.distributed.tensor takes seconds to import, so it is looked at only where someone else has imported it already:
before that no parameter can be a DTensor.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kl_dist.layouts.layout import Layout, LocalSharding
from kl_dist.planning.boxes import Sharding
from kl_dist.ranks import Ranks


def is_dtensor(tensor: Any) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local_sharding(parameter: Any, ranks: Ranks) -> LocalSharding:
    """Where this rank stands, by the device mesh and the placements.

    Raises:
        ValueError: partial sums, shards that are no ranges, ranks beyond this optimizer's.
    """
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
    return LocalSharding(row, (box,))


def sharding(parameter: Any, ranks: Ranks) -> Sharding | None:
    """Who holds what, by the device mesh and the placements.

    None where the mesh is not of all ranks, or the placements are such as only torch can follow.

    Raises:
        ValueError: as `local_sharding`.
    """
    from torch.distributed.tensor import Replicate, Shard

    here = local_sharding(parameter, ranks)
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.size() < ranks.size or any(type(placement) not in (Replicate, Shard) for placement in placements):
        return None
    axes = tuple(placement.dim if placement.is_shard() else None for placement in placements)
    members = tuple(map(ranks.group_rank, mesh.mesh.flatten().tolist()))
    found = _laid_out(tuple(parameter.shape), tuple(mesh.mesh.shape), members, axes)
    mine = ranks.rank in members and (found.row(ranks.rank), tuple(box for box, _ in found.held(ranks.rank)))
    return found if mine == (here.row, here.boxes) else None


@lru_cache(maxsize=256)
def _laid_out(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], members: tuple[int, ...], axes: tuple[int | None, ...]
) -> Sharding:
    """A tensor over a mesh of `members`, in C order: by dimension of the mesh, the axis that it cuts, or None.

    An axis is cut in parts of ceil(d / n), the last ones shorter or empty; what is cut already, again.
    """
    mesh = torch.tensor(members).view(mesh_shape)
    cuts = [k for k, axis in enumerate(axes) if axis is not None]
    others = [k for k, axis in enumerate(axes) if axis is None]
    boxes = []
    for coordinates in product(*(range(mesh_shape[k]) for k in cuts)):
        box = [(0, d) for d in shape]
        for k, at in zip(cuts, coordinates, strict=True):
            axis = axes[k]
            assert axis is not None
            first, last = box[axis]
            part = -(-(last - first) // mesh_shape[k])
            box[axis] = (min(first + at * part, last), min(first + (at + 1) * part, last))
        # torch gives what is empty an offset of its own; where nothing is does not matter
        boxes.append((tuple(box),))
    rows = mesh.permute(*others, *cuts).reshape(-1, len(boxes)).tolist()
    return Sharding(tuple(map(tuple, rows)), tuple(boxes))


def local_shard(tensor: Any) -> Tensor:
    return tensor.to_local().detach()


def local_gradient(parameter: Any, gradient: Any) -> Tensor:
    """One that lies otherwise than its parameter (partial sums of a norm under sequence parallelism, say) is brought
    there first, which is a collective of its device mesh."""
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    local = gradient.to_local()
    return local.wait() if hasattr(local, "wait") else local


def place_of_gradient(parameter: Any, gradient: Any) -> str:
    """The gradient's placements, where they are not its parameter's."""
    return "" if gradient.placements == parameter.placements else str(gradient.placements)


LAYOUT = Layout(local_sharding, local_shard, local_gradient, sharding, place_of_gradient)
