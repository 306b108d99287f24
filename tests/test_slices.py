"""What each rank has of AdamW's work: by arithmetic, every element once, and no list of what the others have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl_dist import plan
from kl_dist.planning.boxes import Sharding, boxes_of_range, fully_sharded, tile, volume
from kl_dist.planning.slices import Stream, make_stream, rows_of, rows_volumes, shard_boxes
from kl_dist.planning.units import Parameter, adamw_unit


def stream_of(lengths: list[int], world_size: int, bucket_bytes: int) -> Stream:
    units = [adamw_unit(i, Parameter(str(i), (n,), torch.float32, 0)) for i, n in enumerate(lengths)]
    return make_stream(range(len(units)), units, world_size, bucket_bytes)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 9), st.sampled_from([64, 256, 1 << 20]))
def test_every_element_of_a_stream_has_one_rank_and_buckets_come_back_in_order(lengths, world_size, bucket_bytes):
    stream = stream_of(lengths, world_size, bucket_bytes)
    order = [element for number in range(stream.buckets) for element in range(*stream.bucket(number))]
    assert order == list(range(sum(lengths)))
    for number in range(stream.buckets):
        start, stop = stream.bucket(number)
        gathered = [e for rank in range(world_size) for e in range(*stream.share(number, rank))]
        assert gathered == list(range(start, stop)), "what an all-gather brings is the bucket, in order"
        found = [(i, e) for i, part in stream.parts(start, stop) for e in range(*part)]
        assert found == [(i, e - stream.starts[i]) for e in range(start, stop) for i in [_unit_at(stream, e)]]
    for place, length in enumerate(lengths):
        held = {rank: [e for part in stream.held(place, rank) for e in range(*part)] for rank in range(world_size)}
        assert sorted(e for elements in held.values() for e in elements) == list(range(length))
        assert stream.holders(place) == [rank for rank, elements in held.items() if elements]


def _unit_at(stream: Stream, element: int) -> int:
    return max(i for i, start in enumerate(stream.starts[:-1]) if start <= element)


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 9), st.integers(1, 60))
def test_rows_are_the_shard_end_to_end_and_as_large_as_is_said(rows, columns, world_size, most):
    sharding = fully_sharded((rows, columns), world_size, world_size)
    for rank, volumes in enumerate(rows_volumes(sharding, most)):
        parts = rows_of(sharding, rank, most)
        assert [sum(map(volume, part)) for part in parts] == list(volumes)
        assert all(0 < n < most + columns for n in volumes)
        ((box, _),) = sharding.held(rank)
        if volume(box):
            first, *others = box
            assert parts[0][0][0][0] == first[0]
            assert sum(volumes) == volume(box) and all([*rows[1:]] == others for part in parts for rows in part)
            assert shard_boxes(sharding, rank) == [box]


def test_rows_of_flat_memory_are_its_boxes():
    """ZeRO: a rank has the end of a row, whole rows, and the beginning of one."""
    ranges = [(0, 5), (5, 31), (31, 40)]
    sharding = Sharding(((0, 1, 2),), tuple(tuple(boxes_of_range((5, 8), *r)) for r in ranges), flat=True)
    boxes = [box for rank in range(3) for part in rows_of(sharding, rank, 10) for box in part]
    assert tile(boxes, (5, 8)) and [len(rows_of(sharding, rank, 10)) for rank in range(3)] == [1, 4, 1]
    assert [len(rows_of(sharding, rank, 100)) for rank in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("shard_size", [1, 8, 512])
def test_a_plan_has_one_unit_for_each_parameter_under_adamw_at_any_world_size(gpt2, shard_size):
    """And with it one number in the agreement; 148 parameters of GPT-2 are vectors and embeddings."""
    few, many = plan(gpt2, 1), plan(gpt2, 512, shard_size=shard_size)
    assert [unit.name for unit in many.units] == [unit.name for unit in few.units]
    assert many.agreement_size == few.agreement_size == 144 + 100 + 3
    parts = [member for members in many.members(511) for member in members if member.unit.elementwise]
    assert len(parts) <= 100 + len(many.buckets), "a slice a bucket, and where parameters meet"


def test_what_has_come_back_is_one_piece_for_each_parameter_and_bucket(gpt2):
    found = plan(gpt2, 512)
    traffics = [found.traffic(number, 0) for number in range(len(found.buckets))]
    arrivals = [leg.arrivals for traffic in traffics for leg in traffic.legs]
    adamw = [[parcel.unit for parcel in there if found.units[parcel.unit].elementwise] for there in arrivals]
    assert all(len(there) == len(set(there)) for there in adamw)
    assert sum(map(len, adamw)) <= 100 + len(found.buckets)
