"""Whether what several ranks hold of a parameter is the same on all of them, seen by its checksum.

A replicated parameter is given its owner's update on every rank. Where it is not the same to begin with (experts of a
rank's own as plain tensors, a model that nobody has broadcast), that update was computed for another rank's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kl_dist.layouts.placement import local_shard
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Ranks

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COMPARE_EVERY = 100  # steps, where nobody says and there are several partition groups
NOTHING = torch.iinfo(torch.int64).min
NO_MEMORY = torch.iinfo(torch.int64).max


class Comparisons:
    """Which parameters' replicas were compared already, and when they are again."""

    def __init__(self) -> None:
        self._alike: set[str] = set()
        self._plan: Plan | None = None

    def before_step(
        self, parameters: Sequence[Tensor], plan: Plan, ranks: Ranks, steps: int, every: int | None
    ) -> None:
        """Once, when all that wraps and broadcasts a model has had its turn: before the first step of a parameter.

        Then every `every` steps, where partition groups compute the same updates each for itself. Raises as
        `check_replicas`.
        """
        every = every or (COMPARE_EVERY if plan.partition_size < plan.world_size else 0)
        if every and steps and steps % every == 0:
            check_replicas(parameters, plan, ranks, self._alike, began_alike=True)
        if plan is self._plan:
            return
        new = {parameter.name for parameter in plan.parameters} - self._alike
        check_replicas(parameters, plan, ranks, new)
        self._alike |= new
        self._plan = plan


def checksum(tensor: Tensor) -> Tensor:
    """The sum of an array's elements, taken for whole numbers, modulo 2^62: 0-D, on its device; NO_MEMORY has none."""
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return torch.tensor(NO_MEMORY)
    whole = tensor.detach().contiguous().view(-1).view(BITS[tensor.element_size()])
    return whole.sum(dtype=torch.int64) % 2**62


def check_replicas(
    parameters: Sequence[Tensor], plan: Plan, ranks: Ranks, names: Collection[str], began_alike: bool = False
) -> None:
    """Compare what the ranks hold of parameters that they hold several times; a collective of 16 bytes for each.

    Args:
        parameters: this rank's, in the plan's order.
        plan: tells who holds what.
        ranks: of the plan.
        names: of those to compare, the same on all ranks.
        began_alike: they were compared before.

    Raises:
        ValueError: on all ranks, naming the first parameter that differs.
    """
    compared: list[str] = []
    told: list[Tensor] = []
    nothing = torch.full((), NOTHING, device=ranks.device)
    for one, parameter in zip(plan.parameters, parameters, strict=True):
        columns = plan.columns(one)
        if one.name not in names or len(columns[0]) < 2:
            continue
        mine = checksum(local_shard(parameter)).to(ranks.device)
        compared += [one.name] * len(columns)
        told += [mine if ranks.rank in column else nothing for column in columns]
    if not told:
        return
    here = torch.stack(told)
    largest = ranks.largest(torch.cat([here, torch.where(here == NOTHING, here, -here)]))
    for name, most, least in zip(compared, largest, largest[len(compared) :], strict=False):
        if most == NO_MEMORY:
            raise ValueError(
                f"parameter {name!r} has no memory: FSDP2 frees what it has gathered for a forward; construct KLShampoo"
                " before the first forward, or after model.reshard()"
            )
        if most != -least and began_alike:
            raise ValueError(
                f"parameter {name!r} has other weights on some ranks, which began alike: their gradients were not the"
                " same, something else wrote to the weights, or a device computes wrongly; go on from a checkpoint"
            )
        if most != -least:
            raise ValueError(
                f"parameter {name!r} has other weights on some ranks, and all would be given the update of its owner's:"
                " wrap the model in DistributedDataParallel or seed the ranks alike before the first step; what is"
                " meant to differ, a rank's own experts, say, belongs in a KLShampoo of its own, whose process_group is"
                " the ranks that share it"
            )
