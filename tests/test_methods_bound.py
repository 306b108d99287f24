"""`polar="bounded"`, the default: no update goes far beyond where whitening ends for a gradient that stays."""

import pytest
import torch
from torch import Tensor

from kl_dist.methods import averages, bound, polar
from tests.models import deviation
from tests.paths import UNIT_LR, WHOLE, follow, train, train_many, update_sizes
from tests.products import product
from tests.sharded import train_alone, train_sharded
from tests.test_methods_polar import MATRICES, TAKE_IT, matrices
from tests.test_reference import distance, gradients

SHAPES = [(24, 24), (16, 24), (24, 16)]


def turning(shape: tuple[int, int], steps: int = 40) -> Tensor:
    """Gradients (steps, m, n) that point one way, and every fourth step turn to another, with a little noise."""
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(-(-steps // 4), d, generator=generator, dtype=torch.float64) for d in shape)
    ways = torch.einsum("tm,tn->tmn", one, other).repeat_interleave(4, 0)
    return ways[:steps] + 0.05 * gradients(shape, steps)


def bounded(P: Tensor) -> Tensor:
    return bound.bound_(P.clone(), torch.empty_like(P))


@product(shape=MATRICES, dtype=[torch.float64, torch.float32])
def test_it_is_by_the_mean_of_singular_values_that_each_count_by_their_square(shape, dtype):
    strong, weak = torch.tensor([9.0, 4.0, 0.1]), torch.tensor([1.0, 0.7, 0.1])
    for values in (strong, weak):
        P = matrices(shape, values).to(dtype)
        tau = float((values.pow(4).sum() / values.square().sum()).sqrt())
        torch.testing.assert_close(bounded(P), P * min(1, max(shape) ** 0.5 / tau))
    assert torch.equal(bounded(P), P)  # of what is weak not a bit is touched


def test_zero_stays_zero_and_what_is_tiny_as_it_is():
    for P in (torch.zeros(2, 5, 8), torch.full((2, 5, 8), 1e-30)):
        assert torch.equal(bounded(P), P)


def test_a_matrix_of_rank_one_keeps_one_singular_value_of_the_root_of_its_longer_side():
    P = bounded(matrices((5, 8), torch.tensor([40.0])))
    torch.testing.assert_close(torch.linalg.svdvals(P)[:, 0], torch.full((2,), 8**0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24)], ids=str)
def test_that_is_where_whitening_ends_for_a_gradient_that_stays(shape):
    grads = matrices(shape, torch.logspace(0, -1, min(shape)))[:1].expand(200, -1, -1)
    path = train(grads, shampoo_exponent=0.5, polar=0, precondition_frequency=1, blocking="none", **UNIT_LR)
    found = torch.linalg.svdvals(path[-1] - path[-2]) / max(shape) ** 0.5
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=0.02)


@product(method=TAKE_IT, shape=SHAPES)
def test_first_updates_are_those_of_the_reference_and_later_ones_what_they_would_be(method, shape):
    """5 / (1 - 0.8) = 25 updates of 40."""
    grads, options = turning(shape), {"betas": (0.9, 0.8), "weight_decay": 0.0}
    whole = {"method": method, **options, **WHOLE}
    path, never = train(grads, **whole), train(grads, polar=0, **whole)
    assert distance(path, follow(method, "fresh", grads, **options)) < 1e-9
    assert (update_sizes(path) < 0.9 * update_sizes(never)).any()
    assert distance(path[26:] - path[25], never[26:] - never[25]) < 1e-12


@product(method=TAKE_IT, shape=SHAPES)
def test_what_gradients_turn_to_is_not_overshot(method, shape):
    """But for what an exponent beyond 1/2 adds, what the largest singular value is above tau, and w."""
    same = {"method": method, "betas": (0.9, 0.9), "blocking": "none", **UNIT_LR}
    bounded, unbounded = (
        float(torch.linalg.svdvals(train(turning(shape, 8), **same, **more).diff(dim=0)).max() / max(shape) ** 0.5)
        for more in ({}, {"polar": 0})
    )
    assert bounded < 1.3 < unbounded


@pytest.mark.parametrize("rank", [1, 4])
def test_it_fades_so_that_where_gradients_stay_in_few_directions_no_update_jumps(rank):
    """These end beyond sqrt(n)."""
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(d, generator=generator, dtype=torch.float64) for d in ((64, rank), (rank, 64)))
    grads, same = (one @ other).expand(60, -1, -1), {"betas": (0.9, 0.9), "shampoo_exponent": 0.5, **UNIT_LR}
    bounded, unbounded = (update_sizes(train(grads, **same, **more)) for more in ({}, {"polar": 0}))
    assert (bounded < 0.9 * unbounded).any()
    assert (bounded[11:] / bounded[10:-1]).max() < 1.15
    torch.testing.assert_close(bounded[50:], unbounded[50:])


@product(method=TAKE_IT, scale=[1e-6, 1e3])
def test_it_does_not_see_the_scale_of_the_gradients(method, scale):
    grads = turning((24, 24))
    assert distance(train(scale * grads, method=method), train(grads, method=method)) < 1e-10


@pytest.mark.parametrize("method", TAKE_IT)
def test_noise_is_never_bounded(method):
    grads = torch.randn(50, 16, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert distance(train(grads, method=method), train(grads, method=method, polar=0)) < 1e-12


def test_matrices_of_a_stack_are_bounded_each_by_its_own_count():
    grads = [turning((24, 24)) for _ in range(9)]
    options = {"betas": (0.9, 0.8), "precondition_frequency": 1, "stagger": False}
    for late, first in ((1, 3), (4, 5), (5, 9), (8, 12)):
        grads[late] = grads[late].clone()
        grads[late][:first] = torch.nan
    for found, own in zip(train_many(grads, **options), grads, strict=True):
        assert distance(found, train(own, **options)) < 1e-12


@product(method=TAKE_IT, layout=["fsdp", "tp"])
def test_weights_that_are_sharded_are_those_of_one_process(world, method, layout):
    """The networks' own gradients, that are bounded: without, weights are others."""
    options = {"method": method, "lr": 1e-2}
    expected = train_alone(torch.float64, 12, options)
    assert deviation(train_alone(torch.float64, 12, {**options, "polar": 0}), expected) > 1e-6
    for found in world.run(train_sharded, 2, layout, torch.float64, 12, options):
        assert deviation(found, expected) <= 1e-9


def test_it_lasts_as_long_as_eigenvalues_remember_what_they_began_with():
    assert polar.start_updates(0.9) == 50 and averages.warm_beta(0.9)(50) == 0.9


def test_a_tensor_may_say_how_long_factors_remember():
    grads = turning((24, 24), 12)
    expected = train(grads, shampoo_beta=0.9)
    assert torch.equal(train(grads, shampoo_beta=torch.tensor(0.9, dtype=torch.float64)), expected)
