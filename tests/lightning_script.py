"""A script that trains with Lightning, for tests that launch it as users do: `python -m tests.lightning_script JSON`.

The JSON: `trainer` (its arguments), `out` (a folder: weights of the end go to weights.pt), `steps`, and of what goes
wrong `how` ("raise", "kill", "signal", "stop") on which `rank` at which `step`, the others being `asleep` for so many
seconds; under torchrun in its first `starts` alone, which is 1. With `patience` they watch each other.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_plugin
from launch.endings import leave
from tests.lightning_runs import OfLayers, rows
from tests.sharded import weights_of


class Layers(OfLayers, pl.LightningModule):
    """At the top level, so that it can be sent to spawned processes."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given

    def train_dataloader(self):
        return rows(self.trainer.world_size, self.trainer.global_rank, self.given["steps"])

    def training_step(self, batch, batch_idx):
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if batch_idx == self.given.get("step") and start < self.given.get("starts", 1):
            if self.trainer.global_rank == self.given["rank"]:
                misbehave(self.given["how"])
            else:
                time.sleep(self.given.get("asleep", 0))
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        weights = weights_of(self.net)
        if self.trainer.is_global_zero:
            torch.save(weights, Path(self.given["out"]) / "weights.pt")


def misbehave(how: str) -> None:
    if how == "raise":
        raise ArithmeticError("the original error")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        time.sleep(1)  # until the others have heard of it
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)


def main() -> None:
    given = json.loads(sys.argv[1])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "devices": 2, "default_root_dir": given["out"]}
    if "patience" in given:
        quiet |= {"callbacks": [lightning_plugin.Patience(given["patience"])]}
    if given.get("saves"):
        quiet |= {"callbacks": [pl.callbacks.OnExceptionCheckpoint(given["out"])], "enable_checkpointing": True}
    pl.Trainer(**{**quiet, **given["trainer"]}).fit(Layers(given))
    leave(0)


if __name__ == "__main__":
    main()
