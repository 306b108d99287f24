"""Training on 1, 2, 3 or 4 ranks under DDP gives the weights that one process gets."""

from functools import cache, partial

import pytest
import torch

from kl_dist import KLShampoo
from kl_dist.methods import rule
from tests.models import METHODS, deviation, same_bits, train_alone, train_with_ddp, zoo, zoo_groups
from tests.noise import NOISE, float32_limit
from tests.products import product

STEPS, LR = 16, 1e-2

# recipe "paper" keeps null spaces, in which rounding errors choose the basis: its factors have to be of full rank soon
HIDDEN = {"fresh": 140, "paper": 16}


@cache
def one_process(method: str, recipe: str, dtype: torch.dtype, seed: int = 0, hidden: int = 0, **options):
    """Weights after STEPS; with a seed, under relative noise on the gradients ("paper": but the first step's)."""
    model = zoo(dtype, hidden or HIDDEN[recipe])
    optimizer = KLShampoo(zoo_groups(model), lr=LR, method=method, recipe=recipe, **options)
    generator = torch.Generator().manual_seed(seed)

    def disturb(step: int) -> None:
        for parameter in model.parameters():
            if seed and (step or recipe == "fresh") and parameter.grad is not None:
                noise = torch.randn(parameter.grad.shape, generator=generator, dtype=torch.float64)
                parameter.grad.copy_(parameter.grad.double() * (1 + NOISE * noise))

    return train_alone(model, optimizer, range(STEPS), disturb)


YARDSTICKS = {
    f"ddp {recipe} {method}": partial(one_process, method, recipe, torch.float32)
    for method in METHODS
    for recipe in HIDDEN
}


def on_ranks(world, world_size, method, recipe, dtype, bucket_bytes=None, hidden=0, **options):
    """The weights after STEPS, which are the same on all ranks, and the number of buckets."""
    options = {"lr": LR, "method": method, "recipe": recipe, **options}
    results = world.run(train_with_ddp, world_size, dtype, hidden or HIDDEN[recipe], STEPS, bucket_bytes, options)
    weights, buckets = results[0]
    assert all(same_bits(others, weights) for others, _ in results)
    return weights, buckets


@product(method=METHODS, recipe=HIDDEN, world_size=[1, 2, 3, 4], dtype=[torch.float64, torch.float32])
def test_weights_do_not_depend_on_the_number_of_ranks(world, method, recipe, world_size, dtype):
    """But for rounding: in float32 no more than noise of 1e-7 on the gradients makes of them."""
    weights, _ = on_ranks(world, world_size, method, recipe, dtype)
    limit = 1e-9 if dtype == torch.float64 else float32_limit(f"ddp {recipe} {method}")
    if (method, recipe, dtype) == ("muon", "paper", torch.float32):
        limit = LR * 2**-8  # its products are bfloat16's: what noise moves across a rounding moves that far
    assert deviation(weights, one_process(method, recipe, dtype)) <= limit


@product(method=METHODS, recipe=HIDDEN)
def test_the_other_schedule_of_refreshes_does_not_depend_on_the_number_of_ranks(world, method, recipe):
    stagger = recipe == "paper"
    weights, _ = on_ranks(world, 3, method, recipe, torch.float64, stagger=stagger)
    assert deviation(weights, one_process(method, recipe, torch.float64, stagger=stagger)) <= 1e-9
    changed = deviation(weights, one_process(method, recipe, torch.float64)) > 1e-6
    assert changed is (rule(method, recipe).refresh is not None)


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_small_buckets_give_the_same_weights(world, world_size):
    weights, buckets = on_ranks(world, world_size, "kl_shampoo", "fresh", torch.float64, bucket_bytes=4096, hidden=560)
    assert buckets >= 4
    assert deviation(weights, one_process("kl_shampoo", "fresh", torch.float64, hidden=560)) <= 1e-9


def one_matrix(group, steps: int) -> tuple[torch.Tensor, list[int]]:
    """A single matrix stepped with made-up gradients: it, and which ranks own something."""
    torch.manual_seed(2)
    parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = KLShampoo([("only", parameter)], process_group=group)
    for _ in range(steps):
        parameter.grad = torch.randn(5, 3, dtype=torch.float64)
        optimizer.step()
    return parameter.detach(), sorted(set(optimizer.plan.owner.values()))


def test_ranks_without_a_matrix_take_part(world):
    expected, _ = one_matrix(None, STEPS)
    for weight, owners in world.run(one_matrix, 4, STEPS):
        assert len(owners) == 1
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)
