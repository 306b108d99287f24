"""Parameters that are whole on every rank: one process, DDP, ZeRO-0.

The gradients are averaged everywhere already, so an owner reads its own; updates go back by one all-gather per bucket,
and every rank applies all of them to its copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.partition import Plan
from kl_dist.units import Unit


class Replicated:
    """Reads gradients and writes weights of `parameters`, in the plan's order."""

    def __init__(self, plan: Plan, parameters: Sequence[Tensor]) -> None:
        self.plan = plan
        self.parameters = parameters
        self._copies: dict[int, Tensor] = {}

    def gradient(self, unit: Unit) -> Tensor | None:
        """The unit's part of its parameter's gradient, shaped as the unit; None without one or where it is frozen."""
        parameter = self.parameters[unit.parameter]
        if parameter.grad is None or not parameter.requires_grad:
            return None
        read = self._copies.get(unit.parameter)
        if read is None:
            read = unit.reading.view(parameter.grad)
            if not _shares_memory(read, parameter.grad):
                self._copies[unit.parameter] = read
        return unit.block.of(read)

    def forget(self) -> None:
        """Let go of what was copied out of gradients that cannot be viewed as matrices; ends a step."""
        self._copies.clear()

    def apply(self, updates: Sequence[tuple[Unit, Tensor]], keep: float, lr: float) -> None:
        """W <- keep W - lr U for every unit given, with U flat in the parameter's dtype.

        Blocks of one parameter that cannot be viewed in place (channels_last strides) are written through a copy.
        """
        targets, steps = [], []
        copies: dict[int, Tensor] = {}
        for unit, update in updates:
            parameter = self.parameters[unit.parameter].detach()
            read = copies.get(unit.parameter)
            if read is None:
                read = unit.reading.view(parameter)
                if not _shares_memory(read, parameter):
                    copies[unit.parameter] = read
            targets.append(unit.block.of(read))
            steps.append(update.view(unit.block.shape))
        if keep != 1:
            torch._foreach_mul_(targets, keep)
        torch._foreach_add_(targets, steps, alpha=-lr)
        for index, read in copies.items():
            unit = next(unit for unit, _ in updates if unit.parameter == index)
            self.parameters[index].detach().copy_(unit.reading.restore(read))


def _shares_memory(view: Tensor, tensor: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
