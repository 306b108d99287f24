"""Option `polar`: whitened momentum near its polar factor, with the norm it had; all demands on "fresh" hold."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kl_dist
from benchmarks import polar as fits
from kl_dist import KLShampoo
from kl_dist.checkpoint.seals import resealed
from kl_dist.methods import METHODS, averages, polar
from tests.models import deviation
from tests.paths import OPTIONS, UNIT_LR, WHOLE, follow, peak_of_a_step, train, train_many, update_sizes, weights
from tests.products import product
from tests.sharded import train_alone, train_sharded
from tests.test_distributed import on_ranks, one_process
from tests.test_methods_fresh import NETWORKS, train_network
from tests.test_reference import distance, gradients

TAKE_IT = [method for method in METHODS if METHODS[method].rules["fresh"].polar]
STEPS = [1, 2, 3, 4, 5, 7]
MATRICES = [(6, 6), (7, 4), (4, 7)]


def matrices(shape: tuple[int, int], values: Tensor) -> Tensor:
    """A batch of two of `shape` with these singular values."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(2, d, len(values), generator=generator, dtype=torch.float64) for d in shape)
    return torch.linalg.qr(left).Q * values.double() @ torch.linalg.qr(right).Q.mT


def norms(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x)


# -- the iteration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_many_steps_give_the_polar_factor_at_the_norm_that_was(shape):
    P = matrices(shape, torch.linspace(0.05, 3, min(shape)))
    left, _, right = torch.linalg.svd(P, full_matrices=False)
    exact = left @ right * (norms(P) / min(shape) ** 0.5)[:, None, None]
    errors = [float((polar.orthogonalize_(P.clone(), steps) - exact).abs().max()) for steps in (1, 3, 5, 12)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 1e-5 and errors[3] < 1e-12


@product(shape=MATRICES, steps=STEPS, dtype=[torch.float64, torch.float32])
def test_the_norm_is_kept_and_the_scale_not_seen(shape, steps, dtype):
    P = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = polar.orthogonalize_(P.clone(), steps)
    torch.testing.assert_close(norms(found), norms(P))
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(polar.orthogonalize_(scale * P, steps), scale * found)


@pytest.mark.parametrize("steps", STEPS)
def test_no_singular_value_grows_by_more_than_is_said(steps):
    values = torch.logspace(-9, 0, 8)
    P = matrices((8, 8), values)
    found = torch.linalg.svdvals(polar.orthogonalize_(P.clone(), steps)).flip(-1)
    bound = polar.GROWTH[min(steps, 5)] * polar.LAST[0] ** max(steps - 5, 0)
    assert (found <= bound * values).all() and (found[:, 0] > bound / 8 * values[0]).all()  # and it is reached, nearly


@pytest.mark.parametrize("steps", STEPS)
def test_what_has_rank_one_or_is_zero_is_left_as_it_is(steps):
    for P in (matrices((5, 8), torch.tensor([2.0])), torch.zeros(2, 5, 8)):
        torch.testing.assert_close(polar.orthogonalize_(P.clone(), steps), P, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)], ids=["one side", "three sides"])
def test_what_has_not_two_sides_is_left_alone(shape):
    P = torch.randn(shape)
    assert polar.orthogonalize_(P, 3) is P and polar.flops(shape[1:], 3) == 0


def test_a_start_leaves_alone_what_is_as_small_as_rounding_and_no_more_than_that():
    values = torch.tensor([1e-9, 1e-6, 1e-4, 1e-3, 0.02, 0.05, 0.2, 1.0])
    found = torch.linalg.svdvals(polar.orthogonalize_(matrices((8, 8), values), polar.START)).flip(-1)
    assert (found[:, :4] < values[:4]).all() and (found[:, 4:] > 0.3 * found[:, -1:]).all()


def test_the_coefficients_are_the_best_for_their_ranges():
    started = torch.tensor(fits.composition(polar.START_LOWER_END, 3))
    assert torch.allclose(torch.tensor(polar.coefficients(polar.START)[:3]), started, rtol=0, atol=1e-6)
    for steps, low in polar.LOWER_ENDS.items():
        exact = torch.tensor(fits.composition(low, steps))
        assert torch.allclose(torch.tensor(polar.coefficients(steps)), exact, rtol=0, atol=1e-6)


# -- in the methods ----------------------------------------------------------------------------------------------------


@product(method=TAKE_IT, shape=[*MATRICES, (3, 4, 5)], steps=[1, 2, 3, 5])
def test_engine_agrees_with_the_reference_in_the_original_coordinates(method, shape, steps):
    grads, W = gradients(shape), weights(shape)
    path = train(grads, W, method=method, polar=steps, **WHOLE)
    assert distance(path, follow(method, "fresh", grads, W, polar=polar.coefficients(steps))) < 1e-9
    plain = train(grads, W, method=method, **WHOLE)
    assert torch.equal(path, plain) == (len(shape) == 3)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_said_is_a_start_where_a_method_can(method):
    grads, W = gradients((7, 4)), weights((7, 4))
    own = polar.START if method in TAKE_IT else 0
    assert torch.equal(train(grads, W, method=method, polar=own), train(grads, W, method=method, polar=None))


def test_what_goes_beyond_whitening_outlives_it():
    """Orthogonalised last, all directions would move alike, whatever the exponent."""
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(40, 12, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 12)
    options = {"polar": 5, "blocking": "none", **UNIT_LR}
    spread = []
    for exponent in (0.5, 0.7):
        U = train(grads, shampoo_exponent=exponent, **options).diff(dim=0)[-1]
        spread.append(float(torch.linalg.svdvals(U)[0] / torch.linalg.svdvals(U)[-1]))
    assert spread[0] < 1.1 and spread[1] > 1.5


@product(method=TAKE_IT, shape=[(6, 6), (4, 7), (7, 4), (3, 4, 5)])
def test_a_start_lasts_until_what_eigenvalues_began_with_is_forgotten(method, shape):
    """5 / (1 - 0.5) = 10 updates of 20."""
    grads, options = gradients(shape, steps=20), {"betas": (0.9, 0.5), "weight_decay": 0.0}
    whole = {"method": method, **options, **WHOLE}
    path, never = train(grads, **whole), train(grads, polar=0, **whole)
    assert distance(path, follow(method, "fresh", grads, **options)) < 1e-9
    if len(shape) == 3:
        assert torch.equal(path, never)
        return
    assert distance(path[1:11], never[1:11]) > 0.01
    assert distance(path[11:] - path[10], never[11:] - never[10]) < 1e-12
    longer = {**whole, "betas": (0.9, 0.75)} if "soap" in method else {**whole, "shampoo_beta": 0.75}
    path, never = (train(grads, polar=said, **longer).diff(dim=0) for said in ("start", 0))
    assert distance(path[19:], never[19:]) > 1e-3, "its twentieth and last"


@pytest.mark.parametrize("method", ["soap", "kl_soap"])
def test_a_start_is_as_long_as_what_the_momentum_is_divided_by_remembers(method):
    """In the eigenbasis that is the second moment, by betas[1]; the factors' memory is another."""
    grads, options = gradients((6, 6), steps=20), {"betas": (0.9, 0.5), "shampoo_beta": 0.9, "weight_decay": 0.0}
    path, never = (train(grads, polar=said, method=method, **options, **WHOLE).diff(dim=0) for said in ("start", 0))
    assert distance(path[9:10], never[9:10]) > 1e-3 and distance(path[10:], never[10:]) < 1e-12


@pytest.mark.parametrize("method", TAKE_IT)
def test_the_first_update_of_all_is_nearly_orthogonal_and_the_last_of_a_start_nearly_what_it_was(method):
    """5 / (1 - 0.9) = 50 updates; 1.25 and 1.01 times as long as whitening alone makes them."""
    same = {"method": method, "betas": (0.9, 0.9), **WHOLE, **UNIT_LR, **whitening_alone(method)}
    grads = gradients((8, 8), steps=50)
    starts, alone = (train(grads, polar=said, **same).diff(dim=0) for said in ("start", 0))
    values = torch.linalg.svdvals(torch.stack([starts[0], alone[0]]))
    even = values.mean(-1) / values.square().mean(-1).sqrt()
    assert even[0] > 0.97 and even[1] < 0.9
    lengths = update_sizes(starts.cumsum(0)) / update_sizes(alone.cumsum(0))
    assert lengths[0] == pytest.approx(1.25, rel=1e-3)
    assert distance(starts[49], alone[49]) < 0.1


def test_a_start_leaves_a_500th_or_less_of_what_averages_began_with_however_long_they_remember():
    for beta, updates in ((0.5, 10), (0.8, 25), (0.9, 50), (0.95, 100), (0.99, 500), (0.999, 750), (0.9999, 750)):
        assert polar.start_updates(beta) == updates
        left = math.prod(averages.warm_beta(beta)(t) for t in range(1, updates + 1))
        assert 1 / 10000 < left < 1 / 500


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_no_update_jumps_where_gradients_stay(rank):
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(d, generator=generator, dtype=torch.float64) for d in ((64, rank), (rank, 64)))
    grads, same = (one @ other).expand(60, -1, -1), {"betas": (0.9, 0.9), "shampoo_exponent": 0.5, **UNIT_LR}
    starts, alone = (update_sizes(train(grads, **same, **more)) for more in ({}, {"polar": 0}))
    assert (starts > 1.2 * alone)[:10].any()
    assert (starts[11:] / starts[10:-1]).log2().abs().max() < 0.2
    if rank < 64:
        torch.testing.assert_close(starts[50:], alone[50:])


def test_a_tensor_may_say_how_long_a_start_lasts():
    grads = gradients((8, 8), steps=12)
    expected = train(grads, shampoo_beta=0.9)
    assert torch.equal(train(grads, shampoo_beta=torch.tensor(0.9, dtype=torch.float64)), expected)


def test_matrices_of_a_stack_have_each_its_own_start():
    """Those of 9 that miss gradients are behind, beside one another or apart."""
    grads = [gradients((6, 6), steps=24) for _ in range(9)]
    options = {"betas": (0.9, 0.5), "precondition_frequency": 1, "stagger": False, "polar": "start"}
    for late, first in ((1, 3), (4, 5), (5, 9), (8, 12)):
        grads[late] = grads[late].clone()
        grads[late][:first] = torch.nan
    together = train_many(grads, **options)
    for found, own in zip(together, grads, strict=True):
        assert distance(found, train(own, **options)) < 1e-12


def test_it_may_be_changed_between_steps():
    grads, start = gradients((6, 6), steps=20), weights((6, 6))
    W = nn.Parameter(start.clone())
    options = WHOLE | {"weight_decay": 0.0}
    opt = KLShampoo([W], polar=3, **OPTIONS | options)
    path = [start]
    for t, G in enumerate(grads):
        opt.param_groups[0]["polar"] = 3 if t < 10 else 0
        W.grad = G.clone()
        opt.step()
        path.append(W.detach().clone())
    always, never = (train(grads, start, polar=steps, **options) for steps in (3, 0))
    found = torch.stack(path)
    assert torch.equal(found[:11], always[:11])
    assert distance(found[11:] - found[10], never[11:] - never[10]) < 1e-12  # the state never knew of it


def test_a_state_that_was_saved_before_it_existed_leaves_it_as_it_is_here():
    saved = KLShampoo([nn.Parameter(torch.ones(4, 4))]).state_dict()
    del saved["param_groups"][0]["polar"]
    opt = KLShampoo([nn.Parameter(torch.ones(4, 4))], polar=3)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["polar"] == 3


def test_a_run_with_a_value_that_is_no_more_goes_on_with_what_took_its_place():
    saved = KLShampoo([nn.Parameter(torch.ones(4, 4))], polar=3).state_dict()
    saved["param_groups"][0]["polar"] = "bounded"
    opt = KLShampoo([nn.Parameter(torch.ones(4, 4))], polar=0)
    opt.load_state_dict(resealed(saved))
    assert opt.param_groups[0]["polar"] == "start"


@product(method=TAKE_IT, steps=[1, 3, 5, "start"], scale=[1e-6, 1e3])
def test_it_does_not_see_the_scale_of_the_gradients(method, steps, scale):
    """Demand (a)."""
    grads = gradients((8, 5), steps=50)
    path = train(grads, method=method, polar=steps)
    assert distance(train(scale * grads, method=method, polar=steps), path) < 1e-10


def whitening_alone(method: str) -> dict[str, float]:
    """What KL-Shampoo does beyond it comes after, and changes the size of directions that are no longer the same."""
    return {"shampoo_exponent": 0.5} if method == "kl_shampoo" else {}


@product(method=TAKE_IT, steps=[1, 3, 5], kind=["rank one", "dead rows", "full"])
def test_every_update_has_the_size_that_it_has_without(method, steps, kind):
    """Demand (b), of gradients of any rank."""
    grads = gradients((24, 24), steps=20)
    if kind == "rank one":
        grads = grads[:, :, :1] * grads[:, :1, :]
    elif kind == "dead rows":
        grads[:, ::3] = 0
    same = {"method": method, **UNIT_LR, **whitening_alone(method)}
    sizes = update_sizes(train(grads, polar=steps, **same))
    torch.testing.assert_close(sizes, update_sizes(train(grads, polar=0, **same)))
    assert sizes.max() < 1.5 and sizes[0] > (1 / 48 if kind == "rank one" else 0.05)
    beyond = [update_sizes(train(grads, method=method, polar=polar, **UNIT_LR)) for polar in (steps, 0)]
    assert ((beyond[0] / beyond[1]).log2().abs() < 0.5).all()


@product(method=TAKE_IT, steps=[0, 1, 3, 5, "start"])
def test_rows_without_a_gradient_come_to_rest(method, steps):
    """While the basis of the null space is being found they move a little; SOAP's second moment widens that."""
    grads = gradients((24, 24), steps=40)
    grads[:, ::3] = 0
    path = train(grads, method=method, polar=steps, **UNIT_LR)
    moves = update_sizes(path[:, ::3]) / update_sizes(path)
    assert moves[30:].max() < 1e-6 and moves.max() < (0.2 if method == "kl_shampoo" else 1)


@product(method=TAKE_IT, network=NETWORKS, batch=[1, 2, 4], steps=[2, 5, "start"])
def test_it_is_continuous_under_rank_deficient_gradients(method, network, batch, steps):
    """Demand (c), in the closed loop."""
    undisturbed = train_network(network, batch, None, method, polar=steps)
    for noise in ("of each entry", "of the mean square"):
        disturbed = train_network(network, batch, noise, method, polar=steps)
        assert (disturbed - undisturbed).abs().max() < 1e-10


def of_rank_one_in_a_row_space_that_stays() -> tuple[Tensor, Tensor]:
    """50 gradients, and the projection onto where they never point."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 128, generator=generator, dtype=torch.float64)
    grads = torch.randn(50, 128, 1, generator=generator, dtype=torch.float64) @ row
    return grads, torch.eye(128, dtype=torch.float64) - row.mT @ row / row.square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_start_makes_no_more_of_rounding_than_whitening_does(dtype):
    """Hundreds of directions that rounding alone points to, each lifted to a hundredth of the signal, outweigh it."""
    grads, outside = of_rank_one_in_a_row_space_that_stays()
    shares = []
    for said in ("start", 0):
        way = train(grads.to(dtype), polar=said, weight_decay=0.0)[-1].double()
        shares.append(float((way @ outside).norm() / way.norm()))
    assert shares[0] < shares[1] < 0.02


@pytest.mark.parametrize("method", TAKE_IT)
def test_a_start_is_continuous_in_wide_matrices_of_low_rank(method):
    """Demand (c), of more directions than the networks above have."""
    grads, _ = of_rank_one_in_a_row_space_that_stays()
    noise = torch.randn(grads.shape, generator=torch.Generator().manual_seed(1), dtype=grads.dtype)
    paths = [train(seen, method=method, lr=1e-2, weight_decay=0.0) for seen in (grads, grads * (1 + 1e-15 * noise))]
    assert (paths[1] - paths[0]).abs().max() < 1e-10


@pytest.mark.parametrize("jump", [1e-3, 1e3])
@pytest.mark.parametrize("method", TAKE_IT)
def test_a_jump_of_scale_does_not_stall_it(method, jump):
    """Demand (d): the size is that of the whitened momentum, whatever its directions."""
    grads = gradients((24, 24), steps=100)
    grads[50:] *= jump
    same = {"method": method, **UNIT_LR, **whitening_alone(method)}
    sizes = update_sizes(train(grads, polar=3, **same))
    torch.testing.assert_close(sizes, update_sizes(train(grads, polar=0, **same)))
    assert sizes.max() < 10


# -- over ranks, and what it costs -------------------------------------------------------------------------------------


@product(method=TAKE_IT, world_size=[2, 3])
def test_weights_do_not_depend_on_the_number_of_ranks(world, method, world_size):
    found, _ = on_ranks(world, world_size, method, "fresh", torch.float64, polar=3)
    assert deviation(found, one_process(method, "fresh", torch.float64, polar=3)) <= 1e-9


@product(method=TAKE_IT, layout=["fsdp", "tp"], steps=[3, "start"])
def test_weights_that_are_sharded_are_those_of_one_process(world, method, layout, steps):
    options = {"method": method, "lr": 1e-2, "polar": steps}
    expected = train_alone(torch.float64, 12, options)
    assert deviation(train_alone(torch.float64, 12, {**options, "polar": 0}), expected) > 1e-6
    for found in world.run(train_sharded, 2, layout, torch.float64, 12, options):
        assert deviation(found, expected) <= 1e-9


@product(shape=[(6, 6), (7, 4), (4, 7)], steps=STEPS)
def test_the_flops_of_its_products_are_those_in_the_plan(shape, steps):
    with FlopCounterMode(display=False) as counted:
        polar.orthogonalize_(torch.randn(1, *shape), steps)
    said = [kl_dist.plan({"W": shape}, 1, blocking="none", polar=polar_steps).cost[0] for polar_steps in (0, steps)]
    assert counted.get_total_flops() == polar.flops(shape, steps) == pytest.approx(said[1] - said[0])


def test_a_start_costs_nothing_in_the_long_run():
    plans = [kl_dist.plan({"W": (96, 96)}, 1, polar=polar) for polar in ("start", 0)]
    assert plans[0].cost == plans[1].cost


@product(method=TAKE_IT, steps=[3, "start"], count=[1, 2, 3, 6, 7])
def test_the_peak_of_a_step_is_what_the_plan_says(method, steps, count):
    peak, said = peak_of_a_step(count, method=method, polar=steps)
    assert peak == pytest.approx(said, rel=0.02)
