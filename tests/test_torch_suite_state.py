"""What torch's own suite asks of every optimizer's state: saved, loaded, copied, seen by hooks."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from kl_dist import KLShampoo
from kl_dist.checkpoint.verify import is_sums
from tests.made_up import parameters, same, states, train, values
from tests.products import product
from tests.torch_optimizers import NAMES, options_of


def trained(name: str, named: bool = True) -> tuple[KLShampoo, dict[str, nn.Parameter]]:
    params = parameters(torch.float32)
    opt = KLShampoo(params.items() if named else params.values(), **options_of(name))
    train(opt, params, range(3))
    return opt, params


def nameless(state: dict[str, Any]) -> dict[str, Any]:
    """Without names, and without `kl_dist` and the checksums, which have a digest of them."""
    state = copy.deepcopy({key: state[key] for key in ("state", "param_groups")})
    for group in state["param_groups"]:
        del group["param_names"]
    for entries in state["state"].values():
        for key in list(filter(is_sums, entries)):
            del entries[key]
    return state


@product(name=NAMES, named=[False, True], named_then=[False, True])
def test_a_loaded_state_goes_on_alike_and_is_left_as_it_was(name, named, named_then):
    """Names that either side has are kept."""
    opt, params = trained(name, named)
    saved, kept = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    others = {key: nn.Parameter(p.detach().clone()) for key, p in params.items()}
    other = KLShampoo(others.items() if named_then else others.values(), **options_of(name))
    other.load_state_dict(saved)
    assert same(nameless(other.state_dict()), nameless(saved))
    for one, its in ((opt, params), (other, others)):
        train(one, its, range(3, 6))
    assert same(values(params), values(others)) and same(saved, kept)
    assert same(nameless(opt.state_dict()), nameless(other.state_dict()))
    if named_then:
        assert other.state_dict()["param_groups"][0]["param_names"] == list(params)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_back_the_state_it_was_given(name, weights_only):
    state = trained(name)[0].state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=weights_only), state)


@pytest.mark.parametrize("name", NAMES)
def test_step_counts_may_be_numbers(name):
    opt, params = trained(name)
    twin, others = trained(name)
    state = copy.deepcopy(opt.state_dict())
    for entries in state["state"].values():
        entries["step"] = entries["step"].item()
    opt.load_state_dict(state)
    train(opt, params, [3])
    train(twin, others, [3])
    assert same(values(params), values(others))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_state_and_a_copy_every_attribute(name):
    opt, _ = trained(name)
    assert all(len(entries) > 1 for entries in states(opt))
    public = {key for key in vars(opt) if not key.startswith("_")}
    assert public == {key for key in vars(copy.deepcopy(opt)) if not key.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_before_saving_sees_and_changes_the_live_state(name):
    opt, params = trained(name)
    twice = {key: 2 * x for key, x in opt.state[params["square"]].items() if key.endswith("exp_avg")}

    def before(opt: torch.optim.Optimizer) -> None:
        opt.state["mine"] = 1
        for key, x in twice.items():
            opt.state[params["square"]][key] = x

    opt.register_state_dict_pre_hook(before)
    saved = opt.state_dict()["state"]
    assert saved["mine"] == 1 and twice
    number = list(params).index("square")
    assert all(torch.equal(saved[number][key], x) for key, x in twice.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_after_saving_may_take_away_what_one_before_put_there(name):
    opt, _ = trained(name)

    def after(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state["came before"] = state["state"].pop("mine", None)
        return state

    opt.register_state_dict_post_hook(after)
    assert opt.state_dict()["came before"] is None
    opt.register_state_dict_pre_hook(lambda opt: opt.state.update(mine=1))
    state = opt.state_dict()
    assert state["came before"] == 1 and "mine" not in state["state"]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_before_loading_come_in_order_and_one_may_be_put_first(name):
    opt, _ = trained(name)
    state = opt.state_dict()

    def in_place(opt: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"] = [{**group, "lr": 0.002} for group in state["param_groups"]]

    def another(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": 0.003} for group in state["param_groups"]]}

    opt.register_load_state_dict_pre_hook(in_place)
    opt.register_load_state_dict_pre_hook(another, prepend=True)
    before = state["param_groups"]
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.002 and state["param_groups"] is before
    opt.register_load_state_dict_pre_hook(another)
    opt.register_load_state_dict_post_hook(lambda opt: opt.state.update(lr_after=opt.param_groups[0]["lr"]))
    opt.load_state_dict(state)
    assert opt.state["lr_after"] == 0.003
