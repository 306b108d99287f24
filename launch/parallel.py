"""How the model is laid out over the ranks: copied (DDP), sharded (FSDP2, HSDP), divided within its layers, or both."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from launch.model import Model
from launch.options import UsageError
from launch.ranks import Ranks

# What shards and divides is imported where it is used: it takes seconds, and one process or DDP has no need of it.


class Laid(NamedTuple):
    """A model in its place."""

    module: nn.Module  # what to call
    part: int  # which part of a batch is this rank's
    parts: int  # of how many; ranks that divide a layer share a part


def lay_out(model: Model, parallel: str, inner: int, ranks: Ranks) -> Laid:
    """Place a freshly initialised model, in place, as `--parallel` says; on one rank it stays as it is."""
    if ranks.size == 1:
        return Laid(model, 0, 1)
    if parallel == "ddp":
        # Views: gradients live in the communication buckets, which saves a copy of the model.
        return Laid(DistributedDataParallel(model, gradient_as_bucket_view=True), ranks.rank, ranks.size)
    mesh = _mesh(parallel, inner, ranks)
    if parallel in ("fsdp", "hsdp"):
        _shard(model, mesh)
        return Laid(model, ranks.rank, ranks.size)
    _divide(model, mesh["tp"])
    if parallel == "tp":
        return Laid(model, 0, 1)
    _shard(model, mesh["dp"])
    return Laid(model, mesh.get_local_rank("dp"), mesh["dp"].size())


def _mesh(parallel: str, inner: int, ranks: Ranks) -> DeviceMesh:
    if parallel in ("fsdp", "tp"):
        name = "dp" if parallel == "fsdp" else "tp"
        return init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=(name,))
    if ranks.size % inner or ranks.size == inner:
        raise UsageError(
            f"--parallel {parallel} lays {ranks.size} processes out in groups of --inner {inner}, which must be"
            " several and whole; start more processes, or another --inner"
        )
    names = ("replicate", "shard") if parallel == "hsdp" else ("dp", "tp")
    return init_device_mesh(ranks.device.type, (ranks.size // inner, inner), mesh_dim_names=names)


def _divide(model: Model, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {
        # queries, keys and values lie in one weight and attention mixes heads, so its output is brought together
        "attention.qkv": ColwiseParallel(output_layouts=Replicate()),
        "attention.project": RowwiseParallel(input_layouts=Replicate()),
        "mlp.expand": ColwiseParallel(),
        "mlp.project": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def _shard(model: Model, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """torch's clipping to a global norm, also where parameters lie on several device meshes, or on none."""
    kinds: dict[Any, list[Any]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter.grad)
    norms = [nn.utils.get_total_norm(kind) for kind in kinds.values()]
    total = torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
    for kind in kinds.values():
        torch._foreach_mul_(kind, (largest / (total + 1e-6)).clamp_max(1.0).item())


def whole(tensor: Any) -> Tensor:
    """A tensor put together from its shards, if it has any; a collective of its mesh."""
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor
