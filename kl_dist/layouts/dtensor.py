"""torch's DTensor: FSDP2, HSDP, tensor parallelism and their combinations.

torch.distributed.tensor takes seconds to import, so it is looked at only where someone else has imported it already:
before that no parameter can be a DTensor.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from kl_dist.layouts.layout import Layout, LocalSharding
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


def local_shard(tensor: Any) -> Tensor:
    return tensor.to_local().detach()


def local_gradient(parameter: Any, gradient: Any) -> Tensor:
    """One that lies otherwise than its parameter (partial sums of a norm under sequence parallelism, say) is brought
    there first, which is a collective of its device mesh."""
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    local = gradient.to_local()
    return local.wait() if hasattr(local, "wait") else local


LAYOUT = Layout(local_sharding, local_shard, local_gradient)
