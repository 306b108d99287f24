"""What a forecast says of a plan: its bytes are those of the plan, its times arithmetic that stands here again."""

import dataclasses
import math

import pytest
import torch

import kl_dist
from kl_dist import options
from kl_dist.cli import advice, forecast, machine
from kl_dist.cli.machine import Machine
from kl_dist.planning.costs import FLOPS_PER_BYTE
from kl_dist.planning.links import links_of

SHAPES = {"wte": (500, 64)} | {f"m{i}": shape for i, shape in enumerate([(192, 64), (64, 64), (64, 256)] * 4)}
GIVEN = {"adamw_names": ("wte",)}
SLOW = Machine("slow", flops=1e9, refresh_flops=5e8, memory=1e9, within=1e8, between=1e7, latency=1e-3)


def group(**given) -> dict:
    found = {**options.DEFAULTS, **GIVEN, **given}
    options.resolve(found)
    return found


def planned(ranks: int, shard_size: int = 1, ranks_per_node: int = 2, **given):
    return kl_dist.plan(SHAPES, ranks, shard_size=shard_size, ranks_per_node=ranks_per_node, **GIVEN, **given)


def agreement(plan) -> int:
    return round((plan.world_size - 1) * 2 * 4 * (plan.agreement_size + 1) / plan.world_size)


@pytest.mark.parametrize("ranks, shard_size", [(1, 1), (2, 1), (8, 1), (8, 8), (8, 2), (8, 4), (6, 3)])
@pytest.mark.parametrize("on_node", [1, 2, 4, 8])
def test_bytes_within_and_between_nodes_are_all_that_a_rank_sends(ranks, shard_size, on_node):
    plan = planned(ranks, shard_size, on_node, partition_size=ranks)
    for rank in range(ranks):
        links = links_of(plan.buckets, plan.travelling(rank)[0], rank, on_node)
        assert links.within + links.between == plan.sent_bytes(rank) - agreement(plan)
        if on_node == 1:
            assert links.within == 0
        if on_node >= ranks:
            assert links.between == 0


@pytest.mark.parametrize("layout", ["ring", "two levels", "all-to-all"])
def test_what_crosses_nodes_is_counted_rank_by_rank(layout):
    """In a ring of two nodes of two only ranks 1 and 3 have a neighbour on the other; in two levels all have."""
    plan = planned(4, 4 if layout == "all-to-all" else 1, 2 if layout == "two levels" else 4)
    links = [links_of(plan.buckets, plan.travelling(rank)[0], rank, 2) for rank in range(4)]
    if layout == "ring":
        assert [one.between > 0 for one in links] == [False, True, False, True]
        assert [one.within > 0 for one in links] == [True, False, True, False]
        return
    if layout == "two levels":
        assert all(one.between > 0 and one.within > 0 for one in links)
        return
    for rank, one in enumerate(links):
        crossing = 0
        for bucket, traffic in zip(plan.buckets, plan.travelling(rank)[0], strict=True):
            for other in {0, 1, 2, 3} - {rank, rank ^ 1} if traffic.sharded else ():
                numel = traffic.outgoing.lengths[other] + traffic.incoming.lengths[other]
                crossing += numel * bucket.dtype.itemsize
        assert one.between == crossing > 0


def test_work_of_the_ranks_adds_up_to_the_plans_cost():
    plan, every = planned(4), group()["precondition_frequency"]
    works = forecast.works_of(plan, group())
    for rank, work in enumerate(works):
        assert work.cost(every) == pytest.approx(plan.cost[rank], rel=1e-2)  # AdamW's ends, and counts of steps
    assert sum(work.cost(every) for work in works) == pytest.approx(sum(plan.cost), rel=1e-2)


@pytest.mark.parametrize("on_node", [2, 8])
def test_a_steps_time_is_the_longer_of_computing_and_exchanging(on_node):
    plan = planned(8, 1, on_node, partition_size=8)
    found = forecast.forecast(plan, group(), SLOW, on_node)
    work, part = found.work, found.seconds
    assert part.products == work.products / 1e9 and part.refreshes == work.refresh / 2 / 5e8
    assert part.memory == work.moved / 1e9 and part.host == 0
    assert part.within == found.within_bytes / 1e8 and part.between == found.between_bytes / 1e7
    assert part.agreement == 3e-3 and part.latency == pytest.approx(
        1e-3 * len(plan.buckets) * (2 if on_node == 2 else 1)
    )
    longer, shorter = max(part.compute, part.exchange), min(part.compute, part.exchange)
    assert found.step_seconds == longer + shorter / len(plan.buckets) + 3e-3
    assert max(work.cost(2) for work in forecast.works_of(plan, group())) == pytest.approx(work.cost(2))
    assert found.state_bytes == max(plan.state_bytes) and found.balance == plan.balance
    assert (found.between_bytes > 0) == (on_node == 2) and found.within_bytes > 0


def test_what_bounds_a_step_is_its_largest_part():
    plan = planned(8, partition_size=8)

    def bound(**faster) -> str:
        return forecast.forecast(plan, group(), dataclasses.replace(SLOW, **faster), 2).seconds.bound

    assert bound(between=1.0) == "between" and bound(latency=1e6) == "latency"
    quick = {"between": 1e15, "within": 1e15, "latency": 0.0}
    assert bound(**quick, refresh_flops=1.0) == "refreshes" and bound(**quick, flops=1.0) == "products"
    assert bound(**quick, memory=1.0) == "memory" and bound(**quick, host=1e9) == "host"
    alone = forecast.forecast(planned(1), group(), SLOW, 8)
    assert alone.seconds.exchange == alone.seconds.agreement == 0


def test_ranks_that_share_cores_take_turns():
    two = dataclasses.replace(SLOW, cores=2)
    assert [two.sharing(ranks) for ranks in (1, 2, 4)] == [1, 1, 2] and SLOW.sharing(64) == 1
    plan = planned(4)
    found = (forecast.forecast(plan, group(), on, 8).seconds.compute for on in (two, SLOW))
    assert next(found) == pytest.approx(2 * next(found))


def test_turns_of_refreshes_are_all_matrices_once():
    plan = planned(2)
    matrices = sum(owner is not None for owner in plan.owners)
    assert [count for count, _ in forecast.schedule(plan, group())] == [matrices / 2, matrices / 2]
    (first, load), *rest = forecast.schedule(plan, group(precondition_frequency=3, stagger=False))
    assert first == matrices and rest == [(0, 0.0), (0, 0.0)] and load == pytest.approx(3, rel=0.01)


def test_the_worlds_are_powers_of_four():
    assert list(forecast.worlds(4096)) == [1, 4, 16, 64, 256, 1024, 4096]
    assert list(forecast.worlds(100, 8)) == [8, 32] and list(forecast.worlds(4, 8)) == []


def test_advice_names_what_saves_and_nothing_that_was_asked_for():
    far = dataclasses.replace(SLOW, between=1e5)

    def on(given):
        size = given.get("partition_size", 8)
        rest = {key: x for key, x in given.items() if key != "partition_size"}
        return forecast.forecast(planned(8, partition_size=size, **rest), group(**rest), far, 2)

    today = on({})
    found = advice.advise({}, group(), today, on)
    assert all(min(one.faster, one.smaller) <= 0.95 for one in found)
    assert [one.faster for one in found] == sorted(one.faster for one in found)
    named = {name for one in found for name in one.change.options}
    assert {"recipe", "partition_size"} <= named  # less state; fewer bytes between nodes
    assert advice.advise({"recipe": "fresh", "partition_size": 8}, group(), today, on) != found
    kept = {name for one in advice.advise({"recipe": "fresh"}, group(), today, on) for name in one.change.options}
    assert "recipe" not in kept

    def impossible(given):
        raise ValueError("no such division")

    assert advice.advise({}, group(), today, impossible) == []


def test_adamws_part_is_memory_alone():
    plan = kl_dist.plan({"b": (1 << 20,)}, 2)
    (one, other) = forecast.works_of(plan, group())
    assert one == other and one.products == one.refresh == 0
    assert one.moved == pytest.approx(sum(plan.cost) / 2 / FLOPS_PER_BYTE)
    found = forecast.forecast(plan, group(), SLOW, 8)
    assert found.idle == 0 and math.isfinite(found.step_seconds) and forecast.shared_side(plan) == 64


@pytest.mark.parametrize("sharded", [False, True])
def test_this_cpu_is_measured(sharded):
    threads = torch.get_num_threads()
    found = machine.this_cpu(32, ranks=2, sharded=sharded)
    assert torch.get_num_threads() == threads
    for rate in (found.flops, found.refresh_flops, found.memory, found.within):
        assert 1e5 < rate < 1e14
    assert 0 < found.host < 10 and 0 < found.latency < 10 and found.within == found.between and found.cores >= 1
