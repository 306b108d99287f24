"""Stacked experts of two layouts, and runs of a model of them that tests compare."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from kl_dist import KLShampoo, param_groups
from tests.models import Weights
from tests.sharded import mesh_of


class Speaks(nn.Module):
    """Experts as transformers' decorator leaves them, (E, ..) with gate and up fused."""

    def __init__(self, experts: int, inner: int, outer: int, transposed: bool, concatenated: bool) -> None:
        super().__init__()
        self.has_gate, self.is_transposed, self.is_concatenated = True, transposed, concatenated
        turned = (2, 1) if transposed else (1, 2)
        gate_up = torch.randn(experts, 2 * inner, outer).permute(0, *turned)
        self.gate_up_proj = nn.Parameter(gate_up.contiguous())
        self.down_proj = nn.Parameter(torch.randn(experts, outer, inner).permute(0, *turned).contiguous())
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * inner))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all experts."""
        weights = (self.gate_up_proj, self.down_proj)
        gate_up, down = (w.transpose(1, 2) for w in weights) if self.is_transposed else weights
        mixed = x @ gate_up.transpose(1, 2) + self.gate_up_proj_bias[:, None]
        gate, up = mixed.chunk(2, dim=-1) if self.is_concatenated else (mixed[..., ::2], mixed[..., 1::2])
        return (F.silu(gate) * up @ down.transpose(1, 2)).sum(0)


def stacks() -> nn.Sequential:
    """The same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(Speaks(3, 6, 8, False, True), Speaks(3, 6, 8, True, False))


def loss_of(model: Any, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
    return model(x).square().mean()


def trained_stacks(group: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> Weights:
    """Weights after a few steps on the same data; on ranks sharded, two of the tensors along the axis that is fused."""
    model = stacks().to(dtype)
    if group is not None:
        fused = {id(model[0].gate_up_proj): Shard(1), id(model[1].gate_up_proj): Shard(2)}
        mesh = mesh_of(group, (group.size(),), ("fsdp",))
        for part in (*model, model):
            fully_shard(part, mesh=mesh, shard_placement_fn=lambda p: fused.get(id(p)))
    opt = KLShampoo(param_groups(model, **{"lr": 1e-2, **options}), process_group=group)
    for step in range(4):
        loss_of(model, step, dtype).backward()
        opt.step()
        opt.zero_grad()
    return {name: (p if group is None else p.full_tensor()).detach() for name, p in model.named_parameters()}
