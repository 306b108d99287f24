"""One step: agree, then bucket by bucket compute, launch, refresh while it travels, wait, apply.

[Note: failures] An owner that raises between two collectives would leave the others waiting. So what goes wrong after
the agreement is kept, and all ranks raise together: at the end of the step, told by a flag at the end of each chunk;
or, where reading the flags would cost a synchronisation (CUDA) or the chunks have left (a refresh), in the next step's
agreement.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_dist.agreement import Gradient, Sight, Trouble, describe_gradients
from kl_dist.exchange import Gathering, Ranks, Room
from kl_dist.layouts.replicated import Replicated
from kl_dist.methods import rule
from kl_dist.options import describe
from kl_dist.partition import Bucket, Plan
from kl_dist.stacks import Stack, build_stacks
from kl_dist.units import Unit


class Engine:
    """Runs the plan over the parameters of this rank. Made anew when the plan changes."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        parameters: Sequence[Tensor],
        groups: list[dict[str, Any]],
        previous: Engine | None = None,
    ) -> None:
        self.plan, self.ranks, self.groups = plan, ranks, groups
        self.device = ranks.device
        self.layout = Replicated(plan, parameters)
        self.stacks = build_stacks(plan, ranks.rank, self.device)
        largest = max((bucket.chunk * bucket.dtype.itemsize for bucket in plan.buckets), default=0)
        self.rooms = [ranks.room(largest, self.device) for _ in range(min(2, len(plan.buckets)))]
        self.failure: Exception | None = None  # of this rank, not yet raised: see [Note: failures]
        self.refreshes = 0
        self.refresh_seconds = 0.0
        if previous is not None:
            self.failure = previous.failure
            self.refreshes, self.refresh_seconds = previous.refreshes, previous.refresh_seconds

    def agree(self, problem: Exception | None, moved: bool) -> list[Gradient] | None:
        """What all ranks know of this step before it changes anything: see [Note: agreement].

        Args:
            problem: what is wrong on this rank.
            moved: the plan no longer fits this rank's parameters.

        Returns:
            What the units' gradients are like, or None when the plan must be made anew first.

        Raises:
            ValueError, TypeError, RuntimeError: on all ranks, when one has a problem or they have other options.
        """
        self.layout.forget()
        said = torch.zeros(self.plan.agreement_size, dtype=torch.float32, device=self.device)
        if problem is None and not moved:
            try:
                describe_gradients(list(self._sights()), said)
            except Exception as error:
                problem = error
        options = tuple(map(describe, self.groups))
        together = "\n".join(options)
        fingerprint = zlib.crc32(together.encode()) % 2**24  # a whole number that float32 holds
        trouble = Trouble.ERROR if problem is not None else Trouble.REPLAN if moved else Trouble.NONE
        said[-3:].copy_(torch.tensor([fingerprint, -fingerprint, trouble]), non_blocking=True)
        *values, largest, smallest, trouble_anywhere = self.ranks.largest(said)
        if trouble_anywhere == Trouble.ERROR:
            self.ranks.raise_together(problem)
        if largest != -smallest:
            self.ranks.check_same(together, options, "the options of a parameter group")
        return None if trouble_anywhere == Trouble.REPLAN else [Gradient(int(value)) for value in values]

    def run(self, said: Sequence[Gradient]) -> None:
        """Compute, exchange and apply all updates.

        Raises:
            RuntimeError: on all ranks, when one of them failed: see [Note: failures].
        """
        failed = False
        under_way: tuple[Bucket, Gathering] | None = None
        with full_precision(self.device):
            for number, (bucket, stacks) in enumerate(zip(self.plan.buckets, self.stacks, strict=True)):
                room = self.rooms[number % 2]  # the bucket that had it before has been applied
                launched = (bucket, self.ranks.gather(self._compute(bucket, stacks, said, room), room))
                self._refresh(stacks, said)
                if under_way is not None:
                    failed |= self._finish(*under_way, said)
                under_way = launched
            if under_way is not None:
                failed |= self._finish(*under_way, said)
        self.layout.forget()
        if failed:
            self.ranks.raise_together(self.failure)

    def _sights(self) -> Iterator[Sight]:
        for stack in (stack for bucket in self.stacks for stack in bucket):
            for row, (index, unit) in enumerate(zip(stack.indices, stack.units, strict=True)):
                yield Sight(index, unit, self.layout.gradient(unit), stack.waits(row))

    def _compute(self, bucket: Bucket, stacks: Sequence[Stack], said: Sequence[Gradient], room: Room) -> Tensor:
        """This rank's chunk of a bucket: its updates end to end, padding, and the flag of failure."""
        chunk = room.chunk(bucket.chunk, bucket.dtype)
        try:
            for stack in stacks:
                updates = chunk[stack.offset : stack.offset + stack.numel]
                stack.update([said[i] for i in stack.indices], self.layout, self._group(stack), updates)
        except Exception as problem:
            self._keep(problem)
            chunk.zero_()
            chunk[-1] = 1
        return chunk

    def _refresh(self, stacks: Sequence[Stack], said: Sequence[Gradient]) -> None:
        began = time.perf_counter()
        try:
            for stack in stacks:
                self.refreshes += stack.refresh([said[i] for i in stack.indices], self._group(stack))
        except Exception as problem:
            self._keep(problem)
        self.refresh_seconds += time.perf_counter() - began

    def _finish(self, bucket: Bucket, gathering: Gathering, said: Sequence[Gradient]) -> bool:
        """Wait for a bucket and apply it; returns whether a rank is known to have failed: see [Note: failures]."""
        buffer = gathering.wait()
        try:
            self._apply(bucket, buffer, said)
        except Exception as problem:
            self._keep(problem)
        return self.device.type != "cuda" and bool(buffer[:, -1].any())

    def _apply(self, bucket: Bucket, buffer: Tensor, said: Sequence[Gradient]) -> None:
        together: dict[tuple[int, str], list[tuple[Unit, Tensor]]] = {}
        for chunk, indices in zip(buffer, bucket.units, strict=True):
            offset = 0
            for index in indices:
                unit = self.plan.units[index]
                if said[index].moves(unit):
                    update = chunk[offset : offset + unit.numel]
                    together.setdefault((unit.group, unit.method), []).append((unit, update))
                offset += unit.numel
        for (group, method), updates in together.items():
            self.layout.apply(updates, *step_size(self.groups[group], method))

    def _group(self, stack: Stack) -> Mapping[str, Any]:
        return self.groups[stack.units[0].group]

    def _keep(self, problem: Exception) -> None:
        if self.failure is None:
            self.failure = RuntimeError(
                f"a step failed half-way ({type(problem).__name__}: {problem}); weights and state are no longer to be"
                " trusted: resume from a checkpoint"
            )
            self.failure.__cause__ = problem


def step_size(group: Mapping[str, Any], method: str) -> tuple[float, float]:
    """(keep, lr) of W <- keep W - lr U.

    `adamw_lr` is AdamW's learning rate when `lr` has the value it was constructed with; schedules move both alike.
    """
    lr = float(group["lr"])
    if method == "adamw" and group["adamw_lr"] is not None:
        lr = float(group["adamw_lr"]) * lr / group["base_lr"]
    keep = 1 - lr * float(group["weight_decay"])
    decays_last = method != "adamw" and rule(method, group["recipe"]).decays_last
    return keep, lr * keep if decays_last else lr


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, TF32 or bfloat16: factor products in lower precision lose the small eigenvalues."""
    with torch.autocast(device.type, enabled=False), ExitStack() as after:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; mixing the two raises there
            for backend in (torch.backends.cuda, torch.backends.mkldnn):
                matmul: Any = getattr(backend, "matmul")  # noqa: B009 (its stub lacks it)
                after.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
                matmul.fp32_precision = "ieee"
        else:
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
