"""Many ranks in one process, a thread each: engines as they are, on collectives that copy from memory to memory.

What is received is not a number until it has come, and nothing leaves before somebody waits for it: who reads too
early, writes into what is still to be sent, or has two things come into one place, ends with wrong weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Condition
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kl_dist.planning.boxes import narrowed
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Exchange
from kl_dist.step.agreement import Presence
from kl_dist.step.engine import Engine

PATIENCE = 30.0  # seconds that one waits for the others


class Sent:
    """A collective under way, of all ranks of a line: their `torch.distributed.Work`."""

    def __init__(self, size: int, arrived: Condition) -> None:
        self.size, self.arrived = size, arrived
        self.posts: dict[int, tuple[Callable[[Sequence[Any]], None], Any]] = {}
        self.done = False

    def get_future(self) -> None:
        raise RuntimeError("there is none")

    def wait(self) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.posts) == self.size, PATIENCE), "some never came"
            if not self.done:
                kinds, given = zip(*(self.posts[place] for place in range(self.size)), strict=True)
                assert len(set(kinds)) == 1, "not all ranks of a line make the same collective"
                kinds[0](given)
                self.done = True


class Wire:
    """What all ranks have sent."""

    def __init__(self) -> None:
        self.arrived = Condition()
        self.sent: dict[tuple[tuple[int, ...], int], Sent] = {}
        self.count: Counter[tuple[tuple[int, ...], int]] = Counter()

    def post(self, line: tuple[int, ...], place: int, kind: Callable[[Sequence[Any]], None], given: Any) -> Sent:
        """The next collective that a rank makes with its line."""
        with self.arrived:
            number = self.count[line, place]
            self.count[line, place] += 1
            sent = self.sent.setdefault((line, number), Sent(len(line), self.arrived))
            sent.posts[place] = kind, given
            self.arrived.notify_all()
        return sent


class Line:
    """`kl_dist.ranks.Team` on a wire."""

    def __init__(self, wire: Wire, members: tuple[int, ...], rank: int) -> None:
        self.wire, self.members, self.size, self.place = wire, members, len(members), members.index(rank)

    def gather(self, chunk: Tensor, room: Tensor) -> Exchange:
        if self.size == 1:
            return Exchange(chunk, ())
        into = room[: self.size * chunk.nbytes].view(self.size, -1).view(chunk.dtype)
        into.fill_(torch.nan)
        return self._post(into, _gather, (chunk, into))

    def broadcast(self, sent: Sequence[tuple[int, Tensor]]) -> Exchange:
        for place, tensor in sent:
            if place != self.place:
                tensor.fill_(torch.nan)
        return self._post(sent[0][1], _broadcast, sent)

    def swap(self, out: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Exchange:
        into.fill_(torch.nan)
        return self._post(into, _swap, (out.split(list(sent)), into.split(list(received))))

    def _post(self, buffer: Tensor, kind: Callable[[Sequence[Any]], None], given: Any) -> Exchange:
        return Exchange(buffer, (self.wire.post(self.members, self.place, kind, given),))


def _gather(given: Sequence[tuple[Tensor, Tensor]]) -> None:
    for place, (chunk, _) in enumerate(given):
        for _, into in given:
            into[place].copy_(chunk)


def _broadcast(given: Sequence[Sequence[tuple[int, Tensor]]]) -> None:
    for same in zip(*given, strict=True):
        (place,) = {place for place, _ in same}
        for other, (_, tensor) in enumerate(same):
            if other != place:
                assert tensor.shape == same[place][1].shape
                tensor.copy_(same[place][1])


def _swap(given: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
    for sender, (out, _) in enumerate(given):
        for place, (_, into) in enumerate(given):
            into[sender].copy_(out[place])


class OnWire:
    """`kl_dist.ranks.Ranks` on a wire."""

    device = torch.device("cpu")

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def team(self, members: Sequence[int]) -> Line:
        return Line(self.wire, tuple(members), self.rank)

    def make_groups(self, lines: Sequence[tuple[int, ...]]) -> None:
        self.lines = set(lines)

    def raise_together(self, problem: Exception | None) -> None:
        if problem is not None:
            raise problem


class Relay(Engine):
    """An engine whose updates are the gradients themselves, so that W <- W - G."""

    def _compute(self, stacks: Any, presences: Any, gradients: Any, updates: Tensor) -> None:
        for stack in stacks:
            start = stack.offset
            for index, unit in zip(stack.indices, stack.units, strict=True):
                gradients([index], [updates[start : start + unit.numel].view(unit.block.shape)])
                start += unit.numel

    def _refresh(self, stacks: Any, presences: Any) -> None:
        pass


PLAIN = {"lr": 1.0, "weight_decay": 0.0, "matrix_lr": None, "adamw_lr": None, "recipe": "fresh"}


def relay(plan: Plan, steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """By rank and parameter, a shard after so many steps from zero, and the sum of its gradients."""
    wire = Wire()
    engines = [Relay(plan, OnWire(wire, rank), _shards(plan, rank), [PLAIN]) for rank in range(plan.world_size)]
    total = [[torch.zeros_like(p) for p in engine.shards.parameters] for engine in engines]
    # it sets what is all threads', and is of products, of which there are none here
    with (
        mock.patch("kl_dist.step.engine.full_precision", lambda device: nullcontext()),
        ThreadPoolExecutor(len(engines)) as threads,
        torch.no_grad(),
    ):
        for step in range(steps):
            for engine, sums in zip(engines, total, strict=True):
                for number, (p, summed) in enumerate(zip(engine.shards.parameters, sums, strict=True)):
                    p.grad = _gradient(plan, number, step, engine.ranks.rank)
                    summed += p.grad
                engine.shards.look()
            presences = [Presence.PRESENT] * len(plan.units)
            for made in [threads.submit(torch.no_grad()(engine.run), presences) for engine in engines]:
                made.result()
    assert all(sent.done for sent in wire.sent.values()), "something was sent that nobody waited for"
    return [
        [(p.detach(), summed) for p, summed in zip(engine.shards.parameters, sums, strict=True)]
        for engine, sums in zip(engines, total, strict=True)
    ]


def _shards(plan: Plan, rank: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros_like(_gradient(plan, number, 0, rank))) for number in range(len(plan.parameters))]


def _gradient(plan: Plan, number: int, step: int, rank: int) -> Tensor:
    """What a rank has of a parameter's gradient, small whole numbers: their sums are exact in every dtype."""
    parameter = plan.parameters[number]
    drawn = torch.Generator().manual_seed(1000 * step + number)
    whole = torch.randint(-30, 30, parameter.shape, generator=drawn).to(parameter.dtype)
    if parameter.sharding is None:
        return whole
    ((box, _),) = parameter.sharding.held(plan.place(rank))
    return narrowed(whole, box).contiguous()
