"""What tests of checkpoints share: runs in every layout that stop, are saved, and go on elsewhere; small optimizers."""

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kl_dist import KLShampoo, full_state_dict
from kl_dist.checkpoint.verify import is_sums
from tests.models import small_buckets
from tests.sharded import Layers, groups_of, lay_out, layers, loss_of, tokens_of, weights_of

EVERY = 3
"""T: every so many steps a refresh."""

STOPS = range(EVERY, 2 * EVERY)
"""A run is stopped in each of the steps between two refreshes."""

FURTHER = EVERY + 1
"""So many steps it goes on, of which one refreshes and another follows a refresh, wherever it was stopped."""

LAYOUTS = (("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4))


class Run:
    """The model of tests.sharded in some layout, with its optimizer; alone without a group."""

    def __init__(
        self, group: dist.ProcessGroup | None, layout: str = "ddp", dtype=torch.float64, **options: Any
    ) -> None:
        self.model = layers(dtype)
        self.part, self.parts = 0, 1
        if layout != "ddp":
            self.part, self.parts = lay_out(self.model, layout, group)
            if self.parts == 3:  # 8 samples do not divide, so each rank takes them all
                self.part, self.parts = 0, 1
        options = {"precondition_frequency": EVERY, "lr": 1e-2, **options}
        with small_buckets(256):  # so that ranks have several slices of a parameter under AdamW
            self.optimizer = KLShampoo(groups_of(self.model), process_group=group, **options)

    def train(self, first: int, last: int) -> "Run":
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss_of(self.model, tokens_of(step).chunk(self.parts)[self.part]).backward()
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.model)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        set_weights(self.model, weights)

    def canonical(self) -> dict[str, Tensor]:
        """The whole state by name, on rank 0; empty elsewhere. A collective."""
        return flat(full_state_dict(self.optimizer))


def flat(full: dict[str, Any]) -> dict[str, Tensor]:
    """A full state without its checksums, which also tell how many steps an optimizer has made."""
    entries = full.get("state", {}).items()
    return {f"{name} {key}": x for name, state in entries for key, x in state.items() if not is_sums(key)}


def set_weights(model: nn.Module | Layers, weights: dict[str, Tensor]) -> None:
    """Whole weights into a model in any layout."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = weights[name]
            if isinstance(parameter, DTensor):
                source = distribute_tensor(source, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(source)


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two dicts of tensors, relative to its norm; infinite where they do not fit."""
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, x in ours.items():
        y = theirs[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        if x.is_floating_point():
            difference = float((x - y).norm() / y.norm().clamp_min(1e-12))
            worst = max(worst, difference) if math.isfinite(difference) else float("inf")
        elif not torch.equal(x, y):
            return float("inf")
    return worst


# -- on one process ----------------------------------------------------------------------------------------------------

SHAPES = {"wide": (70, 140), "square": (5, 5), "vector": (6,), "scalar": (), "nothing": (0, 3)}


def make(shapes: dict[str, tuple[int, ...]] = SHAPES, steps: int = 3, **options: Any) -> KLShampoo:
    """An optimizer that has made some steps."""
    generator = torch.Generator().manual_seed(0)
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = KLShampoo(named, lr=1e-2, **options)
    for _ in range(steps):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def state_of(optimizer: KLShampoo) -> dict[str, Tensor]:
    names = {
        parameter: name
        for g in optimizer.param_groups
        for name, parameter in zip(g["param_names"], g["params"], strict=True)
    }
    return {f"{names[p]} {key}": x.clone() for p, entry in optimizer.state.items() for key, x in entry.items()}


def options_of(optimizer: KLShampoo) -> list[dict[str, Any]]:
    return copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
