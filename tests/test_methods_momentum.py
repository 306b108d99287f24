"""Option `final_beta1`: the momentum's memory grows with the run, and its updates are no noisier for it."""

import pytest
import torch

from kl_dist import KLShampoo, ranges
from kl_dist.methods import Hyper, averages, compact
from tests.paths import FRESH, UNIT_LR, WHOLE, follow, train, train_many, update_sizes, weights
from tests.products import product
from tests.reference.fresh import variance
from tests.test_methods_fresh import spiked
from tests.test_reference import distance, gradients, last_step_off

# betas[0] = 0.2 grows from t = 25 on: within a test
GROWING = dict(betas=(0.2, 0.9), final_beta1=0.7)


@product(method=[*FRESH, "normuon"], nesterov=[True, False], shape=[(8, 5), (3, 4, 5)])
def test_every_method_follows_the_reference_while_beta1_grows_and_when_it_is_there(method, nesterov, shape):
    method, recipe = ("muon", "normuon") if method == "normuon" else (method, "fresh")
    grads, W = gradients(shape, steps=80), weights(shape)
    options = dict(method=method, recipe=recipe, nesterov=nesterov, **GROWING)
    expected = follow(grads=grads, W=W, **options)
    assert distance(train(grads, W, **WHOLE, **options), expected) < 1e-9
    assert distance(follow(grads=grads, W=W, **{**options, "final_beta1": 0.0}), expected) > 1e-3


def test_beta1_is_what_it_was_for_a_twentieth_and_then_a_twentieth_of_the_updates_is_remembered():
    a = averages.newest(Hyper(betas=(0.9, 0.9), eps=0.0, final_beta1=0.99))
    assert all(a(t) == 1 - 0.9 for t in range(1, 201))
    assert [1 / a(t) for t in (400, 1000, 2000, 10**6)] == pytest.approx([20, 50, 100, 100])
    for no_growth in (None, 0.0, 0.9):
        assert averages.newest(Hyper(betas=(0.9, 0.9), eps=0.0, final_beta1=no_growth))(10**6) == 1 - 0.9


@product(beta1=[0.0, 0.5, 0.9, 0.95], final_beta1=[0.96, 0.99, 0.9999])
def test_the_share_of_the_gradient_itself_leaves_the_noise_as_it_was(beta1, final_beta1):
    hyper = Hyper(betas=(beta1, 0.9), eps=0.0, final_beta1=final_beta1)
    before = variance(1 - beta1, beta1)
    shares = [averages.newest(hyper)(t) for t in (1, 25, 300, 1000, 10**5)]
    ahead = [averages.ahead(a, hyper) for a in shares]
    assert [variance(c, 1 - a) for c, a in zip(ahead, shares, strict=True)] == pytest.approx([before] * 5)
    assert all(1 - beta1 - 1e-9 <= c <= before**0.5 + 1e-9 for c in ahead) and ahead[0] == 1 - beta1


@pytest.mark.parametrize("method", FRESH)
def test_updates_are_as_large_as_before_on_noise(method):
    """So the learning rate that was best still is."""
    noise = torch.randn(400, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grown, stays = (
        update_sizes(train(noise, method=method, betas=(0.5, 0.9), final_beta1=final, **UNIT_LR))[200:].mean()
        for final in (0.95, None if method != "kl_shampoo" else 0.0)
    )
    assert grown / stays == pytest.approx(1, abs=0.05)


@product(method=["kl_shampoo", "muon"], kind=["spike", "rank one", "one entry"])
def test_a_spike_is_over_as_soon_however_long_the_memory(method, kind):
    """Demand (e), where 50 gradients are remembered."""
    at = 1000
    grads = spiked(kind, (24, 24), at, steps=at + 60)
    U = update_sizes(train(grads, method=method, betas=(0.9, 0.9), final_beta1=0.99, **UNIT_LR))
    steady = U[at - 50 : at].median()
    assert U[at:].max() < 4 * steady
    assert (U[at + 30 :] < 2 * steady).all() and (U[at + 30 :] > steady / 2).all()


LONG = dict(betas=(0.5, 0.9), final_beta1=0.99, **UNIT_LR)  # a hundred gradients are remembered from t = 2,000 on


@pytest.mark.parametrize("method", ["kl_shampoo", "kl_soap", "soap", "shampoo"])
@pytest.mark.parametrize("silent", [slice(0, 4), slice(None)], ids=["rows", "all"])
def test_what_falls_silent_comes_to_rest(method, silent):
    """Second moments forget sooner than the momentum: it must not be divided by what is left of them."""
    noise = torch.randn(700, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[400:, silent] = 0
    options = {**LONG, "betas": (0.5, 0.6)}  # the second moments' memory is the shorter by far
    U = train(noise, method=method, **options).diff(dim=0)[:, silent].flatten(1).square().mean(1).sqrt()
    assert U[400:].max() < 2 * U[300:400].max()
    assert U[-1] < 0.2 * U[300:400].mean()


@pytest.mark.parametrize("method", ["kl_shampoo", "kl_soap", "soap", "shampoo"])
@pytest.mark.parametrize("jump", [1e-3, 1e3])
def test_a_jump_of_scale_is_over_as_soon_however_long_the_memory(method, jump):
    """Demand (d): no later than with beta1 as it was, five steps allowed, and no update beyond what it was."""
    noise = torch.randn(700, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[400:] *= jump
    grown, stays = (
        update_sizes(train(noise, method=method, **{**LONG, "final_beta1": final})) for final in (0.99, 0.0)
    )
    assert grown[400:].max() < 2 * stays[400:].max()
    assert last_step_off(grown[300:]) <= last_step_off(stays[300:]) + 5


def test_gradients_that_agree_add_up_to_the_same_whatever_is_remembered():
    """The weights of a momentum add up to 1."""
    hyper = Hyper(betas=(0.5, 0.9), eps=0.0, nesterov=True, final_beta1=0.9)
    exp_avg = torch.zeros(1, 2, 2, dtype=torch.float64)
    for t in range(1, 300):
        grad = torch.ones_like(exp_avg)
        found = averages.momentum(exp_avg, grad, torch.tensor([t]), hyper)
        assert torch.allclose(found, torch.ones_like(found), rtol=1e-8)


def test_matrices_of_one_batch_at_different_steps_each_go_by_their_own():
    """One that has no gradient for a while is behind: its memory is shorter."""
    early, late = gradients((6, 6), steps=80), gradients((6, 6), steps=80, seed=1)
    late[:30] = float("nan")
    options = dict(method="kl_shampoo", **WHOLE, **GROWING)
    together = train_many([early, late], **options)
    alone = [train(early, **options), train(late[30:], **options)]
    assert distance(together[0], alone[0]) < 1e-10
    assert distance(together[1][30:], alone[1]) < 1e-10


def test_a_run_that_was_saved_without_goes_on_without():
    """A state of an earlier version does not have the option; nor does it change in the middle."""
    grads = gradients((6, 6), steps=60)
    weight = torch.nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    first = KLShampoo([weight], lr=1e-2, betas=(0.2, 0.9), final_beta1=0.0)
    assert first.param_groups[0]["final_beta1"] == 0.0
    for grad in grads[:20]:
        weight.grad = grad.clone()
        first.step()
    state = first.state_dict()
    for group in state["param_groups"]:
        del group["final_beta1"]
    copy = torch.nn.Parameter(weight.detach().clone())
    second = KLShampoo([copy], lr=1e-2, betas=(0.2, 0.9))
    assert second.param_groups[0]["final_beta1"] == 0.99
    second.load_state_dict(state)
    assert second.param_groups[0]["final_beta1"] is None
    for grad in grads[20:]:
        for parameter, optimizer in ((weight, first), (copy, second)):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_kept_narrow_forgets_at_the_longest_memory_that_is_taken(dtype):
    """Rounded to the nearest, it would stay for ever where it is to lose less than half of its last bit."""
    steps = round(1 / torch.finfo(dtype).eps)
    assert dtype in compact.NARROW.values()
    narrow = torch.linspace(1, 2, steps + 1)[:-1].to(dtype)  # all that there are but for an exponent
    assert narrow.unique().numel() == steps
    longest = ranges.longest_memory(dtype)
    assert ((longest * narrow.float()).to(dtype) < narrow).all()
    assert (((1 + longest) / 2 * narrow.float()).to(dtype) == narrow).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_beta1": 1.0}, "final_beta1 must be at least 0 and below 1, not 1.0"),
        ({"final_beta1": "long"}, "final_beta1 is a number, not 'long'"),
        ({"final_beta1": 0.99, "recipe": "paper"}, 'final_beta1 must be 0 or None under recipe "paper"'),
        ({"final_beta1": 0.997, "recipe": "compact"}, 'final_beta1 must be at most 0.9961 under recipe "compact"'),
        ({"betas": (0.997, 0.9), "recipe": "compact"}, r"betas\[0\] must be at most 0.9961 .* kept in bfloat16"),
        ({"betas": (0.9, 0.9996), "recipe": "compact"}, r"betas\[1\] must be at most 0.9995 .* kept in float16"),
        ({"shampoo_beta": 0.9996, "recipe": "compact"}, "shampoo_beta must be at most 0.9995 .* kept in float16"),
    ],
)
def test_what_is_no_memory_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KLShampoo([torch.nn.Parameter(torch.zeros(4, 4))], **options)
