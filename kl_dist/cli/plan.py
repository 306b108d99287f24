"""`kl-shampoo plan`: who would do what, what it takes, and how long a step would be, for a model and a world."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kl_dist
from kl_dist import options
from kl_dist.cli import advice, forecast, machine, tables
from kl_dist.cli.forecast import Forecast
from kl_dist.cli.machine import Machine
from kl_dist.cli.models import Model
from kl_dist.planning.plan import Plan

MOST_MATRICES = 256
"""Of a rank, that this CPU's own time of a step is measured with, at most."""
OF_PLAN = ("partition_size", "max_state_bytes")
"""What `--set` may name beside the options of a group."""


@dataclass(frozen=True)
class Layout:
    """How parameters lie over a world: `shard_size` ranks have a replica together."""

    name: str
    replicas: int | None = None  # of "hsdp"
    shards: int | None = None

    @staticmethod
    def of(asked: str) -> Layout:
        """Raises ValueError for what is no layout."""
        if asked in ("ddp", "fsdp2"):
            return Layout(asked)
        if found := re.fullmatch(r"hsdp:(\d+)x(\d+)", asked):
            replicas, shards = map(int, found.groups())
            if replicas and shards:
                return Layout("hsdp", replicas, shards)
        raise ValueError(f"layout is ddp, fsdp2 or hsdp:RxS, R replicas of S ranks, not {asked!r}")

    def shard_size(self, world_size: int) -> int:
        """Raises ValueError where the world is not so many replicas."""
        if self.name == "hsdp":
            assert self.replicas is not None and self.shards is not None
            if self.replicas * self.shards != world_size:
                raise ValueError(
                    f"hsdp:{self.replicas}x{self.shards} is for {self.replicas * self.shards} ranks, not {world_size}"
                )
            return self.shards
        return 1 if self.name == "ddp" else world_size

    def at(self, world_size: int) -> Layout:
        """The same layout at another number of ranks: more replicas, or fewer."""
        return replace(self, replicas=world_size // self.shards) if self.shards else self


@dataclass(frozen=True)
class Question:
    """What is asked for; `plan` and `forecast` answer it, `growth` for other worlds too."""

    model: Model
    world_size: int
    layout: Layout
    dtype: torch.dtype
    ranks_per_node: int
    given: Mapping[str, Any]  # options by name, those of `OF_PLAN` included

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self.layout.shard_size(self.world_size)
        options.check_known(self.given, *OF_PLAN, "output_head")

    @property
    def group(self) -> dict[str, Any]:
        """The options that all matrices have in common, resolved."""
        found = {**options.DEFAULTS, **{key: x for key, x in self.given.items() if key in options.DEFAULTS}}
        options.resolve(found)
        return found

    def plan(self) -> Plan:
        """Raises ValueError or TypeError: options that cannot be."""
        given = {**self.model.options, **self.given}
        return kl_dist.plan(
            self.model.given,
            self.world_size,
            shard_size=self.layout.shard_size(self.world_size),
            ranks_per_node=min(self.ranks_per_node, self.world_size),
            dtype=self.dtype,
            **given,
        )

    def forecast(self, on: Machine) -> Forecast:
        return forecast.forecast(self.plan(), self.group, on, self.ranks_per_node)

    def growth(self, largest: int, on: Machine) -> list[Forecast]:
        """By world size, as far as `largest`. A size of partition groups that was asked for is left to the plan."""
        given = {key: x for key, x in self.given.items() if key != "partition_size"}
        found = []
        for ranks in sorted({*forecast.worlds(largest, self.layout.shards or 1), min(self.world_size, largest)}):
            try:
                there = replace(self, world_size=ranks, layout=self.layout.at(ranks), given=given)
                found.append(there.forecast(on))
            except ValueError:  # so few ranks have no room for the state, say
                continue
        return found


def chosen_machine(name: str, question: Question, plan: Plan, rates: Mapping[str, float | None]) -> Machine:
    """A preset or this CPU, with the rates that are given in the place of its own."""
    if name == "cpu":
        most = min(forecast.matrices_of_a_rank(plan), MOST_MATRICES)
        sharded = question.layout.shard_size(question.world_size) > 1
        found = machine.this_cpu(forecast.shared_side(plan), question.world_size, most, sharded)
    else:
        found = machine.PRESETS[name]
    own: dict[str, Any] = {key: rate for key, rate in rates.items() if rate is not None}
    for key, rate in own.items():
        if not rate > 0 and not (key == "latency" and rate == 0):
            raise ValueError(f"{key} must be more than 0, not {rate:g}")
    if "flops" in own:  # a refresh keeps its proportion
        own["refresh_flops"] = found.refresh_flops * own["flops"] / found.flops
    said = ", ".join(f"{key} {rate:g}" for key, rate in own.items() if key != "refresh_flops")
    return replace(found, **own, name=f"{found.name}; {said}") if own else found


def run(
    question: Question, machine_name: str, rates: Mapping[str, float | None], largest: int, png: Path | None
) -> None:
    """Print the tables, and draw the picture where it is asked for."""
    plan = question.plan()
    if not any(unit.numel for unit in plan.units):
        raise ValueError(f"{question.model.name} has no parameter that is trained")
    on = chosen_machine(machine_name, question, plan, rates)
    today = forecast.forecast(plan, question.group, on, question.ranks_per_node)
    helps = advice.advise(
        question.given, question.group, today, lambda given: replace(question, given=given).forecast(on)
    )
    growth = question.growth(largest, on)
    tables.show(question.model, plan, question.layout.name, on, today, forecast.schedule(plan, question.group))
    tables.show_growth(growth, question.world_size)
    tables.show_advice(helps, today)
    if png is not None:
        from kl_dist.cli import picture

        picture.draw(question.model.name, question.layout.name, on, today, growth, png)
