"""What launch/train_lightning.py records of a run, as launch/train.py does: a Lightning callback."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from kl_dist.step.stats import scalars
from launch.ranks import Ranks
from launch.records import Record, Records, opened, set_aside
from lightning_plugin.unwrapping import kl_shampoo_in


class Recorder(Callback):
    """Keeps `metrics.jsonl` in the Trainer's default_root_dir, a line a step.

    Where the validation loss is looked at, what KLShampoo says of itself and of each matrix goes there too, and to the
    Trainer's loggers: "kl_shampoo/matrices/NAME/condition.0".
    """

    def __init__(self) -> None:
        self._records: Records | None = None  # the first rank's
        self._last: Record | None = None  # a step's, until the next begins: validation comes in between
        self._losses: list[Tensor] = []  # of the batches of a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, self._step = Path(trainer.default_root_dir), trainer.global_step
        self._ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        if self._ranks.first and not self._step and (aside := set_aside(folder)):
            rank_zero_info(f"The files of an earlier run are now in {aside}.")
        self._records = opened(folder, self._ranks, lambda: Records(folder, self._step), "--trainer.default_root_dir")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write()
        if not self._losses:
            self._began = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._ranks.synchronize()
        self._stepped, self._lr = time.perf_counter(), optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"])
        if trainer.global_step == self._step:  # gradients are accumulated
            return
        self._ranks.synchronize()
        now, self._step = time.perf_counter(), trainer.global_step
        loss = trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
        self._losses = []
        self._last = {
            "step": self._step,
            "loss": float(loss),
            "lr": float(self._lr),
            "seconds": now - self._began,
            "optimizer_seconds": now - self._stepped,
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is None:  # before training
            return
        self._last |= {"val_loss": float(trainer.callback_metrics["val_loss"]), "memory": self._ranks.peak_memory()}
        ours = [one for one in map(kl_shampoo_in, trainer.optimizers) if one is not None]
        for optimizer in ours:
            self._last["optimizer"] = optimizer.stats(all_ranks=True, matrices=True)
            for logger in trainer.loggers:
                # a logger counts steps from 0
                logger.log_metrics(scalars({"kl_shampoo": self._last["optimizer"]}), step=trainer.global_step - 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._write()
        if self._records:
            self._records.close()
            self._records = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _write(self) -> None:
        if self._records and self._last:
            self._records.record(self._last)
        self._last = None
