"""What a rank holds and sends: state of its own matrices alone, and the bytes that the plan announced."""

import pickle
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from kl_dist import KLShampoo
from tests.counting import Counter
from tests.made_up import same
from tests.models import (
    METHODS,
    backward,
    raising,
    same_bits,
    samples,
    small_buckets,
    snapshot,
    state_tensors,
    train_alone,
    zoo,
    zoo_groups,
)
from tests.products import product
from tests.sharded import lay_out, layers

STEP_BYTES = 8  # the step count of a slice under AdamW


class Holding(NamedTuple):
    held: int  # bytes of all tensors in optimizer.state
    allocated: int  # bytes of the memory behind them
    planned: tuple[int, ...]
    slices: int  # of all ranks


def hold(group, options: dict[str, Any]) -> Holding:
    """A rank's state after some steps."""
    model = zoo(torch.float32, hidden=140)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, **options)
    train_alone(model, optimizer, range(3))
    tensors = state_tensors(optimizer)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    parts = [
        member.unit
        for rank in range(group.size() if group else 1)
        for m in optimizer.plan.members(rank)
        for member in m
    ]
    slices = sum(unit.method == "adamw" for unit in parts)
    return Holding(sum(x.nbytes for x in tensors), sum(storages.values()), tuple(optimizer.plan.state_bytes), slices)


@product(world_size=[2, 3, 4], method=METHODS)
def test_ranks_hold_their_own_state_alone(world, method, world_size):
    options = {"method": method}
    alone = hold(None, options)
    ranks = world.run(hold, world_size, options)
    for rank, holding in enumerate(ranks):
        assert holding.held == holding.allocated == holding.planned[rank]
    # what is cut over more ranks has more slices, and each of them counts its steps
    assert sum(r.held for r in ranks) - STEP_BYTES * ranks[0].slices == alone.held - STEP_BYTES * alone.slices
    assert max(r.held for r in ranks) <= 1.35 * sum(r.held for r in ranks) / world_size


def one_counted_step(group, bucket_bytes: int | None) -> tuple[Counter, Any]:
    """The collectives of the third step, and the plan."""
    model = zoo(torch.float32, hidden=140)
    with small_buckets(bucket_bytes):
        optimizer = KLShampoo(zoo_groups(model), process_group=group)
    train_alone(model, optimizer, range(2))
    backward(model, samples(2, torch.float32))
    with Counter().counting() as counter:
        optimizer.step()
    return counter, optimizer.plan


@pytest.mark.parametrize("bucket_bytes", [None, 4096])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_sends_what_the_plan_says(world, world_size, bucket_bytes):
    for rank, (sent, plan) in enumerate(world.run(one_counted_step, world_size, bucket_bytes)):
        traffics = [plan.traffic(number, rank) for number in range(len(plan.buckets))]
        assert sent.gathers == [leg.chunk for traffic in traffics for leg in traffic.legs]
        assert sent.reduces == [plan.agreement_size, 1]
        assert sent.gathered + sent.reduced == pytest.approx(plan.comm_bytes[rank], abs=1)


def continue_from_a_state_dict(group, method: str) -> None:
    """Stopped and resumed from what each rank saved, or never stopped: the same bits."""
    model, twin = zoo(hidden=140), zoo(hidden=140)
    options = {"process_group": group, "method": method, "lr": 1e-2}
    optimizer = KLShampoo(zoo_groups(model), **options)
    train_alone(model, optimizer, range(5))
    saved = optimizer.state_dict()
    resumed = KLShampoo(zoo_groups(twin), **options)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert same_bits(snapshot(model, optimizer), snapshot(twin, resumed))
    train_alone(model, optimizer, range(5, 10))
    train_alone(twin, resumed, range(5, 10))
    assert same_bits(snapshot(model, optimizer), snapshot(twin, resumed))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_state_dicts_to_the_bit(world, method):
    world.run(continue_from_a_state_dict, 2, method)


def save(group) -> dict[str, Any]:
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group)
    train_alone(model, optimizer, range(2))
    return optimizer.local_state_dict()


def refuse(group, states: list[dict[str, Any]], complaint: str) -> None:
    """Load the state of the next rank of those that saved."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group, lr=0.5)
    train_alone(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with raising(ValueError, complaint):
        optimizer.load_state_dict(states[(group.rank() + 1) % len(states)])
    assert same_bits(snapshot(model, optimizer), before)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]


def test_the_state_of_another_rank_or_world_size_is_refused_and_nothing_changes(world):
    world.run(refuse, 2, world.run(save, 2), "saved with rank")
    world.run(refuse, 2, world.run(save, 3), "saved with world_size 3, here it is 2")
    world.run(refuse, 2, [save(None)], "saved with world_size 1, here it is 2")


def written_by_one_rank(group, folder) -> None:
    """As a loop does that was written for DDP: `if rank == 0: torch.save(..)`."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group)
    train_alone(model, optimizer, range(2))
    with raising(RuntimeError, f"has the part of rank {group.rank()} of 2, and a file of it lacks"):
        torch.save({"optimizer": optimizer.state_dict()}, folder / f"{group.rank()}.pt")
    for steps in (1, 0):  # a consolidated state is not kept past a step
        optimizer.consolidate_state_dict()
        train_alone(model, optimizer, range(steps))
        state = optimizer.state_dict()
        assert ("kl_dist" in state) == (steps > 0 or group.rank() != 0)
    optimizer.consolidate_state_dict()
    optimizer.param_groups[0]["lr"] = 0.125  # by a schedule, before the save
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == 0.125
    if group.rank() == 0:
        torch.save({"optimizer": state}, folder / "whole.pt")
    group.barrier().wait()
    saved = torch.load(folder / "whole.pt", weights_only=True)["optimizer"]
    other = KLShampoo(zoo_groups(zoo()), process_group=group)
    other.load_state_dict(saved)
    assert same(other.local_state_dict()["state"], optimizer.local_state_dict()["state"])


def test_a_file_of_one_rank_is_whole_or_an_error(world, tmp_path):
    world.run(written_by_one_rank, 2, tmp_path)


def pickled_by_rank_0(group) -> None:
    optimizer = KLShampoo(zoo(), process_group=dist.group.WORLD)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, pickle.dumps(optimizer))
    if group.rank() == 0:
        pickle.loads(everywhere[0])
    else:
        with raising(RuntimeError, "was pickled on rank 0, and holds that rank's part of the state; here is rank 1"):
            pickle.loads(everywhere[0])


def test_a_pickled_optimizer_is_for_the_rank_it_is_of(worlds):
    worlds[2].run(pickled_by_rank_0, 2)


def test_what_is_sharded_is_pickled_as_other_optimizers_state_is(world):
    world.run(pickled_shards, 2)


def pickled_shards(group) -> None:
    model = layers(torch.float64)
    lay_out(model, "fsdp", group)
    optimizer = KLShampoo(model, process_group=group)
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert same(state["state"], optimizer.local_state_dict()["state"])


# -- names -------------------------------------------------------------------------------------------------------------


def taken_up(group, named: bool, named_then: bool) -> None:
    """What one that was given names has saved, or one that was not, goes on in another."""
    model, twin = zoo(torch.float64), zoo(torch.float64)
    first, then = (
        KLShampoo(list(one.named_parameters()) if names else list(one.parameters()), process_group=group)
        for one, names in ((model, named), (twin, named_then))
    )
    train_alone(model, first, range(3))
    then.load_state_dict(first.state_dict())
    twin.load_state_dict(model.state_dict())
    for one, optimizer in ((model, first), (twin, then)):
        train_alone(one, optimizer, range(3, 6))
    assert same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize(("named", "named_then"), [(True, False), (False, True)])
def test_ranks_load_states_of_named_parameters_into_nameless_ones_and_back(world, named, named_then):
    world.run(taken_up, 2, named, named_then)


def with_slices_in_buckets_of(group, bucket_bytes: int) -> KLShampoo:
    """A vector of which each of two ranks has half: the first and the second one, or every other quarter."""
    parameter = torch.nn.Parameter(torch.arange(1024.0))
    with small_buckets(bucket_bytes):
        optimizer = KLShampoo([("vector", parameter)], process_group=group)
    parameter.grad = torch.arange(1024.0)
    optimizer.step()
    return optimizer


def load_of_another_division(group) -> None:
    saved = with_slices_in_buckets_of(group, 2048).local_state_dict()
    optimizer = with_slices_in_buckets_of(group, 2**20)
    (mine,), (theirs,) = (x["state"].values() for x in (optimizer.local_state_dict(), saved))
    assert mine["exp_avg"].shape == theirs["exp_avg"].shape and not torch.equal(mine["exp_avg"], theirs["exp_avg"])
    before = [x.clone() for x in state_tensors(optimizer)]
    try:
        optimizer.load_state_dict(saved)
    finally:
        assert same(before, state_tensors(optimizer))


def test_the_state_of_ranks_that_held_other_parts_of_as_many_elements_is_refused(world):
    with raising(ValueError, "saved by ranks that held other parts of it .another layout"):
        world.run(load_of_another_division, 2)
