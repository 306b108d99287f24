"""This rank's shards: gradients are read from them, updates are written into them, wherever the parameters live."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kl_dist.layouts.placement import layout_of, local_gradient, local_shard, place_of_gradient
from kl_dist.planning.boxes import Piece


class Update(NamedTuple):
    """What is to be taken off a piece of this rank's shards."""

    number: int  # of the unit, into Plan.units
    parameter: int
    piece: Piece
    values: Tensor  # shaped as the piece, in the parameter's dtype


class LocalShards:
    """What this rank holds of `parameters`, in the plan's order.

    Views of shards are kept from step to step, as long as the shards stay where they are: making one costs the host
    more than the arithmetic of a small piece.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._gradients: list[Tensor | None] = []
        # by parameter and piece, which several parameters of one shape may have in common
        self._views: dict[tuple[int, int], Tensor] = {}  # of this step's gradients
        self._shards: list[Tensor] = []
        self._targets: dict[tuple[int, int], Tensor] = {}  # views of the shards
        self.may_redistribute = any(layout_of(parameter).place_of_gradient for parameter in parameters)

    def places(self) -> list[str | None]:
        """How the parameters' gradients lie: "" as the parameter does, None without one."""
        return [place_of_gradient(parameter) for parameter in self.parameters]

    def look(self, without: Collection[int] = ()) -> None:
        """Take this step's gradients and weights into view; until `forget`, `gradient` and `apply` are of these.

        A collective where gradients lie otherwise than their parameters, but for those of the parameters `without`,
        which are taken for missing.
        """
        self._views = {}  # of a step that raised before it could forget them
        self._gradients = [
            None if number in without else local_gradient(parameter) for number, parameter in enumerate(self.parameters)
        ]
        shards = [local_shard(parameter) for parameter in self.parameters]
        if not all(map(_same_memory, shards, self._shards)) or len(shards) != len(self._shards):
            self._targets = {}
        self._shards = shards

    def forget(self) -> None:
        self._gradients, self._views = [], {}

    def gradient(self, parameter: int, piece: Piece) -> Tensor | None:
        """A piece of a parameter's gradient; None without one."""
        view = self._views.get((parameter, id(piece)))
        if view is not None:
            return view
        gradient = self._gradients[parameter]
        if gradient is None:
            return None
        view = piece.of_shard(gradient)
        if piece.box is not None:  # others may be copies, and are not kept
            self._views[parameter, id(piece)] = view
        return view

    def rms(self, parameter: int) -> float:
        """The root mean square of what this rank has of a parameter's weights; 0 of nothing. Waits for the device."""
        shard = local_shard(self.parameters[parameter])
        return float(torch.linalg.vector_norm(shard, dtype=torch.float64)) / max(1, shard.numel()) ** 0.5

    def scale_gradients(self, factor: Tensor) -> None:
        """G <- factor G (0-D), in place."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)

    def apply(self, updates: Sequence[Update], keep: float, lr: float) -> None:
        """W <- keep W - lr U for pieces of parameters."""
        targets, steps, copies = [], [], []
        for _, parameter, piece, update in updates:
            target = self._targets.get((parameter, id(piece)))
            if target is None:
                shard = self._shards[parameter]
                target = piece.of_shard(shard)
                if target.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr():
                    self._targets[parameter, id(piece)] = target
                else:
                    copies.append((piece, shard, target))
            targets.append(target)
            steps.append(update if update.device == target.device else update.to(target.device))
        if keep != 1:
            torch._foreach_mul_(targets, keep)
        torch._foreach_add_(targets, steps, alpha=-lr)
        for piece, shard, target in copies:  # strides that no view can follow (channels_last)
            piece.put(shard, target)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.stride() == other.stride()
