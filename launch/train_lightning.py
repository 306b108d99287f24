"""Train the byte-level GPT of launch/model.py with Lightning's Trainer, options and YAML files by LightningCLI.

    python launch/train_lightning.py fit --trainer.strategy kl_shampoo --trainer.accelerator cpu --trainer.devices 2
    torchrun --nproc-per-node 2 launch/train_lightning.py fit --config launch/configs/lightning_ddp.yaml

The module knows nothing of KL-Shampoo: it configures AdamW, with which `--trainer.strategy ddp` trains it and which the
strategies of `lightning_plugin` convert. As in launch/train.py a batch depends on the seed and the step alone, so any
number of devices does the same training.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

import lightning_plugin  # noqa: F401 (makes the strategies known by name)
from launch import endings
from launch.data import Corpus, load_corpus, training_starts, validation_starts, windows
from launch.model import GPT
from launch.optimizers import ADAMW_BETAS, schedule
from launch.options import DEFAULT_RATES, UsageError
from launch.recorder import Recorder

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each windows x context, int64."""


class LanguageModel(LightningModule):
    """A byte-level GPT that AdamW trains, unless the strategy converts it.

    Args:
        layers: transformer blocks.
        width: size of a byte's vector.
        heads: attention heads of a block.
        context: bytes a prediction can see; the data's.
        lr: AdamW's peak learning rate; KL-Shampoo's own is an option of its strategy.
        weight_decay: decoupled weight decay of everything but norms.
        warmup: steps of linear warm-up before the cosine; by default a twentieth of all steps.
    """

    def __init__(
        self,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 128,
        lr: float = DEFAULT_RATES["adamw"].lr,
        weight_decay: float = 0.01,
        warmup: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"--model.width {width} does not divide into --model.heads {heads}")
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.gpt = GPT(layers, width, heads, context)
        # Devices' shares of the last windows may differ, which Lightning's own mean over devices rounds.
        self.over_windows = MeanMetric()

    def get_output_embeddings(self) -> nn.Module:
        """The output head, by the name at which KL-Shampoo looks for it, and leaves it to AdamW."""
        return self.gpt.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.over_windows.update(self._loss(batch), weight=len(batch[0]))
        self.log("val_loss", self.over_windows, prog_bar=True)

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per byte; 0 of no windows."""
        inputs, targets = batch
        summed = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        return summed / max(targets.numel(), 1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UsageError("the cosine of the learning rate needs an end: give --trainer.max_steps or max_epochs")
        warmup = int(steps) // 20 if self.warmup is None else self.warmup
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.lr, betas=ADAMW_BETAS)
        scheduler = LambdaLR(optimizer, lambda done: schedule(done + 1, int(steps), warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches:
    """Batches by their number, from the first that is not done to the end of an epoch: a Trainer asks no more of data.

    No DataLoader, for there is nothing to load, and Lightning would shuffle and divide what one yields.
    """

    def __init__(self, length: int, batch: Callable[[int], Batch], done: Callable[[], int] = lambda: 0) -> None:
        self.length, self.batch, self.done = length, batch, done

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        done = self.done()  # when the first batch is asked for: the iterator may be made before a checkpoint is loaded
        for number in range(done, done - done % self.length + self.length):
            yield self.batch(number)

    # Lightning asks these of what goes on in the middle of an epoch. The Trainer's step says where, so they are empty.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TextData(LightningDataModule):
    """Windows of a text, those of a step the same at any number of devices.

    Args:
        file: a text file to train on; by default the Python standard library's own source.
        context: bytes a prediction can see.
        batch_size: windows of a batch over all devices together; must divide over them.
        steps: batches of an epoch, after which the validation loss is looked at.
        validation_windows: how many fixed windows that takes, evenly over the validation text.
        seed: of the order of the text.
    """

    corpus: Corpus

    def __init__(
        self,
        file: str | None = None,
        context: int = 128,
        batch_size: int = 16,
        steps: int = 50,
        validation_windows: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.file, self.context, self.batch_size, self.steps = file, context, batch_size, steps
        self.validation_windows, self.seed = validation_windows, seed

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        # Devices that divide layers between them share a part.
        divided = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        self.parts: int = divided["num_replicas"]
        self.part: int = divided["rank"]
        if self.batch_size % self.parts:
            raise UsageError(f"--data.batch_size {self.batch_size} does not divide over {self.parts} devices")
        self.corpus = load_corpus(self.file, self.context)

    def train_dataloader(self) -> Batches:
        text, trainer = self.corpus.train, self.trainer
        assert trainer is not None

        def batch(number: int) -> Batch:
            starts = training_starts(text, self.seed, number + 1, self.batch_size, self.context)
            return self._share(text, starts)

        return Batches(self.steps, batch, lambda: trainer.global_step * trainer.accumulate_grad_batches)

    def val_dataloader(self) -> Batches:
        text = self.corpus.validation
        rounds = validation_starts(text, self.validation_windows, self.context).split(self.batch_size)
        return Batches(len(rounds), lambda number: self._share(text, rounds[number]))

    def _share(self, text: Tensor, starts: Tensor) -> Batch:
        """This device's windows of a batch."""
        return windows(text, starts[self.part :: self.parts], self.context)


class CLI(LightningCLI):
    """LightningCLI for one module and its data, which agree on the context."""

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(
            LanguageModel,
            TextData,
            args=None if arguments is None else list(arguments),
            seed_everything_default=0,
            trainer_defaults={
                "max_steps": 200,
                "log_every_n_steps": 10,
                "default_root_dir": "runs/lightning",
                "callbacks": [Recorder()],
            },
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.context", "model.context")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    return endings.status_of(lambda: CLI(arguments))


if __name__ == "__main__":
    endings.process(main)
