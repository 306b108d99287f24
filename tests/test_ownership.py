"""Owners: evenly, and near to where matrices lie as long as that costs little."""

import pytest
import torch

from kl_dist import options
from kl_dist.ownership import UNEVENNESS
from kl_dist.partition import make_plan
from kl_dist.shards import Sharding, boxes_of_range
from kl_dist.units import Parameter


def flat_plan(shapes: list[tuple[int, ...]], world_size: int):
    """A plan for parameters that lie end to end, cut into equal ranges as ZeRO 1 and 2 do."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    part = -(-sum(sizes) // world_size)
    parameters, offset = [], 0
    for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        ends = [
            (min(max(r * part - offset, 0), size), min(max((r + 1) * part - offset, 0), size))
            for r in range(world_size)
        ]
        boxes = tuple(tuple(boxes_of_range(shape, start, stop)) for start, stop in ends)
        sharding = Sharding((tuple(range(world_size)),), boxes, flat=True)
        parameters.append(Parameter(f"w{i}", shape, torch.float32, 0, sharding))
        offset += size
    group = dict(options.DEFAULTS)
    options.resolve(group)
    return make_plan(parameters, [group], world_size)


def sent(plan) -> float:
    """Gradients sent, as a share of what each rank holds on average."""
    whole = 4 * sum(parameter.numel for parameter in plan.parameters)
    return sum(one.gradients_sent for one in plan.traffic_bytes) / whole


def test_matrices_that_lie_whole_on_a_rank_stay_there():
    plan = flat_plan([(32, 32)] * 8, 4)
    assert [plan.owner[f"w{i}"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert plan.balance == pytest.approx(1) and sent(plan) < 1e-2  # the flags at the ends of segments


def test_of_a_matrix_that_straddles_only_the_smaller_part_travels():
    plan = flat_plan([(32, 32)] * 5, 2)
    halves = [plan.owner[f"w{i}"] for i in (0, 1, 3, 4)]
    assert halves == [0, 0, 1, 1] and sent(plan) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_balance_suffers_by_no_more_than_is_said(world_size):
    shapes = [(64, 16), (16, 64), (48, 48), (128, 32), (32, 32), (32, 32), (96, 16), (64, 64), (16, 16)] * 3
    near = flat_plan(shapes, world_size)
    even = make_plan([Parameter(p.name, p.shape, p.dtype, p.group) for p in near.parameters], [resolved()], world_size)
    assert max(near.cost) <= (1 + UNEVENNESS) * max(even.cost) + 1
    assert set(near.owners) == set(range(world_size))


def resolved() -> dict:
    group = dict(options.DEFAULTS)
    options.resolve(group)
    return group


def test_with_one_matrix_too_large_the_others_leave_its_rank():
    plan = flat_plan([(64, 64), (8, 8), (8, 8), (8, 8)], 2)
    assert plan.owner["w0"] == 0 and {plan.owner[f"w{i}"] for i in (1, 2, 3)} == {1}
