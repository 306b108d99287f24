"""What the one-line change makes of a program that knows nothing of KL-Shampoo: its loss beside AdamW's, by the rate.

    OMP_NUM_THREADS=1 python -m benchmarks.by_name --out benchmarks/results/by_name.jsonl
    OMP_NUM_THREADS=1 python -m benchmarks.by_name --model litgpt --out benchmarks/results/by_name.jsonl

A LightningModule with an untied output head and torch's AdamW, on one process; `--model litgpt` takes that library's
GPT (2 layers of width 64 on bytes), where it is installed. Each line of the output is a run: the contender, AdamW's
peak learning rate, the seed, and the validation loss in nats per byte. The contenders:

    adamw           Lightning's own strategy
    head a matrix   strategy="kl_shampoo" by name, but for an output head that KL-Shampoo serves
    by name         strategy="kl_shampoo", which finds the output head
    by the rule     the same, with lr five times AdamW's and adamw_lr half of that
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import CLI
from lightning.pytorch import Trainer, seed_everything
from torch import nn

import lightning_plugin
from launch.model import BYTES, GPT
from launch.train_lightning import LanguageModel, TextData

LAYERS, WIDTH, HEADS, CONTEXT = 2, 64, 4, 64
CONTENDERS = ("adamw", "head a matrix", "by name", "by the rule")


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


def strategy_of(contender: str, lr: float) -> Any:
    if contender == "adamw":
        return "auto"
    told: dict[str, dict[str, Any]] = {
        "head a matrix": {"output_head": ""},
        "by name": {},
        "by the rule": {"lr": 5 * lr, "adamw_lr": 2.5 * lr},
    }
    return lightning_plugin.KLShampooStrategy(**told[contender])


def loss_of(contender: str, model: str, lr: float, seed: int, steps: int, batch_size: int) -> float:
    """The validation loss after a run."""
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
        strategy=strategy_of(contender, lr),
    )
    data = TextData(context=CONTEXT, batch_size=batch_size, steps=steps, seed=seed)
    trainer.fit(Program(model_of(model), lr), data)
    return float(trainer.callback_metrics["val_loss"])


def main(
    out: Path | None = None,
    model: Literal["bytes", "litgpt"] = "bytes",
    steps: int = 150,
    batch_size: int = 16,
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3),
    seeds: int = 3,
) -> None:
    """Run all contenders.

    Args:
        out: file that a line of each run is added to.
        model: the job's byte-level GPT, or litgpt's.
        steps: of each run.
        batch_size: windows of a step.
        lrs: AdamW's peak learning rates.
        seeds: how many.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for lr in lrs:
        for seed in range(seeds):
            for contender in CONTENDERS:
                found = loss_of(contender, model, lr, seed, steps, batch_size)
                settings = {"model": model, "steps": steps, "batch_size": batch_size, "torch": torch.__version__}
                line = {"contender": contender, "lr": lr, "seed": seed, "val_loss": round(found, 4), **settings}
                print(json.dumps(line), flush=True)
                if out is not None:
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    CLI(main, as_positional=False)
