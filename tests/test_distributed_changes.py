"""Parameters that join, are frozen, or change dtype mid-run: the ranks follow, as one process does."""

import pytest
import torch

from kl_dist import KLShampoo
from tests.models import (
    Weights,
    backward,
    deviation,
    raising,
    same_bits,
    samples,
    snapshot,
    train_alone,
    weights_of,
    zoo,
    zoo_groups,
)

LATE = ("odd.weight", "odd.bias", "sometimes.weight")


def join_late(group, method: str) -> Weights:
    """Some parameters are added after a few steps; what was there keeps its owner and its state."""
    model = zoo(hidden=140)
    early, late = ([(n, p) for n, p in model.named_parameters() if (n in LATE) is there] for there in (False, True))
    optimizer = KLShampoo(early, process_group=group, method=method)
    train_alone(model, optimizer, range(5))
    owners, state = optimizer.plan.owner, snapshot(model, optimizer)
    optimizer.add_param_group({"params": late, "lr": 1e-2})
    assert owners.items() < optimizer.plan.owner.items()
    after = snapshot(model, optimizer)
    assert all(torch.equal(after[name], x) for name, x in state.items())
    return train_alone(model, optimizer, range(5, 12))


def frozen_for_a_while(group, method: str) -> Weights:
    """Two layers are frozen for some steps, and come back to their state, which keeps its owner."""
    model = zoo(hidden=140)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, method=method)
    train_alone(model, optimizer, range(4))
    owner = optimizer.plan.owner
    for trainable, steps in ((False, range(4, 8)), (True, range(8, 12))):
        before = snapshot(model, optimizer)
        model.odd.requires_grad_(trainable)
        model.scalar.requires_grad_(trainable)
        train_alone(model, optimizer, steps)
        after = snapshot(model, optimizer)
        resting = {name for name in before if name.split(" of ")[-1] in ("odd.weight", "odd.bias", "scalar")}
        assert all(torch.equal(after[name], before[name]) for name in resting) is not trainable
        assert optimizer.plan.owner == owner
    return weights_of(model)


def thawed_later(group, method: str) -> Weights:
    """Two layers are frozen from the start, so that nothing is kept for them, and are trained later."""
    model = zoo(hidden=140)
    for part in (model.odd, model.scalar):
        part.requires_grad_(False)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, method=method)
    train_alone(model, optimizer, range(4))
    owner = optimizer.plan.owner
    assert model.scalar not in optimizer.state and "scalar" not in owner
    for part in (model.odd, model.scalar):
        part.requires_grad_(True)
    train_alone(model, optimizer, range(4, 12))
    assert owner.items() < optimizer.plan.owner.items()
    return weights_of(model)


def cast_to_double(group, method: str) -> Weights:
    """float32, then model.double(): the state follows."""
    model = zoo(torch.float32, hidden=140)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, method=method)
    train_alone(model, optimizer, range(4))
    model.double()
    weights = train_alone(model, optimizer, range(4, 12))
    floating = [x for entry in optimizer.state.values() for x in entry.values() if x.is_floating_point()]
    assert all(x.dtype == torch.float64 for x in floating)
    return weights


@pytest.mark.parametrize("method", ["kl_shampoo", "soap"])
@pytest.mark.parametrize(
    ("change", "tolerance"),
    [(join_late, 1e-9), (frozen_for_a_while, 1e-9), (thawed_later, 1e-9), (cast_to_double, 1e-5)],
)
def test_a_change_mid_run_gives_what_it_gives_in_one_process(world, change, tolerance, method):
    expected = change(None, method)
    for world_size in (2, 3):
        weights, *others = world.run(change, world_size, method)
        assert all(same_bits(other, weights) for other in others)
        assert deviation(weights, expected) <= tolerance


def a_group_that_differs(group) -> None:
    """What one rank adds has another shape: an error on all, and training goes on without it."""
    model = zoo(hidden=140)
    optimizer = KLShampoo(zoo_groups(model), process_group=group)
    train_alone(model, optimizer, range(2))
    before, plan = snapshot(model, optimizer), optimizer.plan
    added = torch.nn.Parameter(torch.ones(4, 3 + (group.rank() == 1), dtype=torch.float64))
    with raising(ValueError, "'added', shape"):
        optimizer.add_param_group({"params": [("added", added)]})
    with raising(ValueError, "lr must be at least 0"):
        optimizer.add_param_group({"params": [("added", added)], "lr": -1.0 if group.rank() == 0 else 1.0})
    assert len(optimizer.param_groups) == 2
    assert optimizer.plan is plan
    assert same_bits(snapshot(model, optimizer), before)
    train_alone(model, optimizer, range(2, 4))


def test_a_parameter_group_that_differs_between_ranks_is_refused_on_all(world):
    world.run(a_group_that_differs, 3)


def with_other_groups(group, how: str):
    """A list of groups put in the place of param_groups half-way, as Lightning's finetuning callbacks do."""
    model = zoo()
    named = dict(model.named_parameters())
    late = named.pop("odd.weight")
    optimizer = KLShampoo(list(named.items()), lr=1e-2, process_group=group)
    for step in range(6):
        backward(model, samples(step))
        if step == 3 and how == "replaced":
            fresh = {**optimizer.param_groups[0], "lr": 5e-3}
            later = {**fresh, "params": [late], "param_names": ["odd.weight"]}
            optimizer.param_groups = [fresh, later]
        if step == 3 and how == "changed":
            optimizer.param_groups[0]["lr"] = 5e-3
            optimizer.add_param_group({"params": [("odd.weight", late)], "lr": 5e-3})
        optimizer.step()
    return weights_of(model)


def test_a_list_put_in_the_place_of_param_groups_is_followed(world):
    expected = world.run(with_other_groups, 1, "changed")[0]
    for world_size in (1, 2):
        assert deviation(world.run(with_other_groups, world_size, "replaced")[0], expected) <= 1e-9
