"""Owners: evenly, and near to where matrices lie as long as that costs little."""

import pytest

from kl_dist.planning.ownership import UNEVENNESS
from kl_dist.planning.plan import Plan
from tests.zero_plans import zero_plan


def flat_plan(shapes: list[tuple[int, ...]], world_size: int, stage: int = 1) -> Plan:
    return zero_plan({f"w{i}": shape for i, shape in enumerate(shapes)}, world_size, stage)


def sent(plan) -> float:
    """Gradients sent, as a share of what each rank holds on average."""
    whole = 4 * sum(parameter.numel for parameter in plan.parameters)
    return sum(one.gradients_sent for one in plan.traffic_bytes) / whole


def test_matrices_that_lie_whole_on_a_rank_stay_there():
    plan = flat_plan([(32, 32)] * 8, 4)
    assert [plan.owner[f"w{i}"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert plan.balance == pytest.approx(1) and sent(plan) < 1e-2


def test_of_a_matrix_that_straddles_only_the_smaller_part_travels():
    plan = flat_plan([(32, 32)] * 5, 2)
    halves = [plan.owner[f"w{i}"] for i in (0, 1, 3, 4)]
    assert halves == [0, 0, 1, 1] and sent(plan) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_balance_suffers_by_no_more_than_is_said(world_size):
    shapes = [(64, 16), (16, 64), (48, 48), (128, 32), (32, 32), (32, 32), (96, 16), (64, 64), (16, 16)] * 3
    near, even = flat_plan(shapes, world_size), flat_plan(shapes, world_size, stage=0)
    assert max(near.cost) <= (1 + UNEVENNESS) * max(even.cost) + 1
    assert set(near.owners) == set(range(world_size))


def test_what_would_be_uneven_with_matrices_at_home_is_divided_evenly():
    """Each has room at home when its turn comes, and what has none in the end lies a ninth above the evenest."""
    shapes = [(56, 56), (16, 16), (56, 56), (48, 48), (48, 48), (48, 48), (48, 48)]
    near, even = flat_plan(shapes, 2), flat_plan(shapes, 2, stage=0)
    assert max(near.cost) <= (1 + UNEVENNESS) * max(even.cost) + 1


def test_the_heaviest_find_their_owners_first():
    """What is light fills the gaps; the other way round the heavy one would come upon ranks that are full."""
    plan = flat_plan([(16, 16)] * 64 + [(64, 64)], 2, stage=0)
    assert plan.balance < 1.02


def test_with_one_matrix_too_large_the_others_leave_its_rank():
    plan = flat_plan([(64, 64), (8, 8), (8, 8), (8, 8)], 2)
    assert plan.owner["w0"] == 0 and {plan.owner[f"w{i}"] for i in (1, 2, 3)} == {1}
