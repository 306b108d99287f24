"""KLShampoo in torchtitan 0.3: the container of optimizers that its Trainer builds and saves.

    config.optimizer = KLShampooContainer.Config(lr=1e-2, options={"adamw_lr": 5e-3})

Imported by nothing in here: it needs torchtitan. See docs/torchtitan.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer

from kl_dist.groups import param_groups
from kl_dist.optimizer import KLShampoo


class KLShampooContainer(OptimizersContainer):
    """One KLShampoo for each part of the model that this rank has, over the ranks that share the part."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Of the fields it inherits none is used: `param_groups` are made as kl_dist.param_groups makes them."""

        lr: float = 1e-2
        weight_decay: float = 0.1
        output_head: str = "lm_head"
        """Name of the module that AdamW serves, as it does embeddings; parts of a pipeline without it are fine."""

        options: dict[str, Any] = field(default_factory=dict)
        """Any other option of KLShampoo."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        for index, (part, ranks) in enumerate(zip(model_parts, groups_of_ranks(model_parts), strict=True)):
            optimizer = KLShampoo(self.groups_of(part, config), config.lr, process_group=ranks, **config.options)
            self.optimizers.append(optimizer)
            self._log_optimizer(optimizer, index, [group["method"] for group in optimizer.param_groups])
        self._post_init(
            [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        )

    def groups_of(self, part: nn.Module, config: Config) -> list[dict[str, Any]]:
        """The parameter groups of a part; override it for `matrices` that kl_dist.modules does not know, say."""
        head = config.output_head if config.output_head in dict(part.named_modules()) else ""
        return param_groups(part, weight_decay=config.weight_decay, output_head=head)


def groups_of_ranks(parts: Sequence[nn.Module]) -> list[dist.ProcessGroup | None]:
    """For each part the ranks that share it, those of its parameters' meshes; None where they are all. A collective.

    All ranks make all groups: one that only its members make (`use_local_synchronization`) is named after how many
    groups a rank is in already, and where that differs they wait for ever.
    """
    if not dist.is_initialized():
        return [None] * len(parts)
    mine = [ranks_of(part) for part in parts]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    asked = sorted({ranks for theirs in everywhere for ranks in theirs})
    groups = {ranks: dist.new_group(list(ranks)) for ranks in asked if 0 < len(ranks) < len(everywhere)}
    return [groups.get(ranks) for ranks in mine]


def ranks_of(part: nn.Module) -> tuple[int, ...]:
    """The ranks in the meshes of a part's parameters; none where nothing is a DTensor."""
    meshes = {parameter.device_mesh for parameter in part.parameters() if isinstance(parameter, DTensor)}
    return tuple(sorted({int(rank) for mesh in meshes for rank in mesh.mesh.flatten()}))
