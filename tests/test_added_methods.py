"""A method that is added in one file has what all have: plans, plain torch, Lightning's names, DeepSpeed's types."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kl_dist
from kl_dist import KLShampoo
from kl_dist.methods import Flops, Hyper, MatrixState, Rule, Side, add_rule, averages, kronecker
from kl_dist.methods.state import unstarted
from kl_dist.options import recipe_defaults
from tests import deepspeed_runs, lightning_runs
from tests.models import Weights, deviation, raising, same_bits, train_with_ddp

NAME, BETAS = "scaled_momentum", (0.8, 0.9)
STEPS = 12


@dataclass
class ScaledState(MatrixState):
    scale: Tensor  # (B,)


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> ScaledState:
    return ScaledState(*unstarted(batch), like.new_zeros(batch, *shape), like.new_zeros(batch))


def nothing(*_: Any) -> None:
    pass


def update(state: ScaledState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """U = N / s: N the bias-corrected momentum, s the root mean square of the gradients."""
    state.step.add_(1)
    scale = averages.tracked_scale(state.scale, averages.mean_square(grad), state.step, hyper.betas[1])
    return averages.momentum(state.exp_avg, grad, state.step, hyper) / kronecker.column(scale, grad)


def no_products(shape: Sequence[int], sides: Sequence[Side]) -> Flops:
    return Flops(0, 0)


RULE = Rule(allocate, nothing, update, nothing, flops=no_products, working_copies=5, defaults={"betas": BETAS})


def added() -> str:
    """To this process; again is no matter. Not to pytest's own, where other tests go through all methods."""
    add_rule(NAME, "fresh", RULE)
    return NAME


def planned(group: dist.ProcessGroup) -> None:
    shapes = {"a": (64, 64), "b": (64, 64), "bias": (64,)}
    plan = kl_dist.plan(shapes, 2, method=added(), stagger=False)
    assert sorted(plan.owner[name] for name in "ab") == [0, 1] and plan.balance == 1
    matrix, slice_of_bias = 4 * 64 * 64 + 4 + 8 + 1, 2 * 4 * 32 + 8  # exp_avg, scale, step, started
    assert plan.state_bytes == (matrix + slice_of_bias,) * 2
    assert plan.working_bytes(0) == 5 * 4 * 64 * 64
    assert plan.cost[0] == 16 * (2 * (matrix + slice_of_bias) + 2 * 4 * (64 * 64 + 32))  # memory traffic alone
    assert NAME in kl_dist.METHODS and recipe_defaults(NAME, "fresh")["betas"] == BETAS


def test_its_plan_has_its_own_bytes_and_flops(world):
    world.run(planned, 1)


def one_matrix(group: dist.ProcessGroup) -> None:
    """Two steps against the equation in float64, momentum one step ahead (Nesterov's), and the group's own betas."""
    generator = torch.Generator().manual_seed(0)
    first, second, start = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = KLShampoo([("weight", weight)], lr=0.1, weight_decay=0.0, method=added(), process_group=group)
    expected, exp_avg, square = start, torch.zeros(5, 4), 0.0
    for t, gradient in enumerate((first, second), 1):
        weight.grad = gradient.clone()
        optimizer.step()
        exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * float(gradient.square().mean())
        ahead = (BETAS[0] * exp_avg + (1 - BETAS[0]) * gradient) / (1 - BETAS[0] ** (t + 1))
        expected = expected - 0.1 * ahead / math.sqrt(square / (1 - BETAS[1] ** t))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_it_computes_what_its_file_says(world):
    world.run(one_matrix, 1)


def in_torch(group: dist.ProcessGroup) -> Weights:
    options = {"lr": 1e-2, "method": added(), "recipe": "fresh"}
    return train_with_ddp(group, torch.float64, 16, STEPS, None, options)[0]


def test_plain_torch_trains_it_at_any_number_of_ranks(world):
    (expected,), found = world.run(in_torch, 1), world.run(in_torch, 3)
    assert all(deviation(weights, expected) <= 1e-9 for weights in found)


def in_lightning(group: dist.ProcessGroup, namespace: str) -> tuple[Weights, Weights]:
    weights = lightning_runs.fit(group, added(), namespace=namespace)
    return weights, lightning_runs.alone(method=NAME, betas=BETAS, lr=lightning_runs.LR)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.full)])
def test_lightning_trains_it_by_its_name(worlds, namespace):
    for weights, expected in worlds[2].run(in_lightning, 2, namespace, timeout=120):
        assert deviation(weights, expected) <= 1e-9


def in_deepspeed(group: dist.ProcessGroup, stage: int) -> tuple[Weights, Weights]:
    given = deepspeed_runs.config(stage, ranks=group.size())
    with deepspeed_runs.deepspeed_here(group) as deepspeed:
        given["optimizer"]["type"] = added()
        engine = deepspeed_runs.engine_of(deepspeed, given)
        deepspeed_runs.train(engine, range(STEPS))
        weights = deepspeed_runs.weights_of(deepspeed, engine)
        engine.destroy()
    return weights, deepspeed_runs.alone(NAME)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.full)])
def test_a_deepspeed_config_trains_it_by_its_name(worlds, stage):
    (weights, expected), (others, _) = worlds[2].run(in_deepspeed, 2, stage, timeout=120)
    assert same_bits(weights, others) and deviation(weights, expected) <= 1e-5


def refused(group: dist.ProcessGroup) -> None:
    weight, method = torch.nn.Parameter(torch.ones(3, 3)), added()
    with raising(ValueError, "unknown recipe 'paper'; there are 'fresh'"):
        KLShampoo([weight], method=method, recipe="paper", process_group=group)
    with raising(ValueError, "unknown method 'scaled_momentums'; did you mean 'scaled_momentum'"):
        KLShampoo([weight], method="scaled_momentums", process_group=group)


def test_its_name_and_recipes_are_known_to_the_options(world):
    world.run(refused, 1)


@pytest.mark.parametrize(("method", "recipe"), [("adamw", "fresh"), ("with.dot", "fresh"), ("mine", "two words")])
def test_a_name_that_could_not_be_saved_is_refused(method, recipe):
    with pytest.raises(ValueError, match="a method or recipe of one's own is named by a word"):
        add_rule(method, recipe, RULE)
    assert tuple(kl_dist.METHODS) == ("kl_shampoo", "kl_soap", "soap", "shampoo", "muon")
