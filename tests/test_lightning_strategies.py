"""The strategies themselves: their names, their options, and what Lightning expects of any DDP strategy."""

import math
import pickle
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.nn.parallel import DistributedDataParallel

import lightning_plugin
from lightning_plugin.registration import DEEPSPEED, NAMESPACES, register
from lightning_plugin.sharding import repeated_blocks
from tests.lightning_runs import STEPS, adamw, alone, launched, module, pytorch, rows, trainer
from tests.models import METHODS, deviation, same_bits
from tests.sharded import layers, weights_of

VARIANTS = ("", "_find_unused_parameters_true", "_spawn", "_fsdp2")
BOTH = [(import_module(f"lightning_plugin.namespaces.{name}"), *packages) for name, packages in NAMESPACES.items()]
NAMES = [method + variant for method in METHODS for variant in VARIANTS]


# -- names and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_known_to_both_lightnings_and_their_fabrics(name):
    register()  # again is no matter
    for classes, of_trainer, of_fabric in BOTH:
        for package, registry, kind in (
            (of_trainer, "StrategyRegistry", "KLShampooStrategy"),
            (of_fabric, "STRATEGY_REGISTRY", "KLShampooFabricStrategy"),
        ):
            strategies = import_module(f"{package}.strategies")
            made = getattr(strategies, registry).get(name)
            expected = getattr(classes, kind if "fsdp2" not in name else kind.replace("Strategy", "FSDP2Strategy"))
            assert type(made) is expected and isinstance(made, strategies.Strategy)
            method = next(method for method in METHODS if name.startswith(method))
            assert made.optimizer_options == ({} if method == "kl_shampoo" else {"method": method})


@pytest.mark.parametrize("name", [method + ending for method in METHODS for ending in DEEPSPEED])
def test_the_names_with_deepspeed_are_as_lightnings_own(name):
    for classes, of_trainer, _ in BOTH:
        registry = import_module(f"{of_trainer}.strategies").StrategyRegistry
        method, _, theirs = name.partition("_deepspeed")
        made, own = registry.get(name), registry.get(f"deepspeed{theirs}")
        assert type(made) is classes.KLShampooDeepSpeedStrategy
        assert made.config == own.config
        assert made.optimizer_options == ({} if method == "kl_shampoo" else {"method": method})


@pytest.mark.parametrize("classes", [classes for classes, _, _ in BOTH], ids=lambda classes: classes.__name__)
def test_strategies_and_callbacks_can_be_pickled_for_spawn(classes):
    made = [getattr(classes, name)() for name in lightning_plugin.__all__]
    assert [type(one) for one in pickle.loads(pickle.dumps(made))] == [type(one) for one in made]


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"precondtion_frequency": 3}, TypeError, "did you mean 'precondition_frequency'"),
        ({"find_unused_parameter": True}, TypeError, "did you mean 'find_unused_parameters'"),
        ({"fused": True}, TypeError, "chooses its kernels itself"),
        ({"precondition_frequency": 0}, ValueError, "at least 1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        ({"recipe": "frsh"}, ValueError, "did you mean 'fresh'"),
        ({"on_nonfinite": "warn"}, ValueError, '"skip" or "raise"'),
        ({"optimizer_checkpoint": "maybe"}, ValueError, '"strict", "partial" or "ignore"'),
        ({"reduce_to_owners": True, "ddp_comm_hook": fp16_compress_hook}, ValueError, "leave out ddp_comm_hook"),
    ],
)
def test_bad_options_are_refused_before_any_process_starts(options, kind, match):
    with pytest.raises(kind, match=match):
        lightning_plugin.KLShampooStrategy(**options)


def test_the_parents_arguments_reach_the_parent():
    made = lightning_plugin.KLShampooStrategy(find_unused_parameters=True, bucket_cap_mb=3, start_method="spawn", lr=1)
    assert made._ddp_kwargs == {"find_unused_parameters": True, "bucket_cap_mb": 3} and made._start_method == "spawn"
    assert made.optimizer_options == {"lr": 1}


def test_blocks_that_repeat_are_found_where_they_stand():
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = nn.ModuleDict({"body": nn.ModuleList([block, nn.Sequential(*block)]), "head": nn.Linear(3, 2)})
    model = nn.Sequential(model, nn.ReLU())
    assert list(repeated_blocks(model)) == list(model[0]["body"])


# -- what Lightning expects --------------------------------------------------------------------------------------------


def watched(group, strategy: str):
    """What `configure_optimizers` finds, and what is left after a fit and after one that failed."""
    pl, seen = pytorch(), {}

    def configure(made: Any) -> Any:
        seen["devices"] = {parameter.device for parameter in made.parameters()}
        seen["wrapped"] = isinstance(made.trainer.strategy.model, DistributedDataParallel)
        seen["root"] = made.trainer.strategy.root_device
        return adamw(made)

    with launched(group):
        made = module(pl, configure)
        ran = trainer(pl, strategy, max_steps=2)
        ran.strategy.barrier("before anything is set up")
        ran.fit(made, rows(2, group.rank()))
        seen["after"] = ran.strategy.model is made
        broken = module(pl, attend=fail)
        ran = trainer(pl, strategy, max_steps=2)
        with pytest.raises(ArithmeticError):
            ran.fit(broken, rows(2, group.rank()))
        seen["after failure"] = ran.strategy.model is broken
        return seen


def fail(made: Any, step: int) -> None:
    raise ArithmeticError("on every rank")


@pytest.mark.parametrize("strategy", ["kl_shampoo", "kl_shampoo_fsdp2"])
def test_parameters_are_placed_before_configure_optimizers_and_the_module_comes_back_bare(worlds, strategy):
    for seen in worlds[2].run(watched, 2, strategy):
        assert seen["devices"] == {seen["root"]} == {torch.device("cpu")}
        assert seen["wrapped"] is (strategy == "kl_shampoo")
        assert seen["after"] and seen["after failure"]


def spawned_again(group):
    with launched(group):
        ran = trainer(strategy="kl_shampoo_spawn")
        ran.strategy.launcher._already_fit = True
        ran.fit(module(), rows(2, group.rank()))


def test_a_second_fit_under_spawn_is_refused(worlds):
    assert all("fit()` twice" in str(error) for error in worlds[2].run_expecting_errors(spawned_again, 2))


def with_unused_parameters(group):
    made = module()
    made.never = nn.Linear(3, 3)
    with launched(group):
        trainer(max_steps=3).fit(made, rows(2, group.rank()))


def test_unused_parameters_are_an_error_that_names_our_strategy(worlds):
    errors = worlds[2].run_expecting_errors(with_unused_parameters, 2)
    assert all("strategy='kl_shampoo_find_unused_parameters_true'" in str(error) for error in errors)


def refused(group, what: str):
    pl = pytorch()
    plugin = None
    configure = adamw
    strategy: Any = "kl_shampoo"
    if what == "scaler":
        strategy = lightning_plugin.KLShampooStrategy(reduce_to_owners=True)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu")
    if what == "class":
        configure = rms
    if what == "head":
        strategy = lightning_plugin.KLShampooStrategy(output_head="net.hed")
    if what == "twice":
        strategy, configure = lightning_plugin.KLShampooStrategy(lr=1e-3), ours
    if what in ("whole", "too early"):
        strategy = "kl_shampoo_fsdp2"
    if what == "local sgd":
        strategy = lightning_plugin.KLShampooStrategy(ddp_comm_state=PostLocalSGDState(None, None, 1))
    if what == "tensor parallel":
        strategy = lightning_plugin.KLShampooFSDP2Strategy(tensor_parallel_size=2)
    with launched(group):
        made = module(pl, configure)
        if what == "whole":
            made.configure_model = lambda: None
        if what == "too early":
            early = adamw(made)
            made.configure = lambda _: early
        trainer(pl, strategy, plugins=plugin).fit(made, rows(2, group.rank()))


def rms(made: Any) -> Any:
    return torch.optim.RMSprop(made.parameters())


def ours(made: Any) -> Any:
    from kl_dist import KLShampoo

    return KLShampoo(made.named_parameters())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("scaler", "bf16-mixed"),
        ("class", "RMSprop, which cannot be converted"),
        ("head", "no module named 'net.hed'"),
        ("twice", "to one of the two"),
        ("tensor parallel", "configure_model"),
        ("whole", "left 'net.experts' whole on every rank"),
        ("too early", "is no parameter of the module"),
        ("local sgd", "local SGD"),
    ],
)
def test_what_does_not_go_together_is_refused_on_every_rank(worlds, what, said):
    errors = worlds[2].run_expecting_errors(refused, 2, what)
    assert all(said in str(error) for error in errors), errors


def changed_after_reduction(group):
    """Gradients changed by the user's hand, where only their owners have them."""
    pl = pytorch()
    strategy = lightning_plugin.KLShampooStrategy(reduce_to_owners=True)
    made = module(pl)
    made.on_before_optimizer_step = lambda optimizer: made.net.mix.weight.grad.mul_(2)
    with launched(group):
        trainer(pl, strategy).fit(made, rows(2, group.rank()))


def test_a_gradient_changed_behind_the_hook_is_an_error_on_every_rank(worlds):
    errors = worlds[2].run_expecting_errors(changed_after_reduction, 2)
    assert all("net.mix.weight" in str(error) and "clip_grad_norm_" in str(error) for error in errors)


GROWN = 2.0**20  # a scale at which the gradients overflow


def scaled(group):
    """A Trainer with a GradScaler of its own, which a plugin brings to CPUs too; the scale after overflows."""
    pl = pytorch()
    scaler = torch.amp.GradScaler("cpu", init_scale=GROWN, growth_interval=1000)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    with launched(group):
        made = module(pl, dtype=torch.float32)
        trainer(pl, plugins=plugin).fit(made, rows(2, group.rank()))
        return scaler.get_scale(), weights_of(made.net)


def without_first(skipped: int, optimizer: Any, step: int) -> None:
    """Gradients of the first steps that KLShampoo skips, as it does after an overflow."""
    for group in optimizer.param_groups if step < skipped else ():
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)


def test_a_grad_scaler_skips_overflows_on_all_ranks_and_goes_on(worlds):
    (scale, weights), (other, others) = worlds[2].run(scaled, 2)
    assert scale == other < GROWN and same_bits(weights, others)
    skipped = int(math.log2(GROWN / scale))
    expected = alone(torch.float32, change=partial(without_first, skipped))
    assert 1 < skipped < STEPS and deviation(weights, expected) < 0.02  # of float16; one skipped more or less makes 1


def begun_apart(group):
    """A module whose ranks were initialised differently, and a buffer, after no step at all."""
    pl = pytorch()
    with launched(group):
        made = module(pl)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(group.rank())
        made.net.register_buffer("rank", torch.tensor([float(group.rank())]))
        trainer(pl, "kl_shampoo_fsdp2", max_steps=1, limit_train_batches=0).fit(made, rows(2, group.rank()))
        trainer(pl, "kl_shampoo_fsdp2").validate(made, rows(2, group.rank()), verbose=False)
        return weights_of(made.net), float(made.net.rank)


def test_sharded_modules_begin_with_the_first_ranks_parameters(worlds):
    expected = {name: p.detach() for name, p in layers(torch.float64).named_parameters()}
    for weights, rank in worlds[2].run(begun_apart, 2):
        assert same_bits(weights, expected) and rank == 0
