"""The plan divides the work evenly, is the same wherever it is made, and says truly what a rank holds and sends."""

import math
import re
from collections import Counter

import pytest
import torch
from torch import nn

from kl_dist import METHODS, KLShampoo, Plan, param_groups, plan
from kl_dist.checkpoint.inventory import inventory
from kl_dist.options import RECIPE_DEFAULTS
from kl_dist.planning import making
from kl_dist.planning.making import make_plan
from kl_dist.planning.traffic import own_pieces
from kl_dist.planning.units import Parameter
from tests.models import state_tensors

WORLD_SIZES = [1, 2, 3, 4, 8, 16]
SMALL = {
    "a": (8, 6),
    "b": (8, 6),
    "c": (5, 5),
    "d": (5, 5),
    "e": (3, 4, 5),
    "bias": (11,),
    "scalar": (),
    "nothing": (0, 3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gpt2_is_balanced(gpt2, world_size, method):
    """The largest planned cost over the mean; the issue asks for 1.03 at W = 8 and 16."""
    found = plan(gpt2, world_size, method=method)
    assert max(found.cost) / (sum(found.cost) / world_size) == found.balance <= 1.03


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gpt2_is_cut_into_equal_square_blocks(gpt2, world_size):
    """12 layers of 3 + 1 + 4 + 4 blocks, and every state in float32: two factors, two bases, momentum and vectors."""
    found = plan(gpt2, world_size)
    shapes = Counter(unit.block.shape for unit in found.units if unit.method != "adamw")
    assert shapes == {(768, 768): 144}
    numel = 144 * 768**2
    assert 5 * 4 * numel < sum(u.state_bytes for u in found.units if u.method != "adamw") < 5.1 * 4 * numel


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_refreshes_of_a_rank_spread_over_the_steps(gpt2, world_size, every):
    """In each of the T turns a rank refreshes as many matrices as in any other, give or take one."""
    found = plan(gpt2, world_size, precondition_frequency=every)
    counts = [Counter({turn: 0 for turn in range(every)}) for _ in range(world_size)]
    per_turn: Counter[int] = Counter()
    for unit, rank in zip(found.units, found.owners, strict=True):
        if unit.method != "adamw":
            counts[rank][unit.phase % every] += 1
            per_turn[unit.phase % every] += 1
    assert all(max(count.values()) - min(count.values()) <= 1 for count in counts)
    assert max(per_turn.values()) - min(per_turn.values()) <= 1
    for turn in range(every):
        assert max(c[turn] for c in counts) - min(c[turn] for c in counts) <= 1


def test_refresh_phases_know_nothing_of_the_world_size(gpt2):
    phases = [
        {unit.name: unit.phase for unit in plan(gpt2, world_size).units if unit.method != "adamw"}
        for world_size in WORLD_SIZES
    ]
    assert all(phase == phases[0] for phase in phases) and sorted(phases[0].values()) == list(range(144))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shapes", [SMALL, {"w": (4, 4)}, {"b": (3,)}, {}], ids=["small", "one", "vector", "none"])
def test_every_unit_has_one_owner_and_one_place_in_the_buckets(shapes, world_size):
    """At more ranks than matrices too."""
    found = plan(shapes, world_size)
    matrices = {unit.name: rank for unit, rank in zip(found.units, found.owners, strict=True) if rank is not None}
    assert all(0 <= rank < world_size for rank in matrices.values()) and matrices.items() <= found.owner.items()
    assert [owner is None for owner in found.owners] == [unit.elementwise for unit in found.units]
    computed = [(member, rank) for rank in range(world_size) for members in found.members(rank) for member in members]
    assert {member.unit.name: rank for member, rank in computed} == found.owner
    assert len(computed) == len(found.owner) and {member.number for member, _ in computed} == {*range(len(found.units))}
    for i in range(len(found.units)):
        assert sorted({rank for member, rank in computed if member.number == i}) == list(found.keepers(i))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_units_cover_every_element_exactly_once(world_size):
    found = plan(SMALL, world_size)
    count = {name: torch.zeros(shape) for name, shape in SMALL.items()}
    for rank in range(world_size):
        for bucket in found.buckets:
            for number, piece in own_pieces(found.units, found.parameters, bucket, rank):
                piece.of_shard(count[found.parameters[found.units[number].parameter].name]).add_(1)
    assert all((tensor == 1).all() for tensor in count.values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_adamw_slices_are_equal_to_16_bytes_and_in_order(world_size):
    """One slice of each dtype a rank, neighbours' end to end; the last ones may be shorter."""
    tensors = {"a": torch.zeros(101), "h": torch.zeros(33).bfloat16(), "b": torch.zeros(7), "scalar": torch.zeros(())}
    module = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})
    found = plan(module, world_size)
    assert [(bucket.dtype, bucket.stream.starts) for bucket in found.buckets] == [
        (torch.float32, (0, 101, 108, 109)),
        (torch.bfloat16, (0, 33)),
    ]
    for bucket, total in zip(found.buckets, (109, 33), strict=True):
        chunk = math.ceil(total * bucket.dtype.itemsize / world_size / 16) * 16 // bucket.dtype.itemsize
        held = [sum(m.unit.numel for m in bucket.members(found.units, found.parameters, r)) for r in range(world_size)]
        assert held == [min(chunk, max(total - rank * chunk, 0)) for rank in range(world_size)]


def test_one_huge_embedding_does_not_sit_on_one_rank(gpt2):
    found = plan(gpt2, 8)
    held = Counter()
    for rank in range(8):
        for member in (member for members in found.members(rank) for member in members):
            if found.parameters[member.unit.parameter].name == "wte.weight":
                held[rank] += member.unit.numel
    assert len(held) == 8 and max(held.values()) <= math.ceil(50257 * 768 / 7)


def test_same_input_same_plan_other_input_other_plan(gpt2):
    first = plan(SMALL, 3)
    assert plan(dict(SMALL), 3) == first and plan(dict(SMALL), 3).lines == first.lines
    others = [
        plan(SMALL, 2),
        plan(SMALL, 3, lr=2e-3),
        plan(SMALL, 3, method="soap"),
        plan(SMALL, 3, recipe="paper"),
        plan(SMALL, 3, precondition_frequency=7),
        plan(SMALL, 3, dtype=torch.float64),
        plan({**SMALL, "a": (6, 8)}, 3),
        plan({**SMALL, "z": (6, 8)}, 3),
        plan({("A" if name == "a" else name): shape for name, shape in SMALL.items()}, 3),
        plan(dict(reversed(SMALL.items())), 3),
    ]
    told = {other.lines for other in others}
    assert len(told) == len(others) and first.lines not in told


def test_a_plan_is_data_that_nothing_changes_afterwards():
    """It has no list or dict in it, at any depth, and does not look at what it was made of again."""
    first, groups = plan(SMALL, 2), [dict(DEFAULT_GROUP)]
    assert hash(first) == hash(plan(SMALL, 2)) != hash(plan(SMALL, 3))
    parameters = list(first.parameters)
    second = make_plan(parameters, groups, 2)
    before = second.digest(), str(second), second.traffic_bytes
    parameters.clear()
    groups[0].update(method="soap", precondition_frequency=7)
    groups.clear()
    assert (second.digest(), str(second), second.traffic_bytes) == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_has_an_owner_keeps_it(world_size):
    """A grown, a shrunk and a re-ordered set of parameters: units that stay do not move, and phases stay."""
    first = plan(SMALL, world_size)
    groups = [dict(DEFAULT_GROUP)]
    fewer = [p for p in first.parameters if p.name not in ("a", "c")]
    more = [*reversed(first.parameters), Parameter("new", (8, 6), torch.float32, 0)]
    for parameters in (fewer, more):
        second = make_plan(parameters, groups, world_size, first)
        assert {first.owner[name] == rank for name, rank in second.owner.items() if name in first.owner} == {True}
        phases = {unit.name: unit.phase for unit in first.units}
        assert all(unit.phase == phases[unit.name] for unit in second.units if unit.name in phases)
        assert {second.parameters[unit.parameter].name for unit in second.units} == {
            p.name for p in parameters if p.numel
        }
    assert first.owner.keys() < second.owner.keys()


DEFAULT_GROUP = KLShampoo([nn.Parameter(torch.zeros(1))]).param_groups[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("long_side", ["cut", "diagonal", "identity"])
def test_state_bytes_are_the_bytes_allocated(method, recipe, dtype, long_side):
    params = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in SMALL.items()]
    opt = KLShampoo(params, method=method, recipe=recipe, max_preconditioner_dim=7, long_side=long_side)
    tensors = state_tensors(opt)
    allocated = sum(tensor.nbytes for tensor in tensors)
    assert opt.plan.state_bytes == (allocated,)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == allocated


def test_state_is_all_there_before_the_first_step_and_stays_where_it_is():
    params = [(name, nn.Parameter(torch.randn(shape))) for name, shape in SMALL.items()]
    opt = KLShampoo(params)

    def places() -> dict:
        return {(i, key): t.data_ptr() for i, s in enumerate(opt.state.values()) for key, t in s.items()}

    before = places()
    for _ in range(3):
        for _, p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert places() == before


def chunks(found: Plan) -> list[int]:
    """Bytes that a rank sends to each other one, by bucket."""
    traffics = [(found.traffic(i, 0), bucket.dtype) for i, bucket in enumerate(found.buckets)]
    return [leg.chunk * dtype.itemsize for traffic, dtype in traffics for leg in traffic.legs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_comm_bytes_count_padding(dtype):
    """Three equal matrices on two ranks: both send room for two. The agreement is an all-reduce beside."""
    found = plan({"a": (8, 8), "b": (8, 8), "c": (8, 8)}, 2, dtype=dtype)
    chunk = 2 * 64 * dtype.itemsize
    assert chunks(found) == [chunk]
    assert found.padding_bytes == 64 * dtype.itemsize
    assert found.comm_bytes == (chunk + 4 * (found.agreement_size + 1),) * 2
    assert len(found.units) < found.agreement_size < len(found.units) + 10
    # chunks of matrices begin at multiples of 16 bytes
    uneven = plan({"a": (8, 8), "b": (3, 5)}, 2, dtype=dtype)
    assert chunks(uneven) == [64 * dtype.itemsize] and uneven.padding_bytes == 49 * dtype.itemsize
    odd = plan({"a": (9, 9), "b": (3, 5)}, 2, dtype=dtype)
    assert chunks(odd) == [-(-81 * dtype.itemsize // 16) * 16]
    # sharded, each rank sends half of the other's matrix on either trip
    sharded = plan({"a": (8, 8), "b": (8, 8)}, 2, shard_size=2)
    assert sum(one.gradients_sent + one.updates_sent for one in sharded.traffic_bytes) == 2 * 2 * 4 * 32
    assert sharded.padding_bytes == 0
    assert plan(SMALL, 1).comm_bytes == (0,)


def test_buckets_divide_the_bytes(gpt2, monkeypatch):
    """No bucket is much larger than asked for, and little is padding."""
    found = plan(gpt2, 8)
    sizes = [8 * chunk for chunk in chunks(found)]
    assert len(sizes) > 4 and max(sizes) < 1.5 * making.BUCKET_BYTES
    assert found.padding_bytes < 0.03 * sum(sizes)
    monkeypatch.setattr(making, "BUCKET_BYTES", 1 << 40)
    assert len(plan(gpt2, 8).buckets) == 2


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_what_adamw_has_of_shards_is_updated_in_parts(gpt2, world_size):
    """An embedding's update takes no more memory at a time than a bucket; what is held of it stays one box."""
    found = plan(gpt2, world_size, shard_size=world_size)
    most = max(64 * 2**20 / world_size, 4 * 2**20) + 4 * 768  # a row
    units = [member.unit for members in found.members(0) for member in members]
    assert max(unit.nbytes for unit in units if unit.method == "adamw") <= most
    assert len(found.units) == len(plan(gpt2, 1).units), "no unit a rank"
    for entry in inventory(found):
        if entry.key == "exp_avg" and len(entry.shape) == 2:
            assert all(len(entry.boxes(rank)) <= 1 for rank in range(world_size))
            assert sum(math.prod(b - a for a, b in box) for box, _ in entry.holders) == math.prod(entry.shape)
    whole = plan(gpt2, world_size)
    assert max(map(found.working_bytes, range(world_size))) <= 1.01 * max(map(whole.working_bytes, range(world_size)))


def test_a_printed_plan_has_a_row_per_rank(gpt2):
    found = plan(gpt2, 3)
    heading, *rows, last = str(found).splitlines()
    assert len(rows) == 3 and all(int(re.findall(r"\d+", row)[0]) == i for i, row in enumerate(rows))
    assert all(int(row.split()[1]) == 48 for row in rows) and "rank" in heading
    assert f"{found.balance:.3f}" in last


def test_a_printed_plan_of_many_ranks_is_of_the_first(gpt2):
    text = str(plan(gpt2, 4096, partition_size=64))
    assert len(text.splitlines()) == 1 + 32 + 4 and "to rank 63" in text and "64 groups of 64 ranks" in text


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_model_and_its_shapes_and_the_optimizer_have_the_same_plan(world_size):
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    assert plan(bare, world_size) == plan(model, world_size)
    shapes = plan({name: p.shape for name, p in model.named_parameters()}, world_size)
    assert shapes.owner.keys() == plan(model, world_size).owner.keys()
    if world_size == 1:
        assert KLShampoo(param_groups(model)).plan == plan(model, 1)


@pytest.mark.parametrize("world_size", [0, -1, 1.5, None, "2"])
def test_a_world_size_that_is_none_is_an_error(world_size):
    with pytest.raises(ValueError, match="world_size"):
        plan(SMALL, world_size)


def test_options_of_a_plan_are_checked_as_the_optimizers_are():
    with pytest.raises(ValueError, match="'kl_shampoo'"):
        plan(SMALL, 2, method="kl_shampo")
    with pytest.raises(TypeError, match="'blocking'"):
        plan(SMALL, 2, blockings="none")
    with pytest.raises(ValueError, match=r"'e'.*axis 0 of size 3"):
        plan({"e": (3, 4, 5)}, 2, matrices={"parts": {0: 2}})
    assert isinstance(plan(SMALL, 2), Plan)
