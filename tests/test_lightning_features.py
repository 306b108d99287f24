"""What a Trainer offers works under our strategies: schedules, callbacks, tuning, other stages."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from lightning_plugin import together
from tests.lightning_runs import (
    LR,
    STEPS,
    adamw,
    alone,
    fit,
    launched,
    made_strategy,
    module,
    on_ranks,
    plain,
    pytorch,
    rows,
    train,
    trainer,
)
from tests.models import Weights, deviation, same_bits
from tests.sharded import layers, loss_of, tokens_of, weights_of

DOUBLE = 1e-9
STRATEGIES = ("kl_shampoo", "kl_shampoo_fsdp2")
both = pytest.mark.parametrize("strategy", STRATEGIES)


# -- schedules ---------------------------------------------------------------------------------------------------------


def one_cycle(optimizer: Any) -> Any:
    return schedules.OneCycleLR(optimizer, 4e-3, total_steps=STEPS + 1)


def warmup(optimizer: Any) -> Any:
    return schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 5))


def in_sequence(optimizer: Any) -> Any:
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=5), schedules.CosineAnnealingLR(optimizer, STEPS - 5)]
    return schedules.SequentialLR(optimizer, parts, [5])


SCHEDULES = {"one_cycle": one_cycle, "warmup": warmup, "in_sequence": in_sequence}


def fit_on_schedule(group, strategy: str, name: str):
    def configure(made):
        optimizer = adamw(made)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": SCHEDULES[name](optimizer), "interval": "step"}}

    return fit(group, strategy, configure=configure)


@both
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_made_for_adamw_drives_klshampoo(worlds, name, strategy):
    found = worlds[2].run(fit_on_schedule, 2, strategy, name)
    expected = alone(schedule=SCHEDULES[name])
    assert deviation(expected, alone()) > 1e-3, "the schedule must matter for this test to mean anything"
    assert deviation(found[0], expected) <= DOUBLE


def lrs_on_a_plateau(group):
    def configure(made):
        optimizer = adamw(made)
        scheduler = schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "validation"}

    pl, lrs = pytorch(), []
    with launched(group):
        made = module(pl, configure)
        watch = type(
            "Watch",
            (pl.Callback,),
            {"on_train_epoch_start": lambda self, t, m: lrs.append(t.optimizers[0].param_groups[0]["lr"])},
        )
        data = rows(2, group.rank(), steps=2)
        trainer(pl, max_epochs=4, max_steps=-1, callbacks=[watch()]).fit(made, data, data)
    return lrs


def test_reduce_lr_on_plateau_lowers_the_learning_rate(worlds):
    assert worlds[2].run(lrs_on_a_plateau, 2)[0] == [LR, LR / 2, LR / 4, LR / 8]


# -- callbacks and tuning ----------------------------------------------------------------------------------------------


def with_callbacks(group, folder: str, strategy: str):
    """One fit under most of Lightning's callbacks; what they found."""
    pl = pytorch()
    callbacks, loggers = pl.callbacks, pl.loggers
    with launched(group):
        made = module(pl)
        best = callbacks.ModelCheckpoint(f"{folder}/best", monitor="validation", save_top_k=2, save_last=True)
        weights = callbacks.ModelCheckpoint(f"{folder}/weights", save_weights_only=True)
        stop = callbacks.EarlyStopping("validation", patience=0, min_delta=1e9)
        ran = trainer(
            pl,
            strategy,
            max_epochs=9,
            max_steps=-1,
            enable_checkpointing=True,
            logger=loggers.CSVLogger(folder, name="log", version=0),
            log_every_n_steps=2,
            callbacks=[best, weights, stop, callbacks.LearningRateMonitor()],
        )
        data = rows(2, group.rank(), steps=4)
        ran.fit(made, data, data)
        return ran.current_epoch, len(best.best_k_models), best.last_model_path, weights.best_model_path


@both
def test_early_stopping_checkpoints_and_the_learning_rate_monitor(worlds, tmp_path, strategy):
    epochs, kept, last, weights = worlds[2].run(with_callbacks, 2, str(tmp_path), strategy, timeout=120)[0]
    assert epochs == 2 and kept == 2
    assert (tmp_path / "best" / "last.ckpt").exists() and last
    log = (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    assert "lr-KLShampoo" in log.splitlines()[0] and str(LR) in log
    if strategy == "kl_shampoo":
        saved = torch.load(weights, weights_only=True)
        assert "optimizer_states" not in saved and "net.mix.weight" in saved["state_dict"]
        assert torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"][0]["method"] == "kl_shampoo"


def named_as_adamw(made: Any) -> Any:
    optimizer = adamw(made)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup(optimizer), "name": "lr-AdamW"}}


def rates_logged(group, folder: str) -> str:
    pl = pytorch()
    with launched(group):
        logger, monitor = pl.loggers.CSVLogger(folder, name="log", version=0), pl.callbacks.LearningRateMonitor("step")
        ran = trainer(pl, logger=logger, log_every_n_steps=2, callbacks=[monitor])
        ran.fit(module(pl, named_as_adamw), rows(1, 0))
        return (Path(folder) / "log" / "version_0" / "metrics.csv").read_text()


def test_a_schedule_that_is_named_keeps_the_learning_rate_monitors_key_of_adamw(worlds, tmp_path):
    (header, *_) = on_ranks(worlds, 1, rates_logged, str(tmp_path))[0].splitlines()
    assert "lr-AdamW" in header.split(",") and "KLShampoo" not in header


def called_in_a_callback(group, by: int) -> list[float]:
    """What the first `by` ranks make of a module that a callback calls at the end of an epoch."""
    pl, found = pytorch(), []

    class Samples(pl.callbacks.Callback):
        def on_train_epoch_end(self, trainer, module):
            if group.rank() < by:
                found.append(float(module(tokens_of(0)).detach()))
            elif by:
                time.sleep(5)  # busy with what the other has not come to, which would wait for it
                raise ArithmeticError("the other rank has ended")

    with launched(group), mock.patch.object(together, "SECONDS", 1.0):
        made = module(pl)
        made.forward = lambda tokens: loss_of(made.net, tokens)
        trainer(pl, "kl_shampoo_fsdp2", callbacks=[Samples()]).fit(made, rows(2, group.rank()))
        return found


def test_a_sharded_module_is_called_outside_of_steps_by_all_ranks_or_refused(worlds):
    (first,), (second,) = worlds[2].run(called_in_a_callback, 2, 2)
    assert first == second > 0
    error, other = worlds[2].run_expecting_errors(called_in_a_callback, 2, 1)
    assert "rank 0 called it outside of a step" in str(error) and "Have all ranks call it" in str(error)
    assert "the other rank has ended" in str(other)


def averaged(group):
    """Weights and learning rates under StochasticWeightAveraging, which changes the optimizer's schedule half-way.

    Also the weights at the end of each epoch; the callback averages those that an epoch begins with.
    """
    pl, lrs, ends = pytorch(), [], []
    with launched(group):
        made = module(pl, attend=lambda m, _: lrs.append(m.optimizers().param_groups[0]["lr"]))
        made.on_train_epoch_end = lambda: ends.append(weights_of(made.net))
        swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)
        trainer(pl, max_epochs=4, max_steps=-1, callbacks=[swa]).fit(made, rows(2, group.rank(), steps=3))
        return weights_of(made.net), lrs, ends


def test_stochastic_weight_averaging(worlds):
    (weights, lrs, ends), (others, *_) = worlds[2].run(averaged, 2)
    assert same_bits(weights, others)
    assert lrs[0] == LR and lrs[-1] == pytest.approx(5e-3)
    mean = {name: sum(end[name] for end in ends[:-1]) / len(ends[:-1]) for name in weights}
    assert deviation(weights, mean) <= DOUBLE


def found_lr(group, folder: str):
    pl = pytorch()
    with launched(group):
        made = module(pl)
        before = weights_of(made.net)
        ran = trainer(pl, default_root_dir=folder, max_epochs=1, max_steps=-1)
        data = rows(2, group.rank())
        found = pl.tuner.Tuner(ran).lr_find(made, data, num_training=12, min_lr=1e-5, max_lr=1e-1, update_attr=False)
        restored = weights_of(made.net)
        ran.fit(made, data)
        return found.results["lr"], same_bits(before, restored), weights_of(made.net)


def test_lr_find_tries_learning_rates_and_puts_everything_back(worlds, tmp_path):
    lrs, restored, weights = worlds[2].run(found_lr, 2, str(tmp_path))[0]
    assert restored and len(lrs) == 12 and lrs[0] < 2e-5 and lrs[-1] > 1e-2
    assert deviation(weights, alone()) <= DOUBLE


# -- stages and runs ---------------------------------------------------------------------------------------------------


def every_stage(group, strategy: str):
    """What validation, test and prediction say of a module, before and after a fit."""
    pl = pytorch()
    with launched(group):
        made = module(pl)
        data = rows(2, group.rank(), steps=3)
        before = trainer(pl, strategy).validate(made, data, verbose=False)
        ran = trainer(pl, strategy, max_steps=3)
        ran.fit(made, data, data)
        tested = ran.test(made, data, verbose=False)
        return before[0]["validation"], tested[0]["test"], ran.predict(made, data)


def with_weights(weights: Weights) -> Any:
    model = layers(torch.float64)
    model.load_state_dict(weights, strict=False)  # a tied weight has two names there
    return model


def mean_loss(model: nn.Module) -> float:
    return sum(float(loss_of(model, tokens_of(step))) for step in range(3)) / 3


@both
def test_validate_test_and_predict(worlds, strategy):
    found = worlds[2].run(every_stage, 2, strategy)
    fitted = with_weights(alone(steps=3))
    for rank, (validation, test, predicted) in enumerate(found):
        assert validation == pytest.approx(mean_loss(layers(torch.float64)), rel=DOUBLE)
        assert test == pytest.approx(mean_loss(fitted), rel=DOUBLE)
        for step in range(3):
            torch.testing.assert_close(predicted[step], fitted(tokens_of(step)[rank::2]), rtol=DOUBLE, atol=DOUBLE)


def fitted_twice(group, strategy: str):
    pl = pytorch()
    with launched(group):
        made = module(pl)
        data = rows(2, group.rank())
        ran = trainer(pl, strategy)
        ran.fit(made, data)
        first = weights_of(made.net)
        ran.fit_loop.epoch_loop.max_steps = 2 * STEPS
        ran.fit_loop.max_epochs = 2
        ran.fit(made, data)
        return first, weights_of(made.net), len(ran.optimizers)


def after_a_fit(model: nn.Module, optimizer: Any) -> None:
    train(model, plain(model), STEPS)


@both
def test_fit_twice_starts_a_new_optimizer_each_time(worlds, strategy):
    first, second, optimizers = worlds[2].run(fitted_twice, 2, strategy)[0]
    assert deviation(first, alone()) <= DOUBLE and optimizers == 1
    assert deviation(second, alone(start=after_a_fit)) <= DOUBLE


def keeping_configured(made: Any) -> Any:
    """As modules do that make optimizer and schedule once and return them to every fit."""
    if not hasattr(made, "kept"):
        optimizer = adamw(made)
        made.kept = [optimizer], [schedules.StepLR(optimizer, 1, 0.5)]
    return made.kept


def fitted_twice_with_the_same_optimizer(group, strategy: str, options: dict[str, Any]):
    """Weights and learning rates; and what a strategy of other options says to the module then."""
    pl = pytorch()
    with launched(group):
        made, data = module(pl, keeping_configured), rows(2, group.rank())
        for _ in range(2):
            chosen = made_strategy((CLASSES[strategy], options), pl)
            trainer(pl, chosen).fit(made, data)
        (optimizer,), (schedule,) = made.kept
        rates = (
            schedule.get_last_lr(),
            [group["lr"] for group in optimizer.param_groups],
            schedule.optimizer is optimizer,
        )
        weights = weights_of(made.net)
        with pytest.raises(ValueError) as refused:
            trainer(pl, made_strategy((CLASSES[strategy], {"method": "soap"}), pl)).fit(made, data)
        return weights, rates, str(refused.value)


CLASSES = {"kl_shampoo": "KLShampooStrategy", "kl_shampoo_fsdp2": "KLShampooFSDP2Strategy"}


@pytest.mark.parametrize("options", [{}, {"lr": 5 * LR}], ids=str)
@both
def test_a_second_fit_of_a_module_that_keeps_optimizer_and_schedule_goes_on(worlds, strategy, options):
    weights, rates, said = worlds[2].run(fitted_twice_with_the_same_optimizer, 2, strategy, options, timeout=120)[0]
    halved = options.get("lr", LR) / 4  # once an epoch, of which each fit has one
    assert rates == ([halved], [halved], True)
    assert deviation(weights, alone(steps=2 * STEPS, change=halve_after_a_fit, **options)) <= DOUBLE
    assert "converted to KLShampoo by a strategy with other options" in said


def halve_after_a_fit(optimizer: Any, step: int) -> None:
    if step == STEPS:
        for group in optimizer.param_groups:
            group["lr"] /= 2


def quick_runs(group, strategy: str):
    """Steps of a trial run, and of one whose time is up before its data are."""
    pl = pytorch()
    with launched(group):
        data = rows(2, group.rank())
        trial = trainer(pl, strategy, fast_dev_run=True)
        trial.fit(module(pl), data, data)
        slow = module(pl, attend=lambda *_: time.sleep(0.2))
        timed = trainer(pl, strategy, max_time={"seconds": 1}, max_epochs=-1, max_steps=-1)
        timed.fit(slow, data)
        return trial.global_step, timed.global_step


@both
def test_fast_dev_run_and_max_time(worlds, strategy):
    trial, timed = worlds[2].run(quick_runs, 2, strategy)[0]
    assert trial == 1 and 1 <= timed < STEPS
