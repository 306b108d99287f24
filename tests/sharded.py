"""A model that can be laid out in every way that PyTorch shards parameters, and the run that tests compare."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kl_dist import KLShampoo, modules
from tests.models import Weights

SAMPLES, TOKENS, WIDTH = 8, 11, 12
LAYOUTS = {"fsdp": (2, 4), "hsdp": (4,), "tp": (2, 4), "fsdp+tp": (4,), "ddp+tp": (4,)}
"""Every layout and the world sizes that it is tried at."""


class Layers(nn.Module):
    """Embedding, convolution, two matrices that tensor parallelism divides, stacked experts, odd and thin matrices.

    13, 7 and 1 do not divide; with 4 ranks some have no row of `one`. The head is tied to `odd`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.convolution = nn.Conv2d(2, 5, (2, 3), padding=(0, 1))
        self.mix = nn.Linear(15, WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.odd = nn.Linear(WIDTH, 13, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 13, 7) / 3)
        self.tied = nn.Linear(WIDTH, 13, bias=False)
        self.one = nn.Linear(7, 1)
        self.tied.weight = self.odd.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # samples x 4 x WIDTH
        image = x.reshape(-1, 2, 8, 3)[..., :2, :]
        x = x.mean(1) + self.mix(torch.tanh(self.convolution(image)).flatten(1))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        x = torch.tanh(self.odd(x)) + self.tied(x)
        x = torch.einsum("bi,bij->bj", x, self.experts[tokens[:, 0] % 2])  # the third expert is never chosen
        return self.one(torch.tanh(x))


modules.TABLE["Layers"] = {"experts": {"rows": (0,), "columns": (1, 2)}}  # as they are read where no modules are known


def layers(dtype: torch.dtype) -> Layers:
    """The same weights in every process."""
    torch.manual_seed(1)
    return Layers().to(dtype)


def tokens_of(step: int) -> Tensor:
    return torch.randint(TOKENS, (SAMPLES, 4), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    target = torch.sin(tokens.double()).sum(1, keepdim=True)
    output = model(tokens)
    return (output - target.to(output.dtype)).square().mean()


def groups_of(model: Layers) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    experts = named.pop("experts")
    return [
        {"params": list(named.items())},
        {"params": [("experts", experts)], "matrices": {"batch": (0,)}},
    ]


@cache
def mesh_of(group: dist.ProcessGroup, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Made once a process: a mesh makes process groups, where a group of some of the ranks does not do."""
    if group.size() < dist.get_world_size():
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=names)
    return DeviceMesh("cpu", torch.arange(group.size()).reshape(shape), mesh_dim_names=names)


def lay_out(model: Layers, layout: str, group: dist.ProcessGroup, **fsdp: Any) -> tuple[int, int]:
    """Shard the model over the group; returns which part of the samples is this rank's, of how many."""
    world_size, rank = group.size(), group.rank()
    half = world_size // 2
    if layout in ("fsdp", "hsdp"):
        shape, names = ((world_size,), ("shard",)) if layout == "fsdp" else ((2, half), ("replicate", "shard"))
        mesh = mesh_of(group, shape, names)
        for module in (model.up, model.down):
            fully_shard(module, mesh=mesh, **fsdp)
        fully_shard(model, mesh=mesh, **fsdp)
        return rank, world_size
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "tp":
        parallelize_module(model, mesh_of(group, (world_size,), ("tp",)), plan)
        return 0, 1
    mesh = mesh_of(group, (2, half), ("dp", "tp"))
    parallelize_module(model, mesh["tp"], plan)
    if layout == "fsdp+tp":
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh["dp"], **fsdp)
    return mesh.get_local_rank("dp"), 2


def average_over(mesh: DeviceMesh, model: nn.Module) -> None:
    """What DDP does, for parameters that are DTensors of a mesh of their own: gradients averaged over `dp`."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            dist.all_reduce(gradient, op=dist.ReduceOp.SUM, group=mesh.get_group("dp"))
            gradient.div_(2)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(model: nn.Module) -> Weights:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def train_sharded(group: dist.ProcessGroup, layout: str, dtype: torch.dtype, steps: int, options: dict) -> Weights:
    """The weights after `steps`, whole."""
    model = layers(dtype)
    part, parts = lay_out(model, layout, group)
    optimizer = KLShampoo(groups_of(model), process_group=group, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step).chunk(parts)[part]).backward()
        if layout == "ddp+tp":
            average_over(mesh_of(group, (2, 2), ("dp", "tp")), model)
        optimizer.step()
    return weights_of(model)


def train_alone(dtype: torch.dtype, steps: int, options: dict, noise: float = 0.0, seed: int = 0) -> Weights:
    """The same on one process, with relative noise on the gradients if asked."""
    model = layers(dtype)
    optimizer = KLShampoo(groups_of(model), **options)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step)).backward()
        for parameter in model.parameters():
            if noise:
                factor = 1 + noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad.copy_(parameter.grad.double() * factor)
        optimizer.step()
    return weights_of(model)
