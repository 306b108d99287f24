"""A state whose values cannot be is refused when it comes in, by name, or left out where that was asked for."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.checkpoint import values
from tests.made_up import METHODS, parameters, same, states, train
from tests.models import raising
from tests.test_checkpoint import FORMS, make, options_of, state_of

RECIPES = [
    ("kl_shampoo", "paper"),
    ("kl_shampoo", "compact"),
    ("muon", "normuon"),
    *((m, "fresh") for m in METHODS[:-1]),
]
CPU = torch.device("cpu")


def nan(x: Tensor) -> None:
    x.view(-1)[-1] = float("nan")


def infinite(x: Tensor) -> None:
    x.view(-1)[0] = float("-inf")


def negative(x: Tensor) -> None:
    x.view(-1)[0] = -1


def zeroed(x: Tensor) -> None:
    x.zero_()


def swapped_in(x: Tensor) -> None:
    """Another eigenbasis' column twice."""
    x[:, 0] = x[:, 1]


ONE_NUMBER = ("scale", "grad_scale", "step")
BAD: list[tuple[str, Callable[[Tensor], None], str]] = [
    *(
        (field, how, "is not finite")
        for field in ("exp_avg", "exp_avg_sq", "factors", "bases")
        for how in (nan, infinite)
    ),
    ("eigenvalues", nan, "is not finite"),
    ("eigenvalues", negative, "negative values"),
    ("scale", negative, "negative values"),
    ("grad_scale", infinite, "is not finite"),
    ("exp_avg_sq", negative, "negative values"),
    ("row_mean_square", negative, "negative values"),
    ("inverse_roots", nan, "is not finite"),
    ("factors", negative, "negative diagonal"),
    ("bases", zeroed, "is not orthogonal"),
    ("bases", swapped_in, "is not orthogonal"),
    ("step", negative, "is negative"),
]


def spoilt(state: dict, field: str, how: Callable[[Tensor], None]) -> tuple[dict, str] | None:
    """A copy with one tensor of the field changed, and its key; None where no parameter has the field."""
    state = copy.deepcopy(state)
    for entries in state["state"].values():
        for key, tensor in entries.items():
            if key.split("].")[-1].split(".")[0] == field and tensor.numel() > (field not in ONE_NUMBER):
                how(tensor)
                return state, key
    return None


def test_every_bad_value_is_tried_on_some_method():
    for field, how, _ in BAD:
        assert any(spoilt(full_state_dict(make(method=m, recipe=r)), field, how) for m, r in RECIPES), field


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "recipe"), RECIPES)
def test_a_bad_value_is_refused_by_name_with_nothing_changed(method, recipe, form):
    save, load = FORMS[form]
    saved = save(make(method=method, recipe=recipe))
    optimizer = make(method=method, recipe=recipe, steps=1)
    before, options = state_of(optimizer), options_of(optimizer)
    for field, how, complaint in BAD:
        if (found := spoilt(saved, field, how)) is None:
            continue
        bad, key = found
        with raising(ValueError, rf"state '{key}' of parameter .* {complaint}".replace("[", r"\[")):
            load(optimizer, bad)
        assert same(state_of(optimizer), before) and options_of(optimizer) == options
    load(optimizer, saved)


def test_what_is_damaged_is_left_out_where_that_is_asked_for(caplog):
    """By blocks: those that are whole are loaded, the damaged one begins anew."""
    saved = full_state_dict(make())
    bad, key = spoilt(saved, "bases", nan)
    optimizer, whole = make(steps=0), make(steps=0)
    load_full_state_dict(whole, saved)
    left = load_full_state_dict(optimizer, bad, strict=False)
    assert len(left) == 1 and key in left[0] and "is not finite" in left[0]
    block = key.removesuffix("bases.0")
    found, wanted, new = state_of(optimizer), state_of(whole), state_of(make(steps=0))
    for name, tensor in found.items():
        damaged = name.startswith("wide ") and name.removeprefix("wide ").startswith(block)
        assert torch.equal(tensor, (new if damaged else wanted)[name]), name


def test_what_was_read_into_the_state_says_so_and_stops_the_run(tmp_path):
    """torch.distributed.checkpoint loads in place; neither a step nor a save goes on with what it read."""
    params = parameters()
    model = nn.ParameterDict(params)
    optimizer = KLShampoo(model)
    train(optimizer, params, range(3))
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        if folder is bad:
            nan(optimizer.state[params["square"]]["bases.0"])
        model_state, state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)

    def load(folder) -> None:
        model_state, state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)

    load(good)
    before = states(optimizer)
    with raising(ValueError, "state 'bases.0' of parameter 'square' is not finite, and was read into the state"):
        load(bad)
    for use in (optimizer.step, optimizer.state_dict, lambda: full_state_dict(optimizer)):
        with raising(RuntimeError, "load another checkpoint"):
            use()
    state = torch.load(_saved(before, params, tmp_path), weights_only=True)
    load_full_state_dict(optimizer, state)
    assert same(states(optimizer), before)
    train(optimizer, params, range(1))


def _saved(before: list[dict[str, Tensor]], params: dict, folder) -> str:
    """A file of the state as it was."""
    other = KLShampoo(nn.ParameterDict({name: nn.Parameter(p.detach().clone()) for name, p in params.items()}))
    for entries, given in zip(other.state.values(), before, strict=True):
        for key, tensor in given.items():
            entries[key].copy_(tensor)
    torch.save(full_state_dict(other), folder / "file.pt")
    return folder / "file.pt"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_an_eigenbasis_may_be_as_far_off_as_training_and_rounding_make_it(dtype):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q.to(dtype)
    assert values.fault("bases.0", basis, CPU) is None
    basis[:, 3] *= 1.02
    assert "is not orthogonal: an entry of Q^T Q - I is 0.04" in (values.fault("bases.0", basis, CPU) or "")
    for scale in (0.0, 1e2, torch.finfo(dtype).max ** 0.9):  # the last overflows in its products, to both sides
        assert "is not orthogonal" in (values.fault("bases.0", basis * scale, CPU) or ""), scale


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    usual = torch.randn(37, 29, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (usual, usual.t(), usual[::2, 3:], usual[:1, :1], usual[0, 0], usual[:0]):
        assert values.fault("exp_avg", x, CPU) is None
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 1, 511, 512, usual.numel() - 1):
            x = usual.clone()
            x.view(-1)[place] = bad
            assert values.fault("exp_avg", x, CPU) == "is not finite", (bad, place)
            assert values.fault("exp_avg", x.t(), CPU) == "is not finite"
            x.view(-1)[-place - 1] = -bad  # of both signs: their sum is no infinity
            assert values.fault("exp_avg", x, CPU) == "is not finite"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_finite_values_whose_sum_is_not_are_finite(dtype):
    largest = torch.finfo(dtype).max
    for x in (torch.full((4099,), largest, dtype=dtype), torch.full((4099,), -largest, dtype=dtype)):
        assert not x.sum().isfinite() and values.fault("exp_avg", x, CPU) is None
        x[::2] *= -1  # partial sums may overflow to both sides
        assert values.fault("exp_avg", x, CPU) is None
        x[4098] = float("nan")
        assert values.fault("exp_avg", x, CPU) == "is not finite"
