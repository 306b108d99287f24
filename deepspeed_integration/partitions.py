"""Which elements of which parameters DeepSpeed has put into the flat tensors that its optimizer is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kl_dist.layouts.fragment import Fragment


class Slice(NamedTuple):
    """A fragment of a parameter, which lies at `first` to `last` of a flat tensor."""

    parameter: Tensor
    fragment: Fragment
    first: int
    last: int


@dataclass
class Flat:
    """One flat tensor: this rank's part of a parameter group, or of a sub-group of it."""

    master: Tensor  # float32, what the optimizer is given
    group: int
    slices: list[Slice] = field(default_factory=list)

    def find(self, gradient: Tensor | None) -> None:
        """Have the fragments look at where elements and gradients are now."""
        master = self.master.detach()
        for _, fragment, first, last in self.slices:
            fragment.holds(master[first:last], None if gradient is None else gradient[first:last])


def of_stages_1_and_2(zero: Any, device: torch.device) -> Iterator[Flat]:
    """[Note: stages 1 and 2] Every parameter's storage is a view into one flat buffer a group, of which rank k has
    [k S, (k + 1) S); so its place there says what every rank has of it. BF16_Optimizer does the same.
    """
    lists = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    buffers = zero.bf16_groups_flat if hasattr(zero, "bf16_groups") else zero.bit16_groups_flat
    masters = zero.fp32_groups_flat_partition if hasattr(zero, "bf16_groups") else zero.single_partition_of_fp32_groups
    ranks = dist.get_process_group_ranks(zero.dp_process_group)
    me = dist.get_rank(zero.dp_process_group)
    for number, (parameters, buffer, master) in enumerate(zip(lists, buffers, masters, strict=True)):
        flat, size = Flat(master, number), master.numel()
        _require(buffer.numel() == size * len(ranks), "its flat buffer is not of equal partitions")
        for parameter in parameters:
            inside = parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            _require(inside, "a parameter lies outside of its group's flat buffer")
            place = parameter.storage_offset() - buffer.storage_offset()
            first, last = (min(max(place + end - me * size, 0), size) for end in (0, parameter.numel()))
            start = min(max(me * size - place, 0), parameter.numel())
            fragment = Fragment(parameter.shape, master.detach()[first:last], start, ranks, device)
            same = parameter.detach().view(-1)[start : start + last - first] == fragment.local.to(parameter)
            _require(bool(same.all()), "the float32 partition and the parameters differ")
            flat.slices.append(Slice(parameter, fragment, first, last))
        yield flat


def of_stage_3(zero: Any, device: torch.device) -> Iterator[Flat]:
    """Rank k of a parameter's process group has the elements [k n, (k + 1) n), padded at the end."""
    pairs = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    for number, (parameters, master) in enumerate(pairs):
        flat, offset = Flat(master, zero.sub_group_to_group_id[number]), 0
        for parameter in parameters:
            group = parameter.ds_process_group
            ranks, me, length = dist.get_process_group_ranks(group), dist.get_rank(group), parameter.partition_numel()
            start = min(me * length, parameter.ds_numel)
            held = min(start + length, parameter.ds_numel) - start
            fragment = Fragment(parameter.ds_shape, master.detach()[offset : offset + held], start, ranks, device)
            same = parameter.ds_tensor.detach().view(-1)[:held].to(master.device) == fragment.local.to(parameter.dtype)
            _require(bool(same.all()), "the float32 partition and the parameters differ")
            flat.slices.append(Slice(parameter, fragment, offset, offset + held))
            offset += length
        _require(offset == master.numel(), "a sub-group's partitions do not fill its flat tensor")
        yield flat


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(
            f"this version of DeepSpeed lays parameters out in a way KLShampoo does not know: {otherwise}"
        )


def low_precision(zero: Any, number: int, master: Tensor) -> Tensor:
    """What the model has of a flat tensor; DeepSpeed copies it from the master after every step it makes."""
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        return zero.fp16_partitioned_groups_flat[number]
    buffer = zero.bit16_groups_flat[number]
    size, me = master.numel(), dist.get_rank(zero.dp_process_group)
    return buffer.narrow(0, me * size, size)


def forget_gradients(zero: Any, flats: Sequence[Flat]) -> None:
    """Stage 3 and offload keep their buffers, and would find the last step's gradients of what goes unused there."""
    buffer = getattr(zero, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()
    if getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False):
        for flat in flats:
            if flat.master.grad is not None:
                flat.master.grad.zero_()
