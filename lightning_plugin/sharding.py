"""FSDP2 for modules that say nothing of it: each of their repeated blocks a unit of its own, and the rest another."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over a mesh, in place; what is sharded already stays as it is."""
    for module in (*repeated_blocks(model), model):
        if not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that come several of one class in a ModuleList, ModuleDict or Sequential."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            kinds = [type(entry) for entry in child.children()]
            for entry in child.children():
                if kinds.count(type(entry)) > 1 and sum(1 for _ in entry.parameters()) > 1:
                    yield entry
                else:
                    yield from repeated_blocks(entry)
        else:
            yield from repeated_blocks(child)
