"""What the steps of one rank take, in seconds of its host's clock: updates, refreshes, waiting, and time in flight.

An exchange is *in flight* from its launch until the host has it; of several at once the time counts once. What it
cannot know: when it arrived before the host came for it, and of what is waited for how much the other ranks were late
and how much the network took. What a device exchanges the host does not wait for: it is *silent*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter  # bound here: a program that replaces the clock counts its own looks
from typing import NamedTuple

from kl_dist.ranks import Exchange


class Times(NamedTuple):
    """Sums over steps."""

    steps: int = 0
    flops: float = 0.0  # as planned, refreshes amortised: kl_dist.planning.plan.Plan.cost
    updates: float = 0.0
    refreshes: float = 0.0
    in_flight: float = 0.0
    waits: float = 0.0  # of it, in which nothing was computed
    silent: int = 0  # exchanges


class Clock:
    """Adds up; goes on where a plan is made anew."""

    def __init__(self) -> None:
        self.steps, self.silent = 0, 0
        self.flops = self.updates = self.refreshes = self.in_flight = self.waits = 0.0
        self._flights: list[tuple[float, float]] = []  # of the step under way
        self._read = self._lately = Times()

    @contextmanager
    def updating(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.updates += perf_counter() - began

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.refreshes += perf_counter() - began

    def wait(self, exchange: Exchange) -> None:
        began = perf_counter()
        exchange.wait()
        ended = perf_counter()
        if exchange.works:
            self.waits += ended - began
            self.silent += exchange.buffer.device.type != "cpu"
            self._flights.append((exchange.launched, ended))

    def end_step(self, flops: float) -> None:
        self.steps += 1
        self.flops += flops
        self.in_flight += covered(self._flights)
        self._flights = []

    def lately(self) -> Times:
        """Sums over the steps since the last call that found any; until there are more, it finds the same again."""
        if self.steps != self._read.steps:
            now = Times._make(getattr(self, name) for name in Times._fields)
            self._lately = Times._make(a - b for a, b in zip(now, self._read, strict=True))
            self._read = now
        return self._lately


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
