"""Groups that are added, names that meet, and state dicts: what was saved goes on, what does not fit is refused."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kl_dist import KLShampoo, optimizer
from kl_dist.options import RECIPE_DEFAULTS
from tests.made_up import METHODS, SHAPES, furthest, give_gradients, parameters, same, states, train, values


def test_adding_a_group_leaves_the_state_of_others_as_it_is():
    params = parameters()
    names = list(params)
    opt = KLShampoo([(name, params[name]) for name in names[:4]])
    train(opt, params, range(3))
    before = [dict(opt.plan.owner), states(opt)]
    opt.add_param_group({"params": [(name, params[name]) for name in names[4:]], "lr": 0.1, "method": "soap"})
    assert same([{name: opt.plan.owner[name] for name in before[0]}, states(opt)[:4]], before)
    weights = values(params)
    train(opt, params, range(3, 6))
    assert not any(torch.equal(params[name], weights[name]) for name in names)
    assert opt.param_groups[1]["weight_decay"] == opt.param_groups[0]["weight_decay"]


def test_an_added_group_goes_on_like_one_that_was_there():
    params, alone = parameters(), parameters()
    opt = KLShampoo({name: p for name, p in params.items() if name != "twin"}.items(), stagger=False)
    train(opt, {name: p for name, p in params.items() if name != "twin"}, range(0))
    opt.add_param_group({"params": [("twin", params["twin"])]})
    other = KLShampoo(alone.items(), stagger=False)
    for opt_, all_ in ((opt, params), (other, alone)):
        train(opt_, all_, range(6))
    assert furthest(values(params), values(alone)) < 1e-13


def test_two_parameters_of_one_name_keep_their_own_state():
    """Names may repeat between groups; or it is refused."""
    a, b, late = parameters(), parameters(), parameters()
    try:
        opt = KLShampoo([{"params": a.items()}, {"params": b.items()}])
    except ValueError as error:
        assert "'wide'" in str(error)
        return
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step + 100)
        opt.step()
    before = [states(opt), len(opt.plan.owner)]
    opt.add_param_group({"params": late.items()})
    assert same(states(opt)[: len(before[0])], before[0])
    assert before[1] == 2 * len(SHAPES)


def test_two_parameters_of_one_name_in_one_group_are_refused_or_kept_apart():
    a, b = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    try:
        opt = KLShampoo([("w", a), ("w", b)])
    except ValueError as error:
        assert "'w'" in str(error)
        return
    train(opt, {"a": a, "b": b}, range(3))
    before = states(opt)
    opt.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 2)))]})
    assert same(states(opt)[:2], before) and len(opt.plan.owner) == 3


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_goes_on_to_the_last_bit(method, recipe, stop):
    """Whenever it was stopped: before the first step, and at every phase of the refreshes."""
    options = dict(method=method, recipe=recipe, precondition_frequency=3, stagger=True)
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), lr=1e-2, **options)
    train(opt, params, range(stop))
    file = io.BytesIO()
    torch.save({"model": values(params), "optimizer": opt.state_dict()}, file)
    train(opt, params, range(stop, stop + 5))
    file.seek(0)
    saved = torch.load(file)
    resumed = parameters(torch.float32)
    for name, p in resumed.items():
        p.data.copy_(saved["model"][name])
    other = KLShampoo(resumed.items(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3, **options)
    other.load_state_dict(saved["optimizer"])
    train(other, resumed, range(stop, stop + 5))
    assert same([values(params), states(opt)], [values(resumed), states(other)])
    assert other.param_groups[0]["lr"] == 1e-2


def test_a_loaded_schedule_keeps_the_ratio_of_learning_rates():
    params, resumed = parameters(), parameters()
    opt = KLShampoo(params.items(), lr=1e-2, adamw_lr=1e-3)
    opt.param_groups[0]["lr"] = 5e-3
    train(opt, params, range(3))
    other = KLShampoo(resumed.items(), lr=5e-3, adamw_lr=7e-3)
    other.load_state_dict(opt.state_dict())
    for name, p in params.items():
        resumed[name].data.copy_(p.data)
    for opt_, all_ in ((opt, params), (other, resumed)):
        train(opt_, all_, range(3, 6))
    assert same(values(params), values(resumed))


def test_a_state_of_before_matrix_lr_loads_as_it_was():
    params = parameters()
    opt = KLShampoo(params.items(), lr=1e-2)
    saved = opt.state_dict()
    del saved["param_groups"][0]["matrix_lr"]
    other = KLShampoo(parameters().items(), lr=1e-2, matrix_lr=5e-2)
    other.load_state_dict(saved)
    assert other.param_groups[0]["matrix_lr"] is None


def test_a_state_dict_is_plain_data():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True)["state"], opt.state_dict()["state"])
    keys = KLShampoo(parameters().items()).state_dict()["state"]
    assert {i: s.keys() for i, s in keys.items()} == {i: s.keys() for i, s in opt.state_dict()["state"].items()}


def adamw_state() -> dict:
    params = parameters()
    opt = torch.optim.AdamW(params.values())
    train(opt, params, range(2))
    return opt.state_dict()


def state_of(shapes: dict = SHAPES, **options) -> dict:
    params = parameters(shapes=shapes)
    opt = KLShampoo(params.items(), **options)
    train(opt, params, range(2))
    return opt.state_dict()


def state_without(group_key: str | None) -> dict:
    saved = state_of()
    if group_key is None:
        del saved["state"]
    else:
        del saved["param_groups"][0][group_key]
    return saved


REFUSED: dict[str, tuple[Callable[[], dict], str]] = {
    "AdamW's": (adamw_state, "KLShampoo"),
    "nothing": (dict, "KLShampoo"),
    "another method's": (lambda: state_of(method="soap"), "soap"),
    "another recipe's": (lambda: state_of(recipe="paper"), "paper"),
    "another cutting's": (lambda: state_of(max_preconditioner_dim=3), "max_preconditioner_dim"),
    "other shapes'": (lambda: state_of({**SHAPES, "square": (5, 6)}), "square"),
    "fewer parameters'": (lambda: state_of({name: SHAPES[name] for name in list(SHAPES)[1:]}), "parameter"),
    "one without options": (lambda: state_without("method"), "method"),
    "one without tensors": (lambda: state_without(None), "state"),
    "other order's": (lambda: state_of(dict(reversed(SHAPES.items()))), "."),
}


@pytest.mark.parametrize("whose", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(whose):
    make, word = REFUSED[whose]
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(2))
    before = [states(opt), copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups])]
    with pytest.raises(ValueError, match=word):
        opt.load_state_dict(make())
    assert same([states(opt), [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]], before)


# -- state dicts as other programs hand them back ----------------------------------------------------------------------


@pytest.mark.parametrize("named_first", [True, False])
def test_states_of_named_and_of_nameless_parameters_load_into_each_other(named_first):
    params, others = parameters(), parameters()
    given = [params.items(), others.values()] if named_first else [params.values(), others.items()]
    opt, other = (KLShampoo(one) for one in given)
    train(opt, params, range(3))
    other.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(params.values(), others.values(), strict=True):
            q.copy_(p)
    train(opt, params, range(3, 6))
    train(other, others, range(3, 6))
    assert same(values(others), values(params))


def test_names_that_are_given_on_both_sides_must_be_the_same():
    renamed = {f"{name} of another": p for name, p in parameters().items()}
    with pytest.raises(ValueError, match="saved with parameter 'wide of another' where 'wide' is here"):
        KLShampoo(parameters().items()).load_state_dict(KLShampoo(renamed.items()).state_dict())


@pytest.mark.parametrize("kind", [int, float])
def test_step_counts_may_come_back_as_numbers(kind):
    params = parameters()
    opt, other = KLShampoo(params.items()), KLShampoo(parameters().items())
    train(opt, params, range(3))
    saved = opt.state_dict()
    for entries in saved["state"].values():
        entries["step"] = kind(entries["step"])
    other.load_state_dict(saved)
    assert same(states(other), states(opt))


def test_hooks_see_the_state_that_is_saved_and_may_change_it():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    seen = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("before"))

    def doubled(_, state: dict) -> dict:
        for entries in state["state"].values():
            entries["exp_avg"] = 2 * entries["exp_avg"]
        return {**state, "mine": 1}

    before = states(opt)
    opt.register_state_dict_post_hook(doubled)
    saved = opt.state_dict()
    assert seen == ["before"] and saved["mine"] == 1 and same(states(opt), before)
    for entries, own in zip(saved["state"].values(), before, strict=True):
        assert torch.equal(entries["exp_avg"], 2 * own["exp_avg"])


def test_a_compiled_step_makes_the_same_update():
    params, expected = parameters(), parameters()
    opt = KLShampoo(params.items())
    step = torch.compile(opt.step, backend="eager")
    train(KLShampoo(expected.items()), expected, range(4))
    for number in range(4):
        give_gradients(params, number)
        step()
    assert same(values(params), values(expected))


def test_a_compiled_training_step_makes_the_same_update():
    """Forward, backward, clipping, step and schedule in one function, of which the optimizer's step stays as it is."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        opt = KLShampoo(model, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, total_iters=3)

        def step(data, model=model, opt=opt, schedule=schedule):
            opt.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            schedule.step()
            return loss.detach()

        run = torch.compile(step, backend="eager") if compiled else step
        losses = [run(torch.randn(5, 6, dtype=torch.float64)) for _ in range(5)]
        found.append([torch.stack(losses), dict(model.state_dict()), states(opt)])
    assert same(*found)


def test_a_group_whose_compute_dtype_the_device_lacks_is_not_added(monkeypatch):
    """Stands for bfloat16 on CUDA under an old torch: said before anything changes."""

    def lacks(compute_dtype, device):
        if compute_dtype == "bfloat16":
            raise ValueError(f"compute_dtype 'bfloat16' on {device} needs another torch")

    monkeypatch.setattr(optimizer, "check_device", lacks)
    opt = KLShampoo([("W", nn.Parameter(torch.zeros(6, 4)))])
    with pytest.raises(ValueError, match="needs another torch"):
        opt.add_param_group({"params": [("V", nn.Parameter(torch.zeros(6, 4)))], "compute_dtype": "bfloat16"})
    assert len(opt.param_groups) == 1 and [parameter.name for parameter in opt.plan.parameters] == ["W"]
