"""A tensor of which each rank holds some boxes, as torch.distributed.checkpoint understands it.

torch saves, gathers, offloads and stages a DTensor by itself, but no placement of a DTensor says "one rank has all of
it" or "this range of the elements". `Divided` is a DTensor that says what it holds box by box, and nothing else: it
can be copied, moved, gathered and saved, not computed with. What pickles it gets the part of this rank, a plain tensor,
or an error where that would be mistaken for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from kl_dist.checkpoint.holdings import on_every_rank
from kl_dist.checkpoint.inventory import Entry
from kl_dist.planning.boxes import Box, in_boxes
from kl_dist.ranks import Ranks

ALONE = (
    "this state_dict() has the part of rank {rank} of {size}, and a file of it lacks the others': call"
    " consolidate_state_dict() on all ranks before state_dict() on rank 0 (kl_dist.huggingface does it for Trainer and"
    " Accelerate), save with torch.distributed.checkpoint, or write each rank's local_state_dict() to a file of its own"
)

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten._to_copy.default)


class Divided(DTensor):
    """`entry` of the optimizer's state, of which this rank holds `boxes`, end to end in `_local_tensor`."""

    entry: Entry
    boxes: tuple[Box, ...]
    ranks: Ranks
    pickles: bool

    @classmethod
    def of(cls, entry: Entry, local: Tensor, ranks: Ranks, mesh: DeviceMesh, pickles: bool) -> Divided:
        """Without a copy. Writing into what comes out of torch.distributed.checkpoint writes into `local`."""
        if not local.numel():
            local = local.new_empty(1)[:0]  # torch stages no memory of no bytes
        meta = torch.empty(entry.shape, dtype=local.dtype, device="meta")
        spec = DTensorSpec(mesh, (Replicate(),), TensorMeta(meta.shape, meta.stride(), local.dtype))
        made: Any = cls(local, spec, requires_grad=False)
        made.entry, made.boxes, made.ranks, made.pickles = entry, entry.boxes(ranks.rank), ranks, pickles
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        like, *rest = args
        kwargs = kwargs or {}
        if func in _COPIES:
            local = func(like._local_tensor, *rest, **kwargs)
        elif func is torch.ops.aten.new_empty.default and tuple(rest[0]) in (tuple(like.shape), ()):
            local = torch.empty_like(like._local_tensor, device=kwargs.get("device"))
        else:
            raise TypeError(
                f"{func} on a part of the optimizer's state: .to_local() is what this rank holds, .full_tensor() (a"
                " collective) all of it"
            )
        return cls.of(like.entry, local, like.ranks, like.device_mesh, like.pickles)

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """True has torch hand over a whole tensor that it loads, rather than write it into the part that is here."""
        return True

    def data_ptr(self) -> int:
        """None of its own: torch's would be the offset of the part in its storage, taken for an address."""
        return 0

    def redistribute(self, *_: Any, **__: Any) -> DTensor:
        """All of it on every rank; a collective."""
        full = on_every_rank(self.entry, self._local_tensor, self.boxes, self.ranks)
        return DTensor.from_local(full, self.device_mesh, [Replicate()], run_check=False)

    # -- what torch.distributed.checkpoint asks of a tensor ----------------------------------------------------------

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(b - a for a, b in box))
            for box in self.boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, part in in_boxes(self._local_tensor, self.boxes):
            if index.offset is None or torch.Size(start for start, _ in box) == index.offset:
                return part
        raise ValueError(f"{index.fqn} has nothing at {index.offset} on this rank")

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.pickles:
            raise RuntimeError(ALONE.format(rank=self.ranks.rank, size=self.ranks.size))
        return self._local_tensor.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Divided({tuple(self.shape)}, here {list(self.boxes)}: {self._local_tensor})"


def divide(entries: Sequence[Entry], tensors: Sequence[Tensor], ranks: Ranks, pickles: bool) -> list[Tensor]:
    """What this rank holds of each entry, as `Divided`; constants as they are."""
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    return [
        Divided.of(entry, tensor, ranks, mesh, pickles) if entry.constant is None else tensor
        for entry, tensor in zip(entries, tensors, strict=True)
    ]
