"""What a plan needs of a machine: memory, work and bytes of its busiest rank, a step's time and what bounds it.

With P, R / T and M a rank's flops of products, of refreshes and bytes of memory, B_w and B_b what it sends within its
node and between nodes in E exchanges, and n buckets, of which one travels while another is computed:

    host     H = host + (B_w + B_b) per_byte
    compute  C = (P / flops + R / (T refresh_flops) + M / memory + H) sharing        of the rank for which it is largest
    exchange X = B_w / within + B_b / between + E latency                            of a node's last rank
    step       = max(C, X) + min(C, X) / n + log2(W) latency

where the last is the agreement's, an all-reduce of few numbers, and `sharing` says how many ranks take turns on a core.
The model's forward and backward pass, and what DDP or FSDP2 sends for it, are not in it. The host's time is in it where
the machine has one: a GPU's step can hide it (`benchmarks.scale` measures it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kl_dist.cli.machine import Machine
from kl_dist.planning import costs
from kl_dist.planning.links import links_of
from kl_dist.planning.plan import Plan
from kl_dist.planning.traffic import bytes_of, rooms_of


class Seconds(NamedTuple):
    """Of the parts of one step, before anything overlaps."""

    products: float
    refreshes: float
    memory: float
    host: float
    within: float
    between: float
    latency: float  # of all exchanges
    agreement: float  # that opens a step, which nothing overlaps

    @property
    def compute(self) -> float:
        return self.products + self.refreshes + self.memory + self.host

    @property
    def exchange(self) -> float:
        return self.within + self.between + self.latency

    @property
    def bound(self) -> str:
        """The largest part of what takes longest."""
        own, links = ("products", "refreshes", "memory", "host"), ("within", "between", "latency")
        names = own if self.compute >= self.exchange else links
        return max(names, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine; numbers of ranks are those of the one that has most."""

    world_size: int
    partition_size: int
    state_bytes: int
    temporary_bytes: int
    work: costs.Work  # of the busiest rank
    every: int  # T
    within_bytes: int
    between_bytes: int
    balance: float
    padding: float  # over what is sent
    buckets: int
    idle: int  # ranks of a group that own no matrix
    seconds: Seconds

    @property
    def step_seconds(self) -> float:
        shorter, longer = sorted((self.seconds.compute, self.seconds.exchange))
        return longer + shorter / max(self.buckets, 1) + self.seconds.agreement


def forecast(plan: Plan, group: Mapping[str, Any], machine: Machine, ranks_per_node: int) -> Forecast:
    """The forecast for a plan whose groups have these resolved options in common."""
    every, works = group["precondition_frequency"], works_of(plan, group)
    on_node = min(ranks_per_node, plan.world_size)
    slower = machine.sharing(on_node)
    last = min(on_node, plan.partition_size) - 1  # whose neighbour in a ring is on another node, where there is one
    traffics, dtypes = plan.travelling(last)
    links = links_of(plan.buckets, traffics, last, ranks_per_node)
    host = machine.host + (links.within + links.between) * machine.per_byte
    parts = [_compute(work, every, machine, host, slower) for work in works]
    busiest = max(range(len(parts)), key=lambda rank: sum(parts[rank]))
    sent = bytes_of(traffics, dtypes)
    latency = machine.latency if plan.world_size > 1 else 0.0
    owners = {owner for owner in plan.owners if owner is not None}
    return Forecast(
        plan.world_size,
        plan.partition_size,
        max(plan.state_bytes),
        sum(map(sum, rooms_of(traffics, dtypes))) + plan.working_bytes(busiest),
        works[busiest],
        every,
        links.within,
        links.between,
        plan.balance,
        sent.padding / max(sent.gradients_sent + sent.updates_sent, 1),
        len(plan.buckets),
        plan.partition_size - len(owners) if owners else 0,
        Seconds(
            *parts[busiest],
            links.within / machine.within,
            links.between / machine.between,
            links.exchanges * latency,
            latency * math.ceil(math.log2(plan.world_size)),
        ),
    )


def works_of(plan: Plan, group: Mapping[str, Any]) -> list[costs.Work]:
    """By rank of a group, what it computes; AdamW's share is divided evenly, as the plan does but for ends."""
    totals = [[0.0, 0.0, 0.0] for _ in range(plan.partition_size)]
    shared = 0.0
    for unit, owner in zip(plan.units, plan.owners, strict=True):
        if owner is None:
            shared += unit.cost / costs.FLOPS_PER_BYTE
            continue
        work = costs.matrix_work(unit.method, unit.recipe, unit.block, unit.dtype, group["polar"])
        totals[owner] = [a + b for a, b in zip(totals[owner], work, strict=True)]
    return [costs.Work(p, r, m + shared / plan.partition_size) for p, r, m in totals]


def _compute(
    work: costs.Work, every: int, machine: Machine, host: float, slower: float
) -> tuple[float, float, float, float]:
    return (
        slower * work.products / machine.flops,
        slower * work.refresh / every / machine.refresh_flops,
        slower * work.moved / machine.memory,
        slower * host,
    )


def schedule(plan: Plan, group: Mapping[str, Any]) -> list[tuple[int, float]]:
    """By step of a cycle of T, how many matrices are refreshed, and the largest rank's flops of that over the mean's.

    All are, in the last step of a cycle, where they are not staggered.
    """
    every = group["precondition_frequency"]
    counts, loads = [0] * every, [[0.0] * plan.partition_size for _ in range(every)]
    for unit, owner in zip(plan.units, plan.owners, strict=True):
        if owner is not None:
            turn = unit.phase % every if group["stagger"] else 0
            counts[turn] += 1
            work = costs.matrix_work(unit.method, unit.recipe, unit.block, unit.dtype, 0)
            loads[turn][owner] += work.refresh
    mean = sum(map(sum, loads)) / every / plan.partition_size
    return [(count, max(load) / mean if mean else 1.0) for count, load in zip(counts, loads, strict=True)]


def shared_side(plan: Plan) -> int:
    """The side that most of the work is done on: what this CPU is measured with."""
    weights: dict[int, float] = {}
    for unit, owner in zip(plan.units, plan.owners, strict=True):
        if owner is not None:
            side = max(unit.block.shape)
            weights[side] = weights.get(side, 0.0) + unit.cost
    return max(weights, key=lambda side: weights[side], default=64)


def matrices_of_a_rank(plan: Plan) -> int:
    """How many matrices a rank owns, on average and at least one."""
    owned = sum(owner is not None for owner in plan.owners)
    return max(1, round(owned / plan.partition_size))


def worlds(largest: int, step: int = 1) -> Sequence[int]:
    """Powers of four times `step`, up to `largest`."""
    return [step << k for k in range(0, max(0, (largest // step).bit_length()), 2)]
