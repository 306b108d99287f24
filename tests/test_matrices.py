"""A stored tensor is read as the matrices that were asked for, and cut so that every element has one place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_dist import KLShampoo, plan
from kl_dist.options import BLOCKINGS, DEFAULTS, LONG_SIDES
from kl_dist.planning.matrices import cut, near_equal, read_matrices

SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4)


def group(**options) -> dict:
    """Options of a group as they are after `options.resolve`, for recipe "fresh" unless given."""
    return {**DEFAULTS, "merge_dims": True, "blocking": "square", "long_side": "cut", **options}


def block_shapes(shape: tuple[int, ...], **options) -> list[tuple[int, ...]]:
    options = group(**options)
    return [block.shape for block in cut(read_matrices(shape, options), options)]


@given(st.integers(0, 10_000), st.integers(1, 100))
@settings(deadline=None)
def test_near_equal_covers_a_range_in_parts_that_differ_by_one_at_most(length, parts):
    ranges = near_equal(length, parts)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == length and len(ranges) == parts
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((128, 128), [(128, 128)]),
        ((3 * 128, 128), 3 * [(128, 128)]),
        ((4 * 128, 128), 4 * [(128, 128)]),
        ((128, 4 * 128), 4 * [(128, 128)]),
        ((192, 128), [(96, 128), (96, 128)]),
        ((191, 128), [(191, 128)]),
        ((320, 128), [(107, 128), (107, 128), (106, 128)]),
        ((16, 1024), 16 * [(16, 64)]),
        ((16, 1000), 10 * [(16, 67)] + 5 * [(16, 66)]),
        ((16, 127), [(16, 127)]),
        ((1, 100), [(1, 100)]),
        ((100, 1), [(100, 1)]),
        ((1, 1), [(1, 1)]),
        ((2, 128, 17), [(2, 128, 17)]),
        ((64, 64, 3, 3), 9 * [(64, 64)]),
    ],
    ids=str,
)
def test_square_blocking_cuts_the_long_side_into_near_squares(shape, expected):
    assert block_shapes(shape) == expected


def test_nothing_is_cut_without_blocking():
    assert block_shapes((4 * 128, 128), blocking="none") == [(512, 128)]


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ((100, 30), 50, 2 * [(50, 30)]),
        ((101, 30), 50, [(34, 30), (34, 30), (33, 30)]),
        ((100, 60), 50, 4 * [(50, 30)]),
        ((7, 20, 30), 10, 6 * [(7, 10, 10)]),
    ],
    ids=str,
)
def test_a_side_above_the_limit_is_cut_further(shape, limit, expected):
    assert block_shapes(shape, blocking="none", merge_dims=False, max_preconditioner_dim=limit) == expected


def test_square_blocks_that_are_still_too_long_are_cut_again():
    assert block_shapes((400, 200), max_preconditioner_dim=100) == 8 * [(100, 100)]


@pytest.mark.parametrize("kind", ["diagonal", "identity"])
def test_a_side_above_the_limit_keeps_what_the_user_says(kind):
    options = group(blocking="none", max_preconditioner_dim=50, long_side=kind)
    (block,) = cut(read_matrices((100, 30), options), options)
    assert (block.shape, block.sides) == ((100, 30), (kind, "full"))


@pytest.mark.parametrize(
    ("shape", "merged", "unmerged"),
    [
        ((8, 4, 3, 3), (8, 36), (8, 4, 3, 3)),
        ((8, 4, 3), (8, 12), (8, 4, 3)),
        ((8, 4, 7, 7), (8, 196), (8, 4, 7, 7)),
        ((8, 4, 3, 3, 3), (8, 108), (8, 4, 3, 3, 3)),
        ((8, 20, 30), (8, 20, 30), (8, 20, 30)),
        ((8, 20, 30, 3), (8, 20, 90), (8, 20, 30, 3)),
        ((8, 4, 1, 1), (8, 4), (8, 4)),
        ((1, 4, 1), (1, 4), (4, 1)),
        ((8, 1, 5, 5), (8, 25), (8, 5, 5)),
        ((8, 3), (8, 3), (8, 3)),
        ((1, 8), (1, 8), (1, 8)),
    ],
    ids=str,
)
def test_small_trailing_dimensions_are_merged_into_columns_or_not(shape, merged, unmerged):
    assert read_matrices(shape, group()).shape[1:] == merged
    assert read_matrices(shape, group(merge_dims=False)).shape[1:] == unmerged


@st.composite
def declarations(draw) -> tuple[tuple[int, ...], dict | None]:
    """A shape and a `matrices` declaration that fits it, or None."""
    shape = tuple(draw(SHAPES))
    if draw(st.booleans()):
        return shape, None
    axes = draw(st.permutations(range(len(shape))))
    batch = draw(st.integers(0, len(shape) - 2))
    rows = draw(st.integers(1, len(shape) - batch - 1))
    parts = {
        axis: draw(st.sampled_from([n for n in range(1, d + 1) if d % n == 0]))
        for axis, d in enumerate(shape)
        if draw(st.booleans())
    }
    declared = {"rows": tuple(axes[batch : batch + rows]), "columns": tuple(axes[batch + rows :]), "parts": parts}
    return shape, declared | ({"batch": tuple(axes[:batch])} if batch else {})


@given(declarations(), st.booleans())
@settings(deadline=None)
def test_restoring_undoes_reading(declared, merge_dims):
    shape, matrices = declared
    reading = read_matrices(shape, group(matrices=matrices, merge_dims=merge_dims))
    x = torch.arange(math.prod(shape)).reshape(shape)
    assert reading.view(x).shape == reading.shape
    assert torch.equal(reading.restore(reading.view(x)), x)


@given(declarations(), st.sampled_from(BLOCKINGS), st.sampled_from(LONG_SIDES), st.integers(2, 9), st.integers(1, 40))
@settings(deadline=None)
def test_blocks_cover_every_element_exactly_once(declared, blocking, long_side, limit, stretch):
    shape, matrices = declared
    shape = (shape[0] * stretch, *shape[1:])
    options = group(matrices=matrices, blocking=blocking, long_side=long_side, max_preconditioner_dim=limit)
    reading = read_matrices(shape, options)
    count = torch.zeros(shape)
    view = reading.view(count)
    for block in cut(reading, options):
        block.of(view).add_(1)
        assert all(d <= limit or side == long_side != "cut" for d, side in zip(block.shape, block.sides, strict=True))
    assert (reading.restore(view) == 1).all()


@given(declarations())
@settings(deadline=None)
def test_every_block_of_a_parameter_has_a_name_of_its_own(declared):
    shape, matrices = declared
    found = plan({"w": shape}, 1, matrices=matrices, max_preconditioner_dim=3)
    assert len(found.owner) == len(found.units)


@pytest.mark.parametrize(
    ("shape", "declared", "what_fits"),
    [
        ((6, 4), {"parts": {0: 4}}, "axis 0 of size 6 does not divide into 4"),
        ((6, 4), {"parts": {0: 0}}, "axis 0 of size 6 does not divide into 0"),
        ((6, 4), {"parts": {0: 1.5}}, "axis 0 of size 6 does not divide into 1.5"),
        ((6, 4), {"parts": {2: 2}}, r"shape \(6, 4\) has no axis 2"),
        ((6, 4), {"rows": (0,)}, "every axis .* exactly one"),
        ((6, 4), {"rows": (0,), "columns": (0, 1)}, "every axis .* exactly one"),
        ((6, 4), {"batch": (0,)}, "every axis .* exactly one"),
        ((6, 4, 3), {"batch": (0,), "rows": (1,), "columns": (-3,)}, "every axis .* exactly one"),
        ((6, 4, 3), {"rows": (0,), "columns": (1,)}, "every axis .* exactly one"),
        ((6, 4), {"row": (0,), "columns": (1,)}, "no key 'row'.*'rows'"),
        ((6, 4), {"interleaved": {1: 3}}, "axis 1 of size 4 does not divide into 3"),
        ((6, 4), {"parts": {0: 2}, "interleaved": {0: 3}}, "axis 0 is either in 'parts' or 'interleaved'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_declaration_that_does_not_fit_says_what_does(shape, declared, what_fits):
    with pytest.raises(ValueError, match=f"'w'.*{what_fits}"):
        KLShampoo([("w", torch.nn.Parameter(torch.zeros(shape)))], matrices=declared)


@pytest.mark.parametrize(
    "declared",
    [{"batch": 0}, {"parts": [0, 2]}, {"rows": (True,), "columns": (1,)}, {"rows": "0", "columns": "1"}],
    ids=str,
)
def test_a_declaration_of_another_type_is_an_error_that_names_the_parameter(declared):
    with pytest.raises((ValueError, TypeError), match="'w'"):
        KLShampoo([("w", torch.nn.Parameter(torch.zeros(6, 4)))], matrices=declared)
