"""Several optimizers under our strategies, optimizers that grow, none at all, and what our callbacks say of them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim import lr_scheduler as schedules

from kl_dist import KLShampoo
from kl_dist.step.stats import scalars
from tests.jobs import board_of
from tests.lightning_runs import launched, module, on_ranks, pytorch, rows, trainer
from tests.models import deviation, raising, same_bits
from tests.sharded import tokens_of, weights_of

DOUBLE = 1e-9
both = pytest.mark.parametrize("strategy", ("kl_shampoo", "kl_shampoo_fsdp2"))


# -- several optimizers, and none --------------------------------------------------------------------------------------


class Adversaries:
    """A generator and a critic, each with its AdamW, stepped in turn; FSDP2 cannot bear that they are toggled."""

    def __init__(self, toggles: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.generator, self.critic = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, n)) for n in (4, 1))
        self.double()
        self.automatic_optimization, self.toggles = False, toggles

    def configure_optimizers(self):
        return [AdamW(part.parameters(), lr=2e-3) for part in (self.generator, self.critic)]

    def training_step(self: Any, batch, batch_idx):
        noise, real = batch.double(), torch.sin(batch.double())
        first, second = self.optimizers()
        for optimizer, other in ((first, second), (second, first)):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            loss = play(self.generator, self.critic, noise, real, optimizer is first)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if self.toggles:
                self.untoggle_optimizer(optimizer)
            other.zero_grad()


def play(generator, critic, noise, real, generates: bool):
    fake = generator(noise)
    if generates:
        return -critic(fake).mean()
    return (critic(fake.detach()).square() + (critic(real) - 1).square()).mean()


def adversaries_on_ranks(group, strategy: str):
    pl = pytorch()
    with launched(group):
        made = type("Made", (Adversaries, pl.LightningModule), {})("fsdp2" not in strategy)
        ran = trainer(pl, strategy, max_steps=-1)
        ran.fit(made, rows(2, group.rank()))
        kinds = [type(optimizer.optimizer).__name__ for optimizer in made.optimizers()]
        return weights_of(made), kinds


def adversaries_alone():
    made = type("Made", (Adversaries, nn.Module), {})()
    parts = (made.generator, made.critic)
    optimizers = [
        KLShampoo(part.named_parameters(), lr=1e-2, adamw_lr=5e-3, adamw_betas=(0.9, 0.999), betas=(0.9, 0.9))
        for part in parts
    ]
    for batch in rows(1, 0):
        noise, real = batch.double(), torch.sin(batch.double())
        for generates, optimizer in zip((True, False), optimizers, strict=True):
            made.zero_grad()
            play(*parts, noise, real, generates).backward()
            optimizer.step()
    return weights_of(made)


@pytest.mark.parametrize("strategy", ["kl_shampoo_find_unused_parameters_true", "kl_shampoo_fsdp2"])
def test_manual_optimization_of_two_optimizers(worlds, strategy):
    weights, kinds = worlds[2].run(adversaries_on_ranks, 2, strategy)[0]
    assert kinds == ["KLShampoo", "KLShampoo"]
    assert deviation(weights, adversaries_alone()) <= DOUBLE


def adversaries_that_toggle(group) -> tuple[str, bool]:
    pl = pytorch()
    with launched(group):
        made = type("Made", (Adversaries, pl.LightningModule), {})(True)
        with pytest.raises(RuntimeError) as refused:
            trainer(pl, "kl_shampoo_fsdp2", max_steps=-1).fit(made, rows(2, group.rank()))
        return str(refused.value), "toggle_optimizer" in vars(made)


def test_toggling_optimizers_under_fsdp2_is_refused_in_words(worlds):
    for said, still in worlds[2].run(adversaries_that_toggle, 2):
        assert "toggle_optimizer freezes" in said and "zero the others' gradients" in said and not still


class Finetuned:
    """A module whose body joins in the second of three epochs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.backbone = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6)).double()
        self.top = nn.Linear(6, 1).double()
        self.rates: list[list[float]] = []  # of both groups, by step

    def training_step(self: Any, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        return self.loss(batch)

    def loss(self, batch):
        found = self.top(torch.tanh(self.backbone(batch)).mean(1))
        return (found - torch.sin(batch.double()).sum(1, True)).square().mean()

    def configure_optimizers(self: Any):
        optimizer = AdamW([p for p in self.parameters() if p.requires_grad], **TUNED)
        return [optimizer], [schedules.StepLR(optimizer, 1, 0.1)]


TUNED: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3, "eps": 1e-6, "betas": (0.8, 0.97)}
EPOCH = 4  # steps


def finetuned(group, path: str, resumes: bool):
    """Three epochs, or two and then the third from a checkpoint."""
    pl = pytorch()
    with launched(group):
        for epochs in (2, 3) if resumes else (3,):
            made = type("Made", (Finetuned, pl.LightningModule), {})()
            callback = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
            strategy = "kl_shampoo_find_unused_parameters_true"
            ran = trainer(pl, strategy, max_epochs=epochs, max_steps=-1, callbacks=[callback])
            ran.fit(made, rows(group.size(), group.rank(), EPOCH), ckpt_path=path if epochs == 3 and resumes else None)
            if epochs == 2:
                ran.save_checkpoint(path)
        return weights_of(made), made.rates, ran.optimizers[0].routes()


def finetuned_alone(rates: list[list[float]], frozen_again: bool):
    made: Any = type("Made", (Finetuned, nn.Module), {})()
    made.backbone.requires_grad_(False)
    head = [("top.weight", made.top.weight), ("top.bias", made.top.bias)]
    optimizer = KLShampoo(head, adamw_betas=TUNED["betas"], **TUNED)
    for step, now in enumerate(rates):
        if step == EPOCH:
            made.backbone.requires_grad_(True)
            body = [(name, p) for name, p in made.named_parameters() if name.startswith("backbone")]
            optimizer.add_param_group({"params": body, "adamw_names": ("backbone.0.weight",), "lr": now[1]})
        if step == 2 * EPOCH and frozen_again:
            made.backbone.requires_grad_(False)
        for group, rate in zip(optimizer.param_groups, now, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        made.loss(tokens_of(step % EPOCH)).backward()
        optimizer.step()
    return weights_of(made)


def test_a_backbone_that_joins_later_trains_as_its_head_and_resumes(worlds, tmp_path):
    path = str(tmp_path / "two.ckpt")
    weights, rates, _ = on_ranks(worlds, 1, finetuned, path, False)[0]
    assert [len(now) for now in rates] == EPOCH * [1] + 2 * EPOCH * [2]
    assert deviation(weights, finetuned_alone(rates, False)) <= DOUBLE
    resumed, again, _ = on_ranks(worlds, 1, finetuned, path, True)[0]
    assert again == rates[2 * EPOCH :]
    # Lightning leaves the backbone frozen when it resumes, under its own strategies too: the head alone goes on.
    assert deviation(resumed, finetuned_alone(rates, True)) <= DOUBLE


def test_a_backbone_that_joins_later_stays_the_same_on_all_ranks(worlds, tmp_path):
    """DDP averages no gradients of what was frozen when it began: the weights are not those of one process."""
    path = str(tmp_path / "two.ckpt")
    (weights, rates, routes), (others, *_) = worlds[2].run(finetuned, 2, path, False)
    assert same_bits(weights, others) and "backbone.1.weight" in routes
    (resumed, again, _), (others, *_) = worlds[2].run(finetuned, 2, path, True)
    assert same_bits(resumed, others) and again == rates[2 * EPOCH :]
    head = ("top.weight", "top.bias")  # 2e-6 off, for the backbone that is frozen
    assert deviation({name: resumed[name] for name in head}, {name: weights[name] for name in head}) <= 1e-5


def warned_of_finetuning(group, unfreezes: bool) -> list[str]:
    pl = pytorch()
    with launched(group), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = type("Made", (Finetuned, pl.LightningModule), {})()
        callback = [pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)] if unfreezes else []
        trainer(pl, max_epochs=1, max_steps=-1, callbacks=callback).fit(made, rows(group.size(), group.rank(), 1))
        return [str(one.message) for one in caught if "BackboneFinetuning" in str(one.message)]


def test_finetuning_callbacks_under_ddp_are_warned_of_once(worlds):
    first, others = worlds[2].run(warned_of_finetuning, 2, True)
    assert len(first) == 1 and not others
    assert "3 parameters are frozen now ('backbone.0.weight', ..)" in first[0]
    assert worlds[2].run(warned_of_finetuning, 2, False) == [[], []]
    assert on_ranks(worlds, 1, warned_of_finetuning, True) == [[]], "one device trains it right"


def without_optimizer(group, strategy: str):
    pl = pytorch()
    with launched(group):
        made = module(pl, lambda _: None)
        before = weights_of(made.net)
        trainer(pl, strategy, max_steps=2).fit(made, rows(2, group.rank()))
        return same_bits(before, weights_of(made.net))


@both
def test_no_optimizer_trains_nothing(worlds, strategy):
    assert all(worlds[2].run(without_optimizer, 2, strategy))


# -- our callbacks -----------------------------------------------------------------------------------------------------


def monitored(group, folder: str):
    pl = pytorch()
    import lightning_plugin

    said = []
    with raising(ValueError, "matrices_every is 0: a number of steps"):
        lightning_plugin.KLShampooMonitor(matrices_every=0)
    with launched(group):
        lightning_plugin.PartitionSummary._say = said.append
        made = module(pl)
        monitor = lightning_plugin.KLShampooMonitor(matrices_every=8)
        callbacks = [monitor, lightning_plugin.PartitionSummary(parameters=True)]
        loggers = [pl.loggers.CSVLogger(folder, name="log", version=0), pl.loggers.TensorBoardLogger(folder, "board")]
        ran = trainer(pl, logger=loggers, log_every_n_steps=4, callbacks=callbacks)
        ran.fit(made, rows(2, group.rank()))
        shown = {name: float(value) for name, value in ran.progress_bar_metrics.items()}
        return said, shown, ran.optimizers[0].stats(all_ranks=True), sorted(ran.callback_metrics)


def test_the_monitor_logs_and_the_summary_prints(worlds, tmp_path):
    (said, shown, last, kept), (others, *_) = worlds[2].run(monitored, 2, str(tmp_path))
    assert said == others and "balance" in said[0] and "net.mix.weight" in said[0]
    assert set(shown) >= {"kl_shampoo/update_rms", "kl_shampoo/skipped_steps"}
    assert not any("/matrices/" in name for name in kept)
    board = {name.removeprefix("kl_shampoo/"): values for name, values in board_of(tmp_path).items()}
    wanted = scalars(last)
    assert wanted.keys() <= board.keys()
    for name in ("condition", "update_rms", "refreshes", "skipped_steps", "restarts", "wait_seconds"):
        assert list(board[name]) == [3, 7, 11] and board[name][11] == pytest.approx(wanted[name], rel=1e-5)
    of_matrices = {name: list(values) for name, values in board.items() if name.startswith("matrices/")}
    assert of_matrices["matrices/net.mix.weight/effective_rank.0"] == [3, 11]
    header, *_ = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {f"kl_shampoo/{name}" for name in (*wanted, *of_matrices)} <= set(header.split(","))


def monitored_without_klshampoo(group):
    pl = pytorch()
    import lightning_plugin

    callbacks = [lightning_plugin.PartitionSummary(), lightning_plugin.KLShampooMonitor()]
    with launched(group), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(pl, "ddp", callbacks=callbacks, max_steps=2, log_every_n_steps=1).fit(module(pl), rows(2, group.rank()))
        return [str(one.message) for one in caught]


def test_callbacks_of_ours_say_where_they_do_not_belong(worlds):
    said = worlds[2].run(monitored_without_klshampoo, 2)
    assert ["strategy='kl_shampoo'" in " ".join(one) for one in said] == [True, False]
