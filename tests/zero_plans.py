"""Plans for parameters in the partitions of ZeRO, found by arithmetic: at any world size, and without DeepSpeed."""

from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise

import torch

from kl_dist import options
from kl_dist.planning.boxes import Range, Sharding, boxes_of_range
from kl_dist.planning.making import make_plan
from kl_dist.planning.plan import Plan
from kl_dist.planning.units import Parameter


def zero_plan(
    shapes: Mapping[str, tuple[int, ...]], world_size: int, stage: int = 1, adamw_names: Collection[str] = ()
) -> Plan:
    """For one group of parameters; stage 0 leaves them whole.

    Stages 1 and 2 lay them end to end, padded to a multiple of 2 W, in W equal parts; stage 3 cuts each into W.
    """
    group = {**options.DEFAULTS, "adamw_names": tuple(adamw_names)}
    options.resolve(group)
    parameters = [Parameter(name, tuple(shape), torch.float32, 0) for name, shape in shapes.items()]
    if stage:
        ranks = (tuple(range(world_size)),)
        parameters = [
            Parameter(p.name, p.shape, p.dtype, 0, Sharding(ranks, _boxes(p.shape, ranges), flat=True))
            for p, ranges in zip(parameters, _partitions(parameters, world_size, stage), strict=True)
        ]
    return make_plan(parameters, [group], world_size)


def _partitions(parameters: list[Parameter], world_size: int, stage: int) -> Iterator[list[Range]]:
    """By parameter, the elements that each rank has of it."""
    total, offset = sum(p.numel for p in parameters), 0
    part = -(-total // (2 * world_size)) * 2
    for p in parameters:
        first, length = (offset, part) if stage < 3 else (0, -(-p.numel // world_size))
        ends = [min(max(rank * length - first, 0), p.numel) for rank in range(world_size + 1)]
        yield list(pairwise(ends))
        offset += p.numel


def _boxes(shape: tuple[int, ...], ranges: list[Range]) -> tuple:
    return tuple(tuple(boxes_of_range(shape, start, stop)) for start, stop in ranges)
