"""Partition groups: the update, the state and what is saved are the same however many ranks share them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from kl_dist import KLShampoo, clip_grad_norm_, full_state_dict, load_full_state_dict
from tests.checkpoints import Run, furthest
from tests.counting import Counter
from tests.models import (
    METHODS,
    Weights,
    backward,
    deviation,
    raising,
    same_bits,
    samples,
    snapshot,
    state_tensors,
    train_alone,
    weights_of,
    zoo,
    zoo_groups,
)

SIZES = (1, 2, 4)


def alone(method: str, steps: range) -> Weights:
    model = zoo()
    train_alone(model, KLShampoo(zoo_groups(model), method=method, lr=1e-2), steps)
    return weights_of(model)


def of_every_size(group, method: str, steps: range) -> list[tuple[Weights, float]]:
    """The weights, and the norm of the gradients of the last step, by the size of the groups."""
    found = []
    for size in SIZES:
        model = zoo()
        optimizer = KLShampoo(zoo_groups(model), process_group=group, method=method, lr=1e-2, partition_size=size)
        assert optimizer.plan.partition_size == size
        held = sum(x.nbytes for x in state_tensors(optimizer))
        assert held == optimizer.plan.state_bytes[group.rank()]
        train_alone(model, optimizer, steps)
        found.append((weights_of(model), float(clip_grad_norm_(optimizer, 1e9))))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_the_same_for_every_size(world, method):
    expected = alone(method, range(8))
    found = world.run(of_every_size, 4, method, range(8))
    for ranks in zip(*found, strict=True):
        assert all(same_bits(weights, ranks[0][0]) for weights, _ in ranks), "groups come out alike, to the bit"
        assert deviation(ranks[0][0], expected) <= 1e-9
    norms = [norm for there in found for _, norm in there]
    assert max(norms) - min(norms) <= 1e-9 * max(norms)


def counted(group, size: int) -> tuple[Counter, int, int, int]:
    model = zoo(torch.float32, hidden=140)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, partition_size=size)
    train_alone(model, optimizer, range(2))
    backward(model, samples(2, torch.float32))
    with Counter().counting() as counter:
        optimizer.step()
    plan, rank = optimizer.plan, group.rank()
    return counter, plan.sent_bytes(rank), plan.comm_bytes[rank], sum(unit.nbytes for unit in plan.units)


@pytest.mark.parametrize("size", [1, 2])
def test_updates_travel_within_a_group(world, size):
    for sent, said, listed, parameters in world.run(counted, 4, size):
        assert sent.gathered + sent.reduced == pytest.approx(said, abs=1) and said == listed
        assert sent.gathered <= 1.2 * (size - 1) / size * parameters + 100


def hsdp(group, steps: int) -> list[Weights]:
    return [Run(group, "hsdp", partition_size=size).train(0, steps).weights() for size in (2, 4)]


def test_replicas_of_shards_may_be_groups(world):
    expected = Run(None).train(0, 6).weights()
    for ranks in zip(*world.run(hsdp, 4, 6), strict=True):
        assert all(same_bits(weights, ranks[0]) for weights in ranks)
        assert furthest(ranks[0], expected) <= 1e-9


# -- what is saved -----------------------------------------------------------------------------------------------------

WAYS = (("ddp", 2), ("ddp", 1), ("hsdp", 2), ("fsdp", 4), ("ddp", 4))


def crossing(group, folder: str) -> None:
    """Saved under one division and resumed under the next, in files of ranks and as one state of rank 0."""
    usual = Run(group, "fsdp").train(0, 9).weights()
    for (layout, size), (then, others) in pairwise(WAYS):
        run = Run(group, layout, partition_size=size).train(0, 5)
        where = f"{folder}/{layout}{size}"
        dcp.save(get_optimizer_state_dict(run.model, run.optimizer), checkpoint_id=where, process_group=group)
        whole, weights = full_state_dict(run.optimizer), run.weights()
        first, second = (Run(group, then, partition_size=others) for _ in range(2))
        state = get_optimizer_state_dict(first.model, first.optimizer)
        dcp.load(state, checkpoint_id=where, process_group=group)
        set_optimizer_state_dict(first.model, first.optimizer, state)
        load_full_state_dict(second.optimizer, whole if group.rank() == 0 else None)
        for one in (first, second):
            one.set_weights(weights)
            assert furthest(one.train(5, 9).weights(), usual) <= 1e-9, (layout, size, then, others)


def test_checkpoints_cross_between_sizes_and_layouts(worlds, tmp_path):
    worlds[4].run(crossing, 4, str(tmp_path))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def drifted(group, every: int | None) -> int:
    """The step at which it is found that a rank of another group has other weights."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group, partition_size=2, compare_every=every)
    for step in range(7):
        backward(model, samples(step))
        if step == 4 and group.rank() == 3:
            with torch.no_grad():
                dict(model.named_parameters())["odd.weight"].view(-1)[0] += 1e-9
        before = snapshot(model, optimizer)
        try:
            optimizer.step()
        except ValueError as error:
            assert "parameter 'odd.weight' has other weights on some ranks, which began alike" in str(error)
            assert same_bits(before, snapshot(model, optimizer))
            return step
    return -1


def test_groups_that_drift_apart_are_an_error_that_names_the_parameter(world):
    assert world.run(drifted, 4, 2) == [4] * 4
    assert world.run(drifted, 4, None) == [-1] * 4, "by itself every hundred steps"


def without_a_gradient(group, rank: int, name: str) -> tuple[Weights, Weights]:
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group, partition_size=2)
    train_alone(model, optimizer, range(3))
    before = weights_of(model)
    backward(model, samples(3))
    if group.rank() == rank:
        dict(model.named_parameters())[name].grad = None
    optimizer.step()
    return before, weights_of(model)


@pytest.mark.parametrize("name", ["odd.weight", "embedding.weight"])
def test_a_gradient_that_one_groups_owner_lacks_is_left_out_by_all_groups(world, name):
    """Else the groups would come apart. Where an owner is, one of four ranks lacks what it needs."""
    rested = set()
    for rank in range(4):
        found = world.run(without_a_gradient, 4, rank, name)
        assert all(same_bits(after, found[0][1]) for _, after in found)
        rested |= {rank} if torch.equal(found[0][0][name], found[0][1][name]) else set()
    assert {rank % 2 for rank in rested} and rested == {r for r in range(4) if r % 2 in {x % 2 for x in rested}}


def sizes_that_do_not_fit(group) -> None:
    for size in (3, 8, 0):
        with raising(ValueError, "partition_size"):
            KLShampoo([torch.nn.Parameter(torch.ones(4, 4))], process_group=group, partition_size=size)
    with raising(ValueError, "partition_size is one of 4 for 4 ranks"):
        Run(group, "fsdp", partition_size=2)
    with raising(ValueError, "differs between ranks"):
        own = 4 if group.rank() == 1 else 2
        KLShampoo([torch.nn.Parameter(torch.ones(4, 4))], process_group=group, partition_size=own)


def test_sizes_that_do_not_fit_are_refused_on_all_ranks(world):
    world.run(sizes_that_do_not_fit, 4, timeout=30)


def reduced(group) -> tuple[dict[str, Tensor], int]:
    model = zoo()
    ddp = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, lr=1e-2, partition_size=2)
    optimizer.reduce_to_owners(ddp)
    for step in range(5):
        backward(ddp, samples(step).share(group.rank(), group.size()))
        optimizer.step()
    return weights_of(model), optimizer.plan.partition_size


def test_gradients_that_are_reduced_to_their_owners_have_one_each(world):
    expected = alone("kl_shampoo", range(5))
    for weights, size in world.run(reduced, 4):
        assert size == 4 and deviation(weights, expected) <= 1e-9


def grown(group) -> Any:
    """A group of parameters is added, and the ranks stay divided as they were."""
    model = zoo()
    named = zoo_groups(model)
    optimizer = KLShampoo(named[:1], process_group=group, partition_size=2)
    train_alone(model, optimizer, range(2))
    optimizer.add_param_group(named[1])
    train_alone(model, optimizer, range(2, 4))
    weights: list[Any] = [None] * group.size()
    dist.all_gather_object(weights, weights_of(model), group=group)
    assert all(same_bits(other, weights[0]) for other in weights)
    return optimizer.plan.partition_size


def test_a_plan_that_grows_keeps_its_groups(world):
    assert world.run(grown, 4) == [2] * 4
