"""Every update comes to every shard, at more ranks than are started here: all of them in one process."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from kl_dist import plan
from kl_dist.planning import buckets
from kl_dist.planning.buckets import MatrixBucket
from tests.models import small_buckets
from tests.test_distributed_legs import broadcasts
from tests.wire import relay

SHAPES = {"wte": (50, 16), "bias": (7,), "scale": ()} | {
    f"layers.{i}": shape for i, shape in enumerate([(48, 16), (16, 16), (16, 33), (40, 40), (10, 12)] * 3)
}


@contextlib.contextmanager
def all_gathers() -> Iterator[None]:
    """Plans made inside never broadcast."""
    with mock.patch.object(buckets, "FEW", 16), small_buckets(5000):
        yield


@pytest.mark.parametrize("legs", ["an all-gather", "one at a time", "some at a time"])
@pytest.mark.parametrize(
    ("ranks", "shard_size", "partition_size", "ranks_per_node", "on_node", "dtype"),
    [
        (6, 1, 6, 3, 3, torch.float32),
        (8, 1, 8, 2, 2, torch.bfloat16),
        (12, 1, 12, 1, 1, torch.float32),
        (12, 2, 12, 4, 2, torch.float32),  # replicas of two ranks, two on each of three nodes
        (16, 2, 16, 8, 4, torch.bfloat16),
        (16, 4, 16, 8, 2, torch.float64),
        (16, 1, 8, 4, 4, torch.float32),  # groups of two nodes
        (8, 8, 8, 4, 1, torch.float32),
    ],
)
def test_every_update_comes_to_every_shard(ranks, shard_size, partition_size, ranks_per_node, on_node, dtype, legs):
    of = dict(shard_size=shard_size, partition_size=partition_size, ranks_per_node=ranks_per_node, dtype=dtype)
    ways = {"an all-gather": all_gathers(), "one at a time": broadcasts(64), "some at a time": broadcasts(3000)}
    with ways[legs]:
        made = plan(SHAPES, ranks, adamw_names=("wte",), **of)
    matrices = [bucket for bucket in made.buckets if isinstance(bucket, MatrixBucket)]
    assert {bucket.on_node for bucket in matrices} == {on_node}
    assert {bool(bucket.legs) for bucket in matrices} == {legs != "an all-gather" and shard_size < ranks}
    for shards in relay(made, steps=2):
        for shard, gradients in shards:
            assert torch.equal(shard, -gradients)
