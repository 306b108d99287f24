"""KLShampoo is a torch.optim.Optimizer: what works on AdamW works on it.

Gradients are made up, a function of the step alone, so that two runs can be compared whatever their weights are.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import kl_dist
from kl_dist import KLShampoo
from tests.made_up import SHAPES, furthest, give_gradients, parameters, same, states, train, values


def test_parameters_in_any_form_that_torch_takes_are_trained_alike():
    """And repr, where users look for what they gave, shows the options as they were resolved."""
    trained = []
    for form in (dict.values, dict.items, lambda params: [{"params": params.values()}]):
        params = parameters()
        opt = KLShampoo(form(params), lr=1e-2)
        train(opt, params, range(5))
        trained.append(values(params))
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])
    assert furthest(trained[0], parameters()) > 1e-3
    assert "KLShampoo" in repr(opt) and "precondition_frequency: 2\n" in repr(opt)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_adamw_route_is_torch_adamw(dtype, bound):
    ours, theirs = parameters(dtype), parameters(dtype)
    train(KLShampoo(ours.items(), 1e-2, (0.8, 0.9), 1e-6, 0.1, method="adamw"), ours, range(50))
    train(torch.optim.AdamW(theirs.values(), 1e-2, (0.8, 0.9), 1e-6, 0.1), theirs, range(50))
    assert furthest(values(ours), values(theirs)) < bound


def test_adamw_counts_the_steps_of_each_parameter_for_itself():
    """One of several that are updated together misses its gradient on some steps, the first ones among them."""
    ours, theirs = parameters(), parameters()
    optimizers = [
        KLShampoo(ours.items(), 1e-2, (0.8, 0.9), method="adamw"),
        torch.optim.AdamW(theirs.values(), 1e-2, (0.8, 0.9)),
    ]
    for step in range(12):
        for params, opt in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params, step)
            if step % 3 < 2:
                params["square"].grad = None
            opt.step()
    assert furthest(values(ours), values(theirs)) < 1e-12


@pytest.mark.parametrize("method", kl_dist.METHODS)
@pytest.mark.parametrize("adamw_betas", [None, (0.7, 0.8)])
def test_vectors_go_by_adamw_under_every_method(method, adamw_betas):
    """With betas of its own, which are not those of the matrices."""
    ours, theirs = parameters(), parameters()
    options = {} if adamw_betas is None else {"betas": (0.6, 0.65), "adamw_betas": adamw_betas}
    train(KLShampoo(ours.items(), lr=1e-2, weight_decay=0.1, method=method, **options), ours, range(8))
    torchs = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=adamw_betas or (0.9, 0.95), weight_decay=0.1)
    train(torchs, theirs, range(8))
    alike = {name for name in SHAPES if furthest({name: ours[name]}, {name: theirs[name]}) < 1e-12}
    assert alike == {"vector", "scalar"}


def test_parameters_of_one_shape_are_trained_each_by_its_own_gradients():
    """Their pieces are equal and may be one object: nothing may be remembered of a parameter by that alone."""

    def trained(*chosen):
        params = {f"{kind} {i}": nn.Parameter(torch.ones(*shape)) for i in range(3) for kind, shape in shapes.items()}
        optimizer = KLShampoo([(name, params[name]) for name in chosen or params], lr=1e-2, stagger=False)
        for step in range(4):
            for number, p in enumerate(params.values()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
            optimizer.step()
        return {name: params[name].detach() for name in chosen or params}

    shapes = {"matrix": (6, 4), "vector": (5,)}
    together = trained()
    for name, found in together.items():
        assert torch.allclose(found, trained(name)[name], rtol=1e-5, atol=1e-7), name
    assert not torch.allclose(together["matrix 0"], together["matrix 1"], rtol=1e-2)


def test_a_run_is_the_same_to_the_last_bit_every_time():
    runs = []
    for _ in range(2):
        params = parameters(torch.float32)
        train(KLShampoo(params.items()), params, range(5))
        runs.append(values(params))
    assert same(*runs)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    opt, other = KLShampoo(model.parameters()), KLShampoo(twin.parameters())

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        other.zero_grad()
        expected = twin(x).square().mean()
        expected.backward()
        other.step()
        assert torch.equal(opt.step(closure), expected)
    assert torch.equal(model.weight, twin.weight)
    assert other.step() is None


def test_hooks_are_called():
    params, called = parameters(), []
    opt = KLShampoo(params.items())
    for hook in (
        "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"
    ):  # fmt: skip
        getattr(opt, f"register_{hook}_hook")(lambda *args, hook=hook: called.append(hook))
    train(opt, params, range(1))
    opt.load_state_dict(opt.state_dict())
    assert called == [
        "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_by_itself(copied):
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    twins, twin = copied((params, opt))
    before = [values(params), states(opt)]
    train(twin, twins, range(3, 6))
    assert same([values(params), states(opt)], before)
    train(opt, params, range(3, 6))
    assert same([values(params), states(opt)], [values(twins), states(twin)])


def test_zero_grad_forgets_or_zeroes():
    params = parameters()
    opt = KLShampoo(params.items())
    give_gradients(params, 0)
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params.values())
    opt.zero_grad()
    assert all(p.grad is None for p in params.values())


def test_a_step_without_any_gradient_changes_nothing():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    before = [values(params), states(opt)]
    opt.zero_grad()
    opt.step()
    assert same([values(params), states(opt)], before)


def test_groups_have_options_of_their_own():
    params, alone = parameters(), parameters()
    names = list(params)
    options = [
        dict(lr=1e-2, method="soap"),
        dict(lr=1e-3, precondition_frequency=3),
        dict(weight_decay=0.5, recipe="paper"),
    ]
    groups = [{"params": [(name, params[name]) for name in names[i::3]], **option} for i, option in enumerate(options)]
    train(KLShampoo(groups, stagger=False), params, range(8))
    for i, option in enumerate(options):
        opt = KLShampoo([(name, alone[name]) for name in names[i::3]], **{"stagger": False, **option})
        for step in range(8):
            give_gradients(alone, step)
            opt.step()
    assert furthest(values(params), values(alone)) < 1e-12


def test_gradient_scaler_leaves_out_a_step_that_overflowed():
    params = parameters(torch.float32)
    opt, scaler = KLShampoo(params.items()), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        before = [values(params), states(opt)]
        give_gradients(params, step)
        scaler.scale(torch.zeros(()))
        for p in params.values():
            p.grad *= scaler.get_scale()
        if step == 2:
            params["square"].grad[1, 1] = torch.inf
        scaler.step(opt)
        scaler.update()
        assert same([values(params), states(opt)], before) == (step == 2)
    assert scaler.get_scale() == 4.0 and opt.stats()["skipped_steps"] == 0


def test_it_trains_a_model_with_all_that_surrounds_an_optimizer():
    """Clipping, a schedule, weight averaging, autocast: the loss falls by a factor 10, the averaged model's by 3."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 2)
    )
    averaged = swa_utils.AveragedModel(model)
    opt = KLShampoo(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = swa_utils.SWALR(opt, swa_lr=5e-3, anneal_epochs=40)
    x = torch.randn(64, 1, 4, 4)
    y = torch.stack([x.sum((1, 2, 3)).sin(), x[:, 0, 0, 0]], 1)
    losses = []
    for _ in range(80):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() - y).square().mean()
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1).isfinite()
        opt.step()
        scheduler.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    with torch.no_grad():
        assert (averaged(x) - y).square().mean() < losses[0] / 3


def test_autocast_does_not_reach_the_step():
    inside, outside = parameters(torch.float32), parameters(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        opt = KLShampoo(inside.items())
        train(opt, inside, range(5))
    other = KLShampoo(outside.items())
    train(other, outside, range(5))
    assert same([values(inside), states(opt)], [values(outside), states(other)])
