"""Updates that travel between nodes and then within: the same weights as in one level, and less between nodes."""

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kl_dist import KLShampoo, plan
from kl_dist.planning.boxes import Grid
from kl_dist.planning.buckets import everywhere, ranks_on_a_node
from kl_dist.planning.links import links_of
from kl_dist.planning.traffic import along_the_column
from tests.counting import Counter
from tests.models import (
    Weights,
    backward,
    raising,
    same_bits,
    samples,
    small_buckets,
    train_alone,
    weights_of,
    zoo,
    zoo_groups,
)
from tests.test_distributed_legs import broadcasts

SHAPES = {"wte": (500, 64)} | {f"m{i}": shape for i, shape in enumerate([(192, 64), (64, 64), (64, 256)] * 4)}


def nodes_of(ranks: int):
    """As torchrun says how many ranks stand on this node."""
    return mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks))


def made(group, on_node: int, bucket_bytes: int | None, **given) -> tuple[torch.nn.Module, KLShampoo]:
    """Weights under each method's kind of bucket, broadcast in legs if `bucket_bytes` says so."""
    model = zoo(torch.float32, hidden=140)
    with nodes_of(on_node), small_buckets(5000) if bucket_bytes is None else broadcasts(bucket_bytes):
        return model, KLShampoo(zoo_groups(model), process_group=group, lr=1e-2, **given)


def train(group, on_node: int, bucket_bytes: int | None) -> tuple[Weights, set[int]]:
    model, optimizer = made(group, on_node, bucket_bytes)
    train_alone(model, optimizer, range(6))
    return weights_of(model), {bucket.on_node for bucket in optimizer.plan.buckets}


@pytest.mark.parametrize("bucket_bytes", [None, 64, 20_000])
def test_two_levels_bring_what_one_brings(world, bucket_bytes):
    expected = world.run(train, 4, 4, bucket_bytes)
    for weights, on_node in world.run(train, 4, 2, bucket_bytes):
        assert on_node == {2} and same_bits(weights, expected[0][0])
    assert expected[0][1] == {1}


def train_past_nan(group, on_node: int) -> tuple[Weights, int]:
    """A gradient is not finite in the third of six steps, on all ranks, as it is once they are averaged."""
    model, optimizer = made(group, on_node, None)
    for step in range(6):
        backward(model, samples(step, torch.float32))
        if step == 2:
            next(model.parameters()).grad.view(-1)[0] = float("nan")
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), optimizer.stats()["skipped_steps"]


def test_a_step_is_left_out_in_two_levels_as_in_one(world):
    expected, skipped = world.run(train_past_nan, 4, 4)[0]
    assert skipped == 1
    for weights, skipped in world.run(train_past_nan, 4, 2):
        assert skipped == 1 and same_bits(weights, expected)


def counted(group, bucket_bytes: int | None) -> tuple[Counter, Counter, KLShampoo]:
    """What a step sends to other nodes, and within, by the process groups of real collectives."""
    model, optimizer = made(group, 2, bucket_bytes)
    train_alone(model, optimizer, range(2))
    backward(model, samples(2, torch.float32))
    between, within = Counter(), Counter()

    def of(process_group) -> Counter:
        return within if {rank // 2 for rank in dist.get_process_group_ranks(process_group)} != {0, 1} else between

    with contextlib.ExitStack() as patches:
        for name in ("_gather", "_broadcast"):
            count = getattr(Counter, name)
            told = lambda self, group, *given, count=count: count(of(group), group, *given)  # noqa: E731
            patches.enter_context(mock.patch.object(Counter, name, told))
        with Counter().counting():
            optimizer.step()
    traffics = optimizer.plan.travelling(group.rank())[0]
    links = links_of(optimizer.plan.buckets, traffics, group.rank(), 2)
    return between.gathered, within.gathered, links


@pytest.mark.parametrize("bucket_bytes", [None, 64, 20_000])
def test_a_step_sends_what_the_plan_says_between_and_within_nodes(world, bucket_bytes):
    for between, within, links in world.run(counted, 4, bucket_bytes):
        assert 0 < between == links.between and 0 < within == links.within


def of_some(group) -> set[int]:
    _, optimizer = made(group, 1, None)
    return {bucket.on_node for bucket in optimizer.plan.buckets}


def test_ranks_that_are_not_all_of_the_job_have_one_level(world):
    """They could not make the process groups of two."""
    assert world.run(of_some, 2) == [{1}, {1}]


def on_a_group_of_ones_own(group) -> set[str]:
    """Which backends the process groups have that are made beside one of all ranks, which is not the job's."""
    model, optimizer = made(dist.new_group(backend="cpu:gloo"), 2, None)
    train_alone(model, optimizer, range(1))
    return {dist.get_backend_config(one) for one in optimizer.parts.ranks._groups.values()}


def test_groups_of_two_levels_have_the_backend_that_the_optimizer_was_given(world):
    assert world.run(on_a_group_of_ones_own, 4) == [{"cpu:gloo"}] * 4


def said_by_one(group, said: str) -> None:
    here = mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=said if group.rank() == 1 else "2")
    with here, raising(ValueError, f"LOCAL_WORLD_SIZE is '{said}': leave it out"):
        KLShampoo(zoo_groups(zoo()), process_group=group)


@pytest.mark.parametrize("said", ["two", "0", "-2", "1.5"])
def test_what_is_no_number_of_ranks_on_one_rank_is_refused_on_all(world, said):
    world.run(said_by_one, 2, said)


def said_nothing(group) -> set[int]:
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="" if group.rank() == 1 else "2"):
        optimizer = KLShampoo(zoo_groups(zoo()), process_group=group)
    return {bucket.on_node for bucket in optimizer.plan.buckets}


def test_ranks_that_say_nothing_leave_it_to_the_others(world):
    assert world.run(said_nothing, 4) == [{2}] * 4


# -- the plan of it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ranks_per_node", "expected"),
    [
        (everywhere(8), 8, 1),  # one node
        (everywhere(16), 8, 8),
        (everywhere(64), 8, 8),  # 56 / 63 of the ring's bytes
        (everywhere(128), 8, 1),  # 120 / 127: not worth it
        (everywhere(16), 1, 1),  # nothing within
        (everywhere(12), 8, 1),  # nodes that are not alike
        (tuple((4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3) for i in range(4)), 8, 2),  # HSDP: two replicas on a node
        (tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(4)), 8, 1),  # and one
    ],
)
def test_two_levels_are_for_columns_that_lie_alike_on_a_few_nodes(grid: Grid, ranks_per_node, expected):
    assert ranks_on_a_node(grid, ranks_per_node) == expected


@pytest.mark.parametrize("partition_size", [8, 12, 16])
def test_groups_that_end_within_a_node_have_one_level(partition_size):
    found = plan(SHAPES, 48, partition_size=partition_size, ranks_per_node=4, adamw_names=("wte",))
    assert {bucket.on_node for bucket in found.buckets} == {4}
    found = plan(SHAPES, 48, partition_size=partition_size, ranks_per_node=5, adamw_names=("wte",))
    assert {bucket.on_node for bucket in found.buckets} == {1}


@pytest.mark.parametrize(("ranks", "shard_size"), [(16, 1), (16, 2), (32, 4)])
def test_a_node_is_sent_only_what_it_has_not(ranks, shard_size):
    """Over a node's links come the updates of other nodes' owners once; a rank receives what it does in one level."""
    of = dict(shard_size=shard_size, partition_size=ranks, adamw_names=("wte",))
    two, one = (plan(SHAPES, ranks, ranks_per_node=n, **of) for n in (8, ranks))
    for number, bucket in enumerate(two.buckets):
        if bucket.grid is None:
            continue
        for column in zip(*bucket.grid, strict=True):
            sent = [along_the_column(two.traffic(number, rank)) for rank in column]
            flat = [along_the_column(one.traffic(number, rank)) for rank in column]
            assert sum(x.sent for x in sent) == sum(x.sent for x in flat)
            assert [x.received for x in sent] == [x.received for x in flat]
            elsewhere = [rank for rank in column if rank >= 8]
            leg = two.traffic(number, column[0]).legs[0]
            if not leg.senders:
                here = len(column) - len(elsewhere)
                assert (
                    sum(x.first for x in sent[:here])
                    == len(elsewhere) * leg.chunk
                    == here * (ranks // 8 - 1) * leg.chunk
                )
    on_node = max(bucket.on_node for bucket in two.buckets)
    assert max(two.room_bytes(rank) / one.room_bytes(rank) for rank in range(ranks)) < 1 + 1 / on_node
    assert "updates travel between nodes" in str(two) and "updates travel between nodes" not in str(one)
