"""What a rank's clock adds up, and when an exchange says that it has arrived."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kl_dist.ranks import Exchange, Ranks
from kl_dist.step.clock import Clock, covered
from tests.world import patience

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=8)


@given(INTERVALS)
def test_time_in_flight_counts_once_however_many_fly(intervals):
    seconds = {second for start, end in intervals for second in range(start, end)}
    assert covered((float(start), float(end)) for start, end in intervals) == len(seconds)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30 * patience()
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def launched(group: dist.ProcessGroup, kind: str) -> Exchange:
    ranks = Ranks(group)
    chunk = torch.ones(1000)
    if kind == "gather":
        return ranks.gather(chunk, torch.empty(2 * chunk.nbytes, dtype=torch.uint8))
    if kind == "swap":
        return ranks.swap(chunk, (500, 500), torch.empty(1000), (500, 500))
    return ranks.broadcast([(0, chunk), (1, torch.ones(1000))])


def computed_meanwhile(group: dist.ProcessGroup, kind: str) -> None:
    """What counts of an exchange that has arrived long before it is waited for."""
    clock, exchange = Clock(), launched(group, kind)
    until(lambda: all(work.is_completed() for work in exchange.works))
    time.sleep(0.05)
    clock.wait(exchange)
    clock.end_step(1.0)
    times = clock.lately()
    assert 0 < times.waits < times.in_flight and times.in_flight - times.waits >= 0.05 and times.silent == 0


def joined_late(group: dist.ProcessGroup, kind: str) -> float:
    """Until when an exchange was in flight on rank 0; when rank 1 joined it, having heard that it is launched."""
    if group.rank() == 1:
        dist.recv(torch.ones(1), group=group, group_src=0)
        joined = time.perf_counter()
        launched(group, kind).wait()
        return joined
    clock, exchange = Clock(), launched(group, kind)
    told = dist.isend(torch.ones(1), group=group, group_dst=1)
    clock.wait(exchange)
    clock.end_step(1.0)
    told.wait()
    return exchange.launched + clock.lately().in_flight


@pytest.mark.parametrize("kind", ["gather", "swap", "broadcast"])
def test_an_exchange_is_in_flight_until_the_host_has_it_and_only_waiting_is_not_hidden(world, kind):
    world.run(computed_meanwhile, 2, kind)
    arrived, joined = world.run(joined_late, 2, kind)  # on one clock, that of the machine
    assert arrived > joined


def test_without_others_nothing_flies():
    clock = Clock()
    clock.wait(Ranks().gather(torch.ones(3), torch.empty(0, dtype=torch.uint8)))
    clock.end_step(2.0)
    assert clock.lately()[:2] == (1, 2.0) and clock.lately().in_flight == clock.lately().waits == 0


def test_a_reading_is_of_the_steps_since_the_one_before_and_stays_until_there_are_more():
    clock = Clock()
    assert clock.lately().steps == 0
    clock.end_step(2.0)
    clock.end_step(2.0)
    assert [clock.lately()[:2], clock.lately()[:2]] == [(2, 4.0)] * 2
    clock.end_step(3.0)
    assert clock.lately()[:2] == (1, 3.0)
