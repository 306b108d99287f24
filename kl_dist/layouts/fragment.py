"""A range of the elements of a parameter, in flat memory: what ZeRO's partitions hold of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist.layouts.layout import Layout, LocalSharding
from kl_dist.planning.boxes import boxes_of_range
from kl_dist.ranks import Ranks


class Fragment(Tensor):
    """The elements `start` and after, in C order, of a tensor of `shape`; the other `ranks` have the others.

    As with a DTensor, the shape is that of all of it. It can be given to KLShampoo and have a gradient (a Fragment
    too); it cannot be computed with.
    """

    local: Tensor  # 1-D, contiguous; may be on the host while the work is done on `device`
    start: int
    ranks: tuple[int, ...]  # of the whole job, in the order of what they hold

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], local: Tensor, start: int, ranks: Sequence[int], device: torch.device | None = None
    ) -> Fragment:
        made: Any = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=device or local.device, requires_grad=True
        )
        made.local, made.start, made.ranks = local, start, tuple(ranks)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def holds(self, local: Tensor, gradient: Tensor | None) -> None:
        """Take up where the elements and their gradients are now."""
        self.local = local
        self.grad = None if gradient is None else Fragment(self.shape, gradient, self.start, self.ranks, self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a fragment of a parameter: .local is what this rank has of it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fragment({tuple(self.shape)}, here {self.start} to {self.start + self.local.numel()})"


def local_sharding(parameter: Any, ranks: Ranks) -> LocalSharding:
    """Where this rank stands: its range of the elements as boxes, which lie end to end.

    Raises:
        ValueError: it lies over ranks beyond this optimizer's.
    """
    row = tuple(map(ranks.group_rank, parameter.ranks))
    stop = parameter.start + parameter.local.numel()
    return LocalSharding(row, tuple(boxes_of_range(parameter.shape, parameter.start, stop)), flat=True)


def local_shard(tensor: Any) -> Tensor:
    return tensor.local


def local_gradient(parameter: Any, gradient: Any) -> Tensor:
    return gradient.local


LAYOUT = Layout(local_sharding, local_shard, local_gradient)
