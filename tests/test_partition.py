"""How many ranks share state and work, where the plan chooses: as many as have even work, on whole nodes, with room."""

import pytest
import torch

from kl_dist import plan
from kl_dist.cli.models import BUILT_IN
from kl_dist.planning.boxes import Sharding, fully_sharded
from kl_dist.planning.partition import BALANCE, Partition, of_group
from kl_dist.planning.traffic import Bytes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
def test_few_ranks_are_never_divided(gpt2, ranks):
    assert plan(gpt2, ranks).partition_size == plan({"one": (4, 4)}, ranks).partition_size == ranks
    assert plan({"one": (4, 4)}, ranks, ranks_per_node=1).partition_size == ranks


@pytest.mark.parametrize("ranks", [16, 24, 32, 40, 64, 72, 128, 256, 504, 1000, 1024, 2048, 4096])
def test_gpt2_is_balanced_and_not_padded_at_any_number_of_ranks_on_nodes_of_eight(gpt2, ranks):
    found = plan(gpt2, ranks)
    assert found.balance <= 1.10 and found.partition_size % 8 == 0 and ranks % found.partition_size == 0
    sent = found.bytes_of(0)
    assert sent.padding <= 0.05 * sent.updates_sent
    larger = [g for g in range(found.partition_size + 8, ranks + 1, 8) if ranks % g == 0]
    assert all(plan(gpt2, ranks, partition_size=g).balance > BALANCE for g in larger), (
        "the most ranks that are balanced"
    )


def test_what_groups_do_is_what_one_of_them_would_do_alone(gpt2):
    one, many = plan(gpt2, 16), plan(gpt2, 4096, partition_size=16)
    assert (one.owners, one.buckets) == (many.owners, many.buckets) and one.digest() != many.digest()
    assert many.state_bytes == 256 * one.state_bytes and many.traffic_bytes == 256 * one.traffic_bytes
    assert isinstance(many.bytes_of(4095), Bytes) and many.bytes_of(4095) == one.bytes_of(15)
    assert many.keepers(0) == [k * 16 + rank for k in range(256) for rank in one.keepers(0)]
    assert "256 groups of 16 ranks" in str(many)


def test_state_that_has_no_room_is_shared_by_more_ranks(gpt2):
    held = {ranks: max(plan(gpt2, 64, partition_size=ranks).state_bytes) for ranks in (16, 32, 64)}
    assert plan(gpt2, 64).partition_size == 16
    for most, ranks in ((held[16] + 20_000, 16), (held[16] - 1, 32), (held[32] - 1, 64)):
        found = plan(gpt2, 64, max_state_bytes=most)
        assert found.partition_size == ranks and max(found.state_bytes) <= most
    with pytest.raises(ValueError, match="max_state_bytes is 1000, and even of all ranks together one has to hold"):
        plan(gpt2, 64, max_state_bytes=1000)
    with pytest.raises(ValueError, match="max_state_bytes is 1000, and even"):  # though there is nothing to choose
        plan(gpt2, 1, max_state_bytes=1000)


def test_groups_have_whole_replicas_of_what_is_sharded():
    shapes = BUILT_IN["gpt2"]
    given = {"dtype": torch.bfloat16, "adamw_names": ("wte", "wpe")}
    assert plan(shapes, 64, shard_size=64, **given).partition_size == 64
    for shard_size in (8, 16):
        assert plan(shapes, 64, shard_size=shard_size, **given).partition_size == 16
    with pytest.raises(ValueError, match="partition_size is one of 32, 64 for 64 ranks"):
        plan(shapes, 64, shard_size=32, partition_size=16, **given)
    with pytest.raises(TypeError, match="partition_size is a whole number"):
        plan(shapes, 64, partition_size="16", **given)


def test_a_sharding_within_a_group_is_the_same_in_all_or_there_is_none():
    sharding = fully_sharded((12, 3), 12, 2)
    assert of_group(sharding, 12, 4).grid == ((0, 1), (2, 3)) and of_group(sharding, 12, 12) is sharding
    assert of_group(sharding, 12, 3) is None and of_group(sharding, 12, 1) is None
    crossed = Sharding(((0, 1), (2, 3), (4, 6), (5, 7)), sharding.boxes)
    assert of_group(crossed, 8, 4) is None and of_group(crossed, 8, 8) is crossed
    assert Partition(ranks_per_node=4).sizes(24, [None]) == [8, 12, 24]
    assert Partition(ranks_per_node=4).sizes(24, [fully_sharded((12, 3), 24, 8), None]) == [8, 24]
