"""What sharded training sends, holds and allocates is what the plan says, and little."""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from benchmarks.memory import PeakMemory
from kl_dist import KLShampoo, clip_grad_norm_, plan
from kl_dist.layouts import placement
from kl_dist.planning.traffic import Bytes
from kl_dist.ranks import Ranks
from tests.counting import Counter
from tests.models import METHODS, raising, small_buckets, state_tensors
from tests.sharded import groups_of, lay_out, layers, loss_of, mesh_of, tokens_of

PLACES = [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 4), ("fsdp+tp", 4), ("ddp+tp", 4)]


class Seen(NamedTuple):
    """What one rank saw of one step."""

    sent: Counter
    said: Bytes
    agreement: int
    state: int
    state_said: int
    room: int
    room_said: int
    peak: int
    peak_said: int


def observe(group, layout: str, bucket_bytes: int | None, method: str = "kl_shampoo") -> Seen:
    model = layers(torch.float32)
    part, parts = lay_out(model, layout, group)
    with small_buckets(bucket_bytes):
        optimizer = KLShampoo(groups_of(model), process_group=group, method=method)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step).chunk(parts)[part]).backward()
        if step < 2:
            optimizer.step()
    with Counter().counting() as sent, PeakMemory() as memory:
        optimizer.step()
    found, rank = optimizer.plan, group.rank()
    state = sum(x.nbytes for x in state_tensors(optimizer))
    return Seen(
        sent,
        found.traffic_bytes[rank],
        found.agreement_size,
        state,
        found.state_bytes[rank],
        sum(part.nbytes for room in optimizer.parts.engine.rooms for part in room),
        found.room_bytes(rank),
        memory.peak,
        found.working_bytes(rank),
    )


@pytest.mark.parametrize("bucket_bytes", [None, 2048])
@pytest.mark.parametrize(("layout", "world_size"), PLACES)
def test_a_step_sends_and_receives_what_the_plan_says(world, layout, world_size, bucket_bytes):
    for seen in world.run(observe, world_size, layout, bucket_bytes):
        said = seen.said
        swapped_out, swapped_in = sum(seen.sent.swapped_out), sum(seen.sent.swapped_in)
        # gradients go out as updates come back, and the other way round
        assert swapped_out == said.gradients_sent + said.gradients_received
        assert swapped_in == said.gradients_received + said.gradients_sent
        assert swapped_out + seen.sent.gathered == said.gradients_sent + said.updates_sent
        assert seen.sent.reduces == [seen.agreement, 1]
        assert seen.state == seen.state_said and seen.room == seen.room_said


def columns(group, method: str, sharded: bool) -> tuple[int, int, int]:
    """Peak of a step, what the plan says of it, and the state, for matrices large enough that little else counts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(6)))
    if sharded:
        fully_shard(model, mesh=mesh_of(group, (group.size(),), ("shard",)))
    optimizer = KLShampoo(model.named_parameters(), process_group=group, method=method)
    peaks = []
    for _ in range(4):
        for parameter in model.parameters():
            value = torch.randn(parameter.shape)
            if isinstance(parameter, DTensor):
                rows = parameter.to_local().shape[0]
                value = DTensor.from_local(value[:rows], parameter.device_mesh, parameter.placements)
            parameter.grad = value
        with PeakMemory() as memory:
            optimizer.step()
        peaks.append(memory.peak)
    both_turns = max(peaks[2:])  # of a refresh, the larger of which counts; without the step that starts
    return both_turns, optimizer.plan.working_bytes(group.rank()), optimizer.plan.state_bytes[group.rank()]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_of_a_step_is_what_the_plan_says(world, method, world_size, sharded):
    if sharded and world_size == 1:
        pytest.skip("one rank shards nothing")
    for peak, said, _ in world.run(columns, world_size, method, sharded):
        if said:
            assert peak == pytest.approx(said, rel=0.02 if method != "shampoo" else 0.35)


def test_fsdp_divides_traffic_and_state_of_gpt2_evenly(gpt2):
    """Averages of P/W in and out, the largest rank at most a tenth above; state at most 1.1 of its share."""
    found, alone = plan(gpt2, 8, shard_size=8), plan(gpt2, 1)
    share = sum(unit.nbytes for unit in found.units if unit.method != "adamw") / 8
    for trip in ("gradients_sent", "gradients_received", "updates_sent", "updates_received"):
        numbers = [getattr(one, trip) for one in found.traffic_bytes]
        assert sum(numbers) / 8 <= share and max(numbers) <= 1.1 * share
    assert max(found.state_bytes) <= 1.1 * alone.state_bytes[0] / 8
    assert found.balance <= 1.03
    for wrong in (0, 3, 1.5):
        with pytest.raises(ValueError, match="shard_size must divide"):
            plan(gpt2, 8, shard_size=wrong)


def state_of_sharded_layers(group) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(48, 48, bias=False) for _ in range(8)))
    alone = sum(KLShampoo(model.named_parameters(), process_group=group).plan.state_bytes)
    fully_shard(model, mesh=mesh_of(group, (group.size(),), ("shard",)))
    optimizer = KLShampoo(model.named_parameters(), process_group=group)
    return sum(x.nbytes for x in state_tensors(optimizer)), alone


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_holds_its_share_of_the_state(world, world_size):
    for held, alone in world.run(state_of_sharded_layers, world_size):
        assert held <= 1.1 * alone / world_size


def more_ranks_than_matrices(group) -> Any:
    torch.manual_seed(3)
    model = nn.Linear(5, 3, bias=False).double()
    fully_shard(model, mesh=mesh_of(group, (4,), ("shard",)))
    optimizer = KLShampoo(model.named_parameters(), process_group=group)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.full((2, 5), 1.0 + step, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model.weight.full_tensor().detach(), len(set(optimizer.plan.owner.values()))


def test_ranks_without_a_matrix_or_a_row_take_part(world):
    torch.manual_seed(3)
    model = nn.Linear(5, 3, bias=False).double()
    optimizer = KLShampoo(model.named_parameters())
    for step in range(5):
        optimizer.zero_grad()
        # FSDP2 averages the gradients of four ranks that have seen the same
        model(torch.full((2, 5), 1.0 + step, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    for weight, owners in world.run(more_ranks_than_matrices, 4):
        assert owners == 1
        torch.testing.assert_close(weight, model.weight.detach(), rtol=1e-9, atol=0)


def another_model_on_one_rank(group) -> None:
    model = layers(torch.float32)
    lay_out(model, "fsdp", group)
    named = list(model.named_parameters())
    if group.rank() == 1:
        named = named[:-1]
    with raising(ValueError, "differs between ranks"):
        KLShampoo(named, process_group=group)


def another_process_group(group) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = layers(torch.float32)
    lay_out(model, "fsdp", group)
    with raising(ValueError, "its device mesh goes beyond the process group of KLShampoo"):
        KLShampoo(model.named_parameters(), process_group=pairs[group.rank() // 2])


def ranks_in_another_order(group) -> None:
    mesh = DeviceMesh("cpu", torch.arange(group.size()).flip(0))
    parameter = nn.Parameter(distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]))
    with raising(ValueError, "'backwards': the ranks of its device mesh must ascend"):
        KLShampoo([("backwards", parameter)], process_group=group)


def test_what_does_not_fit_is_an_error_on_all_ranks(world):
    world.run(ranks_in_another_order, 4, timeout=30)
    world.run(another_model_on_one_rank, 4, timeout=30)
    world.run(another_process_group, 4, timeout=30)


def with_gradients_as(group, placement) -> torch.Tensor:
    """A sharded matrix whose gradients come sharded alike, or as sums of which each rank has a part."""
    mesh = mesh_of(group, (group.size(),), ("shard",))
    parameter = nn.Parameter(distribute_tensor(torch.ones(8, 6, dtype=torch.float64), mesh, [Shard(0)]))
    optimizer = KLShampoo([("summed", parameter)], lr=1e-2, process_group=group)
    for step in range(3):
        value = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        if placement.is_partial():
            parameter.grad = DTensor.from_local(value / group.size(), mesh, [placement])
        else:
            parameter.grad = distribute_tensor(value, mesh, [placement])
        optimizer.step()
    return parameter.detach().full_tensor()


def test_partial_sums_are_added_up_before_the_step(world):
    """As torch leaves the gradients of norms under sequence parallelism."""
    (expected, *_), (found, *_) = (world.run(with_gradients_as, 4, one) for one in (Shard(0), Partial()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def summed_with(group, trouble: str | None, ranks_in_it: int) -> tuple[list[torch.Tensor], list[float]]:
    """Gradients that are partial sums, of which ranks once have none, or something else to complain of."""
    mesh = mesh_of(group, (group.size(),), ("shard",))
    values = {"whole": (6, 4), "cut": (8, 6), "vector": (5,)}
    lies = {"whole": Replicate(), "cut": Shard(0), "vector": Replicate()}
    named = {
        name: nn.Parameter(distribute_tensor(torch.ones(shape, dtype=torch.float64), mesh, [lies[name]]))
        for name, shape in values.items()
    }
    optimizer = KLShampoo(named.items(), lr=1e-2, process_group=group)
    generator, norms = torch.Generator().manual_seed(0), []
    for step in range(4):
        for name, parameter in named.items():
            value = torch.randn(values[name], dtype=torch.float64, generator=generator)
            parameter.grad = DTensor.from_local(value / group.size(), mesh, [Partial()])
        odd = group.rank() < ranks_in_it
        if step == 2 and trouble == "none" and odd:
            named["whole"].grad = named["cut"].grad = named["vector"].grad = None
        if trouble is None or trouble == "none":
            norms.append(float(clip_grad_norm_(optimizer, 1e6)))
        if step == 2 and trouble == "option":
            optimizer.param_groups[0]["lr"] = "fast" if odd else 1e-2
            with raising(TypeError, "lr is a number"):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-2
        if step == 2 and trouble == "placements":
            right = named["whole"].grad
            if odd:
                named["whole"].grad = DTensor.from_local(torch.ones(6, 4, dtype=torch.float64), mesh, [Replicate()])
            with raising(ValueError, "the gradient of 'whole' has the placements"):
                optimizer.step()
            named["whole"].grad = right
        optimizer.step()
    return [parameter.detach().full_tensor() for parameter in named.values()], norms


@pytest.mark.parametrize("trouble", ["option", "placements", "none"])
def test_partial_sums_wait_for_no_rank_that_has_none_or_an_error(world, trouble):
    """A rank without the gradient would not come to the collective that adds it up: then all do without."""
    everywhere = trouble == "none"
    expected, norms = world.run(summed_with, 3, "none" if everywhere else None, 3)[0]
    for found, norms_found in world.run(summed_with, 3, trouble, 1, timeout=60):
        assert norms_found == (norms if everywhere else [])
        assert all(map(torch.equal, found, expected))


# -- who holds what ----------------------------------------------------------------------------------------------------


def known_and_told(group, layout: str) -> tuple[Any, Any]:
    """The shardings as this rank finds them, and as all ranks tell them."""
    model = layers(torch.float32)
    lay_out(model, layout, group)
    ranks = Ranks(group)
    trained = [(name, parameter, 0) for name, parameter in model.named_parameters()]
    known = placement.known_from_here(trained, ranks)
    told = placement.told_by_all(trained, ranks.gather_objects(placement.seen_from_here(trained, ranks)))
    return known, told


@pytest.mark.parametrize(("layout", "world_size"), PLACES)
def test_a_rank_finds_by_itself_what_all_tell_each_other(world, layout, world_size):
    """Uneven and empty shards, replicas and two dimensions of a mesh; a mesh that not all are in is asked about."""
    for known, told in world.run(known_and_told, world_size, layout):
        assert known == (told if layout in ("fsdp", "hsdp", "tp") else None)


def construct_without_objects(group, layout: str | None) -> str:
    """What is gathered while an optimizer is constructed, as the error it would be."""
    model = layers(torch.float32)
    if layout is not None:
        lay_out(model, layout, group)
    refusal = mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("objects are gathered"))
    try:
        with refusal:
            optimizer = KLShampoo(groups_of(model), process_group=group)
            optimizer.follow_groups()
        return ""
    except AssertionError as error:
        return str(error)


@pytest.mark.parametrize("layout", [None, "fsdp", "hsdp"])
def test_names_and_placements_are_not_gathered_where_ranks_agree(world, layout):
    assert world.run(construct_without_objects, 4, layout) == [""] * 4


def test_placements_that_no_rank_can_know_are_gathered(world):
    assert world.run(construct_without_objects, 4, "ddp+tp") == ["objects are gathered"] * 4
