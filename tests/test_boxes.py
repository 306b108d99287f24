"""The pieces of a block in all shards together are the block, whatever the reading and however the tensor is cut."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_dist import options
from kl_dist.planning.boxes import Sharding, joined, narrowed, pieces, whole
from kl_dist.planning.matrices import cut, near_equal, read_matrices

READINGS = [
    ((12, 5), {}),
    ((130, 64), {}),
    ((5, 1), {}),
    ((1, 7), {}),
    ((6, 4, 3, 2), {}),
    ((6, 4, 3, 2), {"merge_dims": False}),
    ((6, 1, 20), {}),
    ((4, 30), {"max_preconditioner_dim": 7}),
    ((6, 4, 3), {"max_preconditioner_dim": 5}),
    ((12, 4), {"matrices": {"parts": {0: 3}}}),
    ((12, 4), {"matrices": {"parts": {0: 12}}}),
    ((12, 4), {"matrices": {"parts": {0: 1, 1: 2}}}),
    ((4, 6, 5), {"matrices": {"batch": (0,)}}),
    ((4, 6, 5), {"matrices": {"batch": (0,), "parts": {0: 2, 1: 3}}}),
    ((4, 6, 5), {"matrices": {"batch": (2,), "rows": (1,), "columns": (0,)}}),
    ((4, 5, 6), {"matrices": {"batch": (0,), "interleaved": {2: 2}}}),
    ((4, 6, 5), {"matrices": {"batch": (1,), "interleaved": {1: 3}}}),
    ((4, 6, 6), {"matrices": {"rows": (0,), "columns": (1, 2), "parts": {1: 2}, "interleaved": {2: 3}}}),
    ((3, 4, 5, 2), {"matrices": {"rows": (1, 0), "columns": (3, 2)}}),
]


def blocks_of(shape, asked):
    group = {**options.DEFAULTS, "params": [], **asked}
    options.resolve(group)
    reading = read_matrices(shape, group)
    return reading, list(cut(reading, group))


def boxes(shape, counts):
    """All boxes when every axis is cut into so many near-equal parts, some of them empty."""
    return list(product(*(near_equal(d, count) for d, count in zip(shape, counts, strict=True))))


@pytest.mark.parametrize(("shape", "asked"), READINGS, ids=str)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_pieces_of_all_shards_make_the_block(shape, asked, data):
    """Gathered from the shards, a block is what the whole tensor has; put back, the shards are the tensor again."""
    counts = data.draw(st.tuples(*(st.integers(1, 4) for _ in shape)))
    reading, blocks = blocks_of(shape, asked)
    tensor = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    restored = torch.zeros(shape)
    shards = {box: narrowed(tensor, box).clone() for box in boxes(shape, counts)}
    for block in blocks:
        expected = block.of(reading.view(tensor))
        found = torch.zeros(block.shape)
        for box, shard in shards.items():
            for piece in pieces(reading, block, box):
                values = piece.of_shard(shard)
                assert not piece.of_block(found).any() and values.numel() == piece.numel
                piece.of_block(found).copy_(values)
        assert torch.equal(found, expected)
        for box in shards:
            target = torch.zeros([stop - start for start, stop in box])
            for piece in pieces(reading, block, box):
                piece.put(target, piece.of_block(expected))
            narrowed(restored, box).add_(target)
    assert torch.equal(restored, tensor)


def test_a_matrix_that_is_not_sharded_is_one_piece_that_is_a_view():
    for shape, asked in READINGS:
        reading, blocks = blocks_of(shape, asked)
        for block in blocks:
            (piece,) = pieces(reading, block, whole(shape))
            assert piece.ranges == tuple((0, d) for d in block.shape)
    weight = torch.zeros(12, 5)
    reading, (block,) = blocks_of((12, 5), {})
    (piece,) = pieces(reading, block, ((3, 9), (0, 5)))
    piece.of_shard(weight[3:9]).fill_(1)
    assert weight[3:9].all() and not weight[:3].any() and not weight[9:].any()


def test_a_shard_that_cannot_be_viewed_is_written_all_the_same():
    """The transposed sides of a declared reading, and channels_last strides."""
    for shape, asked in [READINGS[4], READINGS[-1]]:
        reading, blocks = blocks_of(shape, asked)
        shard = torch.zeros(shape).to(memory_format=torch.channels_last)
        for block in blocks:
            (piece,) = pieces(reading, block, whole(shape))
            piece.put(shard, torch.ones(block.shape))
        assert shard.all()


def test_a_sharding_knows_rows_columns_and_boxes():
    hsdp = Sharding(((0, 1), (2, 3)), ((((0, 2), (0, 5)),), (((2, 3), (0, 5)),)))
    assert hsdp.row(3) == (2, 3) and hsdp.column(3) == (1, 3) and list(hsdp.held(2)) == [(((0, 2), (0, 5)), None)]


def test_rows_that_follow_each_other_are_joined():
    rows = [((0, 2), (0, 3)), ((2, 5), (0, 3)), ((5, 6), (0, 1)), ((5, 6), (1, 3)), ((8, 9), (0, 3))]
    assert joined(rows) == [((0, 5), (0, 3)), *rows[2:]]
