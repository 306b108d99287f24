"""Every schedule of torch's moves KLShampoo's updates in proportion, for matrices and AdamW's share alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from kl_dist import KLShampoo
from tests.made_up import furthest, parameters, same, train, values

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12, cycle_momentum=False),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, 8)], [4]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=2, factor=0.5),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=1e-3, anneal_epochs=5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False),
}


def moves_under(schedule: str | None, **options) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The learning rate and the change of every weight in each of ten steps."""
    params = parameters()
    opt = KLShampoo(params.items(), lr=1e-2, weight_decay=0.0, **options)
    scheduler = None if schedule is None else SCHEDULES[schedule](opt)
    lrs, moves = [], []
    for step in range(10):
        lrs.append(opt.param_groups[0]["lr"])
        before = values(params)
        train(opt, params, [step])
        moves.append({name: p.detach() - before[name] for name, p in params.items()})
        if scheduler is not None:
            scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
    return lrs, moves


@pytest.mark.parametrize(
    "own", [{}, {"adamw_lr": 1e-3}, {"matrix_lr": 3e-2}, {"matrix_lr": 3e-2, "adamw_lr": 1e-3}], ids=str
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_scale_every_update(schedule, own):
    """The rates are those that AdamW gets, and as gradients do not depend on weights, updates are in proportion.

    `matrix_lr` and `adamw_lr` are what each gets while `lr` has its constructed value, and both move alike.
    """
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = SCHEDULES[schedule](theirs)
    steady = moves_under(None, **own)[1]
    for lr, moved, expected in zip(*moves_under(schedule, **own), steady, strict=True):
        assert lr == theirs.param_groups[0]["lr"]
        assert furthest(moved, {name: x * (lr / 1e-2) for name, x in expected.items()}) < 1e-14
        theirs.step()
        scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
    plain = moves_under(None)[1]
    for name in steady[0]:
        alone = own.get("adamw_lr" if name in ("vector", "scalar") else "matrix_lr", 1e-2)
        assert torch.allclose(steady[0][name], plain[0][name] * alone / 1e-2)


def test_one_cycle_moves_the_first_beta_and_keeps_the_second():
    params, still = parameters(), parameters()
    opt = KLShampoo(params.items(), lr=1e-2, betas=(0.9, 0.95))
    scheduler = lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=20, base_momentum=0.8, max_momentum=0.9)
    betas = []
    train(opt, params, range(19), lambda: (scheduler.step(), betas.append(opt.param_groups[0]["betas"])))
    assert min(beta1 for beta1, _ in betas) < 0.81 and max(beta1 for beta1, _ in betas) > 0.89
    assert {beta2 for _, beta2 in betas} == {0.95}
    opt = KLShampoo(still.items(), lr=1e-2, betas=(0.9, 0.95), adamw_betas=(0.9, 0.95))
    scheduler = lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=20, cycle_momentum=False)
    train(opt, still, range(19), scheduler.step)
    assert furthest(values(params), values(still)) > 1e-4


def test_a_learning_rate_of_zero_moves_nothing():
    params = parameters()
    before = values(params)
    train(KLShampoo(params.items(), lr=0.0), params, range(3))
    assert same(values(params), before)
