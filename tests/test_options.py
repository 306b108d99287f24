"""Bad input is a clear error that says what was wrong and what fits, and nothing has changed after it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kl_dist import METHODS, KLShampoo, param_groups
from kl_dist.options import ADAMW_BETAS, RECIPE_DEFAULTS, recipe_defaults

NAN, INF = float("nan"), float("inf")


def matrix(**kwargs) -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 3, **kwargs))


def named() -> list[tuple[str, nn.Parameter]]:
    return [("first", matrix()), ("second", matrix()), ("bias", nn.Parameter(torch.ones(3)))]


BAD_OPTIONS: list[tuple[dict, type[Exception], str]] = [
    *((dict(lr=x), ValueError, "^lr must be at least 0 and finite") for x in (-1.0, NAN, INF, -INF)),
    *((dict(eps=x), ValueError, "^eps must") for x in (-1e-8, NAN, INF)),
    *((dict(weight_decay=x), ValueError, "^weight_decay must") for x in (-0.1, NAN, INF)),
    *((dict(adamw_lr=x), ValueError, "^adamw_lr must") for x in (-0.1, NAN, INF)),
    *((dict(matrix_lr=x), ValueError, "^matrix_lr must") for x in (-0.1, NAN, INF)),
    *((dict(betas=(x, 0.9)), ValueError, r"^betas\[0\] must be at least 0 and below 1") for x in (-0.1, 1.0, NAN, INF)),
    *((dict(betas=(0.9, x)), ValueError, r"^betas\[1\] must") for x in (-0.1, 1.0, NAN, INF)),
    (dict(betas=(0.9, 0.0)), ValueError, r"^betas\[1\] must be above 0 with method 'kl_shampoo'"),
    (dict(method="soap", recipe="paper", betas=(0.9, 0)), ValueError, r"^betas\[1\] must be above 0 with"),
    (dict(shampoo_beta=0.0), ValueError, "^shampoo_beta must be above 0"),
    *((dict(adamw_betas=(0.9, x)), ValueError, r"^adamw_betas\[1\] must") for x in (-0.1, 1.0, NAN, INF)),
    *((dict(shampoo_beta=x), ValueError, "^shampoo_beta must") for x in (-1, 1.0, NAN)),
    *((dict(shampoo_exponent=x), ValueError, "^shampoo_exponent must") for x in (0.0, -0.5, 1.0, NAN)),
    *((dict(precondition_frequency=x), ValueError, "^precondition_frequency must be at least 1") for x in (0, -3)),
    *((dict(precondition_frequency=x), TypeError, "^precondition_frequency is a whole") for x in (1.5, "2", True, NAN)),
    *((dict(max_preconditioner_dim=x), ValueError, "^max_preconditioner_dim must be at least 1") for x in (0, -1)),
    *((dict(max_preconditioner_dim=x), TypeError, "^max_preconditioner_dim is a whole") for x in (10.0, None)),
    *((dict(lr=x), TypeError, "^lr is a number") for x in ("0.1", None, True, [0.1])),
    *((dict(weight_decay=x), TypeError, "^weight_decay is a number") for x in ("0.1", None)),
    (dict(eps=None), TypeError, "^eps is a number"),
    *((dict(betas=x), TypeError, "^betas is a pair") for x in (0.9, (0.9,), (0.9, 0.9, 0.9), "ab", {0.8, 0.9})),
    (dict(betas=("a", 0.9)), TypeError, r"^betas\[0\] is a number"),
    *((dict(polar=x), TypeError, "^polar is 'start' or a whole number of .* steps, not") for x in (1.5, True, NAN)),
    *((dict(polar=x), ValueError, f"^polar is 'start' or a whole number of .* steps, not {x!r}") for x in ("2", -1)),
    (
        dict(polar=3, recipe="paper"),
        ValueError,
        "^polar must be 0 or None with method 'kl_shampoo' under recipe 'paper'",
    ),
    (dict(polar=3, method="shampoo"), ValueError, "^polar must be 0 or None with method 'shampoo'"),
    *((dict([(key, 1)]), TypeError, f"^{key} is True or False") for key in ("nesterov", "stagger", "merge_dims")),
    (dict(method="kl_shampo"), ValueError, "unknown method 'kl_shampo'.*'kl_shampoo'"),
    (dict(method="SOAP"), ValueError, "unknown method 'SOAP'.*'soap'"),
    (dict(method=None), ValueError, "unknown method None"),
    (dict(recipe="papers"), ValueError, "unknown recipe 'papers'.*'paper'"),
    (dict(recipe="xyz"), ValueError, "unknown recipe 'xyz'.*'fresh', 'paper'"),
    (dict(blocking="squares"), ValueError, "unknown blocking 'squares'.*'square'"),
    (dict(long_side="diag"), ValueError, "unknown long_side 'diag'.*'diagonal'"),
    (dict(matrices=(0, 1)), TypeError, "^matrices is a dict"),
    (dict(lr=0.0, adamw_lr=0.1), ValueError, "lr must not be 0 where adamw_lr is given"),
    (dict(lr=0.0, matrix_lr=0.1), ValueError, "lr must not be 0 where matrix_lr is given"),
]
UNKNOWN = [
    *((word, "no option '{}'") for word in ("amsgrad", "maximize", "fused", "foreach", "capturable", "differentiable")),
    ("momentum", "no option 'momentum'.*betas"),
    ("precondition_frequencies", "'precondition_frequencies'.*did you mean 'precondition_frequency'"),
    ("learning_rate", "'learning_rate'"),
    ("beta", "'beta'.*betas"),
    ("max_preconditioner_dimension", "did you mean 'max_preconditioner_dim'"),
]


def fingerprint(opt: KLShampoo) -> tuple:
    """All that a failed call must leave as it was."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [{key: x.tolist() for key, x in opt.state.get(p, {}).items()} for p in params]
    return copy.deepcopy((groups, [p.tolist() for p in params], state, opt.plan))


def step(opt: KLShampoo) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    opt.step()


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:50])
def test_a_bad_option_is_an_error_that_names_it(options, kind, message):
    with pytest.raises(kind, match=message):
        KLShampoo(named(), **options)
    with pytest.raises(kind, match=message):
        KLShampoo([{"params": named(), **options}])


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:50])
def test_a_bad_group_is_not_added(options, kind, message):
    opt = KLShampoo(named())
    step(opt)
    before = fingerprint(opt)
    with pytest.raises(kind, match=message):
        opt.add_param_group({"params": [("third", matrix())], **options})
    assert fingerprint(opt) == before
    step(opt)


@pytest.mark.parametrize(("word", "message"), UNKNOWN)
def test_an_unknown_option_is_refused_with_the_nearest_that_exists(word, message):
    for give in (lambda: KLShampoo(named(), **{word: 1}), lambda: param_groups(nn.Linear(2, 2), **{word: 1})):
        with pytest.raises(TypeError, match=message.format(word)):
            give()


TORCHS = ("amsgrad", "maximize", "fused", "foreach", "capturable", "differentiable")


@pytest.mark.parametrize("word", TORCHS)
def test_an_option_of_torchs_is_taken_where_it_is_not_asked_for_and_refused_where_it_is(word):
    for value in (False, None):
        opt = KLShampoo([{"params": named(), word: value}], **{word: value})
        assert word not in opt.param_groups[0]
    with pytest.raises(TypeError, match=f"no option '{word}'"):
        KLShampoo([{"params": named(), word: True}])


def test_keys_of_the_users_own_stay_in_their_group_and_a_likely_mistake_is_told(caplog):
    own = {"lr_scale": 0.65, "last_layer": True, "wd_mult": 0.0, "layer_id": 3, "group_name": "layer_3"}
    opt = KLShampoo([{"params": named(), **own}, {"params": [("later", matrix())], "wieght_decay": 0.1}])
    assert {key: opt.param_groups[0][key] for key in own} == own
    (record,) = caplog.records
    assert "'wieght_decay', which KLShampoo carries along unread; did you mean 'weight_decay'" in record.getMessage()
    other = KLShampoo([{"params": named()}, {"params": [("later", matrix())]}])
    other.load_state_dict(opt.state_dict())
    assert {key: other.param_groups[0][key] for key in own} == own


def test_param_names_of_a_group_are_kept_as_torch_keeps_them():
    groups = [{"params": [matrix()], "param_names": ["mine"]}, {"params": [matrix()], "param_names": ["yours"]}]
    opt = KLShampoo(groups)
    assert [group["param_names"] for group in opt.param_groups] == [["mine"], ["yours"]] and set(opt.plan.owner) == {
        "mine",
        "yours",
    }
    with pytest.raises(ValueError, match="parameter group 0 has 1 parameters and 2 param_names"):
        KLShampoo([{"params": [matrix()], "param_names": ["one", "two"]}])


def test_an_empty_group_may_stand_beside_others():
    opt = KLShampoo([{"params": []}, {"params": named()}, {"params": [], "lr": 0.1}])
    step(opt)
    assert [len(group["params"]) for group in opt.param_groups] == [0, 3, 0]
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_what_is_frozen_may_be_of_any_dtype(dtype):
    frozen = nn.Parameter(torch.zeros(3, 3).to(dtype), requires_grad=False)
    opt = KLShampoo([*named(), ("frozen", frozen)])
    for p in opt.param_groups[0]["params"][:-1]:
        p.grad = torch.randn_like(p)
    opt.step()
    assert "frozen" not in opt.plan.owner and frozen not in opt.state


def test_on_nonfinite_is_skip_or_raise():
    with pytest.raises(ValueError, match='on_nonfinite is "skip" or "raise", not \'ignore\''):
        KLShampoo(named(), on_nonfinite="ignore")


def test_a_process_group_that_is_not_initialised_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="not initialised"):
        KLShampoo(named(), process_group=object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group before"):
        KLShampoo(named())


OWN_BETAS = {("kl_shampoo", "fresh"): (0.9, 0.9), ("muon", "fresh"): (0.85, 0.95), ("muon", "paper"): (0.95, 0.95)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
def test_options_left_open_are_the_recipes(recipe, method):
    (group,) = KLShampoo(named(), recipe=recipe, method=method).param_groups
    assert {key: group[key] for key in recipe_defaults(method, recipe)} == recipe_defaults(method, recipe)
    assert group["betas"] == OWN_BETAS.get((method, recipe), {"fresh": (0.95, 0.95), "paper": (0.9, 0.98)}[recipe])
    assert group["adamw_betas"] == ADAMW_BETAS
    (group,) = KLShampoo(
        named(), recipe=recipe, method=method, betas=(0.5, 0.6), nesterov=False, precondition_frequency=7
    ).param_groups
    assert (group["betas"], group["adamw_betas"], group["nesterov"]) == ((0.5, 0.6), (0.5, 0.6), False)
    assert group["precondition_frequency"] == 7


def test_a_learning_rate_may_be_a_tensor():
    numbers, tensors = named(), named()
    for params, lr in ((numbers, 1e-2), (tensors, torch.tensor(1e-2, dtype=torch.float64))):
        opt = KLShampoo(params, lr=lr)
        for _, p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(numbers, tensors, strict=True))


def test_betas_may_be_tensors_for_matrices_and_for_what_adamw_serves():
    """Of parameters with different steps behind them too, whose coefficients are one for each."""
    numbers, tensors = named(), named()
    first, second, final = torch.tensor(0.2), torch.tensor(0.9), torch.tensor(0.7)
    for params, betas, grown in ((numbers, (0.2, 0.9), 0.7), (tensors, (first, second), final)):
        params += [("late", torch.nn.Parameter(torch.ones(3)))]
        opt = KLShampoo(params, lr=1e-2, betas=betas, final_beta1=grown)
        for step in range(30):
            for name, p in params:
                p.grad = None if name == "late" and step < 20 else torch.ones_like(p)
            opt.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(numbers, tensors, strict=True))


# -- parameters --------------------------------------------------------------------------------------------------------

shared = matrix()
BAD_PARAMETERS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "none at all": (list, ValueError, "empty"),
    "a group of none": (lambda: [{"params": []}, {"lr": 1.0}], ValueError, "group 1 has no 'params'"),
    "twice in a group": (lambda: [("one", shared), ("two", shared)], ValueError, "'two' is given twice.*'one'"),
    "twice without names": (lambda: [shared, shared], ValueError, "'group0.param1' is given twice.*'group0.param0'"),
    "in two groups": (
        lambda: [{"params": [("one", shared)]}, {"params": [("other", shared)]}],
        ValueError,
        "'other' is given twice.*'one'",
    ),
    "in two groups by one name": (
        lambda: [{"params": [("one", shared)]}, {"params": [("one", shared)]}],
        ValueError,
        "'one' is given twice",
    ),
    "a set": (lambda: {shared}, TypeError, "set"),
    "a set in a group": (lambda: [{"params": {shared}}], TypeError, "set"),
    "complex": (lambda: [("z", matrix(dtype=torch.complex64))], TypeError, "'z' is torch.complex64"),
    "not a tensor": (lambda: [("n", 3.0)], TypeError, "'n' is a float"),
    "a module": (lambda: [nn.Linear(2, 2)], TypeError, "Linear"),
    "not a leaf": (lambda: [("p", matrix() * 2)], ValueError, "'p' is not a leaf"),
}


@pytest.mark.parametrize("what", BAD_PARAMETERS)
def test_bad_parameters_are_an_error_that_names_them(what):
    make, kind, message = BAD_PARAMETERS[what]
    with pytest.raises(kind, match=message):
        KLShampoo(make())


@pytest.mark.parametrize("what", [what for what in BAD_PARAMETERS if what not in ("none at all", "a group of none")])
def test_bad_parameters_are_not_added(what):
    make, kind, message = BAD_PARAMETERS[what]
    params = make()
    if not isinstance(params, list) or not isinstance(params[0], dict):
        params = [{"params": params}]
    opt = KLShampoo(named())
    step(opt)
    with pytest.raises(kind, match=message.replace("group0", "group1")):
        for group in params:
            before = fingerprint(opt)
            opt.add_param_group(group)
    assert fingerprint(opt) == before
    step(opt)


def test_a_matrix_that_is_both_here_and_there_is_named_by_both_names():
    opt = KLShampoo(named())
    with pytest.raises(ValueError, match=r"'again' is given twice.*'second'"):
        opt.add_param_group({"params": [("again", opt.param_groups[0]["params"][1])]})


def test_an_unknown_output_head_is_an_error():
    with pytest.raises(ValueError, match="'haed'"):
        param_groups(nn.Sequential(nn.Linear(2, 2)), output_head="haed")


# -- between steps -----------------------------------------------------------------------------------------------------


def change(**options) -> Callable[[KLShampoo], None]:
    return lambda opt: opt.param_groups[0].update(options)


BAD_CHANGES: dict[str, tuple[Callable[[KLShampoo], None], type[Exception], str]] = {
    "lr": (change(lr=NAN), ValueError, "^lr must"),
    "negative lr": (change(lr=-1.0), ValueError, "^lr must"),
    "betas": (change(betas=(0.9, 1.0)), ValueError, r"^betas\[1\] must"),
    "weight decay": (change(weight_decay=INF), ValueError, "^weight_decay must"),
    "T": (change(precondition_frequency=0), ValueError, "^precondition_frequency must"),
    "nesterov": (change(nesterov="yes"), TypeError, "^nesterov is True or False"),
    "polar": (change(polar=-2), ValueError, "^polar is 'start' or a whole number of .* steps, not -2"),
    "staggering": (change(stagger="no"), TypeError, "^stagger is True or False"),
    "method": (change(method="soap"), ValueError, "method.*cannot be changed"),
    "recipe": (change(recipe="paper"), ValueError, "recipe.*cannot be changed"),
    "blocking": (change(blocking="none"), ValueError, "blocking.*cannot be changed"),
    "matrices": (change(matrices={"parts": {0: 2}}), ValueError, "matrices.*cannot be changed"),
    "longest side": (change(max_preconditioner_dim=2), ValueError, "max_preconditioner_dim.*cannot be changed"),
    "merging": (change(merge_dims=False), ValueError, "merge_dims.*cannot be changed"),
}


@pytest.mark.parametrize("what", BAD_CHANGES)
def test_a_bad_change_between_steps_is_an_error_that_changes_nothing(what):
    harm, kind, message = BAD_CHANGES[what]
    opt = KLShampoo(named())
    step(opt)
    before = dict(opt.param_groups[0])
    harm(opt)
    harmed = fingerprint(opt)
    with pytest.raises(kind, match=message):
        step(opt)
    assert fingerprint(opt) == harmed
    opt.param_groups[0].update(before)
    step(opt)


def test_a_parameter_of_another_shape_between_steps_is_an_error_that_names_it():
    opt = KLShampoo(named())
    step(opt)
    opt.param_groups[0]["params"][1].data = torch.ones(5, 3)
    harmed = fingerprint(opt)
    with pytest.raises((ValueError, RuntimeError), match="'second'"):
        step(opt)
    assert fingerprint(opt) == harmed


def test_a_sparse_gradient_is_an_error_that_names_the_parameter_and_the_way_out():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    for params in (model.named_parameters(), param_groups(model)):
        opt = KLShampoo(params)
        before = fingerprint(opt)
        model.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TypeError, match=r"'0.weight' is sparse.*sparse=False"):
            opt.step()
        assert fingerprint(opt) == before
