"""FSDP2 for modules that say nothing of it: each of their repeated blocks a unit of its own, and the rest another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a model's parameters over a mesh, in place; what is sharded already stays as it is.

    As under DDP, all ranks begin with the first one's parameters and buffers.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        _take_from_first_rank(model, mesh, device)
    for module in (*repeated_blocks(model), model):
        if not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh)


@torch.no_grad()
def _take_from_first_rank(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """A tensor at a time, so that a model that fits on no device can be sharded."""
    group = mesh.get_group()
    first = dist.get_global_rank(group, 0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta" and tensor.numel():
            here = tensor.detach().to(device).contiguous()
            dist.broadcast(here, first, group=group)
            tensor.copy_(here)


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules, of several layers each, that come several of one class in a list, dict or sequence."""
    children = list(module.children())
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    kinds = [type(child) for child in children if listed and any(child.children())]
    for child in children:
        if kinds.count(type(child)) > 1:
            yield child
        else:
            yield from repeated_blocks(child)
