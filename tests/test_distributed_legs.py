"""Updates that travel by broadcast, a few at a time: the same weights as by all-gathers, in the bytes planned."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl_dist import KLShampoo, plan
from kl_dist.cli.models import BUILT_IN
from kl_dist.planning import buckets
from kl_dist.planning.buckets import EVEN, GATHERED, MatrixBucket, legs_of
from kl_dist.planning.making import BUCKET_BYTES
from tests.counting import Counter
from tests.models import Weights, backward, same_bits, samples, small_buckets, train_alone, weights_of, zoo, zoo_groups
from tests.sharded import average_over, groups_of, lay_out, layers, loss_of, mesh_of, tokens_of
from tests.sharded import weights_of as sharded_weights


@contextlib.contextmanager
def broadcasts(bucket_bytes: int) -> Iterator[None]:
    """Plans made inside broadcast among two ranks already."""
    with mock.patch.object(buckets, "FEW", 1), mock.patch.object(buckets, "GATHERED", 0), small_buckets(bucket_bytes):
        yield


def train_replicated(group, bucket_bytes: int | None) -> tuple[Weights, int]:
    """The weights after some steps, and how many legs a step has."""
    model = zoo(torch.float32, hidden=140)
    with contextlib.nullcontext() if bucket_bytes is None else broadcasts(bucket_bytes):
        optimizer = KLShampoo(zoo_groups(model), process_group=group, lr=1e-2)
    train_alone(model, optimizer, range(6))
    return weights_of(model), sum(len(b.legs) for b in optimizer.plan.buckets if isinstance(b, MatrixBucket))


@pytest.mark.parametrize("bucket_bytes", [64, 20_000, 1 << 26])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_broadcasts_bring_what_all_gathers_bring(world, world_size, bucket_bytes):
    expected = world.run(train_replicated, world_size, None)
    for weights, legs in world.run(train_replicated, world_size, bucket_bytes):
        assert legs > 0 and same_bits(weights, expected[0][0])
    assert expected[0][1] == 0


def train_sharded(group, layout: str, bucket_bytes: int | None) -> Weights:
    model = layers(torch.float32)
    part, parts = lay_out(model, layout, group)
    with contextlib.nullcontext() if bucket_bytes is None else broadcasts(bucket_bytes):
        optimizer = KLShampoo(groups_of(model), process_group=group, lr=1e-2)
    assert (bucket_bytes is None) == (not any(b.legs for b in optimizer.plan.buckets if isinstance(b, MatrixBucket)))
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step).chunk(parts)[part]).backward()
        if layout == "ddp+tp":
            average_over(mesh_of(group, (2, 2), ("dp", "tp")), model)
        optimizer.step()
    return sharded_weights(model)


@pytest.mark.parametrize("layout", ["hsdp", "ddp+tp"])
def test_replicas_of_shards_are_brought_theirs(world, layout):
    """Each column has its own broadcasts, in a group of the device mesh or, past each other, point to point."""
    expected = world.run(train_sharded, 4, layout, None)[0]
    for weights in world.run(train_sharded, 4, layout, 3000):
        assert same_bits(weights, expected)


def counted(group) -> tuple[Counter, int, int]:
    model = zoo(torch.float32, hidden=140)
    with broadcasts(20_000):
        optimizer = KLShampoo(zoo_groups(model), process_group=group)
    train_alone(model, optimizer, range(2))
    backward(model, samples(2, torch.float32))
    with Counter().counting() as counter:
        optimizer.step()
    return counter, optimizer.plan.sent_bytes(group.rank()), optimizer.plan.padding_bytes


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_of_broadcasts_sends_what_the_plan_says(world, world_size):
    for sent, said, _ in world.run(counted, world_size):
        assert sent.broadcasts and sent.gathered + sent.reduced == pytest.approx(said, abs=1)


# -- the plan of it ----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 3.0, 5.0, 40.0]), min_size=1, max_size=30), st.integers(1, 60))
def test_a_leg_has_a_buckets_bytes_or_one_row_and_every_row_has_a_leg(weights, bucket_bytes):
    legs = legs_of([*weights, 1.0], bucket_bytes)
    weights = [*weights, 1.0]
    if not legs:
        padded = len(weights) * max(weights)
        assert len(weights) <= 4 or padded <= min(EVEN * sum(weights), GATHERED * bucket_bytes)
        return
    assert all(stop <= first for (_, stop), (first, _) in pairwise(legs))
    assert [w for start, stop in legs for w in weights[start:stop] if w] == [w for w in weights if w]
    for start, stop in legs:
        rows = [w for w in weights[start:stop] if w]
        assert sum(rows) <= bucket_bytes or len(rows) == 1


@pytest.mark.parametrize(("ranks", "shard_size"), [(8, 1), (64, 1), (1024, 1), (64, 8), (1024, 8)])
def test_no_buffer_holds_more_than_a_few_buckets_at_any_world_size(ranks, shard_size):
    """Llama-8B in bfloat16, whose largest block has half a bucket: two rooms of a chunk and two legs, or one gather."""
    found = plan(
        BUILT_IN["llama-8b"], ranks, shard_size=shard_size, dtype=torch.bfloat16, adamw_names=("embed", "head")
    )
    for rank in (0, ranks - 1):
        traffics = [found.traffic(number, rank) for number in range(len(found.buckets))]
        assert max(leg.numel for traffic in traffics for leg in traffic.legs) * 2 <= GATHERED * BUCKET_BYTES
        assert found.room_bytes(rank) <= 2**30


def test_few_ranks_exchange_as_ever(gpt2):
    for ranks, shard_size in ((2, 1), (4, 1), (4, 2)):
        assert not any(b.legs for b in plan(gpt2, ranks, shard_size=shard_size).buckets if isinstance(b, MatrixBucket))
