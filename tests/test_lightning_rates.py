"""What a converted AdamW's learning rate becomes: by the rule for whole models, or its own."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

from kl_dist import KLShampoo
from kl_dist.methods import METHODS, Transfer
from kl_dist.step.engine import step_size
from lightning_plugin import KLShampooStrategy
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.schedulers import peaks
from tests.test_lightning_conversion import Net, step


def rates(optimizer: KLShampoo, group: int = 0) -> tuple[float, float]:
    """What matrices and AdamW's share are trained at now."""
    of = optimizer.param_groups[group]
    return step_size(of, of["method"])[1], step_size(of, "adamw")[1]


def said(before: Optimizer, net: nn.Module, given: dict) -> str:
    return announcement(before, convert(before, net, given), net, given)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("make", [AdamW, Adam])
def test_matrices_take_five_times_the_rate_and_adamws_share_half_of_that(net, make):
    found = convert(make(net.parameters(), lr=2e-3), net, {})
    assert rates(found) == pytest.approx((1e-2, 5e-3)) and found.param_groups[0]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"convert_lr": "keep"}, (2e-3, 2e-3)),
        ({"convert_lr": "keep", "adamw_lr": 1e-3}, (2e-3, 1e-3)),
        ({"convert_lr": "rule", "adamw_lr": 1e-3}, (1e-2, 1e-3)),
        ({"adamw_lr": 1e-3}, (1e-2, 1e-3)),
        ({"lr": 4e-3}, (4e-3, 4e-3)),
        ({"lr": 4e-3, "adamw_lr": 1e-3}, (4e-3, 1e-3)),
        ({"matrix_lr": 4e-3}, (4e-3, 2e-3)),
        ({"method": "muon"}, (1e-2, 5e-3)),
        ({"method": "shampoo"}, (2e-3, 2e-3)),  # grafted onto AdamW's step
    ],
    ids=str,
)
def test_what_the_strategy_is_told_goes_before_the_rule(net, given, expected):
    given = KLShampooStrategy(**given).optimizer_options
    assert rates(convert(AdamW(net.parameters(), lr=2e-3), net, given)) == pytest.approx(expected)


def test_sgds_rate_which_means_something_else_is_not_converted(net):
    found = convert(SGD(net.parameters(), lr=0.1), net, {"lr": 1e-2, "weight_decay": 0.0})
    assert rates(found) == pytest.approx((1e-2, 1e-2))


def test_a_method_of_ones_own_keeps_adamws_rate_until_it_says_another():
    assert {name: method.from_adamw for name, method in METHODS.items()} == {
        **dict.fromkeys(("kl_shampoo", "kl_soap", "soap", "muon"), Transfer(ratio=5.0, ceiling=2e-2)),
        "shampoo": Transfer(),
    }
    own = type(METHODS["soap"])("One's own", {}).from_adamw
    assert [own.factor(peak) for peak in (0.0, 1e-3, 1.0)] == [1, 1, 1]


def test_no_rate_is_lifted_beyond_the_ceiling_nor_lowered_and_none_overtakes_another():
    """lr = a min(5, max(1, 2e-2 / a)), from a reference that goes case by case."""
    transfer = METHODS["kl_shampoo"].from_adamw
    grid = torch.logspace(-6, 0, 241, dtype=torch.float64).tolist()
    lifted = [a * transfer.factor(a) for a in grid]
    expected = [5 * a if a < 4e-3 else 2e-2 if a < 2e-2 else a for a in grid]
    assert lifted == pytest.approx(expected, rel=1e-12)
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(lifted))
    assert transfer.factor(0.0) == 5  # of a peak that is not known


def test_groups_keep_their_proportions_and_options_of_their_own(net):
    groups = [
        {"params": net.body.parameters(), "lr": 1e-3},
        {"params": net.embedding.parameters()},
        {"params": net.head.parameters(), "matrix_lr": 7e-3},
    ]
    found = convert(AdamW(groups, lr=2e-3), net, {})
    assert [rates(found, i) for i in range(3)] == [
        pytest.approx((5e-3, 2.5e-3)),
        pytest.approx((1e-2, 5e-3)),
        pytest.approx((7e-3, 5e-3)),
    ]


def test_schedules_and_rates_set_by_hand_move_both_and_stay_adamws(net):
    optimizer = AdamW(net.parameters(), lr=2e-3)
    warmup = schedules.LambdaLR(optimizer, lambda done: min(1.0, done / 4))
    found = convert(optimizer, net, {}, [warmup])
    assert rates(found) == (0, 0)
    for done in range(1, 5):
        step(net, found)
        warmup.step()
        assert rates(found) == pytest.approx((1e-2 * done / 4, 5e-3 * done / 4))
    assert warmup.get_last_lr() == [2e-3]
    for group in optimizer.param_groups:  # as litgpt sets them, at each step
        group["lr"] = 1e-3
    assert rates(found) == pytest.approx((5e-3, 2.5e-3))


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(3e-3, (1.5e-2, 7.5e-3)), (4e-3, (2e-2, 1e-2)), (8e-3, (2e-2, 2e-2)), (1e-1, (1e-1, 2.5e-1))],
    ids=str,
)
def test_a_high_rate_is_lifted_to_the_ceiling_and_adamws_share_as_ever(net, lr, expected):
    found = convert(AdamW(net.parameters(), lr=lr), net, {})
    assert rates(found) == pytest.approx(expected) and found.param_groups[0]["lr"] == lr


def warm_up_and_cosine(optimizer):
    warmup = schedules.LinearLR(optimizer, 1e-3, total_iters=4)
    return schedules.SequentialLR(optimizer, [warmup, schedules.CosineAnnealingLR(optimizer, 8)], [4])


def of_lambda(function):
    return lambda optimizer: schedules.LambdaLR(optimizer, function)


def poly(done, steps=1000):
    return (1 - done / steps) ** 0.9  # complex beyond its end


def table(done):
    return [0.25, 0.5, 1.0, 0.5][done]


def noam(width=512, warmup=4000):
    return lambda done: width**-0.5 * min((done + 1) ** -0.5, (done + 1) * warmup**-1.5)


@pytest.mark.parametrize(
    ("lr", "make", "peak"),
    [
        (1e-2, warm_up_and_cosine, 1e-2),
        (1e-2, lambda made: schedules.ConstantLR(made, 1e-2), 1e-2),
        (1e-2, lambda made: schedules.StepLR(made, 2, 0.1), 1e-2),
        (1e-2, lambda made: schedules.CosineAnnealingWarmRestarts(made, 5), 1e-2),
        (1e-2, lambda made: schedules.ReduceLROnPlateau(made), 1e-2),
        (1e-3, lambda made: schedules.OneCycleLR(made, 1e-2, total_steps=20), 1e-2),  # which begins at 4e-4
        (1e-3, lambda made: schedules.CyclicLR(made, 1e-4, 1e-2), 1e-2),
        (1e-3, lambda made: schedules.CyclicLR(made, 1e-4, 1e-2, cycle_momentum=False), 1e-2),
        (1e-2, of_lambda(lambda done: min(1.0, done / 500)), 1e-2),
        (1e-2, of_lambda(poly), 1e-2),
        (1e-2, of_lambda(lambda done: (1 - done / 1000) ** 2), 1e-2),  # grows beyond its end
        (1e-2, of_lambda(table), 1e-2),
        (1e-7, of_lambda(lambda done: min(1e5, 10.0**done)), 1e-2),
        (1.0, of_lambda(lambda done: 1e-2), 1e-2),
        (1.0, of_lambda(noam()), 512**-0.5 * 4000**-0.5),
        (1.0, of_lambda(lambda done: 0.0), 0.0),  # nothing is known
    ],
)
def test_of_a_schedule_the_highest_rate_decides(net, lr, make, peak):
    optimizer = AdamW(net.parameters(), lr=lr)
    found = convert(optimizer, net, {}, [make(optimizer)])
    group = found.param_groups[0]
    factor = METHODS["kl_shampoo"].from_adamw.factor(peak)
    assert group["matrix_lr"] / group["base_lr"] == pytest.approx(factor)
    assert group["adamw_lr"] / group["base_lr"] == pytest.approx(2.5)


def test_a_peak_between_the_steps_that_are_looked_at_is_missed_by_a_tenth_at_most(net):
    for top in (17, 333, 54_321):
        optimizer = AdamW(net.parameters(), lr=1.0)
        ramp = schedules.LambdaLR(optimizer, lambda done, top=top: 1e-2 * min(done / top, top / max(done, 1)))
        (found,) = peaks([ramp], optimizer)
        assert 1e-2 / 1.1 <= found <= 1e-2


def test_a_function_that_counts_its_calls_counts_only_its_schedules(net):
    class Calls:
        made = 0

        def __call__(self, done: int) -> float:
            self.made += 1
            return min(1.0, self.made / 50)

    optimizer = AdamW(net.parameters(), lr=1e-2)
    schedule = schedules.LambdaLR(optimizer, Calls())
    assert peaks([schedule], optimizer) == [1e-2] and schedule.lr_lambdas[0].made == 1


def test_a_schedule_of_another_optimizer_says_nothing(net):
    first, second = AdamW(net.body.parameters(), lr=2e-3), AdamW(net.head.parameters(), lr=2e-3)
    others = schedules.OneCycleLR(first, 1.0, total_steps=20)
    assert peaks([others], second) == [2e-3] and peaks([others], first) == [1.0]


def test_groups_have_factors_of_their_own_but_later_ones_no_higher_than_the_first(net):
    groups = [{"params": net.body.parameters(), "lr": 1e-3}, {"params": net.embedding.parameters()}]
    found = convert(AdamW(groups, lr=1e-2), net, {})
    found.add_param_group({"params": net.head.parameters(), "lr": 1e-4})  # and is then raised to the others'
    expected = [(5e-3, 2.5e-3), (2e-2, 2.5e-2), (2e-4, 2.5e-4)]
    assert [rates(found, i) for i in range(3)] == [pytest.approx(one) for one in expected]


def test_adamw_made_with_a_rate_of_zero_has_the_rules_ratio_once_it_is_set(net):
    optimizer = AdamW(net.parameters(), lr=0.0)
    found = convert(optimizer, net, {})
    assert rates(found) == (0, 0)
    optimizer.param_groups[0]["lr"] = 2e-3
    assert rates(found) == pytest.approx((1e-2, 5e-3))


def test_a_schedule_of_ones_own_goes_on_for_it_is_not_touched(net):
    class Own:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.param_groups[0]["lr"] /= 2

    optimizer = AdamW(net.parameters(), lr=2e-3)
    schedule = Own(optimizer)
    found = convert(optimizer, net, {}, [schedule])
    schedule.step()
    assert rates(found) == pytest.approx((5e-3, 2.5e-3))


def test_groups_that_are_added_later_follow_the_rule(net):
    found = convert(AdamW(net.body.parameters(), lr=2e-3), net, {})
    found.add_param_group({"params": [net.embedding.weight], "lr": 1e-4})
    found.add_param_group({"params": net.head.parameters()})
    assert rates(found, 1) == pytest.approx((5e-4, 2.5e-4)) and rates(found, 2) == pytest.approx((1e-2, 5e-3))


@pytest.mark.parametrize("kept", ["body", "head"])
def test_where_most_is_frozen_adamws_rate_stays_unless_told(net, kept):
    """Of 28 + 30 + 21 numbers of a model, as where adapters or a new head are trained."""
    for name, part in net.named_children():
        part.requires_grad_(name == kept)

    def adamw():
        return AdamW(net.parameters(), lr=2e-3)

    assert rates(convert(adamw(), net, {})) == (2e-3, 2e-3)
    assert rates(convert(adamw(), net, {"convert_lr": "rule"})) == pytest.approx((1e-2, 5e-3))
    net.embedding.requires_grad_(True)
    assert rates(convert(adamw(), net, {})) == pytest.approx((1e-2, 5e-3))


def test_one_line_tells_the_rates_and_how_to_have_others(net):
    def lines(given, make=AdamW):
        found = said(make(net.parameters(), lr=2e-3), net, given).splitlines()
        return [line for line in found if line.startswith("learning rates")]

    (line,) = lines({})
    assert "0.01 for matrices and 0.005 for what AdamW serves, in proportion to AdamW's 0.002" in line
    assert "convert_lr='keep'" in line
    assert "lifts" not in line and "0.001 for what AdamW serves" in lines({"adamw_lr": 1e-3})[0]
    high = said(AdamW(net.parameters(), lr=1e-2), net, {})
    assert "0.02 for matrices (the rule lifts no rate beyond 0.02) and 0.025 for what AdamW serves" in high
    assert "in proportion to Adam's" in lines({}, Adam)[0]
    assert lines({"method": "shampoo"}) == ["learning rates are AdamW's own, 0.002"]
    net.embedding.requires_grad_(False)
    net.body.requires_grad_(False)
    (line,) = lines({})
    assert line.startswith(
        "learning rates are AdamW's own, 0.002, since most of the module is frozen: convert_lr='rule'"
    )
    assert not lines({"lr": 1e-2}) and not lines({"convert_lr": "keep"}) and not lines({"matrix_lr": 1e-2})
    made = KLShampoo(net.named_parameters(), lr=2e-3)
    assert "learning rates" not in announcement(made, convert(made, net, {"convert_lr": "keep"}), net, {})


def test_what_convert_lr_cannot_be_is_said():
    with pytest.raises(ValueError, match='convert_lr is "rule" or "keep", not \'rules\''):
        KLShampooStrategy(convert_lr="rules")
    for told in ({"lr": 1e-2}, {"matrix_lr": 1e-2}):
        with pytest.raises(ValueError, match="leave out lr and matrix_lr"):
            KLShampooStrategy(convert_lr="rule", **told)


def test_a_groups_own_method_has_its_own_ratio(net):
    """Shampoo's updates have AdamW's size, so that its rate is AdamW's, whatever the strategy's method."""
    first, second, *others = net.parameters()
    matrices = [{"params": [first], "method": "shampoo"}, {"params": [second], "method": "kl_shampoo"}]
    rest = [{"params": others}]
    for given, usual in (({}, 1e-2), ({"method": "shampoo"}, None)):
        made = convert(AdamW(matrices + rest, lr=2e-3), net, given)
        assert [group.get("matrix_lr") for group in made.param_groups] == [
            None,
            pytest.approx(1e-2),
            usual and pytest.approx(usual),
        ]


def test_all_to_adamw_is_converted_without_a_word_on_the_rule(net):
    made = convert(AdamW(net.parameters(), lr=2e-3), net, {"method": "adamw"})
    assert all(group["lr"] == 2e-3 and group.get("matrix_lr") is None for group in made.param_groups)


def test_a_rate_in_proportion_to_none_is_refused(net):
    with pytest.raises(
        ValueError, match="adamw_lr is kept in proportion to lr, which is 0 here: give the strategy an lr"
    ):
        convert(AdamW(net.parameters(), lr=0.0), net, {"adamw_lr": 1e-3})
