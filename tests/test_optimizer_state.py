"""What is put into `KLShampoo.state`, or taken out of it, is what the next step uses, or is refused in words."""

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict

from kl_dist import KLShampoo, full_state_dict
from tests.made_up import METHODS, Named, give_gradients, parameters, same, states, train, values

BEFORE, AFTER = range(4), range(4, 7)


def trained(**options) -> tuple[KLShampoo, Named]:
    params = parameters()
    opt = KLShampoo(params.items(), **options)
    train(opt, params, BEFORE)
    return opt, params


def new_on(params: Named, **options) -> tuple[KLShampoo, Named]:
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    return KLShampoo(fresh.items(), **options), fresh


def delete_each(opt: KLShampoo) -> None:
    for p in list(opt.state):
        del opt.state[p]


def empty_each(opt: KLShampoo) -> None:
    for entries in opt.state.values():
        entries.clear()


def replace(opt: KLShampoo) -> None:
    opt.state = defaultdict(dict)


def zero_each(opt: KLShampoo) -> None:
    for entries in opt.state.values():
        for tensor in entries.values():
            tensor.mul_(0)


RESETS = {"cleared": lambda opt: opt.state.clear(), "replaced": replace, "deleted": delete_each, "emptied": empty_each}
RESETS["zeroed in place"] = zero_each


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", RESETS)
def test_state_that_is_taken_away_starts_anew(how: str, method: str):
    opt, params = trained(method=method)
    fresh, others = new_on(params, method=method)
    RESETS[how](opt)
    train(opt, params, AFTER)
    train(fresh, others, AFTER)
    assert same(values(params), values(others)) and same(states(opt), states(fresh))


READS: dict[str, Callable[[nn.Module, KLShampoo], object]] = {
    "state_dict": lambda model, opt: opt.state_dict(),
    "local_state_dict": lambda model, opt: opt.local_state_dict(),
    "get_optimizer_state_dict": lambda model, opt: get_optimizer_state_dict(model, opt),
    "get_state_dict": lambda model, opt: get_state_dict(model, opt),
    "full_state_dict": lambda model, opt: full_state_dict(opt),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("how", READS)
def test_reading_the_state_before_the_first_step_changes_nothing(how: str, gradients: bool):
    """torch's helpers have an optimizer without state take a step, with which AdamW's bias correction goes on."""
    found = []
    for read in (lambda model, opt: None, READS[how]):
        params = parameters()
        model = nn.ParameterDict(params)
        opt = KLShampoo(model)
        if gradients:
            give_gradients(params, 0)
        before = [values(params), states(opt), [p.grad is None for p in params.values()]]
        read(model, opt)
        assert same(before, [values(params), states(opt), [p.grad is None for p in params.values()]])
        train(opt, params, range(3))
        found.append([values(params), states(opt)])
    assert same(*found)


def test_the_state_of_one_parameter_may_be_taken_away():
    opt, params = trained()
    rest = states(opt)
    del opt.state[params["square"]]
    saved = opt.state_dict()["state"]
    steps = {name: int(saved[i]["step"]) for i, name in enumerate(params)}
    assert steps == {name: 0 if name == "square" else len(BEFORE) for name in params}
    kept = [entries for name, entries in zip(params, states(opt), strict=True) if name != "square"]
    assert same(kept, [entries for name, entries in zip(params, rest, strict=True) if name != "square"])


def elsewhere_and_back(opt: KLShampoo) -> None:
    """As a trainer does that keeps the state on the host between phases."""
    for entries in opt.state.values():
        for key in entries:
            entries[key] = entries[key].clone()


def in_new_dicts(opt: KLShampoo) -> None:
    opt.state = defaultdict(
        dict, {p: {key: x.clone() for key, x in entries.items()} for p, entries in opt.state.items()}
    )


@pytest.mark.parametrize("how", [elsewhere_and_back, in_new_dicts])
def test_tensors_that_were_put_in_the_place_of_others_are_used(how: Callable[[KLShampoo], None]):
    opt, params = trained()
    twin, others = trained()
    how(opt)
    for entries in (opt.state[params["square"]], twin.state[others["square"]]):
        entries["exp_avg"] = 2 * entries["exp_avg"]
    train(opt, params, AFTER)
    train(twin, others, AFTER)
    untouched, plain = trained()
    train(untouched, plain, AFTER)
    assert same(values(params), values(others)) and not torch.equal(params["square"], plain["square"])
    assert torch.equal(params["wide"], plain["wide"])


def test_a_loaded_state_wins_over_what_was_taken_away_before():
    opt, _ = trained()
    saved = copy.deepcopy(opt.state_dict())
    opt.state.clear()
    opt.load_state_dict(saved)
    assert same(opt.state_dict()["state"], saved["state"])


def test_what_is_the_users_own_in_the_state_stays_and_travels():
    opt, params = trained()
    other, _ = trained()
    opt.state["mine"] = {"tokens": 5}
    train(opt, params, AFTER)
    for one in (opt, other):
        one.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2, 2)))]})
    assert opt.state["mine"] == copy.deepcopy(opt).state["mine"] == {"tokens": 5}
    other.load_state_dict(opt.state_dict())
    assert other.state["mine"] == {"tokens": 5}
    saved = opt.state_dict()
    del saved["state"]["mine"]
    opt.load_state_dict(saved)
    assert "mine" not in opt.state


def test_a_schedule_writes_into_no_state_that_was_loaded():
    """It changes a learning rate in place that is a tensor."""
    opt, _ = trained(lr=torch.tensor(0.25))
    other, params = trained(lr=torch.tensor(0.25))
    other.load_state_dict(opt.state_dict())
    schedule = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    train(other, params, AFTER, schedule.step)
    assert opt.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["lr"] == 0.25 / 2 ** len(AFTER)


def test_two_that_load_one_state_share_nothing_of_it():
    saved = trained(lr=torch.tensor(0.25))[0].state_dict()
    one, other = (trained(lr=torch.tensor(0.5))[0] for _ in range(2))
    for opt in (one, other):
        opt.load_state_dict(saved)
    one.param_groups[0]["lr"].fill_(0.125)  # as a schedule does
    assert other.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] == 0.25


MISTAKES: dict[str, tuple[Callable[[dict], object], str]] = {
    "of another shape": (lambda entries: entries.update(exp_avg=torch.empty(0)), "'exp_avg'.*'square'.*replaced"),
    "gone beside others": (lambda entries: entries.pop("factors.0"), "'factors.0'.*'square'.*is gone"),
    "no tensor": (lambda entries: entries.update(step=[1]), "'step'.*'square'.*replaced"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_cannot_be_used_is_refused_and_changes_nothing(what: str):
    opt, params = trained()
    spoil, message = MISTAKES[what]
    kept = dict(opt.state[params["square"]])
    spoil(opt.state[params["square"]])
    before = values(params)
    give_gradients(params, 4)
    for use in (opt.step, opt.state_dict):
        with pytest.raises(ValueError, match=message):
            use()
    assert same(values(params), before)
    opt.state[params["square"]].update(kept)
    opt.step()
    assert not torch.equal(params["square"], before["square"])


def test_copies_are_plain_and_go_on():
    opt, params = trained()
    copied = copy.deepcopy(opt)
    assert same(copied.state_dict()["state"], opt.state_dict()["state"])
    plain = copy.deepcopy(dict(opt.state[params["square"]]))
    assert type(plain) is dict and type(copy.deepcopy(opt.state)) is defaultdict
