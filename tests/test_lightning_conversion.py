"""AdamW becomes KLShampoo: what carries over, what becomes ours, what is refused."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam
from torch.optim import lr_scheduler as schedules

from kl_dist import KLShampoo
from kl_dist.options import DEFAULTS, RECIPE_DEFAULTS
from lightning_plugin import KLShampooStrategy
from lightning_plugin.conversion import announcement, convert
from tests.stacks import Speaks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


class Library(nn.Module):
    """A model of a library, which knows its output head, inside a user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def get_output_embeddings(self) -> nn.Module:
        return self.net.head


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def routes(optimizer: KLShampoo) -> dict[str, str]:
    plan = optimizer.plan
    return {plan.parameters[unit.parameter].name: unit.method for unit in plan.units}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    tokens = torch.randint(7, (5,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(tokens).square().sum().backward()
    optimizer.step()


def test_one_group_carries_over_and_default_betas_become_ours(net):
    found = convert(AdamW(net.parameters(), lr=3e-3, weight_decay=0.2, eps=1e-7), net, {})
    (group,) = found.param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (3e-3, 0.2, 1e-7)
    assert group["betas"] == (0.9, 0.9) and group["adamw_betas"] == (0.9, 0.999)
    assert group["param_names"] == [name for name, _ in net.named_parameters()]
    assert routes(found)["embedding.weight"] == "adamw"
    assert routes(found)["head.weight"] == routes(found)["body.weight"] == "kl_shampoo"


def test_betas_that_were_set_are_kept_and_told(net):
    before = AdamW(net.parameters(), betas=(0.8, 0.97))
    after = convert(before, net, {})
    (group,) = after.param_groups
    assert group["betas"] == group["adamw_betas"] == (0.8, 0.97)
    assert "betas=(0.8, 0.97) of group 0 were set" in announcement(before, after, net, {})
    before = AdamW(net.parameters())
    assert "were set" not in announcement(before, convert(before, net, {}), net, {})


def test_betas_given_to_the_strategy_go_before(net):
    given = {"betas": (0.7, 0.75), "adamw_betas": (0.5, 0.6)}
    (group,) = convert(AdamW(net.parameters(), betas=(0.8, 0.97)), net, given).param_groups
    assert (group["betas"], group["adamw_betas"]) == ((0.7, 0.75), (0.5, 0.6))


@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", ["kl_soap", "soap", "shampoo"])
def test_default_betas_become_those_of_the_method_and_recipe(net, method, recipe):
    (group,) = convert(AdamW(net.parameters()), net, {"method": method, "recipe": recipe}).param_groups
    (plain,) = KLShampoo(net.named_parameters(), method=method, recipe=recipe).param_groups
    assert group["betas"] == plain["betas"] and group["method"] == method and group["recipe"] == recipe


OPTIONS = {
    **{"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "method": "shampoo", "recipe": "paper"},
    **{
        "precondition_frequency": 3,
        "shampoo_beta": 0.7,
        "nesterov": True,
        "final_beta1": 0.0,
        "polar": 0,
        "stagger": True,
        "blocking": "square",
    },
    **{"max_preconditioner_dim": 5, "long_side": "diagonal", "merge_dims": True, "matrices": {"rows": (1,)}},
    **{
        "shampoo_exponent": 0.3,
        "adjust_lr_fn": "original",
        "compute_dtype": "bfloat16",
        "matrix_lr": 1e-2,
        "adamw_lr": 1e-4,
        "adamw_betas": (0.7, 0.8),
        "adamw_names": ("body.weight",),
    },
}


def test_every_option_of_the_strategy_is_the_groups(net):
    assert OPTIONS.keys() == DEFAULTS.keys()
    given = KLShampooStrategy(**OPTIONS, on_nonfinite="raise", output_head="head").optimizer_options
    found = convert(AdamW(net.parameters()), net, given)
    (group,) = found.param_groups
    assert {name: group[name] for name in OPTIONS if name != "adamw_names"} == {
        name: x for name, x in OPTIONS.items() if name != "adamw_names"
    }
    assert {name for name, method in routes(found).items() if method == "adamw"} >= {"body.weight", "head.weight"}
    net.body.weight.grad = torch.full_like(net.body.weight, torch.nan)
    with pytest.raises(FloatingPointError):
        found.step()


def test_every_group_keeps_its_keys(net):
    groups = [
        {"params": net.body.parameters(), "lr": 1e-2, "weight_decay": 0.0, "lr_scale": 0.5, "name": "body"},
        {"params": net.embedding.parameters(), "weight_decay": 0.3},
        {"params": net.head.parameters(), "precondition_frequency": 7, "note": {"a": 1}},
    ]
    found = convert(AdamW(groups, lr=2e-3), net, {}).param_groups
    assert [group["lr"] for group in found] == [1e-2, 2e-3, 2e-3]
    assert [group["weight_decay"] for group in found] == [0.0, 0.3, 0.01]
    assert found[0]["lr_scale"] == 0.5 and found[0]["name"] == "body" and found[2]["note"] == {"a": 1}
    assert [group["precondition_frequency"] for group in found] == [2, 2, 7]
    assert not any(key in found[0] for key in ("amsgrad", "fused", "foreach", "decoupled_weight_decay"))


def test_head_by_name_by_the_librarys_word_and_by_tying_goes_to_adamw(net):
    assert routes(convert(AdamW(net.parameters()), net, {"output_head": "head"}))["head.weight"] == "adamw"
    library = nn.Sequential(Library())
    assert routes(convert(AdamW(library.parameters()), library, {}))["0.net.head.weight"] == "adamw"
    untied = Net()
    untied.head = nn.Linear(6, 7)
    assert routes(convert(AdamW(untied.parameters()), untied, {"output_head": ""}))["head.weight"] == "kl_shampoo"
    found = convert(before := AdamW(untied.parameters()), untied, {})
    assert routes(found)["head.weight"] == "adamw"
    assert "'head' is taken for the output head" in announcement(before, found, untied, {})
    tied = Net()
    tied.head = nn.Linear(4, 7, bias=False)
    tied.head.weight = tied.embedding.weight
    assert "head.weight" not in routes(convert(AdamW(tied.parameters()), tied, {}))


def test_a_module_whose_only_part_is_called_module_is_converted(net):
    whole = nn.ModuleDict({"module": net})
    assert routes(convert(AdamW(whole.parameters()), whole, {}))["embedding.weight"] == "adamw"


def test_names_given_to_the_strategy_go_to_adamw_too(net):
    found = routes(convert(AdamW(net.parameters()), net, {"adamw_names": ["body.weight"]}))
    assert found["body.weight"] == found["embedding.weight"] == "adamw"
    with pytest.raises(ValueError, match=r"'bodi\.weight'"):
        convert(AdamW(net.parameters()), net, {"adamw_names": ["bodi.weight"]})


def test_experts_are_read_one_by_one_and_what_is_unknown_is_told_of(caplog):
    model = nn.ModuleDict({"experts": Speaks(2, 3, 4, False, True)})
    model.own = nn.Parameter(torch.zeros(3, 4, 5))
    groups = [{"params": [model.own]}, {"params": model.experts.parameters(), "weight_decay": 0.0}]
    found = convert(AdamW(groups), model, {})
    served = {unit.name: unit.block.shape for unit in found.plan.units if unit.method == "kl_shampoo"}
    assert served == {f"experts.gate_up_proj[{i}]": (3, 4) for i in range(4)} | {
        f"experts.down_proj[{i}]": (4, 3) for i in range(2)
    }
    assert "AdamW serves own:" in caplog.text and found.param_groups[1]["adamw_names"] == ("experts.gate_up_proj_bias",)


def test_what_the_strategy_says_of_matrices_goes_before_what_modules_do():
    model = nn.ModuleDict({"experts": Speaks(2, 3, 4, False, True)})
    given = {"matrices": {"experts.gate_up_proj": {"batch": (0,)}}}
    names = {unit.name: unit.block.shape for unit in convert(AdamW(model.parameters()), model, given).plan.units}
    assert names["experts.gate_up_proj[1]"] == (6, 4) and names["experts.down_proj[1]"] == (4, 3)
    whole = convert(AdamW([model.experts.down_proj]), model, {"matrices": {"rows": (0,), "columns": (1, 2)}})
    assert [unit.block.shape for unit in whole.plan.units] == [(2, 12)]
    with pytest.raises(ValueError, match="matrices has 'expert'"):
        convert(AdamW(model.parameters()), model, {"matrices": {"expert": {"batch": (0,)}}})


def test_a_learning_rate_of_the_strategys_own_scales_groups_and_schedule(net):
    optimizer = AdamW([{"params": net.body.parameters()}, {"params": net.head.parameters(), "lr": 5e-4}], lr=1e-3)
    scheduler = schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    found = convert(optimizer, net, {"lr": 5e-3, "adamw_lr": 1e-3}, [scheduler])
    assert [group["lr"] for group in found.param_groups] == [0, 0]
    assert [group["adamw_lr"] for group in found.param_groups] == [pytest.approx(1e-3), pytest.approx(5e-4)]
    for _ in range(2):
        found.step()
        scheduler.step()
    assert [group["lr"] for group in found.param_groups] == [pytest.approx(5e-3), pytest.approx(2.5e-3)]


@pytest.mark.parametrize(
    ("decays", "expected"), [((0.1, 0.0), [0.5, 0.0]), ((0.1, 0.2), [0.5, 0.5]), ((0.0, 0.0), [0.5, 0.5])]
)
def test_a_weight_decay_of_the_strategys_own_spares_groups_set_apart(net, decays, expected):
    pairs = zip((net.body, net.head), decays, strict=True)
    groups = [{"params": part.parameters(), "weight_decay": decay} for part, decay in pairs]
    found = convert(AdamW(groups), net, {"weight_decay": 0.5})
    assert [group["weight_decay"] for group in found.param_groups] == expected


SCHEDULES = {
    "LambdaLR": lambda opt: schedules.LambdaLR(opt, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda opt: schedules.CosineAnnealingLR(opt, 7),
    "LinearLR": lambda opt: schedules.LinearLR(opt, 0.1, total_iters=4),
    "StepLR": lambda opt: schedules.StepLR(opt, 2),
    "OneCycleLR": lambda opt: schedules.OneCycleLR(opt, 3e-2, total_steps=9),
    "CyclicLR": lambda opt: schedules.CyclicLR(opt, 1e-4, 1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: schedules.CosineAnnealingWarmRestarts(opt, 3),
    "SequentialLR": lambda opt: schedules.SequentialLR(
        opt, [schedules.LinearLR(opt, 0.1, total_iters=3), schedules.CosineAnnealingLR(opt, 6)], [3]
    ),
    "ChainedScheduler": lambda opt: schedules.ChainedScheduler(
        [schedules.ConstantLR(opt, 0.5, 3), schedules.ExponentialLR(opt, 0.9)], opt
    ),
}


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_as_they_would_have(net, name, factor):
    """The learning rates, and momenta where they are cycled, of a schedule on AdamW itself."""
    twin = AdamW(Net().parameters(), lr=1e-3)
    expected = SCHEDULES[name](twin)
    optimizer = AdamW(net.parameters(), lr=1e-3)
    scheduler = SCHEDULES[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = convert(optimizer, net, {} if factor == 1 else {"lr": 1e-3 * factor}, [scheduler])
        for i in range(8):
            assert found.param_groups[0]["lr"] == pytest.approx(factor * twin.param_groups[0]["lr"], rel=1e-9)
            if "max_momentum" in twin.param_groups[0]:
                assert found.param_groups[0]["betas"][0] == pytest.approx(twin.param_groups[0]["betas"][0])
                assert found.param_groups[0]["betas"][1] == 0.9
            step(net, found, i)
            scheduler.step()
            twin.step()
            expected.step()


def test_reduce_on_plateau_drives_the_converted_optimizer(net):
    optimizer = AdamW(net.parameters(), lr=1e-3)
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=0)
    found = convert(optimizer, net, {}, [scheduler])
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert found.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_schedulers_of_other_optimizers_are_left_alone(net):
    other = AdamW(Net().parameters())
    scheduler = schedules.StepLR(other, 1)
    convert(AdamW(net.parameters()), net, {}, [scheduler])
    assert scheduler.optimizer is other


def test_hooks_carry_over_and_the_old_optimizer_says_that_it_is_retired(net):
    calls = []
    optimizer = AdamW(net.parameters())
    optimizer.register_step_post_hook(lambda opt, *_: calls.append(type(opt).__name__))
    found = convert(optimizer, net, {})
    step(net, found)
    assert calls == ["KLShampoo"]
    with pytest.raises(RuntimeError, match=r"self\.optimizers\(\)"):
        optimizer.step()


def test_klshampoo_is_returned_as_it_is(net):
    optimizer = KLShampoo(net.named_parameters(), method="soap")
    assert convert(optimizer, net, {}) is optimizer
    assert convert(optimizer, net, {"method": "soap"}) is optimizer
    with pytest.raises(ValueError, match=r"method='kl_soap'.*one of the two"):
        convert(optimizer, net, {"method": "kl_soap"})
    mixed = KLShampoo([{"params": net.body.parameters()}, {"params": net.head.parameters(), "method": "adamw"}])
    assert convert(mixed, net, {"method": "kl_shampoo"}) is mixed
    with pytest.raises(ValueError, match=r"lr=0\.1"):
        convert(optimizer, net, {"lr": 0.1})


def test_adam_without_decay_and_sgd_with_the_strategys_numbers_are_converted(net):
    assert convert(Adam(net.parameters(), lr=1e-2), net, {}).param_groups[0]["lr"] == 1e-2
    assert convert(Adam(net.parameters(), weight_decay=0.1), net, {"weight_decay": 0.3}).defaults["lr"] == 1e-3
    found = convert(SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True), net, {"lr": 1e-2})
    assert found.param_groups[0]["lr"] == pytest.approx(1e-2) and found.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda p: Adam(p, weight_decay=0.1), ValueError, r"Adam's weight_decay=0\.1 .*AdamW"),
        (lambda p: SGD(p, lr=0.1), ValueError, "SGD.*give the strategy an lr"),
        (lambda p: AdamW(p, amsgrad=True), ValueError, "amsgrad"),
        (lambda p: AdamW(p, maximize=True), ValueError, "negate the loss"),
        (lambda p: NAdam(p), TypeError, "NAdam, which cannot be converted"),
        (lambda p: torch.optim.LBFGS(p), TypeError, "LBFGS, which cannot be converted"),
    ],
)
def test_what_means_something_else_is_refused(net, make, kind, match):
    with pytest.raises(kind, match=match):
        convert(make(net.parameters()), net, {})


def test_sgd_with_decay_needs_both_numbers(net):
    with pytest.raises(ValueError, match="SGD's weight_decay"):
        convert(SGD(net.parameters(), lr=0.1, weight_decay=0.1), net, {"lr": 1e-2})


def test_the_converted_optimizer_trains_as_one_made_by_hand(net):
    twin = Net()
    twin.load_state_dict(net.state_dict())
    found = convert(AdamW(net.parameters(), lr=2e-3), net, {})
    named = list(twin.named_parameters())
    rates = {"lr": 1e-2, "adamw_lr": 5e-3}
    ours = KLShampoo(named, **rates, betas=(0.9, 0.9), adamw_betas=(0.9, 0.999), adamw_names=["embedding.weight"])
    for i in range(5):
        step(net, found, i)
        step(twin, ours, i)
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in pairs)  # 5 x 2e-3 is rounded otherwise


@pytest.mark.parametrize("make", [AdamW, KLShampoo])
def test_a_parameter_that_the_module_does_not_have_is_refused(net, make):
    with pytest.raises(ValueError, match=r"of shape \(3, 3\), is no parameter of the module"):
        convert(make([*net.parameters(), nn.Parameter(torch.ones(3, 3))]), net, {})


def test_groups_that_are_added_later_are_converted_as_the_first_were(net):
    optimizer = AdamW(net.body.parameters(), lr=2e-3, weight_decay=0.3, eps=1e-6, betas=(0.8, 0.97))
    found = convert(optimizer, net, {})
    found.add_param_group({"params": [net.embedding.weight], "lr": 1e-4})
    found.add_param_group({"params": net.head.parameters()})
    first, second, third = found.param_groups
    for group in (second, third):
        assert all(group[key] == first[key] for key in ("weight_decay", "eps", "betas", "adamw_betas"))
    assert (second["lr"], third["lr"]) == (1e-4, 2e-3)
    assert routes(found)["embedding.weight"] == "adamw" and routes(found)["head.weight"] == "kl_shampoo"


def test_what_is_done_to_the_old_optimizers_groups_reaches_the_new_one(net):
    optimizer = AdamW(net.parameters(), lr=1e-2)
    scheduler = schedules.StepLR(optimizer, 1)  # kept by the user alone
    found = convert(optimizer, net, {})
    step(net, found)
    scheduler.step()
    assert found.param_groups[0]["lr"] == pytest.approx(1e-3)
    optimizer.param_groups[0]["lr"] = 5e-4
    assert found.param_groups[0]["lr"] == 5e-4


def test_a_learning_rate_is_scaled_by_the_one_that_was_given(net):
    groups = [{"params": net.body.parameters(), "lr": 3e-4}, {"params": net.head.parameters(), "lr": 1e-4}]
    found = convert(AdamW(groups), net, {"lr": 1.5e-3})
    assert [group["lr"] for group in found.param_groups] == [pytest.approx(1.5e-3), pytest.approx(5e-4)]


def test_a_scheduler_that_keeps_rates_in_its_own_way_is_refused_where_they_are_scaled(net):
    class Own:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = AdamW(net.parameters())
    with pytest.raises(ValueError, match="Own keeps learning rates"):
        convert(optimizer, net, {"lr": 1e-2}, [Own(optimizer)])
