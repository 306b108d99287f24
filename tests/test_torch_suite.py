"""What torch's own suite asks of every optimizer, asked of KLShampoo: steps, schedules, groups, hooks, errors.

Its description of optimizers is in the installed torch, its tests are not; see tests/torch_optimizers.py.
"""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kl_dist import KLShampoo
from tests.made_up import furthest, give_gradients, parameters, same, train, values
from tests.products import product
from tests.torch_optimizers import INFO, LR, NAMES, SCHEDULES, OptimizerErrorEnum, options_of

STEPS = 20


def layer(strided: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A weight and a bias; `strided` are every second element of others."""
    generator = torch.Generator().manual_seed(1)
    whole = {"weight": torch.randn(10, 5, 2, generator=generator), "bias": torch.randn(10, 2, generator=generator)}
    return {
        name: nn.Parameter(x.to(dtype)[..., 0] if strided else x.to(dtype)[..., 0].clone()) for name, x in whole.items()
    }


def loss_of(params: dict[str, nn.Parameter]) -> Tensor:
    inputs = torch.linspace(-1, 1, 5, dtype=params["weight"].dtype)
    return (params["weight"].mv(inputs) + params["bias"]).square().sum()


def closure_of(opt: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss.detach()

    return closure


def test_torchs_testing_library_leaves_the_process_as_it_was():
    assert not torch.backends.flags_frozen()


@product(name=NAMES, schedule=SCHEDULES, strided=[False, True])
def test_the_loss_falls(name, schedule, strided):
    """And no schedule warns that no step was made before its own."""
    params = layer(strided)
    opt = KLShampoo(params.items(), **options_of(name))
    closure = closure_of(opt, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [make(opt) for make in SCHEDULES[schedule]]
        for _ in range(STEPS):
            loss = opt.step(closure)
            for scheduler in schedulers:
                scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    assert loss_of(params) < loss_of(layer())


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_decayed_and_moved_as_its_own_options_say(name):
    params = layer() | {"still": nn.Parameter(torch.ones(4, 3))}
    options = {"lr": 1e-3, **options_of(name)}
    groups = [
        {**options, "params": [("weight", params["weight"])]},
        {**options, "params": [("bias", params["bias"])], "weight_decay": 0.0},
        {"params": [("still", params["still"])]},
    ]
    opt = KLShampoo(groups, lr=1e-28)
    closure = closure_of(opt, params)
    for _ in range(STEPS):
        closure()
        params["still"].grad = torch.rand(4, 3)
        opt.step()
    assert loss_of(params) < loss_of(layer())
    assert torch.equal(params["still"], torch.ones(4, 3))


@product(name=NAMES, shape=[(), (1,)], schedule=SCHEDULES)
def test_a_tensor_for_the_learning_rate_does_what_the_number_does(name, shape, schedule):
    """Equal to the last bit while both are the same number; schedules compute the tensor in float32."""
    pairs = []
    for lr in (LR, torch.full(shape, LR)):
        params = layer()
        opt = KLShampoo(params.items(), **{**options_of(name), "lr": lr})
        pairs.append((opt, params, [make(opt) for make in SCHEDULES[schedule]]))
    for _ in range(5):
        for opt, params, schedulers in pairs:
            loss = opt.step(closure_of(opt, params))
            for scheduler in schedulers:
                scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        found, expected = (values(params) for _, params, _ in pairs)
        assert same(found, expected) if schedule == "no schedule" else furthest(found, expected) < 1e-6
    assert isinstance(pairs[1][0].param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_a_step_returns_the_loss_and_moves_nothing(name):
    """Plain tensors that ask for no gradient are taken, as frozen ones."""
    params = {name: p.detach() for name, p in layer().items()}
    opt = KLShampoo(params.items(), **options_of(name))
    assert opt.step(lambda: 1) == 1
    assert same(params, values(layer()))


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_move_nothing_that_is_not_decayed(name):
    params = layer()
    opt = KLShampoo(params.items(), **{**options_of(name), "weight_decay": 0.0})
    for _ in range(3):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert same(values(params), values(layer()))


@pytest.mark.parametrize("name", NAMES)
def test_together_parameters_move_as_one_by_one(name):
    """Through a step without gradients, and one layer frozen for a while: what is batched changes nothing."""
    options = {**options_of(name), "stagger": False}
    together, alone = parameters(), parameters()
    opts = [KLShampoo(together.items(), **options)]
    others = [KLShampoo([(name, p)], **options) for name, p in alone.items()]
    for step in range(7):
        for params, each in ((together, opts), (alone, others)):
            give_gradients(params, step)
            params["square"].requires_grad_(step not in (3, 4))
            for p in params.values() if step == 2 else [params["square"]] if step in (3, 4) else ():
                p.grad = None
            for opt in each:
                opt.step()
    assert furthest(values(together), values(alone)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_may_be_mixed_in_one_group(name):
    def mixed() -> dict[str, nn.Parameter]:
        dtypes = {"square": torch.float32, "twin": torch.bfloat16, "vector": torch.float16}
        return {key: nn.Parameter(p.detach().to(dtypes.get(key, p.dtype))) for key, p in parameters().items()}

    together, alone = mixed(), mixed()
    options = {**options_of(name), "stagger": False}
    train(KLShampoo(together.items(), **options), together, range(3))
    for key, p in alone.items():
        opt = KLShampoo([(key, p)], **options)
        for step in range(3):
            give_gradients(alone, step)
            opt.step()
    for key, p in alone.items():
        torch.testing.assert_close(together[key], p)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_names_every_option(name):
    opt = KLShampoo(layer().items(), **options_of(name))
    said = repr(opt)
    assert said.startswith("KLShampoo (") and all(f"    {key}: " in said for key in opt.defaults)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_come_in_torchs_order_and_can_be_removed(name):
    params = layer()
    opt, other = KLShampoo(params.items(), **options_of(name)), torch.optim.SGD(params.values())
    called: list[str] = []
    say = lambda what, opt, args, kwargs: called.append(what)  # noqa: E731
    handles = [
        register_optimizer_step_pre_hook(partial(say, "all before")),
        register_optimizer_step_post_hook(partial(say, "all after")),
        opt.register_step_pre_hook(partial(say, "before")),
        opt.register_step_post_hook(partial(say, "after")),
        other.register_step_pre_hook(partial(say, "before")),
        other.register_step_post_hook(partial(say, "after")),
    ]
    for one in (opt, other, opt):
        one.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert called == 3 * ["all before", "before", "after", "all after"]


def test_a_hook_may_change_what_a_step_is_called_with():
    params = layer()
    opt = KLShampoo(params.items())
    opt.register_step_pre_hook(lambda opt, args, kwargs: (args[:1], {"closure": lambda: "the hook's"}))
    assert opt.step(lambda: "the caller's") == "the hook's"


def test_a_profiler_sees_steps_under_the_optimizers_name():
    params = layer()
    opt = KLShampoo(params.items())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        opt.step(closure_of(opt, params))
    seen = {event.key for event in profiler.key_averages()}
    assert {"Optimizer.step#KLShampoo.step", "Optimizer.zero_grad#KLShampoo.zero_grad"} <= seen


LENIENT = {
    "all optimizer params should be with/without names",
    "all optimizer param groups should be with/without names.",
}
WORDS = {
    "invalid param type": (TypeError, "should be an iterable of Tensors or dicts"),
    "a param group cannot have duplicate parameters": (ValueError, "is given twice"),
    "duplicate parameters should not occur across param groups either": (ValueError, "is given twice"),
    "Tensor lr must be 1-element": (TypeError, "lr is a number, not tensor"),
}


@pytest.mark.parametrize(
    "error", INFO.optim_error_inputs_func("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc
)
def test_what_torch_refuses_is_refused(error):
    """But for names that only some parameters have: the others are given some."""
    given = error.optimizer_error_input
    params = list(layer().values()) if given.params is None else given.params
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if given.desc in LENIENT:
        assert KLShampoo(params, **given.kwargs).param_groups[0]["param_names"][0] in ("weight", "group0.param0")
        return
    kind, words = WORDS[given.desc]
    with pytest.raises(kind, match=words):
        KLShampoo(params, **given.kwargs)
