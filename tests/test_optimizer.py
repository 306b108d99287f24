"""KLShampoo is a torch.optim.Optimizer: what works on AdamW works on it, and what goes wrong changes nothing.

Gradients are made up, a function of the step alone, so that two runs can be compared whatever their weights are.
"""

import copy
import io
import logging
import multiprocessing
import pickle
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from kl_dist import KLShampoo
from kl_dist.methods import MATRIX_METHODS
from kl_dist.options import RECIPE_DEFAULTS
from tests.models import state_tensors
from tests.world import patience

SECONDS = 30.0  # for a few steps in a process of their own
SHAPES = {
    "wide": (4, 7),
    "square": (5, 5),
    "twin": (5, 5),
    "three": (3, 4, 2),
    "row": (1, 6),
    "vector": (6,),
    "scalar": (),
}
METHODS = (*MATRIX_METHODS, "adamw")
Named = dict[str, nn.Parameter]


def parameters(dtype: torch.dtype = torch.float64, shapes: dict = SHAPES) -> Named:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def give_gradients(params: Named, step: int) -> None:
    for i, p in enumerate(params.values()):
        generator = torch.Generator().manual_seed(1000 * i + step)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(opt: torch.optim.Optimizer, params: Named, steps: Iterable[int], after: Callable = lambda: None) -> None:
    for step in steps:
        give_gradients(params, step)
        opt.step()
        after()


def values(params: Named) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def states(opt: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of the state of every parameter, in the order of the groups."""
    ordered = [opt.state.get(p, {}) for group in opt.param_groups for p in group["params"]]
    return [{key: x.clone() for key, x in state.items()} for state in ordered]


def same(a, b) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)


# -- as any optimizer --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", MATRIX_METHODS)
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


@pytest.mark.parametrize("adamw_lr", [None, 1e-3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_scale_every_update(schedule, adamw_lr):
    """The rates are those that AdamW gets, and as gradients do not depend on weights, updates are in proportion.

    `adamw_lr` is what AdamW gets while `lr` has its constructed value, and both move alike.
    """
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = SCHEDULES[schedule](theirs)
    steady = moves_under(None, adamw_lr=adamw_lr)[1]
    for lr, moved, expected in zip(*moves_under(schedule, adamw_lr=adamw_lr), steady, strict=True):
        assert lr == theirs.param_groups[0]["lr"]
        assert furthest(moved, {name: x * (lr / 1e-2) for name, x in expected.items()}) < 1e-14
        theirs.step()
        scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
    plain = moves_under(None)[1]
    for name in ("vector", "scalar"):
        assert torch.allclose(steady[0][name], plain[0][name] * (adamw_lr or 1e-2) / 1e-2)


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
    """Clipping, a schedule, weight averaging, autocast: the loss falls by a factor 10, also of the averaged model."""
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
        assert (averaged(x) - y).square().mean() < losses[0] / 4


def test_autocast_does_not_reach_the_step():
    inside, outside = parameters(torch.float32), parameters(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        opt = KLShampoo(inside.items())
        train(opt, inside, range(5))
    other = KLShampoo(outside.items())
    train(other, outside, range(5))
    assert same([values(inside), states(opt)], [values(outside), states(other)])


# -- parameters of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_state_is_in_float32_or_float64(method, dtype, kept):
    params, exact = parameters(dtype), parameters(dtype)
    for p in exact.values():
        p.data = p.data.double()
    opt = KLShampoo(params.items(), method=method, lr=0.1, weight_decay=0.0)
    train(opt, params, range(1))
    floating = {x.dtype for state in opt.state.values() for x in state.values() if x.is_floating_point()}
    assert floating == {kept} and {p.dtype for p in params.values()} == {dtype}
    other = KLShampoo(exact.items(), method=method, lr=0.1, weight_decay=0.0)
    for name, p in params.items():
        exact[name].grad = p.grad.double()
    other.step()
    assert furthest(values(params), values(exact)) < 8 * torch.finfo(dtype).eps + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_odd_shapes_work(method, recipe):
    shapes = {"0-D": (), "one": (1,), "1x1": (1, 1), "1xN": (1, 7), "Nx1": (7, 1), "1-D of 5": (1, 1, 1, 1, 3)}
    shapes |= {"empty": (0,), "empty matrix": (0, 4), "ones": (1, 4, 1), "2x2": (2, 2)}
    params = parameters(shapes=shapes)
    before = values(params)
    opt = KLShampoo(params.items(), method=method, recipe=recipe)
    train(opt, params, range(5))
    for name, p in params.items():
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, before[name])
    assert same(KLShampoo(params.items()).state_dict()["state"].keys(), opt.state_dict()["state"].keys())


@pytest.mark.parametrize("blocking", ["square", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_is_immaterial(method, blocking):
    """channels_last convolutions, transposed weights, gradients with other strides than their parameter's."""
    shapes = {"convolution": (8, 4, 3, 3), "long": (130, 3), "cut": (128, 64), "three": (4, 5, 6)}
    plain, strided = parameters(shapes=shapes), parameters(shapes=shapes)
    strided["convolution"].data = strided["convolution"].data.to(memory_format=torch.channels_last)
    for name in ("long", "cut"):
        strided[name].data = strided[name].data.T.contiguous().T
    strided["three"].data = strided["three"].data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(p.is_contiguous() for p in strided.values())
    opts = [KLShampoo(params.items(), method=method, blocking=blocking) for params in (plain, strided)]
    strides = {name: p.stride() for name, p in strided.items()}
    for step in range(6):
        for opt, params in zip(opts, (plain, strided), strict=True):
            give_gradients(params, step)
            if params is strided and step % 2:
                for p in params.values():
                    p.grad = torch.empty_like(p).copy_(p.grad)
            opt.step()
    assert furthest(values(plain), values(strided)) < 1e-11
    assert {name: p.stride() for name, p in strided.items()} == strides


def test_a_parameter_without_gradient_is_left_alone_for_the_step():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(3))
    for name in SHAPES:
        index = list(SHAPES).index(name)
        before = [values(params)[name], states(opt)[index]]
        give_gradients(params, 3)
        params[name].grad = None
        opt.step()
        assert same([values(params)[name], states(opt)[index]], before)
        others = [other for other in SHAPES if other != name]
        assert not any(torch.equal(values(params)[other], before[0]) for other in others)


@pytest.mark.parametrize("method", MATRIX_METHODS)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
def test_an_expert_without_tokens_keeps_weights_and_state(method, recipe):
    """The gradient of a stack is one tensor; the entry of an expert that saw nothing is exactly zero."""
    params = parameters(shapes={"experts": (3, 4, 5)})
    opt = KLShampoo([{"params": params.items(), "matrices": {"batch": (0,)}}], method=method, recipe=recipe)
    (state,) = opt.state.values()
    for step in range(9):
        idle, before = step % 4, values(params)["experts"]  # 3: none is idle
        kept = {key: x.clone() for key, x in state.items()}
        give_gradients(params, step)
        if idle < 3:
            params["experts"].grad[idle] = 0
        opt.step()
        for expert in range(3):
            touched = {
                key for key, x in state.items() if key.startswith(f"[{expert}]") and not torch.equal(x, kept[key])
            }
            assert bool(touched) == (expert != idle)
            assert expert != idle or torch.equal(params["experts"][expert], before[expert])
    assert not any(torch.equal(params["experts"][i], before[i]) for i in range(3) if i != idle)


def test_tied_parameters_are_served_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    opt = KLShampoo(model.named_parameters())
    assert sorted(opt.plan.owner) == ["0.bias", "0.weight", "1.bias"]


def test_frozen_parameters_are_left_alone_and_can_be_freed():
    """A parameter that is frozen, then trained, then frozen again, keeps its state, and is nothing to the others."""
    params, alone = parameters(), parameters()
    params["square"].requires_grad_(False)
    opt = KLShampoo(params.items(), stagger=False)
    others = {name: p for name, p in alone.items() if name != "square"}
    other = KLShampoo(others.items(), stagger=False)
    for step in range(9):
        before = values(params)
        if step in (3, 6):
            params["square"].requires_grad_(step == 3)
        frozen = not params["square"].requires_grad
        state = {key: x.clone() for key, x in opt.state.get(params["square"], {}).items()}
        for opt_, all_ in ((opt, params), (other, alone)):
            give_gradients(all_, step)
            if frozen:
                params["square"].grad = None
            opt_.step()
        assert torch.equal(params["square"], before["square"]) == frozen
        assert not frozen or same(dict(opt.state.get(params["square"], {})), state)
        assert bool(opt.state.get(params["square"])) == (step >= 3)
    assert furthest({name: p.detach() for name, p in params.items() if name != "square"}, others) < 1e-13


def test_all_parameters_may_be_frozen():
    params = parameters()
    for p in params.values():
        p.requires_grad_(False)
    opt = KLShampoo(params.items())
    opt.step()
    assert opt.plan.owner == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_change_its_dtype_on_the_way(method):
    params, still = parameters(torch.float32), parameters(torch.float32)
    opt, other = (KLShampoo(p.items(), method=method) for p in (params, still))
    for step in range(8):
        if step == 4:
            for p in params.values():
                p.data = p.data.double()
        train(opt, params, [step])
        train(other, still, [step])
    assert furthest(values(params), values(still)) < 1e-4
    assert {x.dtype for s in opt.state.values() for x in s.values() if x.is_floating_point()} == {torch.float64}
    assert opt.plan.state_bytes == (sum(x.nbytes for x in state_tensors(opt)),)


# -- groups and state dicts --------------------------------------------------------------------------------------------


def test_adding_a_group_leaves_the_state_of_others_as_it_is():
    params = parameters()
    names = list(params)
    opt = KLShampoo([(name, params[name]) for name in names[:4]])
    train(opt, params, range(3))
    before = [dict(opt.plan.owner), states(opt)]
    opt.add_param_group({"params": [(name, params[name]) for name in names[4:]], "lr": 0.1, "method": "soap"})
    assert same([{name: opt.plan.owner[name] for name in before[0]}, states(opt)[:4]], before)
    weights = values(params)
    train(opt, params, range(3, 6))
    assert not any(torch.equal(params[name], weights[name]) for name in names)
    assert opt.param_groups[1]["weight_decay"] == opt.param_groups[0]["weight_decay"]


def test_an_added_group_goes_on_like_one_that_was_there():
    params, alone = parameters(), parameters()
    opt = KLShampoo({name: p for name, p in params.items() if name != "twin"}.items(), stagger=False)
    train(opt, {name: p for name, p in params.items() if name != "twin"}, range(0))
    opt.add_param_group({"params": [("twin", params["twin"])]})
    other = KLShampoo(alone.items(), stagger=False)
    for opt_, all_ in ((opt, params), (other, alone)):
        train(opt_, all_, range(6))
    assert furthest(values(params), values(alone)) < 1e-13


def test_two_parameters_of_one_name_keep_their_own_state():
    """Names may repeat between groups; or it is refused."""
    a, b, late = parameters(), parameters(), parameters()
    try:
        opt = KLShampoo([{"params": a.items()}, {"params": b.items()}])
    except ValueError as error:
        assert "'wide'" in str(error)
        return
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step + 100)
        opt.step()
    before = [states(opt), len(opt.plan.owner)]
    opt.add_param_group({"params": late.items()})
    assert same(states(opt)[: len(before[0])], before[0])
    assert before[1] == 2 * len(SHAPES)


def test_two_parameters_of_one_name_in_one_group_are_refused_or_kept_apart():
    a, b = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    try:
        opt = KLShampoo([("w", a), ("w", b)])
    except ValueError as error:
        assert "'w'" in str(error)
        return
    train(opt, {"a": a, "b": b}, range(3))
    before = states(opt)
    opt.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 2)))]})
    assert same(states(opt)[:2], before) and len(opt.plan.owner) == 3


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_goes_on_to_the_last_bit(method, recipe, stop):
    """Whenever it was stopped: before the first step, and at every phase of the refreshes."""
    options = dict(method=method, recipe=recipe, precondition_frequency=3, stagger=True)
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), lr=1e-2, **options)
    train(opt, params, range(stop))
    file = io.BytesIO()
    torch.save({"model": values(params), "optimizer": opt.state_dict()}, file)
    train(opt, params, range(stop, stop + 5))
    file.seek(0)
    saved = torch.load(file)
    resumed = parameters(torch.float32)
    for name, p in resumed.items():
        p.data.copy_(saved["model"][name])
    other = KLShampoo(resumed.items(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3, **options)
    other.load_state_dict(saved["optimizer"])
    train(other, resumed, range(stop, stop + 5))
    assert same([values(params), states(opt)], [values(resumed), states(other)])
    assert other.param_groups[0]["lr"] == 1e-2


def test_a_loaded_schedule_keeps_the_ratio_of_learning_rates():
    params, resumed = parameters(), parameters()
    opt = KLShampoo(params.items(), lr=1e-2, adamw_lr=1e-3)
    opt.param_groups[0]["lr"] = 5e-3
    train(opt, params, range(3))
    other = KLShampoo(resumed.items(), lr=5e-3, adamw_lr=7e-3)
    other.load_state_dict(opt.state_dict())
    for name, p in params.items():
        resumed[name].data.copy_(p.data)
    for opt_, all_ in ((opt, params), (other, resumed)):
        train(opt_, all_, range(3, 6))
    assert same(values(params), values(resumed))


def test_a_state_dict_is_plain_data():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True)["state"], opt.state_dict()["state"])
    keys = KLShampoo(parameters().items()).state_dict()["state"]
    assert {i: s.keys() for i, s in keys.items()} == {i: s.keys() for i, s in opt.state_dict()["state"].items()}


def adamw_state() -> dict:
    params = parameters()
    opt = torch.optim.AdamW(params.values())
    train(opt, params, range(2))
    return opt.state_dict()


def state_of(shapes: dict = SHAPES, **options) -> dict:
    params = parameters(shapes=shapes)
    opt = KLShampoo(params.items(), **options)
    train(opt, params, range(2))
    return opt.state_dict()


def state_without(group_key: str | None) -> dict:
    saved = state_of()
    if group_key is None:
        del saved["state"]
    else:
        del saved["param_groups"][0][group_key]
    return saved


REFUSED: dict[str, tuple[Callable[[], dict], str]] = {
    "AdamW's": (adamw_state, "KLShampoo"),
    "nothing": (dict, "KLShampoo"),
    "another method's": (lambda: state_of(method="soap"), "soap"),
    "another recipe's": (lambda: state_of(recipe="paper"), "paper"),
    "another cutting's": (lambda: state_of(max_preconditioner_dim=3), "max_preconditioner_dim"),
    "other shapes'": (lambda: state_of({**SHAPES, "square": (5, 6)}), "square"),
    "fewer parameters'": (lambda: state_of({name: SHAPES[name] for name in list(SHAPES)[1:]}), "parameter"),
    "one without options": (lambda: state_without("method"), "method"),
    "one without tensors": (lambda: state_without(None), "state"),
    "other order's": (lambda: state_of(dict(reversed(SHAPES.items()))), "."),
}


@pytest.mark.parametrize("whose", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(whose):
    make, word = REFUSED[whose]
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, range(2))
    before = [states(opt), copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups])]
    with pytest.raises(ValueError, match=word):
        opt.load_state_dict(make())
    assert same([states(opt), [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]], before)


# -- gradients that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_DEFAULTS)
def test_a_gradient_that_is_not_finite_skips_the_whole_step(recipe, value, where, caplog):
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), recipe=recipe)
    for step in range(6):
        before = [values(params), states(opt)]
        give_gradients(params, step)
        if step % 2:
            params[where].grad.view(-1)[-1] = value
        with caplog.at_level(logging.WARNING):
            opt.step()
        unchanged = same([values(params), states(opt)], before)
        assert unchanged if step % 2 else not unchanged
    assert opt.stats()["skipped_steps"] == 3
    (warning,) = [record for record in caplog.records if record.name.startswith("kl_dist")]
    assert where in warning.getMessage() and warning.levelno == logging.WARNING


@pytest.mark.parametrize("step", [0, 3])
def test_a_gradient_that_is_not_finite_is_an_error_where_asked(step):
    params = parameters()
    opt = KLShampoo(params.items(), on_nonfinite="raise")
    train(opt, params, range(step))
    before = [values(params), states(opt)]
    give_gradients(params, step)
    params["twin"].grad[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="'twin'"):
        opt.step()
    assert same([values(params), states(opt)], before)
    train(opt, params, range(step, 5))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e8, 1e11])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_any_finite_size_keep_everything_finite(method, size):
    params = parameters(torch.float32)
    opt = KLShampoo(params.items(), method=method)
    for step in range(6):
        give_gradients(params, step)
        for p in params.values():
            p.grad *= size if step % 3 else 1.0
        opt.step()
    assert all(p.isfinite().all() for p in params.values())
    assert all(x.isfinite().all() for state in opt.state.values() for x in state.values())


def legacy() -> None:
    torch.set_float32_matmul_precision("medium")


def new() -> None:
    torch.backends.fp32_precision = "tf32"


def of_one_backend() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def step_with_lower_precision(turn_down: Callable[[], None]) -> None:
    def weights() -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(64, 64))
        opt = KLShampoo([("p", p)], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(64, 64)
            opt.step()
        return p.detach()

    def product() -> Tensor:
        torch.manual_seed(1)
        return torch.randn(64, 64) @ torch.randn(64, 64)

    plain = weights()
    turn_down()
    before = product()
    assert torch.equal(weights(), plain)
    assert torch.equal(product(), before)


@pytest.mark.parametrize("turn_down", [legacy, new, of_one_backend])
def test_a_lower_matmul_precision_of_the_user_is_set_aside_for_the_step_and_kept_after(turn_down):
    """bfloat16 products would move the weights by 1e-3. In a process of its own: torch refuses to mix the switches."""
    if turn_down is not legacy and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")
    process = multiprocessing.get_context("fork").Process(target=step_with_lower_precision, args=(turn_down,))
    process.start()
    process.join(SECONDS * patience())
    assert process.exitcode == 0
