"""Muon is torch.optim.Muon where that can do it, and the engine's beyond: in blocks, in float64, with its neurons."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict, plan
from kl_dist.methods import muon
from tests.models import Weights, deviation, train_with_ddp
from tests.paths import UNIT_LR, WHOLE, train, update_sizes, weights
from tests.products import product
from tests.sharded import train_alone, train_sharded
from tests.test_reference import distance, gradients

ADJUSTMENTS = ["original", "match_rms_adamw"]
SHAPES = [(24, 24), (40, 12), (12, 40)]


def torchs(grads: Tensor, W: Tensor, **options) -> Tensor:
    """All weights on the way under torch.optim.Muon."""
    parameter = nn.Parameter(W.clone())
    optimizer = torch.optim.Muon([parameter], **options)
    path = [W]
    for G in grads:
        parameter.grad = G.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later have it")
@product(shape=SHAPES, adjust_lr_fn=ADJUSTMENTS, nesterov=[True, False], weight_decay=[0.0, 0.1])
def test_paper_recipe_is_torchs_muon(shape, adjust_lr_fn, nesterov, weight_decay):
    """To the bit where the scale is 1, as it is for "original" and no more rows than columns; else to one rounding."""
    grads, W = gradients(shape).float(), weights(shape).float()
    options = dict(lr=2e-2, weight_decay=weight_decay, eps=1e-7, adjust_lr_fn=adjust_lr_fn, nesterov=nesterov)
    path = train(grads, W, method="muon", recipe="paper", **options | {"betas": (0.95, 0.95)})
    expected = torchs(grads, W, momentum=0.95, **options)
    if muon.scale(shape, adjust_lr_fn) == 1:
        assert torch.equal(path, expected)
    assert distance(path, expected) < 1e-5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later have it")
def test_paper_recipe_has_torchs_defaults_but_for_the_weight_decay():
    grads, W = gradients((12, 40)).float(), weights((12, 40)).float()
    parameter = nn.Parameter(W.clone())
    optimizer = KLShampoo([parameter], method="muon", recipe="paper", weight_decay=0.1)
    for G in grads:
        parameter.grad = G.clone()
        optimizer.step()
    assert torch.equal(parameter.detach(), torchs(grads, W)[-1])


def test_matrices_of_one_shape_do_not_change_each_other_in_bfloat16():
    """A stack is as its members alone, to the bit, on however many ranks they lie."""
    params = [nn.Parameter(weights((16, 16)).float() * k) for k in (1, 2, 3)]
    grads = [gradients((16, 16), seed=k).float() for k in range(3)]
    optimizer = KLShampoo(params, method="muon", recipe="paper")
    for step in zip(*grads, strict=True):
        for p, G in zip(params, step, strict=True):
            p.grad = G.clone()
        optimizer.step()
    alone = dict(lr=1e-3, betas=None, method="muon", recipe="paper")
    for k, (p, G) in enumerate(zip(params, grads, strict=True), 1):
        assert torch.equal(p.detach(), train(G, weights((16, 16)).float() * k, **alone)[-1])


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
def test_recipes_differ_by_the_rounding_of_bfloat16(adjust_lr_fn):
    grads, W = gradients((24, 16)).float(), weights((24, 16)).float()
    options = dict(method="muon", adjust_lr_fn=adjust_lr_fn, nesterov=True, **WHOLE)
    paper, fresh = (train(grads, W, recipe=recipe, **options) for recipe in ("paper", "fresh"))
    assert 1e-5 < distance(paper, fresh) < 0.03


def test_singular_values_end_near_one_and_the_vectors_stay():
    """The quintic's five steps: from a hundredth of |X| and more to between 0.6 and 1.25, in the same basis."""
    x = torch.linalg.qr(gradients((20, 20), steps=1)[0]).Q @ torch.diag(torch.logspace(0, -1, 20, dtype=torch.float64))
    found = muon.newton_schulz(x / x.norm())
    P, _, Qt = torch.linalg.svd(x)
    changed = P.mT @ found @ Qt.mT
    assert ((changed.diagonal() > 0.6) & (changed.diagonal() < 1.25)).all()
    assert (changed - changed.diagonal().diag()).abs().max() < 1e-12


@pytest.mark.parametrize("recipe", ["fresh", "normuon"])
@pytest.mark.parametrize("shape", [(24, 24), (64, 192), (24, 6), (6, 24)], ids=str)
def test_every_shape_has_an_update_of_the_size_of_adamws(shape, recipe):
    """RMS 0.2, but for what five steps leave of the singular values; in square blocks as in whole matrices."""
    for blocking in ("square", "none"):
        U = update_sizes(
            train(gradients(shape, steps=6).sign(), method="muon", recipe=recipe, blocking=blocking, **UNIT_LR)
        )
        assert ((U > 0.12) & (U < 0.25)).all()


@pytest.mark.parametrize("first", [1e-6, 1e6])
def test_an_odd_first_gradient_changes_no_updates_size(first):
    grads = gradients((24, 24), steps=100).sign()
    grads[0] *= first
    U = update_sizes(train(grads, method="muon", **UNIT_LR))
    assert ((U > 0.12) & (U < 0.25)).all()


@pytest.mark.parametrize("recipe", ["fresh", "normuon"])
def test_no_gradient_is_too_large_or_too_small(recipe):
    grads, alike = gradients((8, 5)).float(), dict(method="muon", recipe=recipe)
    path = train(grads, **alike)
    assert all(distance(train(c * grads, **alike), path) < 1e-3 for c in (1e-12, 1e-6, 1e6, 1e11))


def test_a_transposed_matrix_has_the_transposed_update():
    """Under match_rms_adamw, which knows no rows from columns."""
    grads = gradients((9, 4))
    path = train(grads, method="muon", **WHOLE)
    assert distance(train(grads.mT, method="muon", **WHOLE).mT, path) < 1e-12


def test_neurons_get_updates_of_one_size():
    """A row whose gradients are always small against the others', and of few directions, moves as they do."""
    grads = gradients((16, 16), steps=60)
    grads[:, :4] = 0.02 * grads[:, :1] + 0.002 * grads[:, :4]
    rows = {
        recipe: train(grads, method="muon", recipe=recipe, **UNIT_LR).diff(dim=0)[-20:].square().mean((0, 2)).sqrt()
        for recipe in ("fresh", "normuon")
    }
    assert rows["fresh"].max() / rows["fresh"].min() > 1.5
    assert rows["normuon"].max() / rows["normuon"].min() < 1.25
    assert 0.12 < rows["normuon"].square().mean().sqrt() < 0.25


def test_a_neuron_without_gradients_stays():
    grads = gradients((8, 8))
    grads[:, 3] = 0
    path = train(grads, method="muon", recipe="normuon", weight_decay=0.0)
    assert path.isfinite().all() and not path[:, 3].any() and path[-1, 2].any()


def test_the_state_is_the_momentum_and_no_side_is_too_long():
    found = {
        recipe: plan({"w": (48, 12)}, 1, method="muon", recipe=recipe, blocking="none", max_preconditioner_dim=16)
        for recipe in ("fresh", "paper", "normuon")
    }
    few = 8 + 1  # step, started
    assert found["fresh"].state_bytes == found["paper"].state_bytes == (4 * 48 * 12 + few,)
    assert found["normuon"].state_bytes == (4 * 48 * 12 + 4 * 48 + few,)
    assert all(len(one.units) == 1 and one.working_bytes(0) == 3 * 4 * 48 * 12 for one in found.values())


def test_the_cost_is_that_of_five_steps():
    short, long = 12, 48
    counted = 5 * (2 * short * long * short + 2 * short**3 + 2 * short * short * long)
    assert muon.flops((long, short), ("full", "full")) == (counted, 0) == muon.flops((short, 4, 12), ("full",) * 3)


def test_there_is_nothing_to_refresh_and_no_condition():
    W = nn.Parameter(weights((6, 6)))
    optimizer = KLShampoo([W], method="muon", precondition_frequency=1)
    W.grad = gradients((6, 6))[0]
    optimizer.step()
    said = optimizer.stats()
    assert said["refreshes"] == 0 and said["condition"] is None and math.isfinite(said["update_rms"])


def in_ddp(group: dist.ProcessGroup) -> Weights:
    return train_with_ddp(group, torch.float64, 140, 6, None, dict(lr=1e-2, method="muon", recipe="normuon"))[0]


def sharded(group: dist.ProcessGroup, layout: str) -> Weights:
    return train_sharded(group, layout, torch.float64, 6, dict(lr=1e-2, method="muon", recipe="normuon"))


def test_neurons_are_those_of_one_process_on_two_ranks(world):
    """Recipe "normuon"; the others are with all methods in test_distributed*.py."""
    (alone,), both = world.run(in_ddp, 1), world.run(in_ddp, 2)
    assert all(deviation(weights, alone) <= 1e-9 for weights in both)
    expected = train_alone(torch.float64, 6, dict(lr=1e-2, method="muon", recipe="normuon"))
    assert all(deviation(weights, expected) <= 1e-9 for weights in world.run(sharded, 2, "fsdp"))


@pytest.mark.parametrize("recipe", ["fresh", "paper", "normuon"])
def test_a_run_that_is_resumed_goes_on_to_the_bit(recipe):
    grads = [gradients(shape).float() for shape in SHAPES]

    def run(steps: range, state: dict | None, start: list[Tensor]) -> tuple[list[Tensor], dict]:
        named = [(f"w{i}", nn.Parameter(W.clone())) for i, W in enumerate(start)]
        optimizer = KLShampoo(named, method="muon", recipe=recipe)
        if state is not None:
            load_full_state_dict(optimizer, state)
        for step in steps:
            for (_, p), G in zip(named, grads, strict=True):
                p.grad = G[step].clone()
            optimizer.step()
        return [p.detach() for _, p in named], full_state_dict(optimizer)

    start = [weights(shape).float() for shape in SHAPES]
    straight, _ = run(range(10), None, start)
    half, state = run(range(5), None, start)
    resumed, _ = run(range(5, 10), state, half)
    assert all(map(torch.equal, resumed, straight))


def test_an_unknown_adjustment_is_refused():
    with pytest.raises(ValueError, match="unknown adjust_lr_fn 'match_rms'; did you mean 'match_rms_adamw'"):
        KLShampoo([nn.Parameter(torch.ones(3, 3))], method="muon", adjust_lr_fn="match_rms")


@pytest.mark.parametrize("recipe", ["fresh", "normuon"])
@pytest.mark.parametrize("beta1", [0.0, 0.4])
def test_a_momentum_that_has_faded_to_zero_moves_nothing_and_ends_nothing(recipe, beta1):
    """Denormal numbers end where they are halved and more."""
    grads = gradients((8, 8), steps=300).float()
    grads[5:-5] = 0
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = KLShampoo([parameter], method="muon", recipe=recipe, betas=(beta1, 0.95), weight_decay=0.0)
    path = []
    for G in grads:
        parameter.grad = G.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    assert torch.equal(path[-6], path[-7]) and not torch.equal(path[-1], path[-6])
    assert optimizer.stats()["restarts"] == 0
