"""The one-line change in programs that know nothing of KL-Shampoo: its strategy by name beside AdamW's, by the rate.

    OMP_NUM_THREADS=1 python -m benchmarks.by_name --out benchmarks/results/by_name.jsonl
    OMP_NUM_THREADS=1 python -m benchmarks.by_name --model litgpt --out benchmarks/results/by_name.jsonl
    OMP_NUM_THREADS=1 python -m benchmarks.by_name --model digits --steps 300 --out benchmarks/results/by_name.jsonl

LightningModules with torch's AdamW and a cosine schedule, on one process. `bytes` is the job's GPT with an untied
output head; `litgpt` that library's (2 layers of width 64 on bytes), `digits` a small convolutional net on
scikit-learn's handwritten digits, where these are installed. Each line of the output is a run: the contender, AdamW's
peak learning rate, the seed, and the validation loss in nats per byte or picture. The contenders,
of which all but the first may be another method (`--method`):

    adamw            Lightning's own strategy
    head a matrix    strategy="kl_shampoo" by name, but for an output head that KL-Shampoo serves and AdamW's rate
    at AdamW's rate  convert_lr="keep": the output head is found, the learning rate is AdamW's for all
    by name          strategy="kl_shampoo" and nothing else: AdamW's learning rate is converted by the rule
    five times       the same, were no rate too high to be lifted; "at most 1.5e-2", "at most 3e-2": another ceiling
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import CLI
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_plugin
from kl_dist.methods import Transfer
from launch.model import BYTES, GPT
from launch.train_lightning import LanguageModel, TextData

LAYERS, WIDTH, HEADS, CONTEXT = 2, 64, 4, 64

Told = Callable[[float], dict[str, Any]]


def lifted(ceiling: float) -> Told:
    """The rule with another ceiling than the method's."""
    transfer = Transfer(ratio=5.0, ceiling=ceiling)
    return lambda lr: {"matrix_lr": transfer.factor(lr) * lr, "adamw_lr": transfer.ratio / 2 * lr}


STRATEGIES: dict[str, Told | None] = {
    "adamw": None,
    "head a matrix": lambda lr: {"output_head": "", "convert_lr": "keep"},
    "at AdamW's rate": lambda lr: {"convert_lr": "keep"},
    "by name": lambda lr: {},
    "five times": lifted(math.inf),
    "at most 1.5e-2": lifted(1.5e-2),
    "at most 3e-2": lifted(3e-2),
}
"""Of each contender, what KLShampooStrategy is told where AdamW's peak learning rate is `lr`."""


def model_of(name: str) -> nn.Module:
    if name == "bytes":
        return GPT(LAYERS, WIDTH, HEADS, CONTEXT)
    litgpt = import_module("litgpt")
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "block_size": CONTEXT}
    config = litgpt.Config(**shape, vocab_size=BYTES, padded_vocab_size=BYTES, padding_multiple=BYTES)
    return litgpt.GPT(config)


class Program(LanguageModel):
    """The job's module, as one who has never heard of KL-Shampoo writes it: nothing says which is the output head."""

    get_output_embeddings = None  # type: ignore[assignment]

    def __init__(self, made: nn.Module, lr: float) -> None:
        super().__init__(layers=1, width=8, heads=1, context=1, lr=lr)
        self.gpt = made  # type: ignore[assignment]


class Digits(LightningModule):
    """Three convolutions and a linear classifier, batch normalisation between, on 8 x 8 pictures of 10 digits."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        widths = (1, 16, 32, 64)
        convolutions = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        ]
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(widths[-1], 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1)
        self.log("val_loss", loss, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits_data(batch_size: int, seed: int) -> dict[str, DataLoader]:
    """1,200 of the pictures to train on, noise added; the other 597, likewise, to validate."""
    data = import_module("sklearn.datasets").load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    generator = torch.Generator().manual_seed(0)
    pictures += 0.3 * torch.randn(pictures.shape, generator=generator)
    everything = TensorDataset(pictures, torch.tensor(data.target))
    order = torch.randperm(len(everything), generator=generator).tolist()
    trained = torch.utils.data.Subset(everything, order[:1200])
    validated = torch.utils.data.Subset(everything, order[1200:])
    shuffled = torch.Generator().manual_seed(seed)
    return {
        "train_dataloaders": DataLoader(trained, batch_size, shuffle=True, generator=shuffled),
        "val_dataloaders": DataLoader(validated, 597),
    }


def strategy_of(contender: str, lr: float, own: dict[str, Any]) -> Any:
    told = STRATEGIES[contender]
    return "auto" if told is None else lightning_plugin.KLShampooStrategy(**own, **told(lr))


def loss_of(
    contender: str, model: str, lr: float, seed: int, steps: int, batch_size: int, own: dict[str, Any]
) -> float:
    """The validation loss after a run; `own` are options of all but AdamW."""
    seed_everything(seed)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        gradient_clip_val=1.0,
        strategy=strategy_of(contender, lr, own),
    )
    if model == "digits":
        trainer.fit(module := Digits(lr), **digits_data(batch_size, seed))  # type: ignore[arg-type]
        # after the last step, which need not end an epoch
        trainer.validate(module, digits_data(batch_size, seed)["val_dataloaders"], verbose=False)
    else:
        data = TextData(context=CONTEXT, batch_size=batch_size, steps=steps, seed=seed)
        trainer.fit(Program(model_of(model), lr), data)
    return float(trainer.callback_metrics["val_loss"])


def main(
    out: Path | None = None,
    model: Literal["bytes", "litgpt", "digits"] = "bytes",
    steps: int = 150,
    batch_size: int = 16,
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3),
    seeds: int = 3,
    contenders: tuple[str, ...] = ("adamw", "head a matrix", "at AdamW's rate", "by name"),
    method: str = "kl_shampoo",
    shampoo_exponent: float | None = None,
    polar: int | Literal["start"] | None = None,
) -> None:
    """Run all contenders.

    Args:
        out: file that a line of each run is added to.
        model: the job's byte-level GPT, litgpt's, or a convolutional net.
        steps: of each run.
        batch_size: windows or pictures of a step.
        lrs: AdamW's peak learning rates.
        seeds: how many.
        contenders: which.
        method: of all but AdamW.
        shampoo_exponent: likewise; None: the method's own.
        polar: likewise.
    """
    told = {"method": method, "shampoo_exponent": shampoo_exponent, "polar": polar}
    own = {key: x for key, x in told.items() if x not in ("kl_shampoo", None)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for lr in lrs:
        for seed in range(seeds):
            for contender in contenders:
                found = loss_of(contender, model, lr, seed, steps, batch_size, own)
                settings = {"model": model, "steps": steps, "batch_size": batch_size, "torch": torch.__version__}
                line = {"contender": contender, "lr": lr, "seed": seed, "val_loss": round(found, 4), **settings, **own}
                print(json.dumps(line), flush=True)
                if out is not None:
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    CLI(main, as_positional=False)
