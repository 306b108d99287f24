"""This rank's shards: gradients are read from them, updates are written into them, wherever the parameters live."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.layouts.placement import local_gradient, local_shard
from kl_dist.planning.boxes import Piece


class LocalShards:
    """What this rank holds of `parameters`, in the plan's order."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._gradients: list[Tensor | None] = []

    def look(self) -> None:
        """Take this step's gradients into view; until `forget`, what `gradient` gives is of these."""
        self._gradients = [local_gradient(parameter) for parameter in self.parameters]

    def forget(self) -> None:
        self._gradients = []

    def gradient(self, parameter: int, piece: Piece) -> Tensor | None:
        """A piece of a parameter's gradient; None without one."""
        gradient = self._gradients[parameter]
        return None if gradient is None else piece.of_shard(gradient)

    def scale_gradients(self, factor: Tensor) -> None:
        """G <- factor G (0-D), in place."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)

    def apply(self, updates: Sequence[tuple[int, Piece, Tensor]], keep: float, lr: float) -> None:
        """W <- keep W - lr U for pieces of parameters, with U flat in the parameter's dtype."""
        targets, steps, copies = [], [], []
        for parameter, piece, update in updates:
            shard = local_shard(self.parameters[parameter])
            target = piece.of_shard(shard)
            if target.untyped_storage().data_ptr() != shard.untyped_storage().data_ptr():
                copies.append((piece, shard, target))
            targets.append(target)
            steps.append(update.view(target.shape).to(target.device))  # parameters may lie on the host
        if keep != 1:
            torch._foreach_mul_(targets, keep)
        torch._foreach_add_(targets, steps, alpha=-lr)
        for piece, shard, target in copies:  # strides that no view can follow (channels_last)
            piece.put(shard, target)
