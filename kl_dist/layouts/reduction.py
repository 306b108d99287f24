"""DDP's gradients reduced to their owners, instead of to everyone.

An owner alone needs the whole gradient of its matrix. So where DDP all-reduces (2 (W-1)/W of the parameters' bytes per
rank) before the updates are all-gathered ((W-1)/W), it is enough to send each piece to its owner, who adds up what
comes: (W-1)/W, and gradients with updates cost what DDP's all-reduce alone does. What a rank does not own keeps the
gradient of its own samples, which is good for nothing.

The pieces are added in the order of the ranks, so that the sum does not depend on who arrives first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kl_dist.planning.boxes import Piece
from kl_dist.planning.plan import Plan
from kl_dist.planning.traffic import own_pieces
from kl_dist.ranks import Ranks


class Reduction:
    """The communication hook, and the memory of what it made of the gradients."""

    def __init__(self, ranks: Ranks, plan: Plan, parameters: Sequence[Tensor]) -> None:
        self.ranks = ranks
        self._made: dict[Tensor, tuple[Tensor, int]] = {}  # by parameter: its reduced gradient, and that one's version
        self._remembering = False
        self.follow(plan, parameters)

    def follow(self, plan: Plan, parameters: Sequence[Tensor]) -> None:
        """Take up who owns what."""
        self._names = {parameter: plan.parameters[i].name for i, parameter in enumerate(parameters)}
        self._pieces: dict[Tensor, list[tuple[int, Piece]]] = {parameter: [] for parameter in parameters}  # by owner
        for bucket in plan.buckets:
            for owner in range(plan.world_size):
                for index, piece in own_pieces(plan.units, plan.parameters, bucket, owner):
                    self._pieces[parameters[plan.units[index].parameter]].append((owner, piece))

    def register(self, ddp: DistributedDataParallel) -> None:
        """Make DDP communicate by this.

        Raises:
            TypeError, ValueError: it cannot.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"reduce_to_owners takes a model in DistributedDataParallel, not {type(ddp).__name__}")
        if dist.get_process_group_ranks(ddp.process_group) != dist.get_process_group_ranks(self.ranks.group):
            raise ValueError("DistributedDataParallel and KLShampoo have different process groups")
        for name, parameter in ddp.module.named_parameters():
            if parameter.requires_grad and parameter not in self._pieces:
                raise ValueError(f"parameter {name!r} is trained but not by KLShampoo, so its gradient has no owner")
        ddp.register_comm_hook(None, lambda _, bucket: self.hook(bucket))
        ddp.register_forward_pre_hook(lambda *_: self._forget_freed())  # model.zero_grad() tells the optimizer nothing

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Send every piece of one bucket to its owner; the bucket then has the mean in the pieces this rank owns."""
        self._remember_after_backward(bucket.parameters())
        size, rank = self.ranks.size, self.ranks.rank
        by_owner: list[list[Tensor]] = [[] for _ in range(size)]
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for owner, piece in self._pieces[parameter]:
                by_owner[owner].append(piece.of_shard(gradient))
        lengths = [sum(view.numel() for view in views) for views in by_owner]
        out = torch.cat([bucket.buffer()[:0], *(view.reshape(-1) for views in by_owner for view in views)])
        into = out.new_empty(size * lengths[rank])
        (work,) = self.ranks.swap(out, lengths, into, [lengths[rank]] * size).works

        def add_up(_: torch.futures.Future[Any]) -> Tensor:
            mean = into.view(size, -1).sum(0).div_(size)
            for view, part in zip(by_owner[rank], mean.split([v.numel() for v in by_owner[rank]]), strict=True):
                view.copy_(part.view(view.shape))
            return bucket.buffer()

        return work.get_future().then(add_up)

    # -- whether the gradients are still what the hook made of them ---------------------------------------------------

    def _remember_after_backward(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter in self._made and self._made[parameter][0] is parameter.grad:
                raise RuntimeError(
                    f"the gradient of {self._names[parameter]!r} was reduced to its owner already, and more cannot be"
                    " added to it: accumulate gradients under no_sync(), and call the optimizer's zero_grad() after a"
                    " step left out"
                )
        if not self._remembering:
            self._remembering = True
            engine: Any = torch.autograd.Variable._execution_engine
            # twice: DDP's own callback, which puts the last gradients in their places, is queued after this hook
            engine.queue_callback(lambda: engine.queue_callback(self._remember))

    def _remember(self) -> None:
        self._remembering = False
        self.accept()

    def accept(self) -> None:
        """Take the gradients as they are now for what the hook made of them."""
        found = ((parameter, parameter.grad) for parameter in self._pieces)
        self._made = {parameter: (grad, grad._version) for parameter, grad in found if grad is not None}

    def forget(self) -> None:
        """The step has used them, or zero_grad() put zeros in their place."""
        self._made = {}

    def _forget_freed(self) -> None:
        """With `gradient_as_bucket_view` DDP puts the same tensor back, and nothing would tell after the backward."""
        self._made = {parameter: made for parameter, made in self._made.items() if parameter.grad is not None}

    def check(self) -> None:
        """Raises RuntimeError where a gradient was written to, or put there, by anything else."""
        for parameter, name in self._names.items():
            grad = parameter.grad
            if grad is None:
                continue
            if parameter not in self._made or self._made[parameter][0] is not grad:
                raise RuntimeError(
                    f"the gradient of {name!r} was not reduced to its owner: the last backward must go through"
                    " DistributedDataParallel, outside of no_sync(), once for every step"
                )
            if grad._version != self._made[parameter][1]:
                raise RuntimeError(
                    f"the gradient of {name!r} was changed after it was reduced to its owner, by something that took it"
                    " for the gradient of all ranks (torch.nn.utils.clip_grad_norm_ or GradScaler.unscale_, say): clip"
                    " with kl_dist.clip_grad_norm_(optimizer, max_norm), or train without reduce_to_owners"
                )
