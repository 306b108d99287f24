"""What this rank has of every tensor that a checkpoint holds: the memory of its stacks, under the inventory's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_dist.checkpoint.inventory import Entry, inventory
from kl_dist.planning.boxes import Box, in_boxes, narrowed, whole
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Ranks
from kl_dist.step.stacks import Stack


@dataclass(frozen=True)
class Holding:
    """What this rank has of one tensor of the state."""

    name: str  # of the parameter
    entry: Entry
    boxes: tuple[Box, ...]
    memory: Tensor  # of the boxes, end to end; of AdamW's `step` one element for each slice

    @property
    def value(self) -> Tensor:
        """The memory, shaped as what it holds; empty where this rank holds nothing."""
        if len(self.boxes) != 1:
            return self.memory
        ((_, value),) = in_boxes(self.memory, self.boxes)
        return value

    def fill(self, source: Tensor) -> None:
        """Copy in what `value` gives."""
        source = source.reshape(-1)
        self.memory.copy_(source if source.numel() == self.memory.numel() else source.clone())

    def fill_from_all(self, full: Tensor) -> None:
        """Copy in this rank's part of the whole tensor."""
        if self.entry.shape == (1,):  # AdamW's step counts may be several, and are the same
            self.fill(full)
            return
        for box, target in in_boxes(self.memory, self.boxes):
            target.copy_(narrowed(full, box))


def holdings(plan: Plan, stacks: Sequence[Sequence[Stack]], ranks: Ranks) -> list[Holding]:
    """What this rank holds of every entry of the plan's inventory, sharing the memory of its stacks."""
    rows: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
    for stack in (stack for bucket in stacks for stack in bucket):
        for row, index in enumerate(stack.indices):
            rows[index].append(stack.state.row(row))
    held = []
    for entry in inventory(plan):
        mine = [] if entry.unit is None else rows[entry.unit]
        boxes, nothing = entry.boxes(ranks.rank), torch.empty(0, dtype=entry.dtype, device=ranks.device)
        memory = _joined([row[entry.field] for row in mine]) if mine else nothing
        if entry.constant is not None:
            boxes, memory = (whole(entry.shape),), torch.full(entry.shape, entry.constant, dtype=entry.dtype)
        held.append(Holding(plan.parameters[entry.parameter].name, entry, boxes, memory))
    return held


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a `kl_dist.checkpoint.divided.Divided`, which takes seconds to import."""
    return hasattr(tensor, "boxes")


def held_here(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, divided or not."""
    return tensor._local_tensor if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def carry_over(old: Sequence[Holding], new: Sequence[Holding], ranks: Ranks) -> None:
    """Copy the state of every parameter that is in both, by name and key, where it means the same.

    A collective for what the ranks hold otherwise than before; one tensor at a time.
    """
    before = {(holding.name, holding.entry.key): holding for holding in old}
    alike = {holding.name for holding in new if holding.entry.is_form and (holding.name, holding.entry.key) in before}
    for holding in new:
        source = before.get((holding.name, holding.entry.key))
        if source is None or holding.name not in alike or holding.entry.constant is not None:
            continue
        if source.entry.holders == holding.entry.holders:
            holding.fill(source.value)
        elif source.entry.constant is None:
            holding.fill_from_all(on_every_rank(source.entry, source.memory, source.boxes, ranks))


def on_every_rank(entry: Entry, memory: Tensor, boxes: Sequence[Box], ranks: Ranks) -> Tensor:
    """All of a tensor of which this rank holds some boxes, end to end in `memory`; a collective."""
    full = torch.empty(entry.shape, dtype=memory.dtype, device=ranks.device)
    held = dict(in_boxes(memory, boxes))
    for box, keepers in entry.holders:
        part = held[box] if box in held else torch.empty_like(narrowed(full, box))
        narrowed(full, box).copy_(ranks.from_rank(keepers[0], part.to(full.device).contiguous()))
    return full


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Neighbours in memory as one tensor, a view."""
    first, total = parts[0].view(-1), sum(part.numel() for part in parts)
    offsets = [part.storage_offset() for part in parts]
    assert all(a + part.numel() == b for a, part, b in zip(offsets, parts, offsets[1:], strict=False)), offsets
    return first if len(parts) == 1 else first.as_strided((total,), (1,))
