"""State that went bad in memory: weights never see it, the matrix starts anew or the run ends, and all ranks say so."""

import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kl_dist import KLShampoo
from tests.made_up import METHODS, give_gradients, parameters, same, states, train, values
from tests.models import raising
from tests.sharded import groups_of, lay_out, layers, loss_of, tokens_of, weights_of

FIELDS = {"kl_shampoo": "bases.0", "kl_soap": "exp_avg_sq", "soap": "bases.1", "shampoo": "inverse_roots.0"}
FIELDS |= {"muon": "exp_avg", "adamw": "exp_avg_sq"}


def spoil(opt: KLShampoo, params: dict[str, nn.Parameter], name: str) -> None:
    """A NaN into the state of one parameter, as memory that fails would write it."""
    method = "adamw" if name == "vector" else opt.param_groups[0]["method"]
    opt.state[params[name]][FIELDS[method]].view(-1)[1] = math.nan


@pytest.mark.parametrize("name", ["square", "vector"])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_stay_and_the_state_starts_anew(method, name, caplog):
    """Of twins that lie in one batch, of a parameter under AdamW: all others go on as if nothing had been."""
    params, others = parameters(), parameters()
    opt, usual = KLShampoo(params.items(), method=method), KLShampoo(others.items(), method=method)
    for one, given in ((opt, params), (usual, others)):
        train(one, given, range(4))
    spoil(opt, params, name)
    before = values(params)[name] * (1 - 1e-3 * 0.01)
    with caplog.at_level(logging.WARNING):
        for one, given in ((opt, params), (usual, others)):
            train(one, given, range(4, 6))
    found, wanted = values(params), values(others)
    assert torch.allclose(found[name], before, rtol=1e-12, atol=0)  # decayed in one step, at rest in the next
    assert same({**found, name: 0}, {**wanted, name: 0})
    assert f"the last update of '{name}' was not finite though the gradient was" in caplog.text
    assert opt.stats()["restarts"] == 1 and opt.stats()["skipped_steps"] == 0
    # and from there on it is a new one
    fresh = {key: nn.Parameter(p.detach().clone()) for key, p in params.items()}
    new = KLShampoo(fresh.items(), method=method)
    for one, given in ((opt, params), (new, fresh)):
        train(one, given, range(6, 9))
    found, wanted = values(params)[name], values(fresh)[name]
    if method in ("soap", "kl_soap"):  # a start enlarges rounding of mixed counts
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)
    else:
        assert same(found, wanted)
    assert all(x.isfinite().all() for state in states(opt) for x in state.values())


def test_under_raise_it_is_an_error_and_the_step_changes_nothing():
    params = parameters()
    opt = KLShampoo(params.items(), on_nonfinite="raise")
    train(opt, params, range(3))
    spoil(opt, params, "twin")
    train(opt, params, range(3, 4))
    before = values(params)
    with raising(FloatingPointError, "the last update of 'twin' was not finite .* the state starts anew"):
        train(opt, params, range(4, 5))
    assert same(values(params), before)
    train(opt, params, range(5, 7))


def test_several_are_counted_and_a_load_forgets_them(caplog):
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    saved = opt.state_dict()
    saved = {**saved, "state": {i: {k: x.clone() for k, x in s.items()} for i, s in saved["state"].items()}}
    for name in ("square", "twin", "wide"):
        spoil(opt, params, name)
    train(opt, params, range(3, 4))
    opt.load_state_dict(saved)
    train(opt, params, range(3, 4))
    assert opt.stats()["restarts"] == 0
    for name in ("square", "twin", "wide"):
        spoil(opt, params, name)
    train(opt, params, range(4, 6))
    assert opt.stats()["restarts"] == 3 and "(and of 2 more)" in caplog.text


def run_with_damage(group, layout: str, name: str, **options) -> tuple[dict, dict]:
    """Weights of a run in which the rank that holds the state of a parameter finds a NaN there, and of one without."""
    found = []
    for damaged in (True, False):
        model = layers(torch.float64)
        part, parts = (group.rank(), group.size()) if layout == "ddp" else lay_out(model, layout, group)
        optimizer = KLShampoo(groups_of(model), process_group=None if layout != "ddp" else group, lr=1e-2, **options)
        for step in range(6):
            if damaged and step == 4:
                state = optimizer.state[dict(model.named_parameters())[name]]
                key = "exp_avg_sq" if "exp_avg_sq" in state else "eigenvalues.0"
                held = state[key].view(-1)
                held[: held.numel() and 1] = math.nan
            optimizer.zero_grad()
            share = tokens_of(step).chunk(parts)[part]
            loss_of(model, share).backward()
            if layout == "ddp":
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=group)
                        parameter.grad /= parts
            optimizer.step()
        found.append(weights_of(model))
    return found[0], found[1]


LAID_OUT = [(layout, ranks, "up.weight") for layout, ranks in (("ddp", 2), ("ddp", 3), ("fsdp", 2), ("hsdp", 4))]
LAID_OUT += [("ddp", 2, "norm.weight"), ("fsdp", 2, "norm.weight")]  # under HSDP replicas compute AdamW each for itself


@pytest.mark.parametrize(("layout", "ranks", "name"), LAID_OUT)
def test_all_ranks_leave_the_same_weights_alone(world, worlds, layout, ranks, name):
    pool = world if layout == "ddp" or ranks == 4 else worlds[ranks]
    found = pool.run(run_with_damage, ranks, layout, name)
    for damaged, usual in found:
        assert damaged[name].isfinite().all() and not torch.equal(damaged[name], usual[name])
        assert {key for key, x in damaged.items() if not torch.allclose(x, usual[key], rtol=0.2, atol=0.05)} <= {name}
    first, *others = (damaged for damaged, _ in found)
    assert all(same(first, other) for other in others)


def damage_in_groups(group) -> None:
    run_with_damage(group, "ddp", "up.weight", partition_size=1)


def test_what_groups_compute_each_for_itself_ends_the_run(worlds):
    with raising(RuntimeError, "the last update of 'up.weight.* on some replicas at least: resume from a checkpoint"):
        worlds[2].run(damage_in_groups, 2)


def load_another_time(group) -> None:
    """Each rank loads its own part, one of them from two steps before."""
    params = {name: nn.Parameter(torch.ones(4, 4)) for name in "abcd"}
    optimizer = KLShampoo(params.items(), process_group=group)
    saved = []
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
        saved.append({**optimizer.local_state_dict()})
        saved[-1]["state"] = {i: {k: x.clone() for k, x in s.items()} for i, s in saved[-1]["state"].items()}
    optimizer.load_state_dict(saved[1 if group.rank() == 1 else 3])
    give_gradients(params, 4)
    optimizer.step()


def test_ranks_that_load_what_was_saved_at_different_times_are_told(world):
    with raising(ValueError, "what the optimizer has loaded .*rank 0 has «4 steps made», rank 1 has «2 steps made»"):
        world.run(load_another_time, 2)


def rate_as_a_tensor(group) -> list[float]:
    params = {name: nn.Parameter(torch.ones(4, 4)) for name in "abcd"}
    rate = 1e-3 if group.rank() else torch.tensor(1e-3)
    optimizer = KLShampoo(params.items(), lr=rate, process_group=group)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    return [x for p in params.values() for x in p.flatten().tolist()]


def test_a_rate_that_is_a_tensor_on_one_rank_is_the_same_rate(world):
    first, second = world.run(rate_as_a_tensor, 2)
    assert first == second
