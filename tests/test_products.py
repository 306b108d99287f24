"""What `make test` leaves out of a product is little: each value still meets two of every other parameter's."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.products import PARTNERS, few, product


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_value_meets_partners_of_every_other_parameter(sizes):
    cases = few(sizes)
    assert len(set(cases)) == len(cases) <= math.prod(sizes)
    assert all(0 <= index < size for case in cases for index, size in zip(case, sizes, strict=True))
    for (one, mine), (other, theirs) in itertools.permutations(enumerate(sizes), 2):
        for value in range(mine):
            met = {case[other] for case in cases if case[one] == value}
            assert len(met) >= min(PARTNERS, theirs)


def test_a_product_of_many_has_twice_the_longest_list_for_its_cases():
    assert len(few([8, 4, 2])) == 16 and len(few([4, 4, 4])) == 8
    assert len(few([3])) == 3


def test_the_cases_left_out_are_there_and_marked_full():
    cases = product(**{"layout,ranks": [("ddp", 2), ("fsdp", 4), ("tp", 2)], "method": ["a", "b", "c"]}).mark
    names, params = cases.args
    assert names == ["layout", "ranks", "method"] and len(params) == 9
    assert {param.id for param in params} >= {"ddp-2-a", "tp-2-c"}
    chosen = [param for param in params if not param.marks]
    assert len(chosen) == len(few([3, 3])) < 9 and all(mark.name == "full" for param in params for mark in param.marks)
