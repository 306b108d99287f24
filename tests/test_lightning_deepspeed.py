"""Lightning's DeepSpeedStrategy trains with KLShampoo as plain kl_dist does on one process, at every ZeRO stage.

Lightning wants GPUs for it; what makes it take CPUs stands here, and nothing else of it is changed.
"""

import contextlib
import gc
from functools import cache, partial
from importlib import import_module

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from kl_dist import KLShampoo, clip_grad_norm_
from kl_dist.options import TORCH_ADAMW_BETAS, recipe_defaults
from lightning_plugin import KLShampooDeepSpeedStrategy
from tests.deepspeed_runs import deepspeed_here, weights_of
from tests.lightning_runs import BY_RULE, LR, STEPS, adamw, alone, launched, module, pytorch, rows, trainer
from tests.models import METHODS, deviation, same_bits
from tests.noise import NOISE, float32_limit
from tests.products import product
from tests.sharded import layers

STAGES = (0, 1, 2, 3)
NAMESPACES = {"lightning.pytorch": "of_lightning", "pytorch_lightning": "of_pytorch_lightning"}


# -- what is expected --------------------------------------------------------------------------------------------------


def falling(step: int) -> float:
    return 1 / (1 + step)


def of_reference(optimizer):
    return LambdaLR(optimizer, falling)


def clipped(optimizer, step):
    clip_grad_norm_(optimizer, 0.5)


REFERENCES = {
    **{method: {"method": method, "betas": recipe_defaults(method, "fresh")["betas"]} for method in METHODS},
    "shampoo": {"method": "shampoo", "betas": recipe_defaults("shampoo", "fresh")["betas"], "lr": LR},
    "scheduled": {"lr": 2 * LR, "schedule": of_reference},
    "clipped": {"change": clipped},
}


def reference(name: str, seed: int = 0):
    return alone(torch.float32, NOISE if seed else 0.0, seed, **REFERENCES[name])


YARDSTICKS = {f"lightning {name}": partial(reference, name) for name in REFERENCES if name != "kl_shampoo"}


def assert_trained(found, name: str = "kl_shampoo") -> None:
    assert deviation(found, reference(name)) <= float32_limit(f"lightning {name}")


# -- training ----------------------------------------------------------------------------------------------------------


def on_cpu(namespace: str, **options):
    """The strategy, which takes CPUs."""
    found = import_module(f"lightning_plugin.namespaces.{NAMESPACES[namespace]}")

    class OnCPU(found.KLShampooDeepSpeedStrategy):
        root_device = torch.device("cpu", 0)  # of an index, as GPUs have

        def setup_environment(self):
            super(found.DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    return OnCPU(**options)


@contextlib.contextmanager
def there(group):
    with launched(group), deepspeed_here(group) as deepspeed:
        freeze_what_is_imported()
        yield deepspeed


@cache
def freeze_what_is_imported() -> None:
    """DeepSpeed collects garbage for every engine of stage 3: half a second over all of these modules."""
    gc.freeze()


def fit(group, namespace="lightning.pytorch", configure=None, resume=None, save=None, steps=STEPS, **options):
    """(weights after a fit, the optimizer's routes, its learning rates); `trainer_*` are options of the Trainer."""
    of_trainer = {key[8:]: options.pop(key) for key in list(options) if key.startswith("trainer_")}
    with there(group) as deepspeed:
        pl = pytorch(namespace)
        made = module(pl, configure, torch.float32)
        made_trainer = trainer(pl, on_cpu(namespace, **options), **of_trainer)
        share = of_trainer.get("accumulate_grad_batches", 1)
        made_trainer.fit(made, rows(group.size(), group.rank(), steps, share), ckpt_path=resume)
        if save is not None:
            made_trainer.save_checkpoint(save)
        engine = made_trainer.strategy.deepspeed_engine
        optimizer = engine.basic_optimizer
        found = {name.removeprefix("net."): x for name, x in weights_of(deepspeed, engine).items()}
        said = optimizer.routes(), [one["lr"] for one in optimizer.groups], optimizer.plan.world_size
        engine.destroy()
        return found, *said


@product(stage=STAGES, method=METHODS, namespace=NAMESPACES)
def test_adamw_is_converted_and_trains_as_on_one_process(worlds, stage, method, namespace):
    found = worlds[2].run(fit, 2, namespace, stage=stage, method=method, timeout=120)
    assert all(same_bits(weights, found[0][0]) for weights, *_ in found)
    assert_trained(found[0][0], method)
    assert found[0][3] == 2


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_one_device_trains_alike(worlds, stage):
    found = worlds[1].run(fit, 1, stage=stage, timeout=120)
    assert_trained(found[0][0])
    assert found[0][3] == 1


def scheduled(made):
    optimizer = adamw(made)
    schedule = LambdaLR(optimizer, falling)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("stage", [1, 3])
def test_schedules_drive_it_and_lr_scales_them(worlds, stage):
    found = worlds[2].run(fit, 2, configure=scheduled, stage=stage, lr=2 * LR, timeout=120)
    assert_trained(found[0][0], "scheduled")
    assert found[0][2] == [pytest.approx(2 * LR * falling(STEPS))]


@pytest.mark.parametrize("stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2))])
def test_clipping_and_accumulation_are_deepspeeds_and_alike(worlds, stage):
    more = {"trainer_gradient_clip_val": 0.5, "trainer_accumulate_grad_batches": 2}
    found = worlds[2].run(fit, 2, stage=stage, timeout=120, **more)
    assert_trained(found[0][0], "clipped")


def made_later(made):
    """Under zero.Init a parameter has no shape of its own when the optimizer is made."""
    assert all(p.numel() == 0 for p in made.parameters())
    return adamw(made)


def built_in_configure_model(group, configure, **options):
    with there(group) as deepspeed:
        pl = pytorch()
        kind = type(module(pl))

        class Late(kind):
            def __init__(self):
                super().__init__(configure, torch.float32)
                del self.net

            def configure_model(self):
                if not hasattr(self, "net"):
                    self.net = layers(torch.float32)

        made = Late()
        fitted = trainer(pl, on_cpu("lightning.pytorch", stage=3, **options))
        fitted.fit(made, rows(group.size(), group.rank()))
        engine = fitted.strategy.deepspeed_engine
        found = {name.removeprefix("net."): x for name, x in weights_of(deepspeed, engine).items()}
        said = engine.basic_optimizer.routes(), [one["lr"] for one in engine.basic_optimizer.groups]
        engine.destroy()
        return found, *said


def test_a_model_made_in_configure_model_at_stage_3(worlds):
    found, routes, _ = worlds[2].run(built_in_configure_model, 2, made_later, timeout=120)[0]
    assert_trained(found)
    assert route_of("net.embedding.weight", routes) == "adamw"


def route_of(name: str, routes: str) -> str:
    (line,) = (line for line in routes.splitlines() if line.startswith(name))
    return next(word for word in line.split() if word in ("adamw", *METHODS))


def with_two_rates(made):
    small = [p for name, p in made.named_parameters() if "norm" in name]
    large = [p for name, p in made.named_parameters() if "norm" not in name]
    return AdamW([{"params": small, "lr": 1e-4}, {"params": large, "lr": 1e-2}])


def test_which_group_is_the_largest_is_known_at_stage_3_too(worlds):
    """`lr` scales all groups by its ratio to that of the largest."""
    *_, rates = worlds[2].run(built_in_configure_model, 2, with_two_rates, lr=2e-2, timeout=120)[0]
    assert rates == [pytest.approx(2e-4), pytest.approx(2e-2)]


def compiled_in_part(made):
    made.net.up = torch.compile(made.net.up, backend="aot_eager")
    return adamw(made)


def test_names_are_those_of_the_module_whether_compiled_or_not(worlds):
    names = {"adamw_names": ["net.up.weight", "net.embedding.weight"], "steps": 1}
    for configure in (compiled_in_part, adamw):
        found = worlds[2].run(fit, 2, configure=configure, stage=2, timeout=120, **names)
        assert route_of("net.up.weight", found[0][1]) == "adamw"


def nothing(made):
    return None


def from_the_entry(type_: str = "KLShampoo", **more) -> dict:
    params = {**BY_RULE, "weight_decay": 0.02, "betas": TORCH_ADAMW_BETAS, "adamw_names": ["net.embedding.weight"]}
    return {"optimizer": {"type": type_, "params": params}, "zero_optimization": {"stage": 2}, **more}


@pytest.mark.parametrize("configure", [nothing, adamw])
def test_a_config_with_an_entry_of_its_own(worlds, configure):
    found = worlds[2].run(fit, 2, configure=configure, config=from_the_entry(), timeout=120)
    assert_trained(found[0][0])


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.full), 2, 3])  # 1 saves as 2 does
def test_a_fit_goes_on_to_the_last_bit(worlds, tmp_path, stage):
    epoch = {"stage": stage, "configure": scheduled, "steps": 4, "trainer_max_steps": -1, "timeout": 120}
    whole = worlds[2].run(fit, 2, trainer_max_epochs=2, **epoch)
    worlds[2].run(fit, 2, save=str(tmp_path / "half.ckpt"), **epoch)
    found = worlds[2].run(fit, 2, resume=str(tmp_path / "half.ckpt"), trainer_max_epochs=2, **epoch)
    assert same_bits(found[0][0], whole[0][0]) and found[0][2] == whole[0][2] == [LR * falling(8)]


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16-true"), (2, "32-true"), (3, "bf16-true")])
def test_weights_alone_go_on_with_a_new_optimizer(worlds, tmp_path, stage, precision):
    path = str(tmp_path / "soap.ckpt")
    some = {"stage": stage, "steps": 4, "trainer_max_steps": -1, "trainer_precision": precision, "timeout": 120}
    saved = worlds[2].run(fit, 2, method="soap", save=path, **some)
    errors = worlds[2].run_expecting_errors(fit, 2, resume=path, trainer_max_epochs=2, **some)
    assert all("soap.ckpt/checkpoint/kl_dist does not fit" in str(error) for error in errors), errors
    more = {"optimizer_checkpoint": "ignore", "trainer_max_epochs": 2, "configure": barely, **some}
    found = worlds[2].run(fit, 2, resume=path, **more)
    assert deviation(found[0][0], saved[0][0]) <= 1e-9


def barely(made):
    """Steps that change next to nothing: what comes of them is what was loaded."""
    return adamw(made, lr=1e-12)


def other_uses(group, path: str):
    """What validate, test and predict say of the weights, before and after a fit, and from a checkpoint."""
    with there(group):
        pl = pytorch()
        made = module(pl, adamw, torch.float32)
        first = trainer(pl, on_cpu("lightning.pytorch", stage=2), max_steps=4)
        data = rows(group.size(), group.rank(), 4)
        first.fit(made, data, data)
        fitted = first.validate(made, data, verbose=False)
        first.save_checkpoint(path)
        again = trainer(pl, on_cpu("lightning.pytorch", stage=2))
        return fitted, again.validate(module(pl, adamw, torch.float32), data, ckpt_path=path, verbose=False)


def test_validation_with_the_weights_of_a_checkpoint(worlds, tmp_path):
    for fitted, again in worlds[2].run(other_uses, 2, str(tmp_path / "there.ckpt"), timeout=120):
        assert fitted == again and fitted[0]["validation"] > 0


# -- what it says, and what it refuses ---------------------------------------------------------------------------------


def watched(group):
    with there(group):
        pl = pytorch()
        said = []
        classes = import_module("lightning_plugin.namespaces.of_lightning")
        summary = type("Summary", (classes.PartitionSummary,), {"_say": staticmethod(said.append)})(parameters=True)
        made = module(pl, adamw, torch.float32)
        fitted = trainer(
            pl,
            on_cpu("lightning.pytorch", stage=2),
            max_steps=4,
            callbacks=[classes.KLShampooMonitor(), summary],
            log_every_n_steps=1,
        )
        fitted.fit(made, rows(group.size(), group.rank()))
        return {name: float(x) for name, x in fitted.callback_metrics.items()}, said


def test_callbacks_find_it_inside_of_deepspeeds(worlds):
    for metrics, said in worlds[2].run(watched, 2, timeout=120):
        assert metrics["kl_shampoo/update_rms"] > 0 and metrics["kl_shampoo/skipped_steps"] == 0
        assert "over 2 ranks" in said[0] and "net.embedding.weight" in said[0]


def said_of(group, configure):
    with there(group):
        said = []
        made = on_cpu("lightning.pytorch", stage=1)
        type(made)._say = staticmethod(said.append)
        fitted = trainer(pytorch(), made, max_steps=1)
        fitted.fit(module(pytorch(), configure, torch.float32), rows(group.size(), group.rank()))
        return said


def slow_betas(made):
    return adamw(made, betas=(0.9, 0.95))


def test_it_says_what_was_converted(worlds):
    ((said,), others) = worlds[2].run(said_of, 2, slow_betas, timeout=120)
    assert others == [said]
    assert "KLShampoo in the place of AdamW" in said and "betas=(0.9, 0.95) of group 0 were set" in said


def with_an_own_config(group):
    with there(group):
        given = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}
        fitted = trainer(pytorch(), on_cpu("lightning.pytorch", config=given))
        return fitted.validate(module(dtype=torch.float32), rows(group.size(), group.rank(), 1), verbose=False)


def test_validation_with_a_config_of_ones_own_at_stage_3(worlds):
    assert worlds[2].run(with_an_own_config, 2, timeout=120)[0][0]["validation"] > 0


def by_hand(made):
    return KLShampoo(made.named_parameters(), lr=LR)


def test_what_cannot_be_trained_is_refused(worlds):
    for configure, kind, said in (
        (nothing, ValueError, "configure_optimizers returned None"),
        (by_hand, TypeError, "or deepspeed_integration.KLShampoo"),
    ):
        for error in worlds[2].run_expecting_errors(fit, 2, configure=configure, stage=2):
            assert isinstance(error, kind) and said in str(error)
    fp16 = {"config": from_the_entry(zero_optimization={"stage": 0}), "trainer_precision": "16-mixed"}
    for error in worlds[2].run_expecting_errors(fit, 2, configure=nothing, **fp16):
        assert "fp16 at ZeRO stage 0" in str(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": from_the_entry("AdamW")}, "asks for 'AdamW'"),
        ({"config": from_the_entry("KLSOAP"), "method": "soap"}, "asks for 'KLSOAP'"),
        ({"config": from_the_entry("Muon"), "method": "muon"}, "asks for 'Muon'"),
        ({"config": from_the_entry(), "lr": 1e-2}, "give these to one"),
        ({"optimizer_checkpoint": "partial"}, "a checkpoint in one file"),
        ({"stagee": 2}, "did you mean 'stage'"),
    ],
)
def test_options_that_contradict_are_refused_at_once(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        KLShampooDeepSpeedStrategy(**options)


def by_name(group):
    with launched(group):
        trainer(pytorch(), "kl_shampoo_deepspeed").fit(module(dtype=torch.float32), rows(2, group.rank()))


def test_gpus_are_wanted_by_lightning(worlds):
    errors = worlds[2].run_expecting_errors(by_name, 2)
    assert all("only supported on CUDA GPUs" in str(error) for error in errors)
