"""Where the parameters lie: the layouts that are known, and what the plan is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist.layouts import dtensor, fragment
from kl_dist.layouts.layout import Layout, LocalSharding
from kl_dist.planning.boxes import Grid, Sharding, tile
from kl_dist.planning.units import Parameter
from kl_dist.ranks import Ranks

WHOLE = Layout(lambda parameter, ranks: None, lambda tensor: tensor.detach(), lambda parameter, gradient: gradient)
"""A plain tensor: one process, DistributedDataParallel."""

_layouts: list[tuple[Callable[[Any], bool], Layout]] = [
    (dtensor.is_dtensor, dtensor.LAYOUT),
    (lambda tensor: isinstance(tensor, fragment.Fragment), fragment.LAYOUT),
]


def add_layout(recognise: Callable[[Any], bool], layout: Layout) -> None:
    """Make a layout known, on every rank and before the optimizer is constructed.

    Args:
        recognise: whether a parameter (or a gradient of one) is of this layout; those added last are asked first.
        layout: its three functions.
    """
    _layouts.insert(0, (recognise, layout))


def layout_of(tensor: Any) -> Layout:
    """The layout of a parameter or of a gradient."""
    return next((layout for recognise, layout in _layouts if recognise(tensor)), WHOLE)


def is_whole(tensor: Any) -> bool:
    """Whether it is a plain tensor, of which every rank has all."""
    return layout_of(tensor) is WHOLE


def local_shard(tensor: Any) -> Tensor:
    """What this rank holds of a parameter or of a gradient, detached, sharing its memory."""
    return layout_of(tensor).local_shard(tensor)


def local_gradient(parameter: Any) -> Tensor | None:
    """The gradient of what this rank holds of a parameter; None without one or where it is frozen."""
    gradient = parameter.grad
    if gradient is None or not parameter.requires_grad:
        return None
    return layout_of(parameter).local_gradient(parameter, gradient)


def place_of_gradient(parameter: Any) -> str | None:
    """How the gradient of a parameter lies: "" as the parameter does, None without one or where it is frozen."""
    gradient = parameter.grad
    if gradient is None or not parameter.requires_grad:
        return None
    place = layout_of(parameter).place_of_gradient
    return "" if place is None else place(parameter, gradient)


def device_of(trained: Sequence[tuple[str, Tensor, int]], otherwise: torch.device) -> torch.device:
    """Where the parameters of this rank are; `otherwise` where there are none.

    Raises:
        ValueError: not all are on one device.
    """
    devices = {parameter.device: name for name, parameter, _ in trained}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"all parameters of a rank must be on one device, but {where}")
    return next(iter(devices), otherwise)


Seen = tuple[str, tuple[int, ...], "LocalSharding | None"]
"""What a rank tells the others of a parameter: its name, its shape, and where it stands in its sharding."""


def seen_from_here(trained: Sequence[tuple[str, Tensor, int]], ranks: Ranks) -> list[Seen]:
    """What this rank has to tell of its parameters, (name, parameter, group) each.

    Raises:
        ValueError: as the layout's `local_sharding`, with the parameter's name.
    """
    return [(name, tuple(p.shape), _of(name, layout_of(p).local_sharding, p, ranks)) for name, p, _ in trained]


def known_from_here(trained: Sequence[tuple[str, Tensor, int]], ranks: Ranks) -> list[Sharding | None] | None:
    """The shardings of this rank's parameters, where it can tell them all without asking the others.

    Raises:
        ValueError: as the layout's `sharding` and as `sharding_of`, with the parameter's name.
    """
    found: list[Sharding | None] = []
    checked: set[int] = set()
    for name, p, _ in trained:
        layout = layout_of(p)
        if layout is WHOLE:
            found.append(None)
            continue
        sharding = None if layout.sharding is None else _of(name, layout.sharding, p, ranks)
        if sharding is None:
            return None
        if id(sharding) not in checked:
            _of(name, _check, sharding, tuple(p.shape))
            checked.add(id(sharding))
        found.append(sharding)
    return found


def parameters_of(trained: Sequence[tuple[str, Tensor, int]], shardings: Sequence[Sharding | None]) -> list[Parameter]:
    """What the plan needs to know of the parameters."""
    pairs = zip(trained, shardings, strict=True)
    return [Parameter(name, tuple(p.shape), p.dtype, group, sharding) for (name, p, group), sharding in pairs]


def told_by_all(
    trained: Sequence[tuple[str, Tensor, int]], everywhere: Sequence[Sequence[Seen]]
) -> list[Sharding | None]:
    """The shardings of the parameters, from what every rank has told of them.

    Raises:
        ValueError: as `sharding_of`, with the parameter's name.
    """
    here = [(name, tuple(p.shape)) for name, p, _ in trained]
    # where the ranks have other parameters the comparison of their plans says which
    alike = all([one[:2] for one in other] == here for other in everywhere)
    return [
        _of(name, sharding_of, [other[i][2] for other in everywhere] if alike else [None], p.shape)
        for i, (name, p, _) in enumerate(trained)
    ]


def _of(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function makes of a parameter; what it does not like about it, with the parameter's name."""
    try:
        return function(*arguments)
    except ValueError as problem:
        raise ValueError(f"parameter {name!r}: {problem}") from None


def sharding_of(by_rank: Sequence[LocalSharding | None], shape: Sequence[int]) -> Sharding | None:
    """The sharding of a parameter from what every rank says of it, in rank order.

    Raises:
        ValueError: what the ranks say does not fit together.
    """
    if all(one is None for one in by_rank):
        return None
    rows = {rank: one.row for rank, one in enumerate(by_rank) if one is not None}
    grid: Grid = tuple(dict.fromkeys(rows.values()))
    everywhere = sorted(rank for row in grid for rank in row)
    if len(rows) < len(by_rank) or everywhere != list(range(len(by_rank))) or len({len(row) for row in grid}) > 1:
        raise ValueError(
            "its shards do not lie alike on all ranks of the process group: construct with the ranks of"
            " its device mesh as process_group"
        )
    boxes = [tuple(one.boxes for rank in row if (one := by_rank[rank]) is not None) for row in grid]
    if any(other != boxes[0] for other in boxes):
        raise ValueError("its replicas are not sharded alike")
    sharding = Sharding(grid, boxes[0], next(one.flat for one in by_rank if one is not None))
    _check(sharding, shape)
    return sharding


def _check(sharding: Sharding, shape: Sequence[int]) -> None:
    grid = sharding.grid
    if any(list(line) != sorted(line) for line in (*grid, *zip(*grid, strict=True))):
        raise ValueError("the ranks of its device mesh must ascend along each dimension")
    if not tile((box for there in sharding.boxes for box in there), shape):
        raise ValueError("its shards overlap or leave a part out")
